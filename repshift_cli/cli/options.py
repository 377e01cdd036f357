"""Options that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from repshift_cli.checkpoints.options import ImageSize, LoadOptions, WeightsKind, parse_model_args
from repshift_cli.errors import UsageError
from repshift_cli.utils.ranges import RANGES


def number(name: str, *flags: str, help: str, metavar: str = "N", show_default: bool | str = True) -> Any:
    """An option whose range is `RANGES[name]`."""
    low, high = RANGES[name]
    return typer.Option(*flags, min=low, max=high, metavar=metavar, help=help, show_default=show_default)


class QuantizeKind(str, Enum):
    """Values of `--quantize`."""

    INT8 = "int8"
    INT8_DYNAMIC = "int8-dynamic"


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

ClassOrder = Annotated[
    str | None,
    typer.Option("--class-order", metavar="ORDER", help="Labels of class folders: natural (as timm), text, or a FILE."),
]

Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...")]

Dtype = Annotated[str, typer.Option("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16.")]

BatchSize = Annotated[
    int | None,
    number("batch_size", "--batch-size", "-b", help="Batch size (default: 8; 1 for large video models)."),
]

Threads = Annotated[int | None, number("threads", "--threads", help="CPU threads (default: all cores).")]

_TARGETS = (
    "Search for the layers and ratios that meet macs=0.65, latency=0.6 (fractions of dense), speedup=1.5, "
    "agreement=0.99 (lowest share of unchanged predictions) or max-drop=0.5 (points of top-1); for encoders without a "
    "head recall@10=0.99 (share of the 10 nearest neighbours) or cosine=0.98. "
)
_BUDGET = "Default: the budget of --recipe."

Target = Annotated[
    str | None,
    typer.Option("--target", "-t", metavar="KIND=VALUE", help=_TARGETS + _BUDGET, show_default=False),
]

Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        "-t",
        metavar="KIND=VALUE",
        help=f"{_TARGETS}With one of cost and one of quality, the quality is checked at that cost. {_BUDGET}",
        show_default=False,
    ),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]

Force = Annotated[bool, typer.Option("--force", help="Overwrite existing outputs, and continue when a check fails.")]

Overwrite = Annotated[bool, typer.Option("--force", help="Overwrite existing outputs.")]

Heads = Annotated[int | None, number("heads", "--heads", help="Attention heads, if no timm model has this shape.")]

ImgSize = Annotated[
    ImageSize | None,
    typer.Option(
        "--img-size",
        parser=ImageSize.parse,
        metavar="N|HxW",
        help="Image size, N x N or height x width: any for a CNN, else what the weights allow.",
    ),
]


def _weights_kind(text: str) -> WeightsKind:
    kind = next((kind for kind in get_args(WeightsKind) if kind == text), None)
    if kind is None:
        raise UsageError(f"invalid --weights {text}: must be raw or ema")
    return cast("WeightsKind", kind)


Weights = Annotated[
    WeightsKind | None,
    typer.Option(
        "--weights",
        parser=_weights_kind,
        metavar="raw|ema",
        help="Which weights of a training checkpoint that holds both: as trained, or averaged (the default).",
    ),
]

MeasureDtype = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="DTYPE", help="float32, bfloat16 or float16 while running; the file keeps its own."
    ),
]

Quantize = Annotated[
    QuantizeKind | None,
    typer.Option(
        "--quantize",
        metavar="KIND",
        help="onnx, openvino: int8 (calibrated on images, faster); onnx: int8-dynamic (needs no images).",
        show_default=False,
    ),
]

Seed = Annotated[int, number("seed", "--seed", help="Random seed for sampling images.")]

Frames = Annotated[
    int | None,
    number("frames", "--frames", help="Frames per clip, if the file of a video model does not contain it."),
]

CheckpointFrames = Annotated[
    int | None,
    number(
        "checkpoint_frames", "--checkpoint-frames", help="Frames per clip in training, to resize position embeddings."
    ),
]

FrameStep = Annotated[
    int | None,
    number(
        "frame_step",
        "--frame-step",
        help="Frames of a video from one frame of a clip to the next, around its middle (default: spread over it).",
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

ModelArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--model-args",
        metavar="KEY=VALUE",
        help="Argument of the model's builder that the file does not contain, such as global_pool=avg; repeatable.",
    ),
]

Tower = Annotated[
    str | None,
    typer.Option(
        "--tower",
        metavar="NAME",
        help="Part of a larger model of transformers, such as vision: only this part is loaded.",
    ),
]

_MODEL_OPTIONS = {
    "model_name": ModelName,
    "heads": Heads,
    "img_size": ImgSize,
    "frames": Frames,
    "checkpoint_frames": CheckpointFrames,
    "frame_step": FrameStep,
    "weights": Weights,
    "mean": Mean,
    "std": Std,
    "crop_pct": CropPct,
    "interpolation": Interpolation,
    "model_args": ModelArgs,
    "tower": Tower,
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
        values = {name: given.pop(name) for name in names}
        for name in ("mean", "std"):
            values[name] = _numbers(f"--{name}", values[name])
        values["model_args"] = parse_model_args(values["model_args"] or ())
        command(load=LoadOptions(**values), **given)

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


def split_values(values: Sequence[str]) -> list[str]:
    """The values in comma-separated lists, without repetitions."""
    return list(dict.fromkeys(part.strip() for value in values for part in value.split(",")))


def label_models(names: Sequence[str]) -> dict[str, str]:
    """Models by label: the stem of the file, or the whole name if two stems are the same.

    Raises:
        UsageError: a model is given twice.
    """
    from repshift_cli.utils.files import weight_stem

    stems = [weight_stem(name) for name in names]
    labels = {name if stems.count(stem) > 1 else stem: name for name, stem in zip(names, stems, strict=True)}
    if len(labels) < len(names):
        raise UsageError(f"a model is given twice: {', '.join(names)}")
    return labels


class Pooling(str, Enum):
    """Values of `--pooling`."""

    FRAMES = "frames"
    ALL = "all"
