"""`repshift export`: write a model for other runtimes and verify it against PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repshift_cli.cli import options
from repshift_cli.errors import UsageError

if TYPE_CHECKING:
    from repshift_cli.export.job import Exported
    from repshift_cli.export.request import Request

__all__ = ["Target", "check_all", "command", "export_all", "show"]

_DYNAMIC = "dynamic"


class Target(str, Enum):
    """Values of `--to`."""

    ONNX = "onnx"
    PT2 = "pt2"
    AOTI = "aoti"
    HUB = "hub"


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A compressed checkpoint, or a dense one (exported dense without --recipe)."
        ),
    ],
    *,
    to: Annotated[
        Target,
        typer.Option(
            "--to", help="onnx; pt2 (torch.export program); aoti (compiled by AOTInductor); hub (folder for timm)."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Output file or folder.",
            show_default="<model>.onnx, .pt2, _aoti.pt2 or _hub",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", "-r", metavar="RECIPE", help="Compress a dense model by this recipe first, without calibration."
        ),
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Export the dense model of a compressed checkpoint.")] = False,
    batch: Annotated[
        str, typer.Option("--batch", metavar="N|dynamic", help="Batch size of the exported model.")
    ] = _DYNAMIC,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="float32, float16 or bfloat16 (default: float32; for hub that of the checkpoint).",
            show_default=False,
        ),
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option(
            "--opset", metavar="N", help="ONNX opset, 18 to 23 (default: 20). 23 has attention as one operator."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="cpu or cuda: the device to compile for (aoti).")
    ] = "cpu",
    tune: Annotated[
        bool, typer.Option("--tune", help="aoti: time several matrix kernels on this machine and use the fastest.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the exported model with the model in PyTorch.")
    ] = True,
    model_name: options.ModelName = None,
    heads: options.Heads = None,
    img_size: options.ImgSize = None,
    frames: options.Frames = None,
    checkpoint_frames: options.CheckpointFrames = None,
    threads: options.Threads = None,
    json: options.AsJson = False,
    force: options.Overwrite = False,
) -> None:
    """Export a model to ONNX, torch.export, AOTInductor or timm."""
    size = _parse_batch(batch)
    from repshift_cli.checkpoints.identify import Clips
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
    clips = Clips(frames, checkpoint_frames)
    with num_threads(threads):
        opened = open_for_export(model, recipe, model_name, heads, img_size, clips=clips, progress=screen)
        for note in opened.loaded.notes if recipe is None else ():
            screen.note(note)
        exported = export(opened, request, screen)
    if json:
        ui.print_json(exported.to_dict())
    else:
        show(exported)


def check_all(checkpoint: Path, targets: Sequence[Target], force: bool) -> None:
    """Check before the work that a checkpoint can be exported; errors as `export.job.check`."""
    from repshift_cli.export.job import check

    for request in _requests(checkpoint, targets, force):
        check(request)


def export_all(checkpoint: Path, targets: Sequence[Target], force: bool) -> list[Exported]:
    """Export a checkpoint into its own folder; errors as `export.job.export`."""
    from repshift_cli.cli import ui
    from repshift_cli.export.job import export, open_for_export

    screen = ui.Screen()
    return [
        export(open_for_export(str(checkpoint), None, progress=screen), request, screen)
        for request in _requests(checkpoint, targets, force)
    ]


def _requests(checkpoint: Path, targets: Sequence[Target], force: bool) -> list[Request]:
    from repshift_cli.export.request import Request, default_output

    return [
        Request(target.value, checkpoint.parent / default_output(checkpoint.name, target.value), force=force)
        for target in dict.fromkeys(targets)
    ]


def _parse_batch(text: str) -> int | None:
    """A batch size, or None for `dynamic`.

    Raises:
        UsageError: it is neither.
    """
    if text == _DYNAMIC:
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UsageError(f"invalid --batch {text!r}: must be {_DYNAMIC} or an integer >= 1")
    return int(text)


def show(exported: Exported) -> None:
    """Print what was written."""
    from repshift_cli.cli import ui

    document, verified = exported.document, exported.document.verified
    ui.print_text(f"model    {document.model['name']}, {'compressed' if document.plan else 'dense'}")
    ui.print_text(f"cost     {document.dense_macs / 1e9:.3f} -> {document.macs / 1e9:.3f} GMACs per input")
    for label, port in (("input", document.input), ("output", document.output)):
        shape = ", ".join("batch" if size is None else str(size) for size in port.shape)
        ui.print_text(f"{label:<8} {port.name}: {port.dtype} [{shape}]")
    if exported.operators is not None:
        most = sorted(exported.operators.items(), key=lambda item: -item[1])
        ui.print_text(f"graph    opset {document.opset}: {', '.join(f'{count} {name}' for name, count in most)}")
    if verified is None:
        ui.print_text("verified no (--no-verify)")
    else:
        parts = [f"largest difference {verified.max_difference:.2g} (allowed {verified.tolerance:g})"]
        if verified.kept_equal is not None:
            parts.append(f"kept tokens equal {verified.kept_equal:.2%}")
        if verified.top1 is not None:
            parts.append(f"same class {verified.top1:.1%}")
        batches = ", ".join(map(str, verified.batches))
        ui.print_text(f"verified {', '.join(parts)}; {verified.inputs} inputs in batches of {batches}")
    ui.print_text(f"wrote    {exported.output} ({exported.bytes / 1e6:.1f} MB)")
