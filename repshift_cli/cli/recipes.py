"""`repshift recipes`: list, print, check and import recipes."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, cast

import typer

from repshift_cli.cli import guard, options, ui

app = typer.Typer(help="List, show, check and import recipes.", no_args_is_help=True, rich_markup_mode=None)


class ScheduleKind(str, Enum):
    """Values of `--kind`; see `planning/import_schedule.py`."""

    RATIOS = "ratios"
    COUNTS = "counts"
    KEPT = "kept"


@app.command("list", cls=guard.Command)
def list_shipped(*, json: options.AsJson = False) -> None:
    """List the shipped recipes."""
    from repshift_cli.planning.recipe import Recipe, shipped_recipes

    recipes = {name: Recipe.parse(text, f"{name}.yaml") for name, text in shipped_recipes().items()}
    if json:
        found = [
            {"name": name, "description": each.description, "model": each.model, "schedules": list(each.schedules)}
            for name, each in recipes.items()
        ]
        ui.result.keep({"recipes": found})
        return
    rows = [
        [name, "; schedules: ".join(filter(None, (recipe.description, ", ".join(recipe.schedules))))]
        for name, recipe in recipes.items()
    ]
    ui.print_table(None, ["name", "description"], rows, left=2)


@app.command(cls=guard.Command)
def show(
    name: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A shipped recipe, `default`, or a compressed checkpoint.")
    ],
    *,
    blocks: Annotated[int, options.number("blocks", help="Number of blocks of the model, for `default`.")] = 12,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="Compressed checkpoints: print the calibrated metric of each site.")
    ] = False,
    json: options.AsJson = False,
) -> None:
    """Print a recipe as YAML, to save and edit."""
    text = _calibrated(name) if calibrated else _text(name, blocks)
    if json:
        from repshift_cli.planning.recipe import Recipe
        from repshift_cli.reduction.checks import check_components

        recipe = Recipe.parse(text, name)
        check_components(recipe)  # else an option can be anything
        ui.result.keep({"name": name, "text": text, "recipe": recipe.model_dump(mode="json")})
        return
    typer.echo("\n".join(map(ui.visible, text.split("\n"))), nl=False)  # without the line breaks of `print_text`


@app.command(cls=guard.Command)
def check(
    file: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file or a shipped recipe.")],
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Also show the plan for this model.")
    ] = None,
) -> None:
    """Check a recipe without a model: keys, types, metric and reducer. With --model also its sites."""
    from repshift_cli.planning.recipe import Recipe
    from repshift_cli.reduction.checks import check_components

    recipe = Recipe.load(file)
    check_components(recipe)
    if model is not None and recipe.budget is None:
        from repshift_cli.cli.show.plan import show_sites
        from repshift_cli.compression.api import compress_dense

        opened = compress_dense(model, file)
        assert opened.compressed is not None
        show_sites(opened.compressed.plan, f"Sites in {model}")
    content = f"{len(recipe.layers)} sites" if recipe.budget is None else f"a search for {recipe.budget}"
    ui.print_text(f"{file}: valid ({content})")


@app.command("import", cls=guard.Command)
def import_(
    schedule: Annotated[
        str,
        typer.Argument(
            metavar="SCHEDULE",
            help="Ratios to drop per block (drop_r=[0.2,0,0,0.2]), ToMe's r=13, or DiffRate's merge_kept_num=[...].",
        ),
    ],
    *,
    kind: Annotated[
        ScheduleKind | None,
        typer.Option(
            metavar="KIND",
            help="What the numbers are, if no name says it: ratios to drop, counts to merge, or tokens kept.",
        ),
    ] = None,
    blocks: Annotated[
        int | None, options.number("blocks", "--blocks", help="Blocks of the model, if one number is for all.")
    ] = None,
    tokens: Annotated[
        int | None,
        options.number("patch_tokens", "--tokens", help="Patch tokens of the model, for counts and tokens kept."),
    ] = None,
    prefix: Annotated[
        int | None,
        options.number("prefix_tokens", "--prefix", help="Prefix tokens (class token) among the tokens kept."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="The recipe file (default: print the recipe).")
    ] = None,
    force: options.Overwrite = False,
) -> None:
    """Write a recipe from a schedule of a paper: ratios or token counts per block."""
    from repshift_cli.planning.import_schedule import Kind, import_schedule
    from repshift_cli.utils.files import write_text

    known = cast("Kind | None", kind and kind.value)
    text = import_schedule(schedule, known, blocks=blocks, tokens=tokens, prefix=prefix)
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_text(output, text, force)
        ui.print_text(f"wrote {output}")


def _calibrated(name: str) -> str:
    """The plan of a compressed checkpoint as a recipe that needs no calibration."""
    from repshift_cli.checkpoints.artifact import open_model
    from repshift_cli.errors import CheckpointError
    from repshift_cli.planning.recipe import LayerDrop, Recipe
    from repshift_cli.reduction.plans import with_last_block

    compressed = open_model(name).compressed
    if compressed is None:
        raise CheckpointError(f"{name} contains no plan", "It is not a compressed checkpoint.")
    plan = compressed.plan
    layers = tuple(
        LayerDrop(layer=site.layer, keep_grid=site.grid_out, metric=site.metric)
        if site.grid_out
        else LayerDrop(layer=site.layer, keep_tokens=site.tokens_out - plan.prefix_tokens, metric=site.metric)
        for site in plan.sites
    )
    recipe = Recipe(version=1, metric=plan.sites[0].metric, reducer=plan.reducer, restore=plan.restore, layers=layers)
    if plan.last_block != with_last_block(plan, recipe, compressed.family, compressed.model).last_block:
        recipe = recipe.model_copy(update={"last_block": plan.last_block})
    return recipe.to_yaml()


def _text(name: str, blocks: int) -> str:
    from repshift_cli.errors import CheckpointError
    from repshift_cli.planning.recipe import SCALED, Recipe, scaled_recipe

    if name in SCALED:
        return scaled_recipe(name, blocks).text
    if Path(name).suffix != ".safetensors":
        return Recipe.load(name).text
    from repshift_cli.checkpoints.weights import read_weights

    stored = (read_weights(Path(name)).document or {}).get("recipe")
    if not isinstance(stored, dict) or not isinstance(stored.get("text"), str):
        raise CheckpointError(f"{name} contains no recipe", "It is not a compressed checkpoint.")
    return str(stored["text"])
