"""Hostile inputs, made from valid ones by a seed, and the code that reads them.

Each target changes a valid input by a random generator and passes it to the code that reads such inputs. It returns if
the input is accepted; the only error that it may raise is a `RepshiftError`.
"""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as to_safetensors
from tiny import make_plan, make_recipe, tiny_vit

from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.exported import DOCUMENT_FILE, kind_of, read_document
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.loaded import ModelDescription
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.checkpoints.schema import EXPORT_VERSION
from repshift_cli.checkpoints.weights import METADATA_KEY, read_weights
from repshift_cli.data.sources.tar import tar_members
from repshift_cli.data.video.annotations import open_video_text
from repshift_cli.evaluation.classification.predictions import Predictions, load_predictions, save_predictions
from repshift_cli.evaluation.classification.resume import ResumeState
from repshift_cli.planning.recipe import Recipe, shipped_recipes
from repshift_cli.planning.resolve import resolve
from repshift_cli.reduction.checks import check_components
from repshift_cli.reduction.families.base import match
from repshift_cli.utils.hashing import digest_of_document
from repshift_cli.utils.progress import Silent

__all__ = ["TARGETS", "Fuzzer", "changed_bytes", "changed_tree", "to_json"]

_MOST_CHANGES = 4
_NUMBERS = (0, 1, -1, 2, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**30, -(2**63))
_FLOATS = (0.0, 0.5, 1.0, -0.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
_DEEP = "nested deeply"
"""Stands for lists in lists, thousands deep, which Python's own tools could not copy or write."""

_TEXTS = (
    *("", " ", "0", "none", "../../etc/passwd", "/dev/zero", "a\0b", "\ud800", "é" * 40, "x" * 5000),
    *("{", "vit", "blocks.0", _DEEP),
)
_SNIPPETS = (
    *(b"{", b"}", b"[", b"]", b":", b",", b"\n", b"- ", b"  ", b"\t", b'"', b"'", b"#", b"|", b">", b"\0", b"\xff"),
    *(b"&a ", b"*a", b"<<: ", b"!!python/object/apply:os.system ", b"!!binary ", b"? ", b"---\n", b"%YAML 9.9\n"),
    *(b"1e999", b"-0", b".inf", b".nan", b"0x10", b"0o7", b"1_000", b"null", b"true", b"~", b"99999999999999999999"),
)

Target = Callable[[random.Random], None]


class Fuzzer:
    """The targets; the files that they read are in a folder of their own.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_vit(depth=3, embed_dim=16)
        # as deep as the models of the shipped recipes, so that some changed recipes are valid
        deep = tiny_vit(depth=12, embed_dim=16)
        self.layout = match(deep).layout(deep)
        self.tensors = {key: value.contiguous().clone() for key, value in self.model.state_dict().items()}
        self.document = self._document()
        self.exported_document = self._exported_document()
        self.recipes = [*shipped_recipes().values(), make_recipe().text, make_recipe(reducer="merge").text]
        (folder / "videos").mkdir()
        for name in ("v1.mp4", "v2.mp4"):
            (folder / "videos" / name).touch()
        self.predictions = self._predictions()
        self.tar = self._tar()
        self.state = ResumeState(folder / "state", {"run": 1}, ("one",), Silent())
        self.state.open()

    def recipe(self, rng: random.Random) -> None:
        """The text of a recipe, and the plan that it gives for a model."""
        text = rng.choice(self.recipes)
        changed = changed_bytes(rng, text.encode()) if rng.random() < 0.5 else _as_text(rng, _changed_yaml(rng, text))
        recipe = Recipe.parse(changed.decode("utf-8", "replace"), "fuzzed")
        check_components(recipe)
        if recipe.layers:
            resolve(recipe, self.layout)

    def metadata(self, rng: random.Random) -> None:
        """The document in the metadata of a compressed checkpoint, loaded as a model that is ready to run."""
        if rng.random() < 0.8:
            text = to_json(changed_tree(rng, self.document))
        else:
            text = changed_bytes(rng, json.dumps(self.document).encode()).decode("utf-8", "replace")
        path = self.folder / "metadata.safetensors"
        path.write_bytes(to_safetensors(self.tensors, {METADATA_KEY: text.encode("utf-8", "replace").decode()}))
        opened = artifact.open_model(path)
        # its preprocessing is run too, unless the images are too large for a test
        preprocessing = opened.loaded.description.preprocessing
        if max(preprocessing.input_size) <= 512 and preprocessing.crop_pct > 0.1:
            preprocessing.transform()(Image.new("RGB", (20, 20)))

    def header(self, rng: random.Random) -> None:
        """The header of a safetensors file, and the detection of the model from it."""
        whole = to_safetensors(self.tensors, {"format": "pt"})
        (length,) = struct.unpack("<Q", whole[:8])
        header, data = whole[8 : 8 + length], whole[8 + length :]
        if rng.random() < 0.7:
            header = to_json(changed_tree(rng, json.loads(header))).encode("utf-8", "replace")
        else:
            header = changed_bytes(rng, header)
        length = len(header) if rng.random() < 0.8 else rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(header) + 8])
        cut = len(data) if rng.random() < 0.8 else rng.randrange(len(data))
        path = self.folder / "header.safetensors"
        path.write_bytes(struct.pack("<Q", length) + header + data[:cut])
        weights = read_weights(path)
        if rng.random() < 0.1:  # which is slow
            load_checkpoint(path, LoadOptions(heads=rng.choice([None, 2])))
        assert isinstance(weights.tensors, dict)

    def annotations(self, rng: random.Random) -> None:
        """Captions or questions of videos."""
        rows: list[dict[str, Any]] = [
            {"video": "v1.mp4", "caption": ["a red square", "it moves"]},
            {"video": ["v1.mp4", "v2.mp4"], "caption": "two videos"},
        ]
        questions = [{"video": "v2.mp4", "question": "what?", "answer": "a circle", "question_id": 3}]
        good: list[Any] = rng.choice([rows, questions])
        path = self.folder / rng.choice(["a.json", "a.jsonl"])
        if path.suffix == ".jsonl":
            path.write_bytes(changed_bytes(rng, "\n".join(map(json.dumps, good)).encode()))
        elif rng.random() < 0.6:
            path.write_text(to_json(changed_tree(rng, good)), encoding="utf-8", errors="replace")
        else:
            path.write_bytes(changed_bytes(rng, json.dumps(good).encode()))
        paragraph = rng.choice([None, True, False])
        open_video_text(None, annotations=path, videos=self.folder / "videos", paragraph=paragraph)

    def exported(self, rng: random.Random) -> None:
        """The document of an exported file."""
        path = self.folder / "e.pt2"
        text = to_json(changed_tree(rng, self.exported_document)) if rng.random() < 0.7 else None
        content = self._archive(json.dumps(self.exported_document) if text is None else text)
        path.write_bytes(changed_bytes(rng, content) if text is None else content)
        document = read_document(path, kind_of(path))
        ModelDescription.from_dict(document.model)

    def saved_predictions(self, rng: random.Random) -> None:
        """A prediction file."""
        path = self.folder / "p.npz"
        path.write_bytes(changed_bytes(rng, self.predictions))
        load_predictions(path)

    def archive(self, rng: random.Random) -> None:
        """A tar of images."""
        path = self.folder / "a.tar"
        path.write_bytes(changed_bytes(rng, self.tar))
        tar_members(path)

    def progress(self, rng: random.Random) -> None:
        """A file of the state of a run, which is skipped if it is damaged."""
        good = {
            "run": digest_of_document(self.state.header),
            "shard": 0,
            "images": 2,
            "counts": {"one": {"top1": 1, "top5": 2, "seconds": 0.5}},
            "same": 0,
            "skipped": [[2, "gone"]],
            "rows": [
                {
                    "indices": [0, 1],
                    "answers": [[1], [2]],
                    "said": {"one": {"top": [[1, 2], [0, 1]], "probabilities": [[0.5, 0.1], [0.4, 0.2]]}},
                }
            ],
        }
        path = self.folder / "state" / "000000.json"
        path.write_text(to_json(changed_tree(rng, good)), encoding="utf-8", errors="replace")
        self.state.load({0: range(3)}, with_rows=True)

    def _document(self) -> dict[str, Any]:
        torch.manual_seed(0)
        path = self.folder / "good.safetensors"
        path.write_bytes(to_safetensors(self.tensors))
        loaded = load_checkpoint(path, LoadOptions(heads=2))
        recipe = make_recipe("[{layer: 0, drop_ratio: 0.25}, {layer: 2, keep_tokens: 5}]")
        plan = make_plan(loaded.model, recipe)
        document: dict[str, Any] = json.loads(json.dumps(artifact.make_document(loaded, plan, recipe, None, {})))
        return document

    def _exported_document(self) -> dict[str, Any]:
        port = {"name": "images", "shape": [None, 3, 32, 32], "dtype": "float32"}
        shared = ("repshift_version", "created", "model", "plan", "recipe", "source", "versions")
        own = {"export_version": EXPORT_VERSION, "kind": "pt2", "measured": None, "opset": None, "verified": None}
        counts = {"macs": 8, "dense_macs": 9, "num_classes": 2}
        common = {key: self.document[key] for key in shared}
        return {**common, **own, **counts, "input": port, "output": {**port, "shape": [None, 2]}, "device": "cpu"}

    @staticmethod
    def _archive(text: str) -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("e/models/model.json", "{}")
            archive.writestr(f"e/{DOCUMENT_FILE}", text.encode("utf-8", "replace"))
        return stream.getvalue()

    def _predictions(self) -> bytes:
        path = self.folder / "good.npz"
        ids = np.array(["a", "b"], dtype=np.str_)
        top = np.array([[0, 1], [1, 0]], dtype=np.int32)
        chances = np.array([[0.6, 0.4], [0.7, 0.3]], dtype=np.float32)
        save_predictions(path, Predictions(ids, top[:, :1], top, chances, {"model": "m"}), force=True)
        return path.read_bytes()

    def _tar(self) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name in ("a/1.png", "x" * 200 + ".png", "a/1.cls"):
                info = tarfile.TarInfo(name)
                info.size = 600
                archive.addfile(info, io.BytesIO(b"1" * 600))
        return stream.getvalue()


TARGETS: dict[str, Callable[[Fuzzer, random.Random], None]] = {
    "recipes": Fuzzer.recipe,
    "metadata of checkpoints": Fuzzer.metadata,
    "headers of safetensors": Fuzzer.header,
    "annotations": Fuzzer.annotations,
    "exported files": Fuzzer.exported,
    "predictions": Fuzzer.saved_predictions,
    "archives": Fuzzer.archive,
    "states of runs": Fuzzer.progress,
}
"""By what they read."""


def changed_bytes(rng: random.Random, content: bytes) -> bytes:
    """Some bytes flipped, removed, repeated, inserted or moved."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, _MOST_CHANGES)):
        place = rng.randrange(len(changed) + 1)
        length = rng.choice([1, 2, 8, 64])
        kind = rng.randrange(6)
        if kind == 0 and place < len(changed):
            changed[place] = rng.randrange(256)
        elif kind == 1:
            del changed[place : place + length]
        elif kind == 2:
            changed[place:place] = changed[place : place + length] * rng.choice([1, 2, 50])
        elif kind == 3:
            changed[place:place] = rng.choice(_SNIPPETS) * rng.choice([1, 1, 1, 3, 2000])
        elif kind == 4:
            del changed[place:]
        else:
            other = rng.randrange(len(changed) + 1)
            changed[place:place] = changed[other : other + length]
    return bytes(changed)


def changed_tree(rng: random.Random, tree: Any) -> Any:
    """A JSON value with some places replaced."""
    changed = copy.deepcopy(tree)
    for _ in range(rng.randint(1, _MOST_CHANGES)):
        holder, key = _place(rng, changed)
        if holder is None:
            return _value(rng)
        kind = rng.randrange(5)
        if kind == 0 and isinstance(holder, dict):
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice([*_TEXTS, "kind", "num_heads", "depth", "shape"])] = holder[key]
        elif kind == 2 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            holder[key] = _value(rng)
    return changed


