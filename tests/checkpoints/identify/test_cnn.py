"""ResNet, ConvNeXt and RegNet: detection, loading, other image sizes."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import images, save_weights, tiny_vit
from torch import Tensor, nn

from repshift_cli.checkpoints.build import build
from repshift_cli.checkpoints.create import quickly_on_meta
from repshift_cli.checkpoints.identify.identity import Identity
from repshift_cli.checkpoints.identify.match import identify
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckpointError, UsageError


def weights_of(name: str, **options: Any) -> dict[str, Tensor]:
    """Names and shapes of a timm model's tensors, without values."""
    return dict(quickly_on_meta(name, options).state_dict())


def found(tensors: dict[str, Tensor], hint: str = "weights", model_name: str | None = None) -> Identity:
    return identify(tensors, "weights.pth", LoadOptions(model_name), hint)


def refusal(tensors: dict[str, Tensor], hint: str = "weights", model_name: str | None = None) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        found(tensors, hint, model_name)
    assert caught.value.exit_code == 3
    return caught.value


def trained(name: str, **options: Any) -> nn.Module:
    """A model in eval mode with statistics and scales as after training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model: nn.Module = timm.create_model(name, **{"num_classes": 7, **options})
        for key, value in model.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.ndim == 1 and value.is_floating_point():
                value.add_(0.1 * torch.randn_like(value))
    return model.eval()


def same(loaded: LoadedModel, model: nn.Module, size: int = 64) -> bool:
    # rounding of kernels depends on the memory layout of the weights, which in a mapped file is that of the file
    copied = copy.deepcopy(loaded.model)
    with torch.no_grad():
        return torch.equal(copied(images(2, size)), model(images(2, size)))


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet50d",
        "seresnet50",
        "resnext50_32x4d",
        "convnext_atto",
        "convnextv2_atto",
        "regnety_002",
        "regnetz_005",
        "test_convnext",
    ],
)
def test_saved_weights_are_detected_and_loaded(name: str, tmp_path: Path) -> None:
    model = trained(name)
    loaded = load_checkpoint(save_weights(model, tmp_path / f"{name}.safetensors"))
    assert (loaded.description.name, loaded.description.architecture) == (name, name)
    assert loaded.description.args == {"num_classes": 7}
    assert same(loaded, model)


@pytest.mark.parametrize(
    "name",
    [
        "resnet14t",
        "resnet50_gn",
        "wide_resnet50_2",
        "senet154",
        "ecaresnetlight",
        "convnext_tiny",
        "convnext_tiny_hnf",
        "convnextv2_nano",
        "regnetx_004_tv",
        "regnety_040_sgn",
        "regnetv_064",
        "regnetz_040_h",
    ],
)
def test_registered_models_are_detected(name: str) -> None:
    tensors = weights_of(name)
    identity = found(tensors)
    assert (identity.name, identity.architecture, identity.args) == (name, name, {})
    assert any(f"detected {name} from tensor names and shapes" in note for note in identity.notes)


@pytest.mark.parametrize("name", ["resnet14t", "convnext_atto", "regnety_002"])
def test_the_number_of_classes_is_detected(name: str) -> None:
    assert found(weights_of(name, num_classes=3), name).args == {"num_classes": 3}
    headless = {key: value for key, value in weights_of(name).items() if not re.match(r"fc\.|head\.fc\.", key)}
    assert found(headless, name).args == {"num_classes": 0}


def test_torchvisions_files(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.resnet18(num_classes=5).eval()
    torch.save(model.state_dict(), tmp_path / "resnet18-f37072fd.pth")
    loaded = load_checkpoint(tmp_path / "resnet18-f37072fd.pth")
    assert loaded.description.name == "resnet18"
    assert same(loaded, model)
    assert any("resnet18.tv_in1k" in note and "assumed its preprocessing" in note for note in loaded.notes)


def test_counters_that_old_files_do_not_have(tmp_path: Path) -> None:
    model = trained("test_resnet")
    state = {key: value for key, value in model.state_dict().items() if "num_batches_tracked" not in key}
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "old.pth")
    for model_name in (None, "test_resnet"):
        loaded = load_checkpoint(tmp_path / "old.pth", LoadOptions(model_name=model_name))
        assert loaded.tensors.keys() == model.state_dict().keys()
        assert same(loaded, model)


class TestSeveralThatFit:
    def test_all_are_listed_with_the_plain_one_first(self) -> None:
        error = refusal(weights_of("resnet50"))
        assert "compute different things: resnet50, resnetaa50, resnetblur50" in error.message
        assert "--model" in error.hint

    @pytest.mark.parametrize("name", ["resnet50", "resnetaa50", "resnetblur50"])
    def test_the_file_name_or_the_user_chooses(self, name: str) -> None:
        tensors = weights_of("resnet50")
        assert found(tensors, hint=f"{name}-0676ba61").name == name
        assert found(tensors, model_name=name).name == name

    def test_the_recipe_chooses(self) -> None:
        identity = identify(weights_of("resnet50"), "weights.pth", LoadOptions(fallback_name="resnetblur50"), "weights")
        assert identity.name == "resnetblur50"


class TestPreprocessing:
    def test_other_possible_models_are_noted(self) -> None:
        identity = found(weights_of("resnet50"), hint="resnet50")
        assert (identity.preprocessing.interpolation, identity.preprocessing.crop_pct) == ("bicubic", 0.95)
        assert any("resnet50.tv_in1k" in note and "--model" in note for note in identity.notes)

    def test_the_user_chooses(self) -> None:
        identity = found(weights_of("resnet50"), model_name="resnet50.tv_in1k")
        assert (identity.preprocessing.interpolation, identity.preprocessing.crop_pct) == ("bilinear", 0.875)

    def test_the_file_name_chooses(self) -> None:
        identity = found(weights_of("resnet50"), hint="resnet50.tv_in1k")
        assert identity.name == "resnet50.tv_in1k"
        assert (identity.preprocessing.interpolation, identity.preprocessing.crop_pct) == ("bilinear", 0.875)
        assert identity.notes == ["detected resnet50.tv_in1k from tensor names and shapes"]


def official_convnext(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the keys that ConvNeXt's authors use."""
    renamed = {}
    for key, value in state.items():
        name = re.sub(r"^stem\.", "downsample_layers.0.", key)
        name = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
        name = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", name)
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        name = name.replace("mlp.grn.bias", "grn.beta").replace("mlp.grn.weight", "grn.gamma")
        name = re.sub(r"^head\.(norm|fc)\.", lambda match: "norm." if match[1] == "norm" else "head.", name)
        if "pwconv" in name and value.ndim == 4:
            value = value.flatten(1)  # noqa: PLW2901
        renamed[name] = value.reshape(1, 1, 1, -1) if "grn." in name else value
    return renamed


