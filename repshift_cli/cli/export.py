"""`repshift export`: a model as a file that runs where models are served, checked against torch."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.cli import options
from repshift_cli.errors import UsageError

if TYPE_CHECKING:
    from repshift_cli.export.job import Exported

__all__ = ["Target", "check_all", "command", "export_all", "show"]

_DYNAMIC = "dynamic"


class Target(str, Enum):
    """What `--to` takes."""

    ONNX = "onnx"
    PT2 = "pt2"
    AOTI = "aoti"
    HUB = "hub"


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A compressed checkpoint; or a dense one, as it is or with --recipe.")
    ],
    *,
    to: Annotated[
        Target,
        typer.Option(
            "--to",
            help="onnx; pt2: a program of torch.export; aoti: compiled by AOTInductor; hub: a folder for timm and the "
            "hub.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File or folder.", show_default="<model>.onnx, .pt2, _aoti.pt2 or _hub"),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Compress a dense model by this recipe first, uncalibrated.")
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Export the dense model of a compressed one.")] = False,
    batch: Annotated[
        str, typer.Option("--batch", metavar="N|dynamic", help="Inputs at a time: any number, or N.")
    ] = _DYNAMIC,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="float32 (default), float16 or bfloat16; for hub that of the file.", show_default=False
        ),
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option("--opset", help="Of ONNX, 18 to 23 (default: 20); 23 has attention as one operator."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda; what a package is compiled for.")] = "cpu",
    tune: Annotated[
        bool,
        typer.Option("--tune", help="aoti: time several kernels for each product on this machine, take the fastest."),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare what was written with the model in torch.")
    ] = True,
    model_name: options.ModelName = None,
    heads: options.Heads = None,
    img_size: options.ImgSize = None,
    frames: options.Frames = None,
    checkpoint_frames: options.CheckpointFrames = None,
    threads: options.Threads = None,
    json: options.AsJson = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
) -> None:
    """Write a model as ONNX, torch.export program, compiled package or hub folder that runs without repshift."""
    size = _parse_batch(batch)
    from repshift_cli.cli import ui
    from repshift_cli.export.job import check, export, open_for_export
    from repshift_cli.export.request import Request, default_output
    from repshift_cli.measure.device import num_threads, resolve_device, resolve_dtype

    request = Request(
        target=to.value,
        output=output or default_output(model, to.value),
        dense=dense,
        batch=size,
        dtype=None if dtype is None else resolve_dtype(dtype),
        device=resolve_device(device),
        opset=opset,
        tune=tune,
        verify=verify,
        force=force,
    )
    check(request)
    screen = ui.Screen()
    load = LoadOptions(model_name, heads, img_size, frames, checkpoint_frames)
    with num_threads(threads):
        opened = open_for_export(model, recipe, load, progress=screen)
        for note in opened.loaded.notes if recipe is None else ():
            screen.note(note)
        exported = export(opened, request, screen)
    if json:
        ui.print_json(exported.to_dict())
    else:
        show(exported)


def check_all(checkpoint: Path, targets: Sequence[Target], force: bool) -> None:
    """Refuse exports of a checkpoint that could not be written; errors as `exporting.check`."""
    from repshift_cli.export.job import check

    for request in _requests(checkpoint, targets, force):
        check(request)


def export_all(checkpoint: Path, targets: Sequence[Target], force: bool) -> list[Exported]:
    """Export a checkpoint that was just written, beside itself; errors as `exporting.export`."""
    from repshift_cli.cli import ui
    from repshift_cli.export.job import export, open_for_export

    screen = ui.Screen()
    return [
        export(open_for_export(str(checkpoint), None, progress=screen), request, screen)
        for request in _requests(checkpoint, targets, force)
    ]


def _requests(checkpoint: Path, targets: Sequence[Target], force: bool) -> list[Any]:
    from repshift_cli.export.request import Request, default_output

    return [
        Request(target.value, checkpoint.parent / default_output(checkpoint.name, target.value), force=force)
        for target in dict.fromkeys(targets)
    ]


def _parse_batch(text: str) -> int | None:
    """A number of inputs, None for any.

    Raises:
        UsageError: it is neither.
    """
    if text == _DYNAMIC:
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UsageError(f"--batch: {text!r} is neither dynamic nor a number from 1 on", "For example: --batch 8.")
    return int(text)


def show(exported: Exported) -> None:
    """Print what was written, for people."""
    from repshift_cli.cli import ui

    document = exported.document
    ui.print_text(f"model    {document.model['name']}, {'with fewer tokens' if document.plan else 'dense'}")
    ui.print_text(f"cost     {document.dense_macs / 1e9:.3f} -> {document.macs / 1e9:.3f} GMACs per input")
    for label, port in (("input", document.input), ("output", document.output)):
        shape = ", ".join("batch" if size is None else str(size) for size in port.shape)
        ui.print_text(f"{label:<8} {port.name}: {port.dtype} [{shape}]")
    if exported.operators is not None:
        most = sorted(exported.operators.items(), key=lambda item: -item[1])
        ui.print_text(f"graph    opset {document.opset}: {', '.join(f'{count} {name}' for name, count in most)}")
    if document.verified is None:
        ui.print_text("checked  no: --no-verify was given")
    else:
        verdict = document.verified
        told = [f"largest difference {verdict.max_difference:.2g} (allowed {verdict.tolerance:g})"]
        if verdict.kept_equal is not None:
            told.append(f"kept places equal {verdict.kept_equal:.2%}")
        if verdict.top1 is not None:
            told.append(f"same class {verdict.top1:.1%}")
        ui.print_text(f"checked  {', '.join(told)}; {verdict.inputs} inputs in batches of {_listed(verdict.batches)}")
    ui.print_text(f"wrote    {exported.output} ({exported.bytes / 1e6:.1f} MB)")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
