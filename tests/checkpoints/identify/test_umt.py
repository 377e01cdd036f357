"""UMT: detection of the authors' checkpoints, and refusal of other models."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import save_weights, tiny_vit
from tiny_umt import reference, tiny_umt, umt_clips
from torch import Tensor

from repshift_cli.checkpoints.build import build
from repshift_cli.checkpoints.identify.identity import Identity
from repshift_cli.checkpoints.identify.match import identify
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckpointError, RepshiftError, UsageError
from repshift_cli.models import umt
from repshift_cli.models.umt import UmtAnswering, UmtModel, UmtRetrieval

State = dict[str, Tensor]


def load(path: Path, model: UmtModel | None = None, **options: Any) -> LoadedModel:
    """Load the file as its model, or as `tiny_umt()`."""
    shape = (model or tiny_umt()).vision
    own = LoadOptions(None, shape.heads, shape.img_size, shape.frames, shape.checkpoint_frames)
    return load_checkpoint(path, replace(own, **options))


def same(loaded: LoadedModel, model: UmtModel) -> bool:
    clips = umt_clips(model)
    with torch.no_grad():
        return torch.equal(loaded.model(clips), model(clips))


def found(tensors: State, **options: Any) -> Identity:
    return identify(tensors, "weights.pth", LoadOptions(**{"heads": 4, **options}), "weights")


def state(**options: Any) -> State:
    return dict(tiny_umt(**options).state_dict())


def pretraining(tensors: State) -> State:
    """The same weights in the form of the authors' pretraining files."""
    changed = {key.replace("text_encoder.", "text_encoder.bert.", 1): value for key, value in tensors.items()}
    extra = (
        "clip_teacher.conv1.weight",
        "vision_encoder.clip_decoder.0.head.weight",
        "text_encoder.cls.predictions.bias",
    )
    return {**changed, **{key: torch.zeros(3) for key in extra}}


