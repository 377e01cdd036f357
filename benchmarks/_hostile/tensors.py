"""Checkpoints with odd tensors, images of odd kinds, and datasets laid out in odd ways."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from _hostile.attempt import Attempt, Check, Result, all_counted, same_number
from _hostile.good import BUILTIN, CLASSES, IMAGES, Good

SAME: dict[str, Callable[[Tensor], Any]] = {
    "negative view": lambda value: torch._neg_view(-value),
    "conjugate view": lambda value: torch.complex(torch.zeros_like(value), -value).conj().imag,
    "transposed view": lambda value: value.t().contiguous().t() if value.ndim == 2 else value,
    "slice of another": lambda value: torch.stack([value, value + 1])[0],
    "every second": lambda value: torch.stack([value, value + 1], dim=-1)[..., 0],
    "parameter": nn.Parameter,
    "buffer": nn.Buffer,
    "double": lambda value: value.double(),
    "sparse": lambda value: value.to_sparse(),
    "requires gradients": lambda value: value.clone().requires_grad_(),
}
"""Tensors with the same values: they are read right, or refused."""

OTHER: dict[str, Callable[[Tensor], Any]] = {
    "compressed rows": lambda value: value.reshape(value.shape[0], -1).to_sparse_csr(),
    "meta": lambda value: value.to("meta"),
    "nested": lambda value: torch.nested.nested_tensor([value, value]),
    "expanded": lambda value: value[:1].expand(10**9, *value.shape[1:]),
    "expanded to its shape": lambda value: value.flatten()[0].expand(value.shape),
    "overlapping": lambda value: value.as_strided(value.shape, [1] * value.ndim),
    "complex": lambda value: value.to(torch.complex64),
    "quantized": lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
    "integers": lambda value: value.to(torch.int64),
    "booleans": lambda value: value > 0,
    "8 bits": lambda value: value.to(torch.float8_e4m3fn),
    "NaN": lambda value: value * float("nan"),
    "infinite": lambda value: value + float("inf"),
    "huge": lambda value: value * 0 + 1e38,
    "tiny": lambda value: value * 1e-45,
    "empty": lambda value: value[:0],
    "scalar": lambda value: value.flatten()[0],
    "other shape": lambda value: value[..., None],
    "one row more": lambda value: torch.cat([value, value[:1]]),
    "one row less": lambda value: value[1:],
    "a list": lambda value: value.flatten().tolist(),
    "None": lambda value: None,
    "text": lambda value: "x",
    "an array": lambda value: value.numpy(),
}


def torch_tensors(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """A `.pth` with one odd tensor."""
    tensors: dict[Any, Any] = dict(good.tensors)
    key = rng.choice([*sorted(tensors), "head.weight", "pos_embed", "patch_embed.proj.weight", "cls_token"])
    same = rng.random() < 0.5
    made = rng.choice(sorted(SAME if same else OTHER))
    try:
        tensors[key] = (SAME | OTHER)[made](tensors[key])
    except (RuntimeError, TypeError, IndexError):
        same, tensors[key] = False, "x"
    torch.save(tensors, folder / "m.pth")
    return _torch_attempt(rng, good, folder, same)


def _torch_attempt(rng: random.Random, good: Good, folder: Path, same: bool) -> Attempt:
    if rng.random() < 0.3:
        command = ["compress", "m.pth", *good.heads, "-o", "out.safetensors", "--seconds", "0", "--no-calibrate"]
        return Attempt(
            [command],
            codes=frozenset({0, 2, 3, 5}),
            outputs=("out.safetensors",),
            check=_written(good, folder / "out.safetensors") if same else None,
        )
    command = good.evaluate("m.pth", *good.heads)
    check = same_number(good.numbers[str(good.pth)]) if same else None
    first = [["inspect", "m.pth", *good.heads]] if rng.random() < 0.5 else []
    return Attempt([*first, command], codes=frozenset({0, 2, 3, 5}), check=check)


def _written(good: Good, path: Path) -> Check:
    """The written tensors are those of the model."""

    def check(results: Sequence[Result]) -> str | None:
        if results[0].code != 0 or not path.exists():
            return None
        found = load_file(path)
        differing = [key for key, value in good.tensors.items() if not torch.equal(found[key].float(), value)]
        return f"number: other weights were written: {differing[:3]}" if differing else None

    return check


def wrappers(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """A `.pth` whose tensors lie under other keys, beside other values."""
    tensors: dict[Any, Any] = dict(good.tensors)
    prefix = rng.choice(["module.", "model.", "backbone.", "encoder.model.", ""])
    tensors = {f"{prefix}{key}": value for key, value in tensors.items()}
    holder = rng.choice(["state_dict", "model", "model_state_dict", "net", "\ud800", "[/red]", ""])
    beside = rng.choice(
        [
            {},
            {"epoch": 5, "loss": float("nan")},
            {"n_averaged": torch.tensor(3)},
            {"args": [1], "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}},
            {"model_ema": {key: value + 1 for key, value in tensors.items()}},
            {"\x1b[31merror: x\n": 1, 3: 4, None: 5, ("a",): 6},
        ]
    )
    document: Any = {holder: tensors, **beside}
    if rng.random() < 0.3:
        document = {**tensors, **beside}
    elif rng.random() < 0.2:
        for _ in range(rng.choice([3, 150])):
            document = {"x": document}
    if rng.random() < 0.2:
        changed = rng.choice(["", "\ud800", 3, None, "x" * 100_000, "a\nb", "blocks.-1.x", "blocks.99999999999.x"])
        document[changed] = torch.zeros(2)
    try:
        torch.save(document, folder / "m.pth")
    except (RecursionError, RuntimeError, UnicodeError):
        torch.save({holder: [tensors]}, folder / "m.pth", _use_new_zipfile_serialization=False)
    averaged = "model_ema" in document
    return _torch_attempt(rng, good, folder, same=not averaged)


def weights(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """A `.safetensors` without metadata and with odd values or shapes."""
    tensors = dict(good.tensors)
    key = rng.choice(sorted(tensors))
    names = ["NaN", "infinite", "huge", "tiny", "empty", "scalar", "other shape", "one row more", "one row less"]
    tensors[key] = OTHER[rng.choice([*names, "integers", "booleans", "8 bits"])](tensors[key]).contiguous().clone()
    if rng.random() < 0.1:
        del tensors[key]
    save_file(tensors, folder / "m.safetensors")
    commands = [
        ["inspect", "m.safetensors", *good.heads],
        good.evaluate("m.safetensors", *good.heads),
        ["compress", "m.safetensors", *good.heads, "--dry-run"],
        ["compress", "m.safetensors", *good.heads, "-o", "o.safetensors", "--seconds", "0", "--no-calibrate"],
        ["export", "m.safetensors", *good.heads, "--to", "hub", "-o", "out"],
    ]
    outputs = ("o.safetensors", "out", "out/*")
    return Attempt([rng.choice(commands)], codes=frozenset({0, 2, 3, 4, 5}), outputs=outputs)


def damaged_artifact(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """A compressed checkpoint with NaN or infinite weights."""
    tensors = {key: value.clone() for key, value in good.tiny_tensors.items()}
    key = rng.choice(sorted(tensors))
    tensors[key].view(-1)[rng.randrange(tensors[key].numel())] = rng.choice([float("nan"), float("inf"), 1e38])
    save_file(tensors, folder / "m.safetensors", metadata=good.metadata)
    commands = [
        ["visualize", "m.safetensors", "--data", str(good.data), "--count", "2", "-o", "k.png"],
        ["bench", "m.safetensors", "--seconds", "0", "--min-runs", "1", "-b", "1"],
        ["export", "m.safetensors", "--to", "hub", "-o", "out"],
        good.evaluate("m.safetensors", "--compare-dense"),
    ]
    return Attempt([rng.choice(commands)], outputs=("k.png", "out", "out/*"))


SAME_IMAGES: dict[str, Callable[[Image.Image, Path], Any]] = {
    "bmp": lambda image, path: image.save(path.with_suffix(".bmp")),
    "tif": lambda image, path: image.save(path.with_suffix(".tif")),
    "TIFF": lambda image, path: image.save(path.with_suffix(".TIFF"), format="TIFF"),
    "ppm": lambda image, path: image.save(path.with_suffix(".ppm")),
    "PNG": lambda image, path: image.save(path.with_suffix(".PNG"), format="PNG"),
    "webp": lambda image, path: image.save(path.with_suffix(".webp"), lossless=True),
    "opaque": lambda image, path: image.convert("RGBA").save(path),
    "gif named png": lambda image, path: image.save(path, format="BMP"),
}
"""Files with the same pixels: they are read right, or counted as skipped."""

OTHER_IMAGES: dict[str, Callable[[Image.Image, Path], Any]] = {
    "16 bits": lambda image, path: _gray(image, np.uint16, 257).save(path),
    "floats": lambda image, path: _gray(image, np.float32, 1).save(path.with_suffix(".tif")),
    "32 bits": lambda image, path: _gray(image, np.int32, 1).save(path.with_suffix(".tif")),
    "one bit": lambda image, path: image.convert("1").save(path),
    "palette": lambda image, path: image.convert("P").save(path),
    "gray with alpha": lambda image, path: image.convert("LA").save(path),
    "inks": lambda image, path: image.convert("CMYK").save(path.with_suffix(".tif")),
    "animation": lambda image, path: image.save(path.with_suffix(".gif"), save_all=True, append_images=[image] * 3),
    "half": lambda image, path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "nothing": lambda image, path: path.write_bytes(b""),
    "text": lambda image, path: path.write_text("[/red]\x1b[31m"),
    "wide": lambda image, path: image.resize((30_000, 1)).save(path),
    "one pixel": lambda image, path: image.resize((1, 1)).save(path),
    "large": lambda image, path: Image.new("1", (16_000, 16_000)).save(path),
    "too large": lambda image, path: Image.new("1", (40_000, 16_000)).save(path),
    "large screen": lambda image, path: _large_screen(path),
    "flipped bytes": lambda image, path: path.write_bytes(
        path.read_bytes()[:60] + b"\xff" * 9 + path.read_bytes()[69:]
    ),
}


def _gray(image: Image.Image, kind: Any, scale: float) -> Image.Image:
    return Image.fromarray((np.asarray(image.convert("L"), dtype=np.float64) * scale).astype(kind))


def _large_screen(path: Path) -> None:
    Image.new("P", (4, 4)).save(path, format="GIF")
    content = bytearray(path.read_bytes())
    content[6:10] = b"\x80\x3e\x80\x3e"
    path.write_bytes(content)


def images(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """One or all images in another format, of another mode, or damaged."""
    data = good.copy_data(folder)
    paths = sorted(data.rglob("*.png"))
    same = rng.random() < 0.5
    name = rng.choice(sorted(SAME_IMAGES if same else OTHER_IMAGES))
    make = (SAME_IMAGES | OTHER_IMAGES)[name]
    for path in paths if same and rng.random() < 0.5 else [rng.choice(paths)]:
        image = Image.open(path).convert("RGB")
        make(image, path)
        replaced = [each for each in path.parent.glob(f"{path.stem}.*") if each != path]
        if replaced:
            path.unlink()
    commands = [good.evaluate(BUILTIN, data="data")] * 4
    if not same:
        commands.append(["compress", BUILTIN, "--calibration", "data", "--seconds", "0", "-o", "o.safetensors"])
        commands.append(["visualize", str(good.artifact), "--data", "data", "--count", "9", "-o", "k.png"])
    check = same_number(good.numbers[BUILTIN]) if same else all_counted(IMAGES)
    outputs = ("o.safetensors", "k.png")
    return Attempt([rng.choice(commands)], codes=frozenset({0, 2, 4, 5}), outputs=outputs, check=check)


def layouts(  # noqa: PLR0912
    rng: random.Random, good: Good, folder: Path
) -> Attempt:
    """The same images in folders of odd names, deeper, linked, or beside other files."""
    data = good.copy_data(folder)
    choice = rng.randrange(9)
    check = same_number(good.numbers[BUILTIN])
    if choice == 0:
        for path in sorted(data.rglob("*.png")):
            part = path.parent / f"part{rng.randrange(3)}"
            part.mkdir(exist_ok=True)
            path.rename(part / path.name)
    elif choice == 1:
        for name in ("Thumbs.db", ".DS_Store", "notes.txt", "README.md"):
            (rng.choice([data, data / "air"]) / name).write_bytes(b"x")
    elif choice == 2:
        for path in sorted(data.iterdir()):
            path.rename(data / f"{CLASSES.index(path.name):02d} {rng.choice(_ODD_NAMES)}")
    elif choice == 3:
        (data / "air").rename(folder / "elsewhere")
        (data / "air").symlink_to(folder / "elsewhere")
    elif choice == 4:
        one = rng.choice(sorted(data.rglob("*.png")))
        (one.parent / "again.png").symlink_to(one)
    elif choice == 5:
        (data / "air" / "loop").symlink_to(data)
        check = None
    elif choice == 6:
        split = rng.choice(["val", "valid", "test", "validation"])
        (folder / "whole").mkdir()
        data.rename(folder / "whole" / split)
        shutil.copytree(good.data, folder / "whole" / "train")
        (folder / "whole").rename(data)
        check = None
    elif choice == 7:
        for path in sorted(data.rglob("*.png")):
            path.rename(path.with_name(f"{path.stem}{rng.choice(_ODD_NAMES)}.png"))
    else:
        os.rename(data, os.fsencode(folder) + b"/\xff" + rng.choice(_ODD_NAMES).encode("utf-8", "surrogateescape"))  # noqa: PTH104
        name = next(folder.iterdir()).name
        return Attempt([good.evaluate(BUILTIN, data=name)], codes=frozenset({0, 2, 4}), check=check)
    command = good.evaluate(BUILTIN, data="data")
    if rng.random() < 0.3:
        command += ["--save-predictions", "p.npz"]
    return Attempt([command], codes=frozenset({0, 2, 4}), outputs=("p.npz",), check=check)


_ODD_NAMES = (
    "[red]",
    "[bold]",
    "\x1b[31mx",
    "a\nerror: x",
    "\udcff",
    " ",
    "x" * 200,
    "é",
    "-o",
    "%s",
    "{x}",
    "\u202e",
)

KINDS = {
    "tensors of torch": (torch_tensors, 9),
    "wrapped weights": (wrappers, 4),
    "values of weights": (weights, 4),
    "weights that are not finite": (damaged_artifact, 3),
    "images": (images, 8),
    "layouts of datasets": (layouts, 7),
}
