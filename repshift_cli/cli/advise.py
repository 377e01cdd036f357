"""`repshift advise`: which way to run a model is fastest on this machine, at equal answers."""

from __future__ import annotations

from typing import Annotated

import typer

from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.cli import options, ui
from repshift_cli.cli.show.advise import show


@options.takes_model
def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A compressed checkpoint, or a dense one (see --recipe).")
    ],
    *,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", "-r", metavar="RECIPE", help="Compress a dense model by this recipe (default: three sites)."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Images to compare outputs on: a folder or a dataset."),
    ] = None,
    images: Annotated[int, options.number("images", help="Images of --data to compare.")] = 64,
    calibration: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Images for static int8; without them int8 is dynamic.")
    ] = None,
    smaller_model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Also time this model: a checkpoint or a timm name; may be repeated."),
    ] = None,
    agreement: Annotated[
        float, options.number("agreement", metavar="X", help="Least share of unchanged predictions of the advised row.")
    ] = 0.98,
    batch_size: Annotated[int, options.number("batch_size", "--batch-size", "-b", help="Batch size to time.")] = 1,
    seconds: Annotated[float, options.number("seconds", metavar="S", help="Duration of the timing per row.")] = 3.0,
    threads: options.Threads = None,
    load: LoadOptions,
    seed: options.Seed = 0,
    json: options.AsJson = False,
) -> None:
    """Time fewer tokens beside int8, other runtimes and models.

    The fastest way whose answers are near enough is named.
    """
    from repshift_cli.benchmark.advice import Question, advise
    from repshift_cli.compression.api import compress_dense, open_compressed
    from repshift_cli.export.ways import exported_ways
    from repshift_cli.measure.device import num_threads

    question = Question(
        data=data,
        images=images,
        calibration=calibration,
        smaller_models=tuple(smaller_model or ()),
        batch=batch_size,
        agreement=agreement,
        seconds=seconds,
        seed=seed,
    )
    screen = ui.Screen()
    with num_threads(threads):
        if recipe:
            opened = compress_dense(model, recipe, load, progress=screen)
        else:
            opened = open_compressed(model, load, progress=screen)
        found = advise(opened, question, exported_ways, screen)
    if json:
        ui.result.keep(found.to_dict())
    else:
        show(found)