class TestRoundTrip:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"embed_dim": 0},
            {"frames": 5, "img_size": 24},
            {"frames": 4, "checkpoint_frames": 2},
            {"heads": 8, "depth": 2, "hidden": 40},
            {"width": 128, "patch_size": 16, "text": {"fusion_layer": 2, "types": 1, "vocabulary": 33}},
            {"text": {"width": 128, "heads": 2, "depth": 5, "positions": 9}, "embed_dim": 10},
        ],
    )
    def test_the_form_is_detected(self, options: dict[str, Any], tmp_path: Path) -> None:
        model = tiny_umt(**options)
        loaded = load(save_weights(model, tmp_path / "weights.safetensors"), model)
        assert isinstance(loaded.model, UmtModel)
        assert isinstance(loaded.model, UmtAnswering if options.get("embed_dim") == 0 else UmtRetrieval)
        assert (loaded.model.vision, loaded.model.text) == (model.vision, model.text)
        assert loaded.description.architecture == "umt"
        assert loaded.description.name == f"UMT of width {model.vision.width}, depth {model.vision.depth}"
        assert loaded.description.preprocessing.shape == tuple(umt_clips(model).shape[1:])
        assert loaded.description.preprocessing.crop_mode == "squash"
        assert loaded.model.pretrained_cfg["frames"] == model.vision.frames
        assert same(loaded, model)
        assert not loaded.model.training
        assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.model.parameters())
        assert all(torch.equal(b, a) for a, b in zip(model.buffers(), loaded.model.buffers(), strict=True))

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: state,
            lambda state: {"model": state, "epoch": 9},
            lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
            lambda state: {f"module.{key}": value for key, value in state.items()},
            lambda state: {"state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}},
            lambda state: {"model": pretraining(state)},
            lambda state: {"module": None, "model": {f"module.{k}": v for k, v in pretraining(state).items()}},
            lambda state: {key: value for key, value in state.items() if "position_ids" not in key},
        ],
    )
    def test_wrapped(self, wrap: Callable[[State], Any], tmp_path: Path) -> None:
        model = tiny_umt()
        torch.save(wrap(state()), tmp_path / "weights.pth")
        assert same(load(tmp_path / "weights.pth"), model)

    def test_half_precision_is_converted_to_float32(self, tmp_path: Path) -> None:
        model = tiny_umt()
        for parameter in model.parameters():
            parameter.data = parameter.data.half().float()
        torch.save(
            {key: value.half() if value.is_floating_point() else value for key, value in state().items()},
            tmp_path / "a.pth",
        )
        assert same(load(tmp_path / "a.pth"), model)

    def test_tensors_of_pretraining_are_left_out_with_a_note(self, tmp_path: Path) -> None:
        torch.save({"model": pretraining(state())}, tmp_path / "weights.pth")
        loaded = load(tmp_path / "weights.pth")
        assert "left out 3 tensors that only pretraining uses" in loaded.notes
        assert set(loaded.tensors) == set(state())

    @pytest.mark.parametrize("embed_dim", [24, 0])
    def test_a_description_builds_it_again(self, embed_dim: int, tmp_path: Path) -> None:
        model = tiny_umt(embed_dim=embed_dim, frames=4, checkpoint_frames=2)
        first = load(save_weights(model, tmp_path / "weights.safetensors"), model)
        again = ModelDescription.from_dict(json.loads(json.dumps(first.description.to_dict())))
        built = build(again, first.tensors, "weights.safetensors")
        clips = umt_clips(model)
        with torch.no_grad():
            assert torch.equal(built(clips), model(clips))

    def test_by_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_umt()
        shape = asdict(model.vision) | {"img_size": 224, "frames": 12, "heads": 1}
        monkeypatch.setitem(umt.MODELS, "umt_tiny", (umt.VisionShape(**shape), model.text, 24))
        path = save_weights(model, tmp_path / "weights.safetensors")
        assert load_checkpoint(path).description.name == "umt_tiny"
        assert load_checkpoint(path, LoadOptions(model_name="umt_tiny")).description.name == "umt_tiny"
        assert load_checkpoint(path, LoadOptions(fallback_name="umt_tiny")).description.name == "umt_tiny"
        with pytest.raises(CheckpointError, match="the weights are those of umt_tiny, not of umt_base"):
            load_checkpoint(path, LoadOptions(model_name="umt_base"))
        with pytest.raises(CheckpointError, match="the weights are those of another UMT, not of umt_tiny"):
            load_checkpoint(path, LoadOptions(model_name="umt_tiny", heads=4))
        loaded = load_checkpoint(path, LoadOptions(model_name="umt_tiny", img_size=32, frames=3, checkpoint_frames=2))
        assert loaded.description.preprocessing.shape == (3, 3, 32, 32)
        assert loaded.description.args["vision"]["checkpoint_frames"] == 2

    def test_random_weights_by_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_umt()
        shape = umt.VisionShape(**asdict(model.vision) | {"img_size": 64, "frames": 12})
        monkeypatch.setitem(umt.MODELS, "umt_tiny", (shape, model.text, 24))
        assert load_checkpoint("umt_tiny").description.preprocessing.shape == (12, 3, 64, 64)
        loaded = load_checkpoint("umt_tiny", LoadOptions(img_size=32, frames=3))
        assert loaded.description.preprocessing.shape == (3, 3, 32, 32)
        assert "RANDOM weights" in loaded.notes[0]
        again = build(loaded.description, loaded.tensors, "umt_tiny")
        with torch.no_grad():
            assert torch.equal(again(umt_clips(model)), loaded.model(umt_clips(model)))
        with pytest.raises(UsageError, match="--img-size 36 does not fit umt_tiny: invalid img_size=36"):
            load_checkpoint("umt_tiny", LoadOptions(img_size=36))
        with pytest.raises(UsageError, match="invalid frames 1000000"):
            load_checkpoint("umt_tiny", LoadOptions(frames=10**6))


class TestHeads:
    def test_by_the_convention_of_64_channels(self) -> None:
        vision, text = (found(state(width=128), heads=None).args[side] for side in ("vision", "text"))
        assert (vision["heads"], text["heads"]) == (2, 1)

    def test_another_width_needs_the_option(self, tmp_path: Path) -> None:
        model = tiny_umt(width=48)
        path = save_weights(model, tmp_path / "weights.safetensors")
        with pytest.raises(CheckpointError, match="unknown number of attention heads for width 48") as caught:
            load(path, heads=None)
        assert caught.value.hint == "Give --heads."
        assert same(load(path, heads=4), model)

    @pytest.mark.parametrize(
        ("heads", "message"), [(5, "5 heads do not divide a width of 64"), (-4, "invalid heads -4")]
    )
    def test_heads_that_do_not_fit(self, heads: int, message: str, tmp_path: Path) -> None:
        path = save_weights(tiny_umt(), tmp_path / "weights.safetensors")
        with pytest.raises((CheckpointError, UsageError), match=message):
            load(path, heads=heads)

    def test_of_a_text_encoder_of_another_width(self, tmp_path: Path) -> None:
        """The reference vectors, with 48 channels on both sides."""
        case = reference("retrieval")
        path = tmp_path / "weights.safetensors"
        save_file(case.weights, path)
        try:
            loaded = load_checkpoint(path, LoadOptions(heads=4, img_size=32, frames=4))
        except CheckpointError as error:
            assert "--heads" not in error.hint, f"it asks for what was given: {error.message}"
        else:
            with torch.no_grad():
                tokens = loaded.model.encode_video(case.tensors["in/video"])  # type: ignore[operator]
            torch.testing.assert_close(tokens, case.tensors["out/vision_embeds"], rtol=0, atol=1e-5)


