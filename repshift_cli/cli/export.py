"""`repshift export`: a model as a file that runs without repshift, verified against torch."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.cli import options, ui
from repshift_cli.errors import UsageError
from repshift_cli.export.formats import FORMATS

if TYPE_CHECKING:
    from repshift_cli.export.job import Exported
    from repshift_cli.export.request import Request

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
            metavar="PATH",
            help="File or folder.",
            show_default=f"<model> and {', '.join(known.suffix for known in FORMATS.values())}",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", metavar="RECIPE", help="Compress a dense model first, without calibration."),
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Export the dense model of a compressed one.")] = False,
    batch: Annotated[str, typer.Option(metavar="N|dynamic", help="Batch size: any, or N.")] = _DYNAMIC,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="float32 (default), float16 or bfloat16; for hub the default is that of the file.",
            show_default=False,
        ),
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option(metavar="N", help="ONNX opset, 18 to 23 (default: 20); 23 has attention as one operator."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu or cuda; a package is compiled for it.")] = "cpu",
    tune: Annotated[
        bool,
        typer.Option("--tune", help="aoti: time several kernels for each product on this machine and use the fastest."),
    ] = False,
    quantize: options.Quantize = None,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Unlabelled images or videos to quantise with: a folder or a dataset."),
    ] = None,
    calibration_images: Annotated[
        int | None,
        options.number(
            "calibration_images", help="Number of calibration images (default: 128; 32 clips for large video models)."
        ),
    ] = None,
    agreement: Annotated[
        float | None,
        options.number(
            "agreement",
            metavar="X",
            help="Least share of unchanged predictions of a quantised model (default: 0.99).",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the export with the model in torch.")
    ] = True,
    load: LoadOptions,
    threads: options.Threads = None,
    json: options.AsJson = False,
    force: options.Overwrite = False,
) -> None:
    """Write a model as ONNX, OpenVINO, a program or a hub folder.

    These run without repshift.
    """
    size = _parse_batch(batch)
    from repshift_cli.export.job import check, export, open_for_export
    from repshift_cli.export.request import Request
    from repshift_cli.measure.device import num_threads, resolve_device, resolve_dtype

    request = Request(
        target=to.value,
        output=output or _default_output(to, model, quantize),
        dense=dense,
        batch=size,
        dtype=None if dtype is None else resolve_dtype(dtype),
        device=resolve_device(device),
        opset=opset,
        tune=tune,
        verify=verify,
        **_quantization(quantize, calibration, calibration_images, agreement),
        force=force,
    )
    check(request)
    screen = ui.Screen()
    with num_threads(threads):
        opened = open_for_export(model, recipe, load, progress=screen)
        for note in opened.loaded.notes if recipe is None else ():
            screen.note(note)
        exported = export(opened, request, screen)
    if json:
        ui.result.keep(exported.to_dict())
    else:
        show(exported)


def _default_output(target: Target, model: str, quantize: options.QuantizeKind | None) -> Path:
    output = FORMATS[target.value].default_output(model)
    return output.with_stem(f"{output.stem}_int8") if quantize else output


def _quantization(
    quantize: options.QuantizeKind | None, calibration: str | None, images: int | None, agreement: float | None
) -> dict[str, Any]:
    """The fields of a request; raises UsageError for options of a quantised model without `--quantize`."""
    given = {"calibration": calibration, "calibration_images": images, "agreement": agreement}
    given = {name: value for name, value in given.items() if value is not None}
    if given and quantize is None:
        raise UsageError(f"--{next(iter(given)).replace('_', '-')} is for a quantised model", "Add --quantize int8.")
    return {"quantize": quantize and quantize.value, **given}


def requests_for(
    checkpoint: Path,
    targets: Sequence[Target],
    force: bool,
    *,
    quantize: options.QuantizeKind | None,
    calibration: str | None,
    images: int | None,
) -> list[Request]:
    """Exports of a checkpoint into its own folder, checked before it is written; errors as `job.check`.

    What cannot be quantised stays in floating point.
    """
    from repshift_cli.export.job import check
    from repshift_cli.export.request import Request

    found = []
    for target in dict.fromkeys(targets):
        kind = quantize if "quantize" in FORMATS[target.value].options else None
        fields = _quantization(kind, calibration, images, None) if kind else {}
        output = checkpoint.parent / _default_output(target, checkpoint.name, kind)
        found.append(Request(target.value, output, force=force, **fields))
    if quantize and not any(request.quantize for request in found):
        raise UsageError("--quantize is for an export to onnx or openvino", "Add --export onnx.")
    for request in found:
        check(request)
    return found


def export_all(checkpoint: Path, requests: Sequence[Request]) -> list[Exported]:
    """Export a checkpoint; errors as `job.export`."""
    from repshift_cli.export.job import export, open_for_export

    screen = ui.Screen()
    return [export(open_for_export(str(checkpoint), None, progress=screen), request, screen) for request in requests]


def _parse_batch(text: str) -> int | None:
    """A batch size, None for any; raises UsageError for other values."""
    if text == _DYNAMIC:
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UsageError(
            f"invalid --batch {text}: must be dynamic or a number of at least 1", "For example: --batch 8."
        )
    return int(text)


def show(exported: Exported, verb: str = "wrote") -> None:
    """Print the result as text; `verb` is the label of the file."""
    document = exported.document
    ui.print_text(f"model    {document.model.name}, {'with fewer tokens' if document.plan else 'dense'}")
    ui.print_text(f"cost     {document.dense_macs / 1e9:.3f} -> {document.macs / 1e9:.3f} GMACs per input")
    for label, port in (("input", document.input), ("output", document.output)):
        shape = ", ".join("batch" if size is None else str(size) for size in port.shape)
        ui.print_text(f"{label:<8} {port.name}: {port.dtype} [{shape}]")
    if exported.operators is not None:
        most = sorted(exported.operators.items(), key=lambda item: -item[1])
        ui.print_text(f"graph    opset {document.opset}: {', '.join(f'{count} {name}' for name, count in most)}")
    if document.quantized is not None:
        made = document.quantized
        ranges = "" if made.percentile is None else f", ranges of activations at percentile {made.percentile:g}"
        ui.print_text(f"layers   {made.layers} in int8, {len(made.float_layers)} in float32{ranges}")
    if document.verified is None:
        ui.print_text("verified no: it was written with --no-verify")
    else:
        verdict = document.verified
        parts = [f"largest difference {verdict.max_difference:.2g} (allowed {verdict.tolerance:g})"]
        if verdict.kept_equal is not None:
            parts.append(f"kept positions equal {verdict.kept_equal:.2%}")
        if verdict.top1 is not None:
            parts.append(f"same class {verdict.top1:.1%}")
        elif verdict.agreement is not None:
            parts.append(f"mean cosine {verdict.agreement:.4f}")
        batches = ", ".join(map(str, verdict.batches))
        ui.print_text(f"verified {', '.join(parts)}; {verdict.inputs} inputs in batches of {batches}")
    ui.print_text(f"{verb:<8} {exported.output} ({exported.bytes / 1e6:.1f} MB)")
