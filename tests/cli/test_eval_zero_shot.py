"""`repshift eval --class-names`, for models with a text tower."""

from __future__ import annotations

import json
import shutil
import string
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers as hf
from outcome import Command, explained
from PIL import Image
from safetensors.torch import save_file
from tiny_transformers import CLIP, TEXT, tiny_transformer
from torch import Tensor
from torch.nn.functional import normalize

from repshift_cli.checkpoints.libraries.base import encode_texts
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.errors import CheckpointError, ModelError
from repshift_cli.evaluation.zero_shot import ZeroShotClassifier, class_embeddings

QUIET = ("--workers", "0", "--threads", "1", "-b", "16")
NAMES = ("dog", "cat", "sea gull")
PROMPTS = ("a photo of a {}.", "the {}")


def write_tokenizer(folder: Path) -> None:
    """The tokenizer of CLIP, whose tokens are letters."""
    letters = [*string.ascii_lowercase, "."]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')


def tiny(kind: str) -> Any:
    """A CLIP or SigLIP of transformers that reads texts of 32 tokens."""
    vision: Any = getattr(hf, f"{kind}VisionConfig")(**CLIP)
    text: Any = getattr(hf, f"{kind}TextConfig")(**{**TEXT, "max_position_embeddings": 32, "projection_size": 32})
    config = getattr(hf, f"{kind}Config")(vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=24)
    return tiny_transformer(f"{kind}Model", lambda: getattr(hf, f"{kind}Model")(config))