class TestClips:
    def test_assumed_clips_are_noted(self) -> None:
        identity = found(state(), heads=None)
        assert identity.preprocessing.shape == (12, 3, 224, 224)
        note = "the checkpoint does not say which clips it takes: assumed 12 frames of 224x224 (--frames, --img-size)"
        assert note in identity.notes
        assert found(state(), img_size=32, frames=3).notes == []

    @pytest.mark.parametrize(
        ("options", "shape"),
        [
            ({"img_size": 32}, (12, 3, 32, 32)),
            ({"frames": 1}, (1, 3, 224, 224)),
            ({"img_size": 384, "frames": 16, "checkpoint_frames": 4}, (16, 3, 384, 384)),
        ],
    )
    def test_given_clips(self, options: dict[str, Any], shape: tuple[int, ...]) -> None:
        identity = found(state(), **options)
        assert identity.preprocessing.shape == shape
        vision = identity.args["vision"]
        assert (vision["frames"], vision["img_size"]) == (shape[0], shape[2])
        assert vision["checkpoint_frames"] == options.get("checkpoint_frames")

    @pytest.mark.parametrize("size", [30, 225, 4])
    def test_a_size_that_is_not_a_multiple(self, size: int) -> None:
        with pytest.raises(UsageError, match=f"invalid --img-size {size}: must be a multiple of the patch size 8"):
            found(state(), img_size=size)

    @pytest.mark.parametrize("clips", [{"frames": -1}, {"frames": 10**9}, {"checkpoint_frames": -2}])
    def test_invalid_clips(self, clips: dict[str, int], tmp_path: Path) -> None:
        path = save_weights(tiny_umt(), tmp_path / "weights.safetensors")
        with pytest.raises(RepshiftError):
            load(path, **clips)

    @pytest.mark.parametrize("clips", [{"frames": 3}, {"checkpoint_frames": 3}])
    def test_a_model_of_images_takes_no_clips(self, clips: dict[str, int], tmp_path: Path) -> None:
        path = save_weights(tiny_vit(), tmp_path / "weights.safetensors")
        with pytest.raises(UsageError, match="takes single images, not clips"):
            load_checkpoint(path, LoadOptions(heads=2, **clips))


def plus(**extra: tuple[int, ...]) -> Callable[[State], State]:
    return lambda state: {**state, **{key.replace("__", "."): torch.zeros(shape) for key, shape in extra.items()}}


def without(*words: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if not any(word in key for word in words)}