class TestOtherKeys:
    def test_convnexts_authors(self, tmp_path: Path) -> None:
        model = trained("convnextv2_atto")
        torch.save({"model": official_convnext(dict(model.state_dict()))}, tmp_path / "convnextv2_atto_1k_224.pt")
        for model_name in (None, "convnextv2_atto"):
            loaded = load_checkpoint(tmp_path / "convnextv2_atto_1k_224.pt", LoadOptions(model_name=model_name))
            assert loaded.tensors.keys() == model.state_dict().keys()
            assert same(loaded, model)

    def test_the_first_version(self) -> None:
        state = official_convnext(weights_of("convnext_tiny", num_classes=21841))
        assert "stages.0.0.dwconv.weight" in state
        identity = found(state)
        assert (identity.name, identity.args) == ("convnext_tiny", {"num_classes": 21841})

    def test_openclip(self) -> None:
        state = {f"visual.trunk.{key}": value for key, value in weights_of("convnext_tiny", num_classes=0).items()}
        state |= {"visual.head.proj.weight": torch.zeros(512, 768), "logit_scale": torch.zeros(())}
        identity = found(state)
        assert (identity.name, identity.args) == ("convnext_tiny", {"num_classes": 512})
        assert identity.tensors["head.fc.weight"].shape == (512, 768)

    def test_of_another_size_than_the_named_model(self) -> None:
        state = official_convnext(weights_of("convnext_tiny"))
        identity = found(state, model_name="convnextv2_atto")
        assert "downsample_layers.0.0.weight" in identity.tensors


