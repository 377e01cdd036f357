"""The valid inputs that attempts change one thing of. Made once, by the commands themselves."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from _shape_videos import write_dataset
from tiny import tiny_vit

from repshift_cli.checkpoints.exported import DOCUMENT_FILE
from repshift_cli.data.builtin.digits import DigitDataset

IMAGES = 30
CLASSES = ("air", "bus", "cat", "dog", "elk", "fox", "gnu", "hen", "type2", "type10")
"""In the order of the labels, which is not that of the text."""

RECIPE = "version: 1\nmetric: {kind: representation_shift}\nreducer: {kind: prune}\nlayers: [{layer: 0, drop_ratio: 0.25}, {layer: 2, keep_tokens: 5}]\n"  # noqa: E501
BUILTIN = "builtin:vit-digits"
SMALL = "builtin:vit-digits-small"
VIDEO = "builtin:umt-shapes"


class Good:
    """Paths and numbers of the valid inputs.

    Attributes:
        folder: holds them; no attempt may change it.
        numbers: of `eval --json` by model: evaluated, skipped and correct images, in folders named by their label.
    """

    def __init__(self, base: Path) -> None:
        self.folder = base / "good"
        self.numbers: dict[str, tuple[int, int, int]] = {}
        self.folder.mkdir(parents=True)
        self.data, self.tar, self.shapes = (self.folder / name for name in ("data", "data.tar", "shapes"))
        self.tiny, self.artifact, self.pth = (
            self.folder / name for name in ("tiny.safetensors", "artifact.safetensors", "digits.pth")
        )
        self.pt2, self.onnx, self.hub = (self.folder / name for name in ("model.pt2", "model.onnx", "hub"))
        self.predictions, self.recipe, self.state = (
            self.folder / name for name in ("predictions.npz", "recipe.yaml", "state")
        )
        self._write_data()
        self._write_models()

    def _write_data(self) -> None:
        scenes, kept = DigitDataset("test", 400, 5), dict.fromkeys(range(len(CLASSES)), 0)
        for index in range(400):
            image, label = scenes.load(index)
            if kept[label] < IMAGES // len(CLASSES):
                kept[label] += 1
                (self.data / CLASSES[label]).mkdir(parents=True, exist_ok=True)
                image.save(self.data / CLASSES[label] / f"{index:05d}.png")
        self.images = sorted(self.data.rglob("*.png"))
        self.labels = {path: CLASSES.index(path.parent.name) for path in self.images}
        self.numbered = self.folder / "numbered"
        for label, name in enumerate(CLASSES):
            shutil.copytree(self.data / name, self.numbered / f"{label:02d}")
        with tarfile.open(self.tar, "w") as archive:
            for path in self.images:
                archive.add(path, str(path.relative_to(self.data)))
        self.recipe.write_text(RECIPE)
        write_dataset(self.shapes, count=2, seed=0, frames=8, size=64)

    def _write_models(self) -> None:
        save_file({key: value.contiguous().clone() for key, value in tiny_vit().state_dict().items()}, self.tiny)
        asset = Path(__file__).resolve().parents[2] / "repshift_cli" / "assets" / "vit_digits_small.safetensors"
        self.tensors = load_file(asset)
        torch.save(self.tensors, self.pth)

    def commands(self, *, slow: bool) -> list[list[str]]:
        """Commands that make the other inputs, and those that give the numbers."""
        model, recipe, numbered = str(self.artifact), str(self.recipe), str(self.numbered)
        measured = ["--seconds", "0", "--no-calibrate"]
        programs = [
            ["export", model, "--to", path.suffix[1:], "-o", str(path), "--no-verify"] for path in (self.pt2, self.onnx)
        ]
        checked = [self.evaluate(name, data=numbered) for name in (SMALL, str(self.hub), str(self.onnx))]
        checked.append(self.evaluate(str(self.tiny), *self.heads, data=str(self.tar)))
        return [
            ["compress", str(self.tiny), "--heads", "2", "-r", recipe, "-o", model, *measured],
            *(programs if slow else []),
            ["export", model, "--to", "hub", "-o", str(self.hub), "--no-verify"],
            self.evaluate(BUILTIN, "--save-predictions", str(self.predictions), data=numbered),
            self.evaluate(model, data=numbered),
            self.evaluate(str(self.pth), *self.heads, data=numbered),
            *(checked if slow else []),
        ]

    heads: tuple[str, ...] = ("--heads", "2")
    """Options without which the `.pth` is not read."""

    def search(self) -> list[str]:
        """A short `search`."""
        return ["search", SMALL, "-t", "macs=0.7", "--images", "16", "--evaluations", "2", "--seconds", "0"]

    def evaluate(self, model: str, *options: str, data: str | None = None) -> list[str]:
        """`eval` of a model on the images."""
        return ["eval", model, "--dataset", data or str(self.data), "--json", "-b", "16", "--workers", "0", *options]

    def finish(self) -> None:
        """Read what the commands have made."""
        with safe_open(self.artifact, "pt") as file:
            self.metadata: dict[str, str] = file.metadata()
        self.tiny_tensors = load_file(self.artifact)
        (self.key,) = self.metadata.keys() - {"format"}
        self.document: dict[str, Any] = json.loads(self.metadata[self.key])
        if self.pt2.exists():
            with zipfile.ZipFile(self.pt2) as archive:
                self.members = {name: archive.read(name) for name in archive.namelist()}
            self.exported_name = next(name for name in self.members if name.endswith(DOCUMENT_FILE))

    def copy_data(self, folder: Path, name: str = "data") -> Path:
        """A copy of the images in the scratch folder, as links to the same content where that is enough."""
        shutil.copytree(self.data, folder / name, copy_function=shutil.copy)
        return folder / name

    def clear(self) -> None:
        """Delete everything."""
        os.chmod(self.folder, 0o700)  # noqa: PTH101
        shutil.rmtree(self.folder.parent, ignore_errors=True)
