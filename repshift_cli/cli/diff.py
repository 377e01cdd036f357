"""`repshift diff`: how two checkpoints differ, in weights, plan and origin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from repshift_cli.cli import options, ui
from repshift_cli.cli.show.provenance import describe
from repshift_cli.utils.text import describe_metric, describe_tokens

if TYPE_CHECKING:
    from repshift_cli.checkpoints.artifact import Opened

_SHOWN = 5
"""Names of tensors that are listed."""


def command(
    first: Annotated[str, typer.Argument(metavar="A", help="A checkpoint, compressed or dense.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another checkpoint.")],
    *,
    json: options.AsJson = False,
) -> None:
    """Show how two checkpoints differ.

    Compared are weights, tokens, metrics, recipe, calibration and measurements.
    """
    from repshift_cli.checkpoints.artifact import open_model
    from repshift_cli.checkpoints.loaded import differing_tensors

    sides = [open_model(first), open_model(second)]
    tensors = differing_tensors(*(side.weights for side in sides))
    a, b = (_facts(side) for side in sides)
    differing = [(name, a.get(name), b.get(name)) for name in dict.fromkeys((*a, *b)) if a.get(name) != b.get(name)]
    if json:
        found = {name: {"a": one, "b": other} for name, one, other in differing}
        ui.result.keep({"a": first, "b": second, "weights_differ": tensors, "differing": found})
        return
    total = len(sides[0].weights.keys() | sides[1].weights.keys())
    listed = f": {', '.join(tensors[:_SHOWN])}{', ...' if len(tensors) > _SHOWN else ''}" if tensors else ""
    ui.print_text(f"weights  {f'{len(tensors)} of {total} tensors differ{listed}' if tensors else 'equal'}")
    if differing:
        ui.print_table(
            None, ["", "A", "B"], [[name, one or "-", other or "-"] for name, one, other in differing], left=3
        )
    else:
        ui.print_text("Everything else is equal.")


def _facts(opened: Opened) -> dict[str, str]:
    """What the two sides are compared in, as text by title."""
    description = opened.loaded.description
    found = {"model": description.name, "input": str(description.preprocessing), "GMACs": f"{opened.macs / 1e9:.3f}"}
    if opened.compressed is None:
        return {**found, "reducer": "none (dense)"}
    plan = opened.compressed.plan
    found |= {"reducer": plan.reducer.kind, "restore": str(plan.restore), "last block": plan.last_block}
    for site in plan.sites:
        before, after = (
            describe_tokens(*each) for each in ((site.tokens_in, site.grid_in), (site.tokens_out, site.grid_out))
        )
        found[f"after {site.site}"] = f"{before} -> {after}, {describe_metric(site.metric.model_dump())}"
    assert opened.loaded.document is not None
    return found | describe(opened.loaded.document)
