"""`repshift recipes`: list, print and check recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repshift_cli.cli import guard, options, ui

app = typer.Typer(help="List, show and check recipes.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list", cls=guard.Command)
def list_shipped() -> None:
    """List the shipped recipes."""
    from repshift_cli.planning.recipe import Recipe, shipped_recipes

    recipes = {name: Recipe.parse(text, f"{name}.yaml") for name, text in shipped_recipes().items()}
    rows = [[name, recipe.description or ""] for name, recipe in recipes.items()]
    ui.print_table(None, ["name", "description"], rows, left=2)


@app.command(cls=guard.Command)
def show(
    name: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A shipped recipe, `default`, or a compressed checkpoint.")
    ],
    blocks: Annotated[int, options.number("blocks", help="Number of blocks of the model, for `default`.")] = 12,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="Compressed checkpoints: print the calibrated metric of each site.")
    ] = False,
) -> None:
    """Print a recipe as YAML, to save and edit."""
    text = _calibrated(name) if calibrated else _text(name, blocks)
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
    from repshift_cli.planning.recipe import Recipe, default_recipe

    if name == "default":
        return default_recipe(blocks).text
    if Path(name).suffix != ".safetensors":
        return Recipe.load(name).text
    from repshift_cli.checkpoints.weights import read_weights

    stored = (read_weights(Path(name)).document or {}).get("recipe")
    if not isinstance(stored, dict) or not isinstance(stored.get("text"), str):
        raise CheckpointError(f"{name} contains no recipe", "It is not a compressed checkpoint.")
    return str(stored["text"])
