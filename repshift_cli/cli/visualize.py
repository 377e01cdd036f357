"""`repshift visualize`: an image of the tokens that a compressed model keeps, and their indices."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.cli import guard, options, ui
from repshift_cli.errors import UsageError
from repshift_cli.utils.figures import check_figure_path

if TYPE_CHECKING:
    from repshift_cli.checkpoints.artifact import Opened
    from repshift_cli.visualize.view import Visualization

_SCENES, _CLIP_SCENES = "builtin:digits", "builtin:shapes"
_IMAGES, _CLIPS = 6, 3  # a clip takes the space of several images


@options.takes_model
def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint that `repshift compress` wrote.")],
    *,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="A folder of images or videos, or a dataset. Default for a built-in model: built-in scenes.",
            show_default=False,
        ),
    ] = None,
    class_order: options.ClassOrder = None,
    count: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=64,
            metavar="N",
            help="Number of images or clips.",
            show_default=f"{_IMAGES}, or {_CLIPS} clips",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Image file (.png, .svg or .pdf).")
    ] = Path("kept.png"),
    indices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the kept indices to this file, as JSON.")
    ] = None,
    load: LoadOptions,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    force: options.Overwrite = False,
    json: options.AsJson = False,
) -> None:
    """Draw which patches a compressed model keeps after each site."""
    from repshift_cli.utils.files import check_outputs

    check_figure_path("--output", output)
    check_outputs({"--output": output, "--indices": indices}, force)

    from repshift_cli.checkpoints.artifact import open_model
    from repshift_cli.measure.device import resolve_device
    from repshift_cli.visualize.view import visualize

    target = resolve_device(device)
    opened = open_model(model, load)
    if opened.compressed is None:
        raise UsageError(f"{model} is a dense model: it keeps all tokens", f"Run: repshift compress {model}")
    of_clips = opened.loaded.description.preprocessing.frames is not None
    samples = data or _default_data(opened, model, of_clips)
    opened.module.to(target)
    for note in opened.loaded.notes:
        ui.remark(note)
    shown = visualize(opened, samples, count or (_CLIPS if of_clips else _IMAGES), seed, class_order)
    shown.samples.info.report(ui.Screen())
    for reason in shown.samples.skipped:
        ui.warn(f"skipped: {reason}")
    if json:
        ui.result.keep(document(shown, model, output, indices))
    write(shown, output, indices, force)
    if not json:
        show(shown, output, indices)


def write(shown: Visualization, output: Path, indices: Path | None, force: bool) -> None:
    """Write the image and, if given, the indices; errors as `files.atomic_output`."""
    import json

    from repshift_cli.utils.files import write_text
    from repshift_cli.visualize.draw import save_figure

    guard.run_all(
        partial(save_figure, shown.figure(), output, force),
        *([] if indices is None else [partial(write_text, indices, json.dumps(shown.document()) + "\n", force)]),
    )


def show(shown: Visualization, output: Path, indices: Path | None) -> None:
    """Print the result as text."""
    samples = len(shown.results)
    counts = ((rows.shape[1], shown.patches[layer].patches, layer) for layer, rows in shown.kept.items())
    stages = ", ".join(f"{kept} of {total} after block {layer}" for kept, total, layer in counts)
    ui.print_text(f"merged  into {stages}" if shown.merged else f"kept    {stages}")
    if shown.of_clips:
        moved = [result.moved for result in shown.results]
        ui.print_text(
            f"moved   features by {sum(moved) / samples:.4f} on average, {max(moved):.4f} at most (1 - cosine)"
        )
    if shown.unchanged is not None:
        ui.print_text(f"classes {shown.unchanged} of {samples} predictions agree with the dense model")
    ui.print_text(f"wrote   {output} ({shown.samples.description})")
    if indices is not None:
        ui.print_text(f"wrote   {indices} (indices of the {'merged' if shown.merged else 'kept'} patches)")


def document(shown: Visualization, model: str, output: Path, indices: Path | None) -> dict[str, Any]:
    """The JSON document of the command, without the kept positions."""
    found = shown.document()
    key = "clips" if shown.of_clips else "images"
    samples = [{name: entry[name] for name in entry if name not in ("kept", "per_frame")} for entry in found.pop(key)]
    return {
        "model": model,
        "output": str(output),
        "indices": None if indices is None else str(indices),
        "data": shown.samples.description,
        "skipped": list(shown.samples.skipped),
        **found,
        **({} if shown.of_clips else {"unchanged": shown.unchanged}),
        key: samples,
    }


def _default_data(opened: Opened, model: str, of_clips: bool) -> str:
    """The scenes that a built-in model was trained on; raises UsageError for other models."""
    scenes, what = (_CLIP_SCENES, "videos") if of_clips else (_SCENES, "images")
    if opened.loaded.is_builtin:
        return scenes
    raise UsageError(
        f"no {what} were given for {model}", f"Add --data FOLDER (or --data {scenes} for built-in scenes)."
    )