def renamed(before: str, after: str) -> Callable[[State], State]:
    return lambda state: {key.replace(before, after): value for key, value in state.items()}


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (renamed("vision_encoder.encoder.", "vision_encoder."), "a vision encoder, but not that of UMT"),
            (without("q_bias"), "it has a vision encoder, but not that of UMT"),
            (without("patch_embed"), "it has a vision encoder, but not that of UMT"),
            (without("mlp.fc1.weight"), "it has a vision encoder, but not that of UMT"),
            (plus(vision_encoder__encoder__patch_embed__proj__weight=(64, 3, 8, 8)), "but not that of UMT"),
            (
                plus(vision_encoder__encoder__patch_embed__proj__weight=(64, 3, 2, 8, 8)),
                "patches of 2 frames and 8x8 are not supported",
            ),
            (
                plus(vision_encoder__encoder__patch_embed__proj__weight=(64, 3, 1, 8, 4)),
                "patches of 1 frames and 8x4 are not supported",
            ),
            (without("text_encoder."), "it has a vision encoder, but not the text encoder of UMT"),
            (without("crossattention"), "but not the text encoder of UMT"),
            (without("word_embeddings"), "but not the text encoder of UMT"),
            (renamed("text_encoder.", "text_encoder.transformer."), "but not the text encoder of UMT"),
        ],
    )
    def test_other_forms(self, change: Callable[[State], State], reason: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            found(change(state()))
        assert reason in caught.value.message
        assert caught.value.message.startswith("weights.pth: ")
        assert caught.value.exit_code == 3

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (without("itm_head"), "missing: itm_head.bias, itm_head.weight"),
            (without("temp"), "missing: temp"),
            (without("blocks.2.norm1"), "missing: vision_encoder.encoder.blocks.2.norm1.bias"),
            (without("layer.1.crossattention.self.key"), "missing: text_encoder.encoder.layer.1.crossattention"),
            (without("pool_norm"), "missing: vision_encoder.pool_norm.bias"),
            (plus(text_proj__gate=(3,)), "unknown: text_proj.gate"),
            (plus(vision_encoder__encoder__blocks__1__norm1__weight=(3,)), "norm1.weight is [3], not [64]"),
            (plus(itm_head__weight=(3, 64)), "shapes: itm_head.weight is [3, 64], not [2, 64]"),
            (plus(text_encoder__embeddings__position_ids=(1, 3)), "position_ids is [1, 3], not [1, 16]"),
        ],
    )
    def test_tensors_that_do_not_fit(self, change: Callable[[State], State], reason: str, tmp_path: Path) -> None:
        save_file(change(state()), tmp_path / "weights.safetensors")
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path / "weights.safetensors")
        assert "the weights do not fit UMT of width 64, depth 4: " in caught.value.message
        assert reason in caught.value.message

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "shapes",
        [
            {  # VideoMAE
                "encoder.patch_embed.proj.weight": (64, 3, 2, 16, 16),
                "encoder.blocks.0.attn.q_bias": (64,),
                "encoder.blocks.0.attn.qkv.weight": (192, 64),
                "encoder.blocks.0.mlp.fc1.weight": (256, 64),
                "encoder.norm.weight": (64,),
                "decoder.blocks.0.attn.qkv.weight": (96, 32),
                "mask_token": (1, 1, 32),
            },
            {  # VideoMAE, fine-tuned
                "patch_embed.proj.weight": (64, 3, 2, 16, 16),
                "blocks.0.attn.q_bias": (64,),
                "blocks.0.attn.qkv.weight": (192, 64),
                "blocks.0.mlp.fc1.weight": (256, 64),
                "fc_norm.weight": (64,),
                "head.weight": (400, 64),
            },
            {  # InternVideo2
                "vision_encoder.patch_embed.proj.weight": (64, 3, 1, 14, 14),
                "vision_encoder.cls_token": (1, 1, 64),
                "vision_encoder.blocks.0.attn.qkv.weight": (192, 64),
                "vision_encoder.blocks.0.attn.q_norm.weight": (64,),
                "vision_encoder.blocks.0.mlp.fc1.weight": (256, 64),
                "text_encoder.embeddings.word_embeddings.weight": (40, 64),
            },
            {"vision_encoder.model.layers.0.attn.weight": (3, 3), "text_encoder.a": (1,)},
        ],
    )
    def test_other_video_models(self, shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
        torch.save({"model": {key: torch.zeros(shape) for key, shape in shapes.items()}}, tmp_path / "weights.pth")
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(tmp_path / "weights.pth", LoadOptions(heads=4))
        assert caught.value.exit_code == 3
        if any(key.startswith("vision_encoder.") for key in shapes):
            assert "it has a vision encoder, but not that of UMT" in caught.value.message
            assert "UMT's checkpoints for retrieval and question answering" in caught.value.hint

    def test_code_in_a_pickle(self, tmp_path: Path) -> None:
        class Harm:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (tmp_path / "harm",))

        torch.save({"model": state(), "config": Harm()}, tmp_path / "weights.pth")
        with pytest.raises(CheckpointError, match="could run code when loaded"):
            load(tmp_path / "weights.pth")
        assert not (tmp_path / "harm").exists()


def described(changes: dict[str, Any], **preprocessing: Any) -> dict[str, Any]:
    """The document of `tiny_umt()` with changes to its arguments: `vision.depth`, `text.width`, `embed_dim`."""
    model = tiny_umt()
    args: dict[str, Any] = {"vision": asdict(model.vision), "text": asdict(model.text), "embed_dim": 24}
    for key, value in changes.items():
        side, _, name = key.rpartition(".")
        (args[side] if side else args)[name] = value
    transform = {**Preprocessing.of_model(model).to_dict(), **preprocessing}
    return {"model": {"name": "mine", "architecture": "umt", "args": args, "preprocessing": transform}}


