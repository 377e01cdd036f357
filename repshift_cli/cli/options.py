"""Options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AsJson",
    "Attention",
    "AttentionKind",
    "BatchSize",
    "CheckpointFrames",
    "DataDir",
    "Device",
    "Dtype",
    "Force",
    "Frames",
    "Heads",
    "ImgSize",
    "InputsAtATime",
    "MeasureDtype",
    "ModelName",
    "Pooling",
    "Seed",
    "Threads",
]


class AttentionKind(str, Enum):
    """What `--attention` takes; see `models/attention_mode.py`."""

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
        help="What computes attention, on all sides: flash (the package flash-attn), sdpa (torch's fused kernels; one "
        "of them by name: sdpa:flash, sdpa:efficient, sdpa:cudnn, sdpa:math), explicit, or auto: flash-attn where it "
        "can run, else as the model has it.",
    ),
]


ModelName = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help="The name (timm's, vim_..., umt_...), where the file does not tell."),
]


DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Where the dataset lies (or REPSHIFT_DATA_DIR).")]


Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]


Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]


BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images at a time.")]


InputsAtATime = Annotated[
    int | None,
    typer.Option("--batch-size", "-b", min=1, help="Inputs at a time (default: 8; 1 for a large video model)."),
]


Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads (default: as many as cores).")]


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")]


Force = Annotated[bool, typer.Option("--force", help="Replace an existing output, and go on where a check says no.")]


Heads = Annotated[
    int | None, typer.Option("--heads", min=1, help="Attention heads, for a shape that no timm model has.")
]


ImgSize = Annotated[
    int | None,
    typer.Option("--img-size", min=1, metavar="N", help="Images of N x N: any for a CNN, else as the weights allow."),
]


MeasureDtype = Annotated[
    str, typer.Option("--dtype", help="float32, bfloat16 or float16, to run in; the file keeps its own.")
]


Seed = Annotated[int, typer.Option("--seed", min=0, help="Which pictures are drawn.")]


Frames = Annotated[
    int | None,
    typer.Option("--frames", min=1, metavar="N", help="Frames of a clip, where the file of a video model tells none."),
]


CheckpointFrames = Annotated[
    int | None,
    typer.Option(
        "--checkpoint-frames", min=1, metavar="N", help="Frames that it was trained on, to stretch its positions from."
    ),
]


class Pooling(str, Enum):
    """What `--pooling` takes."""

    FRAMES = "frames"
    ALL = "all"
