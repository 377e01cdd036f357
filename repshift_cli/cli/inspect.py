"""`repshift inspect`: what a checkpoint holds and where its tokens can go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.cli import options
from repshift_cli.cli.show.plan import describe_metric, describe_tokens
from repshift_cli.utils.garbage import without_collection

if TYPE_CHECKING:
    from repshift_cli.checkpoints.artifact import Opened
    from repshift_cli.planning.layout import Layout
    from repshift_cli.planning.plan import Plan

__all__ = ["command"]


def command(
    checkpoint: Annotated[str, typer.Argument(help="As for compress.")],
    *,
    model: options.ModelName = None,
    heads: options.Heads = None,
    img_size: options.ImgSize = None,
    frames: options.Frames = None,
    checkpoint_frames: options.CheckpointFrames = None,
    json: options.AsJson = False,
) -> None:
    """Show a model's blocks, tokens and sites, what can be reduced, and why something cannot."""
    with without_collection():  # a tenth of the time, most of which is importing torch and timm
        from repshift_cli.checkpoints.artifact import open_model
        from repshift_cli.cli import ui

        opened = open_model(checkpoint, LoadOptions(model, heads, img_size, frames, checkpoint_frames))
        document = _describe(opened)
    for note in opened.loaded.notes:
        ui.remark(note)
    if json:
        ui.print_json(document)
    else:
        _show(opened, document)


def _describe(opened: Opened) -> dict[str, Any]:
    from repshift_cli.reduction.checks import feeds
    from repshift_cli.reduction.families.base import match
    from repshift_cli.reduction.metrics.base import metric_kinds

    loaded = opened.loaded
    family = match(loaded.model)
    layout = family.layout(loaded.model)
    plan = opened.compressed.plan if opened.compressed else None
    counts = _tokens(layout, plan)
    grids = {site.layer: list(grid) for site, grid in layout.grids(plan.grids_kept if plan else None)}
    everywhere = {"block_input", "block_output", *family.shows}
    # what no block of such a model has (a mixer in a ViT) is no limit of a block
    known = {
        kind: [each for each in found().variants() if each.taps() <= everywhere]
        for kind, found in metric_kinds().items()
    }
    sites = []
    for site in family.sites(loaded.model):
        possible = {kind: sum(feeds(each, site) for each in variants) for kind, variants in known.items()}
        entry = {"site": site.name, "layer": site.layer, "block": type(site.block).__name__}
        entry |= {"tokens": counts[site.layer]} | ({"grid": grids[site.layer]} if layout.map_size else {})
        entry["scores"] = [kind for kind, count in possible.items() if count]
        entry["limited"] = {
            kind: f"{count} of {len(known[kind])} variants: {site.missing.get('*', 'not shown')}"
            for kind, count in possible.items()
            if count < len(known[kind])
        }
        sites.append(entry)
    return {
        "model": {
            "name": loaded.description.name,
            "family": family.name,
            "params": sum(parameter.numel() for parameter in loaded.model.parameters()),
            "classes": getattr(loaded.model, "num_classes", None),
        },
        "source": {"origin": loaded.source.origin, "path": loaded.source.path, "sha256": loaded.source.sha256},
        "preprocessing": loaded.description.preprocessing.to_dict(),
        "prefix_tokens": layout.prefix_tokens,
        "patch_tokens": layout.patch_tokens,
        "gmacs": opened.macs / 1e9,
        "dense_gmacs": opened.dense_macs / 1e9,
        "compressed": plan is not None,
        "plan": plan.summary() if plan else None,
        "sites": sites,
        "barred": {name: why for name, why in layout.barred.items() if not name.isdigit()},
    }


def _tokens(layout: Layout, plan: Plan | None) -> dict[int, int]:
    """Tokens that enter (for a feature map: that leave) the block of each site, by layer."""
    if layout.map_size:
        return layout.tokens(plan.grids_kept if plan else None)
    total = layout.prefix_tokens + layout.patch_tokens
    counts = plan.tokens_at(len(layout.sites)) if plan else (total,) * len(layout.sites)
    return {site.layer: count for site, count in zip(layout.sites, counts, strict=False)}


def _show(opened: Opened, document: dict[str, Any]) -> None:
    from repshift_cli.cli import ui

    model = document["model"]
    head = "no head" if model["classes"] is None else f"{model['classes']} classes"
    ui.print_text(f"model    {model['name']} ({model['family']}), {model['params']:,} parameters, {head}")
    ui.print_text(f"input    {opened.loaded.description.preprocessing}")
    prefix, patches = document["prefix_tokens"], document["patch_tokens"]
    if prefix or "grid" not in document["sites"][0]:
        ui.print_text(f"tokens   {prefix} that never go (class, registers) + {patches} patches")
    else:
        ui.print_text("tokens   positions of feature maps, of which whole rows and columns go")
    told = f"{document['dense_gmacs']:.3f} GMACs per {opened.loaded.description.preprocessing.unit} dense"
    if document["compressed"]:
        told += f", {document['gmacs']:.3f} with its plan"
    ui.print_text(f"cost     {told}")
    for row in document["plan"] or ():
        ui.print_text(f"kept     after {row['site']} by {describe_metric(row['metric'])}")
    ui.print_text("")
    dropping = {row["site"]: row for row in document["plan"] or ()}
    rows = []
    for site in document["sites"]:
        tokens = describe_tokens(site["tokens"], site.get("grid"))
        if (row := dropping.get(site["site"])) is not None:
            tokens += f" -> {describe_tokens(row['tokens_out'], row.get('grid_out'))}"
        limits = "; ".join(f"{kind}, {why}" for kind, why in site["limited"].items())
        scores = f"limited: {limits}" if limits else ", ".join(site["scores"])
        rows.append([site["site"], site["block"], tokens, scores])
    ui.print_table("Sites", ["after", "block", "tokens", "scores"], _same_as_above(rows), left=4)
    reasons = document["barred"]
    for why in dict.fromkeys(reasons.values()):
        names = ", ".join(name for name in reasons if reasons[name] == why)
        ui.print_text(f"no site  {names}: {why}")


def _same_as_above(rows: list[list[str]]) -> list[list[str]]:
    """Fold runs of equal rows, which deep models are full of: `blocks.1 .. blocks.11`."""
    folded: list[list[str]] = []
    first = ""
    for row in rows:
        if folded and folded[-1][1:] == row[1:]:
            folded[-1][0] = f"{first} .. {row[0]}"
        else:
            first = row[0]
            folded.append(list(row))
    return folded
