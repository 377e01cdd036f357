"""Options that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.errors import UsageError


class AttentionKind(str, Enum):
    """Values of `--attention`; see `models/attention_mode.py`."""

    AUTO = "auto"
    FLASH = "flash"
    SDPA = "sdpa"
    SDPA_FLASH = "sdpa:flash"
    SDPA_EFFICIENT = "sdpa:efficient"
    SDPA_CUDNN = "sdpa:cudnn"
    SDPA_MATH = "sdpa:math"
    EXPLICIT = "explicit"


Attention = Annotated[
    AttentionKind,
    typer.Option(
        "--attention",
        metavar="KIND",
        help="Attention implementation of all models: auto (flash-attn if it can run, else the model's own), flash "
        "(flash-attn), sdpa (fused kernels of torch), sdpa:flash, sdpa:efficient, sdpa:cudnn, sdpa:math, explicit.",
    ),
]

Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A .safetensors, .pth or .pt file, a folder with config.json, a timm name, or a built-in model "
        "(builtin:vit-digits).",
    ),
]

ModelName = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="NAME", help="Model name (of timm, vim_... or umt_...), if the file does not contain it."
    ),
]

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", metavar="DIR", help="Folder of the dataset (or REPSHIFT_DATA_DIR).")
]

Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...")]

Dtype = Annotated[str, typer.Option("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16.")]

BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", "-b", min=1, metavar="N", help="Batch size (default: 8; 1 for large video models)."),
]

Threads = Annotated[int | None, typer.Option("--threads", min=1, metavar="N", help="CPU threads (default: all cores).")]

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]

Force = Annotated[bool, typer.Option("--force", help="Overwrite existing outputs, and continue when a check fails.")]

Overwrite = Annotated[bool, typer.Option("--force", help="Overwrite existing outputs.")]

Heads = Annotated[
    int | None, typer.Option("--heads", min=1, metavar="N", help="Attention heads, if no timm model has this shape.")
]

ImgSize = Annotated[
    int | None,
    typer.Option(
        "--img-size", min=1, metavar="N", help="Image size N x N: any for a CNN, else what the weights allow."
    ),
]

MeasureDtype = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="DTYPE", help="float32, bfloat16 or float16 while running; the file keeps its own."
    ),
]

Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Random seed for sampling images.")]

Frames = Annotated[
    int | None,
    typer.Option(
        "--frames", min=1, metavar="N", help="Frames per clip, if the file of a video model does not contain it."
    ),
]

CheckpointFrames = Annotated[
    int | None,
    typer.Option(
        "--checkpoint-frames", min=1, metavar="N", help="Frames per clip in training, to resize position embeddings."
    ),
]


Mean = Annotated[
    str | None,
    typer.Option(
        "--mean", metavar="R,G,B", help="Mean of pixels in 0..1, if the file does not contain it; or one value."
    ),
]

Std = Annotated[
    str | None,
    typer.Option("--std", metavar="R,G,B", help="Their standard deviation, if the file does not contain it."),
]

CropPct = Annotated[
    float | None,
    typer.Option("--crop-pct", metavar="X", help="Share of the resized image that the crop takes, likewise."),
]

Interpolation = Annotated[
    str | None,
    typer.Option("--interpolation", metavar="NAME", help="bicubic, bilinear, nearest, ... to resize images, likewise."),
]

Trust = Annotated[
    bool,
    typer.Option("--trust", help="Open .pt2 files, which can run code of their author. ONNX files need no trust."),
]

_MODEL_OPTIONS = {
    "model_name": ModelName,
    "heads": Heads,
    "img_size": ImgSize,
    "frames": Frames,
    "checkpoint_frames": CheckpointFrames,
    "mean": Mean,
    "std": Std,
    "crop_pct": CropPct,
    "interpolation": Interpolation,
}
"""By field of `LoadOptions`."""


def takes_model(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `LoadOptions` in place of its parameter `load`.

    An option that the command declares itself is left to it.
    """
    own = inspect.signature(command, eval_str=True)
    names = [name for name in _MODEL_OPTIONS if name not in own.parameters]

    @wraps(command)
    def run(**given: Any) -> None:
        said = {name: given.pop(name) for name in names}
        for name in ("mean", "std"):
            said[name] = _numbers(f"--{name}", said[name])
        command(load=LoadOptions(**said), **given)

    parameters = []
    for parameter in own.parameters.values():
        if parameter.name == "load":
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters += [
                inspect.Parameter(name, kind, default=None, annotation=_MODEL_OPTIONS[name]) for name in names
            ]
        else:
            parameters.append(parameter)
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """The numbers in a comma-separated list; raises UsageError for other texts."""
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"invalid {option} {text!r}: must be one number or one per channel", f"For example: {option} 0.5,0.5,0.5."
        ) from error


class Pooling(str, Enum):
    """Values of `--pooling`."""

    FRAMES = "frames"
    ALL = "all"
