"""`repshift search`: a checkpoint and a budget in, the recipe that meets it with the least harm out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repshift_cli.cli import options
from repshift_cli.cli.bench import check_picture_format
from repshift_cli.cli.show.search import show_search
from repshift_cli.cli.torchrun import Interrupted, is_first, one_voice, own_device
from repshift_cli.errors import INTERRUPTED, CheckFailed, UsageError

if TYPE_CHECKING:
    from repshift_cli.compression.settings import Settings
    from repshift_cli.search.job import Found
    from repshift_cli.search.target import Target
    from repshift_cli.utils.progress import Progress


__all__ = [
    "command",
]


_WORDS = {
    "output": "the recipe",
    "checkpoint": "the compressed checkpoint",
    "plot": "quality against cost",
}


def command(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A .safetensors, .pth or .pt file, a folder with config.json, a timm name, builtin:..."),
    ],
    *,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            metavar="KIND=VALUE",
            help="macs=0.65, latency=0.6 (fractions of dense), agreement=0.99 (least share of unchanged predictions) "
            "or max-drop=0.5 (points of top-1). Default: the budget of --recipe.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="Where metric and reducer come from; its layers are not used."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="Pictures or videos of the model's own kind, a folder or a dataset. Default: built-in scenes.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            "--images",
            min=16,
            help="How many of them are used (default: 256; 64 clips for a large video model).",
            show_default=False,
        ),
    ] = None,
    evaluations: Annotated[
        int | None,
        typer.Option("--evaluations", min=1, metavar="N", help="How many schedules are tried.", show_default=False),
    ] = None,
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
        typer.Option("--save", metavar="FILE", help="Write the compressed checkpoint (.safetensors) as well."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw quality against cost (.png, .svg or .pdf).")
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state",
            metavar="FILE",
            help="Where the search stands, to go on after an interruption.",
            show_default="<recipe>.state.json",
        ),
    ] = None,
    model: options.ModelName = None,
    heads: options.Heads = None,
    img_size: options.ImgSize = None,
    frames: options.Frames = None,
    checkpoint_frames: options.CheckpointFrames = None,
    device: options.Device = "cpu",
    dtype: options.MeasureDtype = "float32",
    batch_size: options.InputsAtATime = None,
    threads: options.Threads = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.0, help="Time for each measurement of latency; 0 measures none.")
    ] = 5.0,
    seed: options.Seed = 0,
    json: options.AsJson = False,
    force: options.Force = False,
) -> None:
    """Find the schedule that meets a budget with the least harm to the predictions, and write it as a recipe."""
    with one_voice():
        goal = _target(target, recipe)
        files = _Files.of(checkpoint, goal, output=output, save=save, plot=plot, state=state)
        files.check(force)

        from repshift_cli.checkpoints.identify import Clips
        from repshift_cli.cli import ui
        from repshift_cli.compression.run import search_checkpoint
        from repshift_cli.compression.settings import Settings
        from repshift_cli.measure.device import num_threads as using_threads
        from repshift_cli.search.job import Request
        from repshift_cli.utils.progress import Silent

        first = is_first()
        request = Request(goal, evaluations, tuple(reducer or ()), files.state, seconds)
        settings = Settings(
            recipe=recipe,
            model_name=model,
            heads=heads,
            img_size=img_size,
            clips=Clips(frames, checkpoint_frames),
            output=files.checkpoint,
            data=data,
            calibration_images=images,
            device=own_device(device),
            dtype=dtype,
            batch_size=batch_size,
            seconds=seconds,
            seed=seed,
            force=force,
        )
        run = _Run(files, settings, ui.Screen() if first else Silent())
        with using_threads(threads), _explained_interrupt(files, first):
            found = search_checkpoint(checkpoint, settings, request, run.progress)
            if first:
                run.finish(found, json)


@dataclass(frozen=True)
class _Files:
    """What the search writes."""

    recipe: Path
    checkpoint: Path | None
    plot: Path | None
    state: Path

    @classmethod
    def of(
        cls,
        checkpoint: str,
        target: Target,
        *,
        output: Path | None,
        save: Path | None,
        plot: Path | None,
        state: Path | None,
    ) -> _Files:
        """The names that were given, and those that follow from them."""
        recipe = output or default_output(checkpoint, target)
        return cls(recipe, save, plot, state or recipe.with_name(f"{recipe.name}.state.json"))

    def check(self, force: bool) -> None:
        """Refuse what could not be written, before any time is spent on searching.

        Raises:
            UsageError, OutputError: as `files.check_outputs`; or the ending of the plot is none that can be drawn.
        """
        from repshift_cli.utils.files import check_outputs

        if self.plot is not None:
            check_picture_format("--plot", self.plot)
        outputs = {"--output": self.recipe, "--save": self.checkpoint, "--plot": self.plot}
        check_outputs({**outputs, "--state": self.state}, force=True)
        for option, path in outputs.items():
            check_outputs({option: path}, path is not None and self.replacing(path, force))

    def replacing(self, path: Path, force: bool) -> bool:
        """Whether a file may be replaced if it exists: where an interruption of this search wrote it as it stands."""
        if force or not path.is_file() or not self.state.is_file():
            return force
        from repshift_cli.search.state import kept_outputs
        from repshift_cli.utils.files import sha256_of

        written = kept_outputs(self.state).get(str(path.resolve()))
        return written is not None and written == sha256_of(path)

    def keep(self, path: Path) -> None:
        """Note in the state that this was written: after an interruption the search that goes on may replace it."""
        from repshift_cli.search.state import keep_outputs
        from repshift_cli.utils.files import sha256_of

        keep_outputs(self.state, {str(path.resolve()): sha256_of(path)})

    def written(self) -> dict[str, str | None]:
        """Their names, by what they are."""
        return {
            "output": str(self.recipe),
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "plot": None if self.plot is None else str(self.plot),
        }


@dataclass(frozen=True)
class _Run:
    """How a finished search is told and written."""

    files: _Files
    settings: Settings
    progress: Progress

    def finish(self, found: Found, json: bool) -> None:
        """Write all that was asked for, then tell it.

        Raises:
            CheckFailed: the target is not met and `force` is off; nothing is written.
            Interrupted: the search was; what there was by then has been written.
        """
        from repshift_cli.cli import ui

        self._check_met(found)
        self._write(found)
        # before anything is printed: a pipe that was closed must not leave the state of a search that is done
        if not found.result.interrupted:
            self.files.state.unlink(missing_ok=True)
        if json:
            ui.print_json(document(found, self.files))
        else:
            show_search(found)
            for what, name in self.files.written().items():
                if name is not None:
                    ui.print_text(f"wrote   {name} ({_WORDS[what]})")
        if found.result.interrupted:
            ui.warn(
                f"interrupted: {self.files.recipe} is the best so far of {found.result.evaluations} schedules. The "
                f"search is kept in {self.files.state}; the same command goes on from there"
            )
            raise Interrupted(INTERRUPTED)

    def _check_met(self, found: Found) -> None:
        result = found.result
        if result.met:
            if missed := found.missed_on_others():
                self.progress.warn(missed)
            return
        if self.settings.force:
            self.progress.warn(
                f"the target {result.target} is not met: the nearest is {result.target.kind}={result.nearest:.4g}"
            )
            return
        if result.interrupted:
            self.progress.warn(
                f"interrupted: the best so far misses {result.target} ({result.target.kind}={result.nearest:.4g}), so "
                f"nothing was written. The search is kept in {self.files.state}; the same command goes on from there"
            )
            raise Interrupted(INTERRUPTED)
        try:
            result.require_met()
        except CheckFailed as error:
            raise CheckFailed(
                error.message,
                f"{error.hint} Nothing was written; with --force the nearest is, and what was found until now is "
                f"kept for that in {self.files.state}.",
            ) from None

    def _write(self, found: Found) -> None:
        from repshift_cli.compression.run import save_found
        from repshift_cli.search.plot import save
        from repshift_cli.utils.files import write_text

        force, files = self.settings.force, self.files
        write_text(files.recipe, found.recipe.text, files.replacing(files.recipe, force))
        files.keep(files.recipe)
        if files.plot is not None:
            save(found.chart(), files.plot, files.replacing(files.plot, force))
            files.keep(files.plot)
        if files.checkpoint is not None:
            replacing = files.replacing(files.checkpoint, force)
            save_found(found, replace(self.settings, force=replacing), self.progress)
            files.keep(files.checkpoint)


def _target(text: str | None, recipe: str | None) -> Target:
    """What was asked for, on the command line or by the budget of the recipe.

    Raises:
        UsageError: neither tells, or what they tell cannot be.
    """
    from repshift_cli.planning.recipe import Recipe
    from repshift_cli.search.target import Target

    if text is not None:
        return Target.parse(text)
    budget = Recipe.load(recipe).budget if recipe is not None else None
    if budget is None:
        raise UsageError(
            "nothing tells what the search is to reach",
            "Add --target macs=0.65, latency=0.6, agreement=0.99 or max-drop=0.5, or a recipe with a budget.",
        )
    return Target.parse(str(budget))


def default_output(checkpoint: str, target: Target) -> Path:
    """`<name>_macs0.65.yaml` in the current folder."""
    from repshift_cli.utils.files import weight_stem

    name = checkpoint.rstrip("/").rsplit("/", 1)[-1].removeprefix("builtin:")
    return Path(f"{weight_stem(name)}_{target.kind}{target.value:g}.yaml")


@contextmanager
def _explained_interrupt(files: _Files, first: bool) -> Iterator[None]:
    """Say what is left where an interruption came before there was anything to write."""
    from repshift_cli.cli import ui

    try:
        yield
    except KeyboardInterrupt:
        if first and files.state.is_file():
            ui.warn(f"interrupted; the search is kept in {files.state}, and the same command goes on from there")
            raise Interrupted(INTERRUPTED) from None
        raise


def document(found: Found, files: _Files) -> dict[str, Any]:
    """The JSON document of the command."""
    result = found.result.to_dict()
    return {
        **files.written(),
        "model": {"name": found.loaded.description.name, "family": found.family.name},
        **result,
        "target": str(found.result.target),
        "recipe": found.recipe.text,
        "reducer": found.result.plan.reducer.kind,
        "labelled": found.inputs.labels is not None,
        "description": found.inputs.description,
        "measured_on": dict(found.measured_on),
    }
