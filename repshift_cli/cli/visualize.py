"""`repshift visualize`: draw the patches that a compressed model keeps, and write their indices."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repshift_cli.cli import options
from repshift_cli.errors import UsageError
from repshift_cli.utils.figures import check_figure_path

if TYPE_CHECKING:
    from repshift_cli.checkpoints.artifact import Opened
    from repshift_cli.visualize.view import View

__all__ = ["command", "document", "show", "write"]

_IMAGES, _CLIPS = 6, 3
"""Default number of samples; a clip takes several times the space of an image."""


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint from `repshift compress`.")],
    *,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="A folder of images or videos, or a dataset. Default: built-in scenes, for a built-in model.",
            show_default=False,
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            "--count",
            min=1,
            max=64,
            help="Number of images or clips.",
            show_default=f"{_IMAGES} images, {_CLIPS} clips",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Output figure (.png, .svg or .pdf).")
    ] = Path("kept.png"),
    indices: Annotated[
        Path | None, typer.Option("--indices", metavar="FILE", help="Write the indices of the kept patches as JSON.")
    ] = None,
    heads: options.Heads = None,
    img_size: options.ImgSize = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    force: options.Overwrite = False,
    json: options.AsJson = False,
) -> None:
    """Draw which patches a compressed model keeps at each site."""
    from repshift_cli.utils.files import check_outputs

    check_figure_path("--output", output)
    check_outputs({"--output": output, "--indices": indices}, force)

    from repshift_cli.checkpoints.artifact import open_model
    from repshift_cli.cli import ui
    from repshift_cli.measure.device import resolve_device
    from repshift_cli.visualize.view import view_kept

    where = resolve_device(device)
    opened = open_model(model, heads=heads, img_size=img_size)
    if opened.compressed is None:
        raise UsageError(f"{model} is a dense model: it keeps all tokens", f"Run: repshift compress {model}")
    of_clips = opened.loaded.description.preprocessing.frames is not None
    samples = data or _default_data(opened, model, of_clips)
    opened.module.to(where)
    for note in opened.loaded.notes:
        ui.remark(note)
    view = view_kept(opened, samples, count or (_CLIPS if of_clips else _IMAGES), seed)
    for reason in view.samples.skipped:
        ui.warn(f"skipped: {reason}")
    write(view, output, indices, force)
    if json:
        ui.print_json(document(view, model, output, indices))
    else:
        show(view, output, indices)


def write(view: View, output: Path, indices: Path | None, force: bool) -> None:
    """Write the figure and the indices; errors as `files.atomic_output`."""
    from repshift_cli.utils.files import write_text
    from repshift_cli.visualize.draw import save_figure

    save_figure(view.figure(), output, force)
    if indices is not None:
        write_text(indices, json_module.dumps(view.indices()) + "\n", force)


def show(view: View, output: Path, indices: Path | None) -> None:
    """Print what was drawn, in 80 columns."""
    from repshift_cli.cli import ui

    shown = len(view.readings)
    kind = "merged" if view.merged else "kept"
    sites = ((rows.shape[1], view.patches[layer].patches, layer) for layer, rows in view.kept.items())
    counts = ", ".join(f"{kept} of {total} after block {layer}" for kept, total, layer in sites)
    ui.print_text(f"merged  into {counts}" if view.merged else f"kept    {counts}")
    if view.of_clips:
        moved = [reading.moved for reading in view.readings]
        ui.print_text(f"change  of features: mean {sum(moved) / shown:.4f}, largest {max(moved):.4f} (1 - cosine)")
    if view.unchanged is not None:
        ui.print_text(f"quality {view.unchanged} of {shown} predictions are the same as those of the dense model")
    ui.print_text(f"wrote   {output} ({view.samples.description})")
    if indices is not None:
        ui.print_text(f"wrote   {indices} (indices of the {kind} patches)")


def document(view: View, model: str, output: Path, indices: Path | None) -> dict[str, Any]:
    """The JSON document of the command, without the lists of indices."""
    known = view.indices()
    return {
        "model": model,
        "output": str(output),
        "indices": None if indices is None else str(indices),
        "data": view.samples.description,
        "skipped": list(view.samples.skipped),
        **{key: known[key] for key in ("grid", "patch", "layers", "tokens") if key in known},
        **({} if view.of_clips else {"unchanged": view.unchanged}),
        **view.samples_to_dict(),
    }


def _default_data(opened: Opened, model: str, of_clips: bool) -> str:
    """The built-in scenes of a built-in model.

    Raises:
        UsageError: it is not a built-in model.
    """
    from repshift_cli.checkpoints.load import BUILTIN

    scenes, what = ("builtin:shapes", "videos") if of_clips else ("builtin:digits", "images")
    if f"builtin:{opened.loaded.description.name}" in BUILTIN:
        return scenes
    raise UsageError(f"no {what} given for {model}", f"Add --data FOLDER, or --data {scenes} for built-in scenes.")