class TestUnregisteredShapes:
    ARGS = {"num_classes": 4, "channels": [16, 24, 32, 48], "layers": [1, 2, 1, 1]}  # noqa: RUF012

    def test_they_are_refused_with_the_reason(self) -> None:
        error = refusal(weights_of("resnet18", **self.ARGS), "resnet18")
        assert (
            "it looks like a ResNet with stages of 1, 2, 1, 1 blocks, but no timm model has these tensors"
            in error.message
        )
        assert "--model" in error.hint

    def test_a_self_describing_file(self, tmp_path: Path) -> None:
        import json

        model = trained("resnet18", **self.ARGS)
        preprocessing = Preprocessing((3, 72, 72), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
        description = ModelDescription("mine", "resnet18", self.ARGS, preprocessing)
        metadata = {"repshift": json.dumps({"model": description.to_dict()})}
        save_file(dict(model.state_dict()), tmp_path / "mine.safetensors", metadata)
        loaded = load_checkpoint(tmp_path / "mine.safetensors")
        assert loaded.description.preprocessing == preprocessing
        assert Preprocessing.of_model(loaded.model) == preprocessing
        assert loaded.model.pretrained_cfg["input_size"] == (3, 72, 72)
        assert same(loaded, model)

    @pytest.mark.parametrize(
        "changes",
        [
            {"layers": [10**9, 1, 1, 1]},
            {"layers": "many"},
            {"channels": [0, 0, 0, 0]},
            {"channels": []},
            {"layers": [-1, 1, 1, 1]},
            {"cardinality": 0},
            {"output_stride": 0},
            {"num_classes": -3},
            {"no_such": 1},
        ],
    )
    def test_invalid_arguments(self, changes: dict[str, Any]) -> None:
        model = timm.create_model("resnet18", **self.ARGS)
        description = ModelDescription("mine", "resnet18", self.ARGS | changes, Preprocessing.of_model(model))
        with pytest.raises(CheckpointError):
            build(description, model.state_dict(), "mine.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"conv1.weight": torch.zeros(3)},
        {"fc.weight": torch.zeros(())},
        {"fc.weight": torch.zeros(7)},
        {"layer1.0.conv1.weight": torch.zeros(())},
        {"layer9.7.conv1.weight": torch.zeros(3)},
        {"bn1.running_mean": torch.zeros(5)},
    ],
)
@pytest.mark.parametrize("model_name", [None, pytest.param("test_resnet", marks=pytest.mark.slow)])
def test_tensors_of_odd_shapes_are_refused(changes: dict[str, Tensor], model_name: str | None, tmp_path: Path) -> None:
    state = {key: torch.zeros(value.shape) for key, value in weights_of("test_resnet").items()} | changes
    save_file(state, tmp_path / "test_resnet.safetensors")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "test_resnet.safetensors", LoadOptions(model_name=model_name))


def test_other_numbers_of_channels() -> None:
    assert "these weights take 1" in refusal(weights_of("test_resnet", in_chans=1)).message


