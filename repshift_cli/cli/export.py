"""`repshift export`: a model as a file that runs without repshift, verified against torch."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.cli import guard, options, ui
from repshift_cli.errors import UsageError
from repshift_cli.export.formats import FORMATS

if TYPE_CHECKING:
    from repshift_cli.export.job import Exported

Target = Enum("Target", {name: name for name in FORMATS}, type=str)  # type: ignore[misc]
"""Values of an option that names a format."""

_DYNAMIC = "dynamic"


@options.takes_model
def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A compressed checkpoint, or a dense model.")],
    *,
    to: Annotated[
        Target, typer.Option(help="; ".join(f"{name}: {known.description}" for name, known in FORMATS.items()))
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File or folder.",
            show_default=f"<model> and {', '.join(known.suffix for known in FORMATS.values())}",
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Compress a dense model first, without calibration.")
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Export the dense model of a compressed one.")] = False,
    batch: Annotated[str, typer.Option(metavar="N|dynamic", help="Batch size: any, or N.")] = _DYNAMIC,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32 (default), float16 or bfloat16; for hub the default is that of the file.", show_default=False
        ),
    ] = None,
    opset: Annotated[
        int | None, typer.Option(help="ONNX opset, 18 to 23 (default: 20); 23 has attention as one operator.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; a package is compiled for it.")] = "cpu",
    tune: Annotated[
        bool,
        typer.Option("--tune", help="aoti: time several kernels for each product on this machine and use the fastest."),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the export with the model in torch.")
    ] = True,
    load: LoadOptions,
    threads: options.Threads = None,
    json: options.AsJson = False,
    force: options.Overwrite = False,
) -> None:
    """Export a model to ONNX, torch.export, a compiled package or a hub folder, to run without repshift."""
    size = _parse_batch(batch)
    from repshift_cli.export.job import check, export, open_for_export
    from repshift_cli.export.request import Request
    from repshift_cli.measure.device import num_threads, resolve_device, resolve_dtype

    request = Request(
        target=to.value,
        output=output or FORMATS[to.value].default_output(model),
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
    with num_threads(threads):
        opened = open_for_export(model, recipe, load, progress=screen)
        for note in opened.loaded.notes if recipe is None else ():
            screen.note(note)
        with guard.failure_as_json(json):
            exported = export(opened, request, screen)
    if json:
        ui.print_json(exported.to_dict())
    else:
        show(exported)


def check_all(checkpoint: Path, targets: Sequence[Target], force: bool) -> None:
    """Check the exports of a checkpoint before it is written; errors as `job.check`."""
    from repshift_cli.export.job import check

    for request in _requests(checkpoint, targets, force):
        check(request)


def export_all(checkpoint: Path, targets: Sequence[Target], force: bool) -> list[Exported]:
    """Export a checkpoint into its own folder; errors as `job.export`."""
    from repshift_cli.export.job import export, open_for_export

    screen = ui.Screen()
    return [
        export(open_for_export(str(checkpoint), None, progress=screen), request, screen)
        for request in _requests(checkpoint, targets, force)
    ]


def _requests(checkpoint: Path, targets: Sequence[Target], force: bool) -> list[Any]:
    from repshift_cli.export.request import Request

    return [
        Request(target.value, checkpoint.parent / FORMATS[target.value].default_output(checkpoint.name), force=force)
        for target in dict.fromkeys(targets)
    ]


def _parse_batch(text: str) -> int | None:
    """A batch size, None for any; raises UsageError for other values."""
    if text == _DYNAMIC:
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UsageError(
            f"invalid --batch {text}: must be dynamic or a number of at least 1", "For example: --batch 8."
        )
    return int(text)


def show(exported: Exported) -> None:
    """Print the result as text."""
    document = exported.document
    ui.print_text(f"model    {document.model.name}, {'with fewer tokens' if document.plan else 'dense'}")
    ui.print_text(f"cost     {document.dense_macs / 1e9:.3f} -> {document.macs / 1e9:.3f} GMACs per input")
    for label, port in (("input", document.input), ("output", document.output)):
        shape = ", ".join("batch" if size is None else str(size) for size in port.shape)
        ui.print_text(f"{label:<8} {port.name}: {port.dtype} [{shape}]")
    if exported.operators is not None:
        most = sorted(exported.operators.items(), key=lambda item: -item[1])
        ui.print_text(f"graph    opset {document.opset}: {', '.join(f'{count} {name}' for name, count in most)}")
    if document.verified is None:
        ui.print_text("verified no: --no-verify was given")
    else:
        verdict = document.verified
        parts = [f"largest difference {verdict.max_difference:.2g} (allowed {verdict.tolerance:g})"]
        if verdict.kept_equal is not None:
            parts.append(f"kept positions equal {verdict.kept_equal:.2%}")
        if verdict.top1 is not None:
            parts.append(f"same class {verdict.top1:.1%}")
        batches = ", ".join(map(str, verdict.batches))
        ui.print_text(f"verified {', '.join(parts)}; {verdict.inputs} inputs in batches of {batches}")
    ui.print_text(f"wrote    {exported.output} ({exported.bytes / 1e6:.1f} MB)")