def _place(rng: random.Random, tree: Any) -> tuple[Any, Any]:
    """A random place in the tree; None if it has none."""
    places: list[tuple[Any, Any]] = []
    open_: list[Any] = [tree]
    while open_:
        node = open_.pop()
        if isinstance(node, dict | list):
            keys = list(node) if isinstance(node, dict) else range(len(node))
            places += [(node, key) for key in keys]
            open_ += [node[key] for key in keys]
    return rng.choice(places) if places else (None, None)


def _value(rng: random.Random) -> Any:
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: rng.choice(_NUMBERS),
        lambda: rng.choice(_FLOATS),
        lambda: rng.choice(_TEXTS),
        lambda: rng.choice([None, True, False, [], {}, [[]], {"": None}]),
        lambda: [rng.choice(_NUMBERS) for _ in range(rng.choice([1, 2, 3, 50]))],
        lambda: _nested(rng.choice([3, 30, 80])),
        lambda: {"kind": rng.choice(_TEXTS)},
        lambda: rng.randint(-5, 40),
    )
    return rng.choice(kinds)()


def _nested(depth: int) -> Any:
    value: Any = 0
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def _changed_yaml(rng: random.Random, text: str) -> Any:
    import yaml

    return changed_tree(rng, yaml.safe_load(text))


def _as_text(rng: random.Random, tree: Any) -> bytes:
    """A tree as JSON, which is valid YAML, sometimes with aliases that multiply."""
    # PyYAML takes seconds for the deepest nesting, so it is rare
    text = to_json(tree, 5000 if rng.random() < 0.1 else 200)
    if rng.random() < 0.1:
        text = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
            f"{name}: &{name} [*{before}, *{before}, *{before}, *{before}, *{before}]\n"
            for before, name in zip("abcdefgh", "bcdefghi", strict=True)
        )
    return text.encode("utf-8", "replace")


def to_json(tree: Any, deep: int = 5000) -> str:
    return json.dumps(tree, ensure_ascii=False).replace(json.dumps(_DEEP), "[" * deep + "]" * deep)