def written(path: Path, changes: dict[str, Any] | None = None, **preprocessing: Any) -> Path:
    save_file(state(), path, {"repshift": json.dumps(described(changes or {}, **preprocessing))})
    return path


@pytest.fixture
def _little_memory() -> Iterator[None]:
    """Limit the memory: allocations of more than 4 GB fail."""
    if sys.platform != "linux":
        pytest.skip("only Linux keeps to the limit")
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


class TestMetadata:
    def test_a_self_describing_file(self, tmp_path: Path) -> None:
        loaded = load_checkpoint(written(tmp_path / "mine.safetensors"))
        assert (loaded.description.name, loaded.description.preprocessing.frames) == ("mine", 3)
        assert same(loaded, tiny_umt())
        path = tmp_path / "mine.safetensors"
        assert same(load_checkpoint(path, LoadOptions(img_size=32, heads=4, frames=3)), tiny_umt())

    @pytest.mark.usefixtures("_little_memory")
    @pytest.mark.parametrize(
        "changes",
        [
            {"vision.depth": 10**9},
            {"vision.depth": 1e9},
            {"vision.depth": -1},
            {"vision.depth": "deep"},
            {"vision.frames": 10**9},
            {"vision.frames": -3},
            {"vision.frames": 0},
            {"vision.frames": None},
            {"vision.img_size": 8 * 10**9},
            {"vision.img_size": -32},
            {"vision.img_size": [32, 32]},
            {"vision.patch_size": 0},
            {"vision.width": 10**18},
            {"vision.width": -64},
            {"vision.heads": 0},
            {"vision.heads": -4},
            {"vision.hidden": 10**30},
            {"vision.checkpoint_frames": 0},
            {"vision.checkpoint_frames": -2},
            {"vision.checkpoint_frames": "two"},
            {"vision.checkpoint_frames": 10**12},
            {"vision.checkpoint_frames": 10**9},
            {"vision.no_such": 1},
            {"vision": {}},
            {"vision": None},
            {"vision": []},
            {"text.depth": 10**9},
            {"text.depth": -1},
            {"text.fusion_layer": 0},
            {"text.fusion_layer": 10**9},
            {"text.fusion_layer": -1},
            {"text.vocabulary": 10**18},
            {"text.positions": 10**15},
            {"text.positions": -1},
            {"text.heads": 0},
            {"text.width": 0},
            {"text.types": -1},
            {"text": 3},
            {"embed_dim": -1},
            {"embed_dim": 10**30},
            {"embed_dim": "many"},
            {"embed_dim": 0},
            {"no_such": 1},
            {"pretrained": True},
        ],
        ids=str,
    )
    def test_invalid_arguments(self, changes: dict[str, Any], tmp_path: Path) -> None:
        path = written(tmp_path / "mine.safetensors", changes)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        assert caught.value.exit_code == 3

    @pytest.mark.parametrize("frames", [10**9, -1, 0, "many", [3]])
    def test_invalid_frames(self, frames: object, tmp_path: Path) -> None:
        path = written(tmp_path / "mine.safetensors", frames=frames)
        with pytest.raises(CheckpointError, match=r"frames|preprocessing of the model cannot be read"):
            load_checkpoint(path)

    @pytest.mark.parametrize("preprocessing", [{"frames": 5}, {"frames": None}, {"input_size": [3, 40, 40]}])
    def test_clips_of_another_model(self, preprocessing: dict[str, Any], tmp_path: Path) -> None:
        path = written(tmp_path / "mine.safetensors", **preprocessing)
        with pytest.raises(CheckpointError, match="its metadata names"):
            load_checkpoint(path)

    def test_frames_that_contradict_the_file(self, tmp_path: Path) -> None:
        path = written(tmp_path / "mine.safetensors")
        with pytest.raises(UsageError, match=r"--frames 5: the metadata of .* names clips of 3 frames"):
            load_checkpoint(path, LoadOptions(frames=5))
        with pytest.raises(UsageError, match=r"--img-size 40: .* takes images of 32x32"):
            load_checkpoint(path, LoadOptions(img_size=40))
        with pytest.raises(CheckpointError, match="mine has 4 attention heads, not 2"):
            load_checkpoint(path, LoadOptions(heads=2))

    def test_checkpoint_frames_that_contradict_the_file(self, tmp_path: Path) -> None:
        path = written(tmp_path / "mine.safetensors")
        with pytest.raises(UsageError, match="--checkpoint-frames"):
            load_checkpoint(path, LoadOptions(checkpoint_frames=2))
