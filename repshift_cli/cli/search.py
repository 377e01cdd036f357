"""`repshift search`: find the recipe that meets a target with the least change of the predictions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.cli import options, ui
from repshift_cli.cli.show.search import show_search
from repshift_cli.cli.torchrun import Interrupted, rank_zero_errors, refuse_torchrun
from repshift_cli.errors import INTERRUPTED, UsageError
from repshift_cli.utils.figures import check_figure_path
from repshift_cli.utils.files import check_outputs, check_weights_name, default_output, sha256_of, write_text

if TYPE_CHECKING:
    from repshift_cli.compression.settings import Settings
    from repshift_cli.search.job import FinishedSearch
    from repshift_cli.search.target import SearchTarget
    from repshift_cli.utils.progress import Progress


_KINDS = {
    "output": "the recipe",
    "checkpoint": "the compressed checkpoint",
    "plot": "quality against cost",
}


@options.takes_model
def command(
    checkpoint: options.Checkpoint,
    *,
    target: options.Target = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", "-r", metavar="RECIPE", help="Gives the metric and the reducer; its layers are not used."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="Folder or dataset of images or videos. Default: built-in scenes.",
            show_default=False,
        ),
    ] = None,
    class_order: options.ClassOrder = None,
    images: Annotated[
        int | None,
        options.number(
            "search_images",
            "--images",
            help="Number of images (default: 256; 64 clips for a large video model).",
            show_default=False,
        ),
    ] = None,
    evaluations: Annotated[
        int, options.number("evaluations", "--evaluations", help="Number of schedules to try.")
    ] = 40,
    reducer: Annotated[
        list[str] | None,
        typer.Option(
            "--reducer",
            metavar="KIND",
            help="Try this reducer; may be repeated. Default: that of --recipe, else merge and prune.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The recipe.", show_default="<checkpoint>_<target>.yaml"),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", metavar="FILE", help="Also write the compressed checkpoint (.safetensors)."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Plot quality against cost (.png, .svg or .pdf).")
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state",
            metavar="FILE",
            help="State file, to continue after an interruption.",
            show_default="<recipe>.state.json",
        ),
    ] = None,
    load: LoadOptions,
    device: options.Device = "cpu",
    dtype: options.MeasureDtype = "float32",
    batch_size: options.BatchSize = None,
    threads: options.Threads = None,
    seconds: Annotated[
        float, options.number("seconds", "--seconds", help="Time of each latency measurement; 0 measures none.")
    ] = 5.0,
    seed: options.Seed = 0,
    json: options.AsJson = False,
    force: options.Force = False,
) -> None:
    """Find the best drop schedule for a target, and write a recipe."""
    with rank_zero_errors():
        refuse_torchrun("repshift search")
    goal = _target(target, recipe)
    output = output or default_output(checkpoint, f"_{goal.kind}{'-' if goal.k else ''}{goal.value:g}.yaml")
    files = _Files(output, save, plot, state or output.with_name(f"{output.name}.state.json"))
    files.check(force)

    from repshift_cli.compression.run import search_checkpoint
    from repshift_cli.compression.settings import Settings
    from repshift_cli.measure.device import num_threads as using_threads
    from repshift_cli.search.job import SearchRequest

    request = SearchRequest(goal, evaluations, tuple(reducer or ()), files.state, seconds)
    settings = Settings(
        recipe=recipe,
        load=load,
        output=files.checkpoint,
        data=data,
        class_order=class_order,
        calibration_images=images,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        seconds=seconds,
        seed=seed,
        force=force,
    )
    screen = ui.Screen()
    try:
        with using_threads(threads):
            found = search_checkpoint(checkpoint, settings, request, screen)
            _finish(found, files, settings, screen, json)
    except KeyboardInterrupt:
        # before the first schedule; later interruptions return the best one
        if not files.state.is_file():
            raise
        ui.warn(f"interrupted. {_continue(files)}")
        raise Interrupted(INTERRUPTED) from None


@dataclass(frozen=True)
class _Files:
    recipe: Path
    checkpoint: Path | None
    plot: Path | None
    state: Path

    def check(self, force: bool) -> None:
        """Check that all files can be written, before the search starts."""
        if self.plot is not None:
            check_figure_path("--plot", self.plot)
        outputs = {"--output": self.recipe, "--save": self.checkpoint, "--plot": self.plot}
        check_outputs({**outputs, "--state": self.state}, force=True)
        for option, path in outputs.items():
            check_outputs({option: path}, path is not None and self.can_replace(path, force))
        if self.checkpoint is not None:
            check_weights_name(self.checkpoint)

    def can_replace(self, path: Path, force: bool) -> bool:
        """Whether a file may be replaced: with --force, or if an interruption of this search wrote it unchanged."""
        if force or not path.is_file() or not self.state.is_file():
            return force
        from repshift_cli.search.state import kept_outputs

        written = kept_outputs(self.state).get(str(path.resolve()))
        return written is not None and written == sha256_of(path)

    def keep(self, path: Path) -> None:
        """Record a written file in the state, so that a continued search may replace it; without that it is removed."""
        from repshift_cli.search.state import keep_outputs

        try:
            keep_outputs(self.state, {str(path.resolve()): sha256_of(path)})
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def outputs(self) -> dict[str, str | None]:
        """The names of the output files by kind."""
        named = (self.recipe, self.checkpoint, self.plot)
        return {kind: None if path is None else str(path) for kind, path in zip(_KINDS, named, strict=True)}


def _finish(found: FinishedSearch, files: _Files, settings: Settings, screen: Progress, json: bool) -> None:
    """Write all outputs and print the result."""
    result = found.result
    if json:
        ui.result.keep({**dict.fromkeys(_KINDS), **found.to_dict()})
    if not result.met and not settings.force:
        if result.interrupted:
            screen.warn(
                f"interrupted: the best schedule so far misses {result.target} ({result.target.kind}="
                f"{result.nearest:.4g}), so nothing was written. {_continue(files)}"
            )
            raise Interrupted(INTERRUPTED)
        screen.note(f"nothing was written; --force writes the nearest schedule, from the state in {files.state}")
    result.check_met(settings.force, screen.warn)
    _write(found, files, settings, screen)
    # before printing, since a closed pipe must not leave the state of a finished search
    if not result.interrupted:
        files.state.unlink(missing_ok=True)
    if json:
        ui.result.keep(files.outputs())
    else:
        show_search(found)
        for kind, name in files.outputs().items():
            if name is not None:
                ui.print_text(f"wrote   {name} ({_KINDS[kind]})")
    if result.interrupted:
        best = f"{files.recipe} is the best of {result.evaluations} schedules so far"
        screen.warn(f"interrupted: {best}. {_continue(files)}")
        raise Interrupted(INTERRUPTED)


def _continue(files: _Files) -> str:
    return f"The state is kept in {files.state}; the same command continues the search"


def _write(found: FinishedSearch, files: _Files, settings: Settings, screen: Progress) -> None:
    from repshift_cli.compression.run import save_found
    from repshift_cli.search.plot import save

    force = settings.force
    write_text(files.recipe, found.recipe.text, files.can_replace(files.recipe, force))
    files.keep(files.recipe)
    if files.plot is not None:
        save(found.chart(), files.plot, files.can_replace(files.plot, force))
        files.keep(files.plot)
    if files.checkpoint is not None:
        save_found(found, replace(settings, force=files.can_replace(files.checkpoint, force)), screen)
        files.keep(files.checkpoint)


def _target(text: str | None, recipe: str | None) -> SearchTarget:
    """The target of the command line, else the budget of the recipe."""
    from repshift_cli.planning.recipe import Recipe
    from repshift_cli.search.target import SearchTarget

    if text is None:
        budget = Recipe.load(recipe).budget if recipe is not None else None
        text = None if budget is None else str(budget)
    if text is None:
        raise UsageError(
            "no target is given",
            "Add --target macs=0.65, latency=0.6, agreement=0.99, max-drop=0.5, recall@10=0.99 or cosine=0.98, or a "
            "recipe with a budget.",
        )
    return SearchTarget.parse(text)
