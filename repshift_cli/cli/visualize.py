"""`repshift visualize`: a picture of the tokens that a compressed model keeps, and their indices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.cli import options
from repshift_cli.cli.bench import check_picture_format
from repshift_cli.errors import UsageError

if TYPE_CHECKING:
    from repshift_cli.checkpoints.artifact import Opened
    from repshift_cli.visualize.view import View

__all__ = ["command", "document", "show"]

_SCENES, _CLIP_SCENES = "builtin:digits", "builtin:shapes"
_PICTURES, _CLIPS = 6, 3  # a clip takes several times the room of a picture


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint that `repshift compress` wrote.")],
    *,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="A folder with pictures (or videos), or a dataset. Default: built-in scenes, for a built-in model.",
            show_default=False,
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            "--count", min=1, max=64, help="How many pictures or clips.", show_default=f"{_PICTURES}, or {_CLIPS} clips"
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The picture (.png, .svg or .pdf).")
    ] = Path("kept.png"),
    indices: Annotated[
        Path | None, typer.Option("--indices", metavar="FILE", help="Write the kept indices to this file, as JSON.")
    ] = None,
    heads: options.Heads = None,
    img_size: options.ImgSize = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    force: options.Force = False,
    json: options.AsJson = False,
) -> None:
    """Show which patches of some pictures or clips a compressed model keeps, site by site."""
    _check_outputs(output, indices, force)

    from repshift_cli.checkpoints.artifact import open_model
    from repshift_cli.cli import ui
    from repshift_cli.measure.device import resolve_device
    from repshift_cli.visualize.view import view_kept

    where = resolve_device(device)
    opened = open_model(model, LoadOptions(heads=heads, img_size=img_size))
    if opened.compressed is None:
        raise UsageError(
            f"{model} is dense: it keeps all tokens, so there is nothing to show",
            f"Compress it first: repshift compress {model}",
        )
    of_clips = opened.loaded.description.preprocessing.frames is not None
    samples = data or _default_data(opened, model, of_clips)
    opened.module.to(where)
    for note in opened.loaded.notes:
        ui.remark(note)
    view = view_kept(opened, samples, count or (_CLIPS if of_clips else _PICTURES), seed)
    for reason in view.samples.skipped:
        ui.warn(f"left out: {reason}")
    write(view, output, indices, force)
    if json:
        ui.print_json(document(view, model, output, indices))
    else:
        show(view, output, indices)


def write(view: View, output: Path, indices: Path | None, force: bool) -> None:
    """Write the picture and, where asked for, the indices; errors as `files.atomic_output`."""
    import json

    from repshift_cli.utils.files import write_text
    from repshift_cli.visualize.draw import save_figure

    save_figure(view.figure(), output, force)
    if indices is not None:
        write_text(indices, json.dumps(view.indices()) + "\n", force)


def show(view: View, output: Path, indices: Path | None) -> None:
    """Print for people what was written, in 80 columns."""
    from repshift_cli.cli import ui

    shown = len(view.readings)
    counts = ((rows.shape[1], view.patches[layer].patches, layer) for layer, rows in view.kept.items())
    stages = ", ".join(f"{kept} of {total} after block {layer}" for kept, total, layer in counts)
    ui.print_text(f"merged  into {stages}" if view.merged else f"kept    {stages}")
    if view.of_clips:
        moved = [reading.moved for reading in view.readings]
        mean = sum(moved) / shown
        ui.print_text(f"moved   features by {mean:.4f} on average, {max(moved):.4f} at most (1 - cosine)")
    if view.unchanged is not None:
        ui.print_text(f"classes {view.unchanged} of {shown} predictions are the same as the dense model's")
    ui.print_text(f"wrote   {output} ({view.samples.description})")
    if indices is not None:
        ui.print_text(f"wrote   {indices} (indices of the {'merged' if view.merged else 'kept'} patches)")


def document(view: View, model: str, output: Path, indices: Path | None) -> dict[str, Any]:
    """The JSON document of the command: what was seen, without the lists of indices."""
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


def _check_outputs(output: Path, indices: Path | None, force: bool) -> None:
    """Refuse what could not be written, before any work is done for it.

    Raises:
        UsageError, OutputError: as `files.check_output`; or the ending of the picture is none that can be drawn, or
            both go to the same file.
    """
    from repshift_cli.utils.files import check_outputs

    check_picture_format("--output", output)
    check_outputs({"--output": output, "--indices": indices}, force)


def _default_data(opened: Opened, model: str, of_clips: bool) -> str:
    """The scenes that a built-in model was made for.

    Raises:
        UsageError: it is another model.
    """
    scenes, what = (_CLIP_SCENES, "videos") if of_clips else (_SCENES, "pictures")
    if opened.loaded.is_builtin:
        return scenes
    raise UsageError(
        f"no {what} were named for {model}", f"Add --data FOLDER (or --data {scenes} for built-in scenes)."
    )