@pytest.mark.parametrize(
    "values",
    [
        {"input_size": [3, 0, 224]},
        {"input_size": [3, 224, 10**9]},
        {"input_size": [3, -224, 224]},
        {"input_size": [0, 224, 224]},
        {"crop_pct": 0.0},
        {"crop_pct": float("nan")},
        {"std": [0.5, 0.0, 0.5]},
        {"std": [0.5, float("nan"), 0.5]},
        {"std": [0.5, 1e-300, 0.5]},
        {"mean": [0.5, 1e300, 0.5]},
        {"input_size": [3, float("inf"), 224]},
    ],
)
def test_invalid_preprocessing(values: dict[str, Any]) -> None:
    fine = Preprocessing((3, 224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9).to_dict()
    with pytest.raises(CheckpointError, match="the preprocessing of the model"):
        Preprocessing.from_dict(fine | values)


class TestImageSize:
    def test_of_a_file(self, tmp_path: Path) -> None:
        model = trained("test_resnet")
        path = save_weights(model, tmp_path / "weights.safetensors")
        assert load_checkpoint(path, LoadOptions(model_name="test_resnet")).description.preprocessing.input_size == (
            3,
            160,
            160,
        )
        loaded = load_checkpoint(path, LoadOptions(model_name="test_resnet", img_size=96))
        assert loaded.description.preprocessing.input_size == (3, 96, 96)
        assert Preprocessing.of_model(loaded.model) == loaded.description.preprocessing
        assert any(note.startswith("preprocessing set to 96x96x3") for note in loaded.notes)
        assert same(loaded, model, 96)

    def test_of_a_folder(self, tmp_path: Path) -> None:
        import json

        from timm.models import save_for_hf

        save_for_hf(trained("test_resnet"), tmp_path, safe_serialization=True)
        config = json.loads((tmp_path / "config.json").read_text())
        config["pretrained_cfg"]["input_size"] = [3, 128, 128]
        (tmp_path / "config.json").write_text(json.dumps(config))
        for asked, size in ((None, 128), (64, 64)):
            loaded = load_checkpoint(tmp_path, LoadOptions(img_size=asked))
            assert loaded.description.preprocessing.input_size == (3, size, size)
            assert loaded.model.pretrained_cfg["input_size"] == (3, size, size)

    def test_of_a_name(self) -> None:
        loaded = load_checkpoint("test_resnet", LoadOptions(img_size=64))
        assert loaded.source.origin == "random"
        assert loaded.model.pretrained_cfg["input_size"] == (3, 64, 64)

    def test_of_a_vit(self, tmp_path: Path) -> None:
        path = save_weights(tiny_vit(embed_dim=128), tmp_path / "vit.safetensors")
        assert load_checkpoint(path, LoadOptions(img_size=32)).description.preprocessing.input_size == (3, 32, 32)
        with pytest.raises(UsageError, match="takes images of 32x32: its position table has that size"):
            load_checkpoint(path, LoadOptions(img_size=64))

    def test_random_weights_of_any_size(self) -> None:
        loaded = load_checkpoint("test_vit", LoadOptions(img_size=96))
        assert loaded.description.args == {"img_size": 96}
        assert loaded.model(images(1, 96)).shape == (1, 1000)

    @pytest.mark.parametrize("size", [0, -3, 10**6])
    @pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
    def test_an_invalid_size(self, name: str, size: int) -> None:
        with pytest.raises(UsageError, match="Allowed are 1 to 4096"):
            load_checkpoint(name, LoadOptions(img_size=size))

    def test_metadata_of_another_size_than_the_model(self, tmp_path: Path) -> None:
        import json

        preprocessing = Preprocessing((3, 64, 64), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
        description = ModelDescription("a ViT", "test_vit", {"dynamic_img_size": False}, preprocessing)
        metadata = {"repshift": json.dumps({"model": description.to_dict()})}
        save_file(dict(timm.create_model("test_vit").state_dict()), tmp_path / "v.safetensors", metadata)
        with pytest.raises(CheckpointError, match="names images of 64x64, but the model takes 160x160"):
            load_checkpoint(tmp_path / "v.safetensors")


class TestOtherNetworksOfMaps:
    @pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_byobnet", "ghostnet_050", "resnest14d"])
    def test_they_are_detected_by_the_names_of_their_tensors(self, name: str) -> None:
        identity = found(weights_of(name, num_classes=5))
        assert (identity.name, identity.args) == (name, {"num_classes": 5})

    def test_several_that_fit_are_listed(self) -> None:
        error = refusal(weights_of("efficientnet_b0"))
        assert "compute different things: efficientnet_b0, " in error.message
        assert "tf_efficientnet_b0" in error.message
        assert found(weights_of("efficientnet_b0"), "tf_efficientnet_b0-0af12548").name == "tf_efficientnet_b0"

    def test_other_shapes_and_heads(self) -> None:
        tensors = weights_of("test_byobnet") | {"stem.conv.weight": torch.zeros(7, 3, 3, 3)}
        assert "its tensors have the names of test_byobnet, but other shapes" in refusal(tensors).message
        with pytest.raises(CheckpointError, match="--heads is for transformers"):
            identify(weights_of("test_byobnet"), "w.pth", LoadOptions(heads=3), "w")

    def test_saved_and_loaded(self, tmp_path: Path) -> None:
        model = trained("mobilenetv3_small_050")
        loaded = load_checkpoint(save_weights(model, tmp_path / "mobilenetv3_small_050.safetensors"))
        assert same(loaded, model)