def write_model(folder: Path, kind: str = "Clip") -> Any:
    model = tiny({"Clip": "CLIP"}.get(kind, kind))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP, 30 images in class folders and the class names, in another order than the folders."""
    root = tmp_path_factory.mktemp("zero")
    write_model(root / "clip")
    random = np.random.default_rng(0)
    for index in range(30):
        path = root / "photos" / NAMES[index % 3].replace(" ", "_") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((32, 32)).save(path)
    (root / "names.txt").write_text("\n".join(NAMES) + "\n")
    recipe = "version: 1\nmetric: {kind: token_norm}\nlayers: [{layer: 0, keep_tokens: 5}]\n"
    (root / "r.yaml").write_text(recipe)
    return root


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["Clip", "Siglip"])
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", kind)
    loaded = load_checkpoint(tmp_path / "m")
    texts = [f"a photo of a {name}." for name in NAMES]
    padding = "max_length" if kind == "Siglip" else True
    tokens = hf.CLIPTokenizer.from_pretrained(tmp_path / "m")(
        texts, padding=padding, truncation=True, max_length=32, return_tensors="pt"
    )
    assert tokens["input_ids"].unique(dim=0).shape[0] == 3
    with torch.no_grad():
        wanted = model(pixel_values=images(), input_ids=tokens["input_ids"]).logits_per_image
        classes = class_embeddings(loaded, NAMES, PROMPTS[:1])
        found = ZeroShotClassifier(loaded.model, classes, texts)(images())
    torch.testing.assert_close(found, wanted - (model.logit_bias if kind == "Siglip" else 0), atol=1e-4, rtol=1e-4)
    assert found.argmax(1).equal(wanted.argmax(1))
    states = [ZeroShotClassifier(loaded.model, classes, each).state_dict() for each in (texts, texts[:1])]
    assert not states[0]["texts"].equal(states[1]["texts"])  # a resumed run is of the same texts
    assert "classes" not in states[0]  # and not of the same rounding


def test_of_several_prompts_the_mean_is_that_of_open_clip(tmp_path: Path) -> None:
    """With the tokenizer of open_clip, and with one of transformers in the folder."""
    sizes = {"context_length": 32, "width": 16, "heads": 2, "layers": 1}
    other = {"vocab_size": 64, "pool_type": "last", "hf_tokenizer_name": "nobody/nothing"}
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
    for folder, text in (tmp_path / "own", {"vocab_size": 49408}), (tmp_path / "other", other):
        config: dict[str, Any] = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {**sizes, **text}}
        torch.manual_seed(0)
        model: Any = open_clip.CLIP(**config).eval().requires_grad_(False)
        folder.mkdir()
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        if "hf_tokenizer_name" in text:
            with pytest.raises(CheckpointError, match="it has no tokenizer files"):
                class_embeddings(load_checkpoint(folder), NAMES, PROMPTS)
            write_tokenizer(folder)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        wanted = open_clip.build_zero_shot_classifier(model, tokenizer, NAMES, PROMPTS).mT
        found = class_embeddings(load_checkpoint(folder), NAMES, PROMPTS)
        torch.testing.assert_close(normalize(found, dim=-1), wanted, atol=1e-5, rtol=1e-4)
        assert float(found.norm(dim=-1).mean()) == pytest.approx(float(model.logit_scale.exp()), rel=1e-5)


def test_accuracy_of_the_compressed_and_the_dense_model(root: Path, cli: Command, tmp_path: Path) -> None:
    options = ("--recipe", root / "r.yaml", "--seconds", "0", "--no-calibrate", "--threads", "1")
    done = cli("compress", root / "clip", "-o", "fast", *options, "--data", root / "photos")
    assert done.rc == 0, done.stderr
    options = ("--dataset", root / "photos", "--class-names", root / "names.txt", "--compare-dense", "--json", *QUIET)
    done = cli("eval", "fast", *options, "--resume", "state", "--save-predictions", "p.npz")
    assert done.rc == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["class_order"] == "model"  # labels follow the file
    names = root / "names.txt"
    assert document["zero_shot"] == {
        "class_names": {"path": str(names), "sha256": sha256(names.read_bytes()).hexdigest(), "classes": 3},
        "prompts": ["a photo of a {}."],
    }
    with np.load(tmp_path / "p_dense.npz") as saved:
        rows = {str(key): int(top[0]) for key, top in zip(saved["id"], saved["top"], strict=True)}
        answers = dict(zip(map(str, saved["id"]), saved["answers"][:, 0].tolist(), strict=True))
    assert {Path(key).parent.name: NAMES[label] for key, label in answers.items()} == {
        name.replace(" ", "_"): name for name in NAMES
    }
    loaded = load_checkpoint(root / "clip")
    classes = class_embeddings(loaded, NAMES, PROMPTS[:1])
    for key, predicted in rows.items():
        with Image.open(root / "photos" / key) as image:
            pixels = loaded.description.preprocessing.transform()(image.convert("RGB"))
        with torch.no_grad():
            assert int((normalize(loaded.model(pixels[None]), dim=-1) @ classes.mT).argmax()) == predicted
    correct = sum(rows[key] == answers[key] for key in rows)
    assert document["dense"]["top1"] == pytest.approx(100 * correct / 30)
    assert document["agreement"] < 100
    several = cli("eval", "fast", "--against", "random", *options)
    assert several.rc == 0, several.stderr
    found = {row["name"]: row["top1"] for row in json.loads(several.stdout)["models"]}
    assert list(found) == ["compressed", "dense", "random"]
    assert (found["compressed"], found["dense"]) == (document["top1"], document["dense"]["top1"])


def test_names_that_are_not_folders_are_matched_by_order(root: Path, cli: Command, tmp_path: Path) -> None:
    (tmp_path / "n.txt").write_text("kitten\nhound\nbird\n")
    options = ("--dataset", root / "photos", "--class-names", "n.txt", "--prompt", "the {}", "--json", *QUIET)
    done = cli("eval", root / "clip", *options)
    assert done.rc == 0, done.stderr
    assert "matched by order: cat is 'kitten', dog is 'hound', sea_gull is 'bird'" in " ".join(done.stderr.split())
    (tmp_path / "n.txt").write_text("kitten\nhound\n")
    explained(cli("eval", root / "clip", *options), 4, "photos has 3 classes, but n.txt has 2 class names")


@pytest.mark.parametrize(
    ("names", "options", "rc", "words"),
    [
        ("", (), 4, "has an empty line, or a name twice"),
        ("dog\ncat\ndog\n", (), 4, "a name twice: dog"),
        ("dog\ncat\nbird\n", ("--prompt", "a photo"), 2, "--prompt 'a photo': it has no {}"),
        ("dog\ncat\nbird\n", ("--embeddings", "."), 2, "--class-names is not used with --embeddings"),
    ],
)
def test_a_wrong_option_is_one_error(  # noqa: PLR0917
    names: str, options: tuple[str, ...], rc: int, words: str, root: Path, cli: Command, tmp_path: Path
) -> None:
    (tmp_path / "n.txt").write_text(names)
    done = cli("eval", root / "clip", "--dataset", root / "photos", "--class-names", "n.txt", *options, *QUIET)
    explained(done, rc, words)


def test_a_model_with_classes_is_refused(root: Path, cli: Command) -> None:
    done = cli("eval", "builtin:vit-digits-small", "--class-names", root / "names.txt", *QUIET)
    explained(done, 2, "--class-names: builtin:vit-digits-small has a head of 10 classes")
    explained(cli("eval", root / "clip", "--dataset", ".", "--prompt", "a {}"), 2, "--prompt needs --class-names")


def test_a_model_without_a_text_tower_or_a_tokenizer_is_refused(root: Path, tmp_path: Path) -> None:
    tiny_transformer("CLIPVisionModel").save_pretrained(tmp_path / "v")
    with pytest.raises(ModelError, match="has no text tower"):
        encode_texts(load_checkpoint(tmp_path / "v"), NAMES)
    folder = shutil.copytree(root / "clip", tmp_path / "m")
    (folder / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"its tokenizer lacks merges\.txt"):
        encode_texts(load_checkpoint(folder), NAMES)
    (folder / "vocab.json").unlink()
    with pytest.raises(CheckpointError, match="it has no tokenizer files"):
        encode_texts(load_checkpoint(folder), NAMES)


def test_a_tokenizer_that_does_not_fit_or_runs_code_is_refused(root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(root / "clip", tmp_path / "m")
    loaded = load_checkpoint(folder)
    with pytest.raises(CheckpointError, match="makes the same tokens of 'dog' and 'Dog'"):
        encode_texts(loaded, ["dog", "Dog"])
    words: dict[str, int] = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({key: index + 9 for key, index in words.items()}))
    with pytest.raises(CheckpointError, match="but the model has 64"):
        encode_texts(loaded, ["zz.", "a"])
    (folder / "vocab.json").write_text(json.dumps({key: (index + 5) % 56 for key, index in words.items()}))
    with pytest.raises(CheckpointError, match="the same embedding for all texts"):
        encode_texts(loaded, ["bc", "bd"])
    (folder / "own.py").write_text("raise SystemExit('it ran')")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="its tokenizer does not load"):
        encode_texts(loaded, NAMES)
