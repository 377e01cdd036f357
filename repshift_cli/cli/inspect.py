"""`repshift inspect`: the blocks, tokens and reduction sites of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.cli import options, ui
from repshift_cli.cli.show.plan import EXACT
from repshift_cli.cli.show.provenance import describe, provenance
from repshift_cli.utils.garbage import without_collection
from repshift_cli.utils.text import describe_metric, describe_tokens

if TYPE_CHECKING:
    from repshift_cli.checkpoints.artifact import Opened
    from repshift_cli.planning.layout import Layout
    from repshift_cli.planning.plan import Plan
    from repshift_cli.reduction.families.base import Family


@options.takes_model
def command(
    checkpoint: options.Checkpoint,
    *,
    load: LoadOptions,
    json: options.AsJson = False,
) -> None:
    """Show the blocks and sites of a model, or an exported file."""
    with without_collection():  # saves a tenth of the time, most of which is importing torch and timm
        from repshift_cli.checkpoints.artifact import open_model
        from repshift_cli.checkpoints.exported import is_exported

        if is_exported(checkpoint):
            _show_exported(checkpoint, json)
            return

        opened = open_model(checkpoint, load)
        document = _describe(opened)
    for note in opened.loaded.notes:
        ui.remark(note)
    if json:
        ui.result.keep(document)
    else:
        _show(document, opened.loaded.description.preprocessing)


def _show_exported(name: str, json: bool) -> None:
    from repshift_cli.checkpoints.exported import document_of
    from repshift_cli.cli.export import show
    from repshift_cli.export.job import Exported
    from repshift_cli.utils.files import size_of

    found = Exported(Path(name), document_of(Path(name)), size_of(Path(name)))
    if json:
        ui.result.keep(found.to_dict())
    else:
        show(found, "file")


def _describe(opened: Opened) -> dict[str, Any]:
    from repshift_cli.reduction.families.base import match

    loaded = opened.loaded
    family = match(loaded.model)
    layout = family.layout(loaded.model)
    plan = opened.compressed.plan if opened.compressed else None
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
        "last_block": plan.last_block if plan else None,
        "provenance": provenance(loaded.document) if plan and loaded.document else None,
        "sites": _sites(opened, family, layout, plan),
        "barred": {name: why for name, why in layout.barred.items() if not name.isdigit()},
    }


def _sites(opened: Opened, family: Family, layout: Layout, plan: Plan | None) -> list[dict[str, Any]]:
    """Each site with its tokens, and the metrics that can score them."""
    from repshift_cli.reduction.checks import feeds
    from repshift_cli.reduction.metrics.base import metric_kinds

    counts = _tokens(layout, plan)
    grids = {site.layer: list(grid) for site, grid in layout.grids(plan.grids_kept if plan else None)}
    # variants that need something no block of the family has (a mixer in a ViT) are not counted as limits of a block
    family_taps = {"block_input", "block_output", *family.shows}
    known = {
        kind: [each for each in found().variants() if each.taps() <= family_taps]
        for kind, found in metric_kinds().items()
    }
    sites = []
    for site in family.sites(opened.loaded.model):
        possible = {kind: sum(feeds(each, site) for each in variants) for kind, variants in known.items()}
        entry: dict[str, Any] = {"site": site.name, "layer": site.layer, "block": type(site.block).__name__}
        entry["tokens"] = counts[site.layer]
        if layout.map_size:
            entry["grid"] = grids[site.layer]
        entry["scores"] = [kind for kind, count in possible.items() if count]
        entry["limited"] = {
            kind: f"{count} of {len(known[kind])} variants: {site.missing.get('*', 'not shown')}"
            for kind, count in possible.items()
            if count < len(known[kind])
        }
        sites.append(entry)
    return sites


def _tokens(layout: Layout, plan: Plan | None) -> dict[int, int]:
    """Tokens at the input of the block of each site, by layer; for a feature map, at its output."""
    if layout.map_size:
        return layout.tokens(plan.grids_kept if plan else None)
    total = layout.prefix_tokens + layout.patch_tokens
    counts = plan.tokens_at(len(layout.sites)) if plan else (total,) * len(layout.sites)
    return {site.layer: count for site, count in zip(layout.sites, counts, strict=False)}


def _show(document: dict[str, Any], preprocessing: Any) -> None:
    model = document["model"]
    head = f"{model['classes']} classes" if model["classes"] else "no head"
    ui.print_text(f"model    {model['name']} ({model['family']}), {model['params']:,} parameters, {head}")
    ui.print_text(f"input    {preprocessing}")
    prefix, patches = document["prefix_tokens"], document["patch_tokens"]
    if prefix or "grid" not in document["sites"][0]:
        protected = "1 protected token (class)" if prefix == 1 else f"{prefix} protected tokens (class, registers)"
        ui.print_text(f"tokens   {f'{protected} + ' if prefix else ''}{patches} patches")
    else:
        ui.print_text("tokens   positions of feature maps; whole rows and columns are dropped")
    compressed = f", {document['gmacs']:.3f} compressed" if document["compressed"] else ""
    ui.print_text(f"cost     {document['dense_gmacs']:.3f} GMACs per {preprocessing.unit} dense{compressed}")
    plan = {row["site"]: row for row in document["plan"] or ()}
    for site, row in plan.items():
        ui.print_text(f"metric   after {site}: {describe_metric(row['metric'])}")
    if document["last_block"] == "exact":
        ui.print_text(EXACT)
    made = {**document["provenance"], "model": model} if document["provenance"] else None
    for title, text in (describe(made) if made else {}).items():
        ui.print_text(f"{title:<8} {text}")
    ui.print_text("")
    rows = []
    for site in document["sites"]:
        tokens = describe_tokens(site["tokens"], site.get("grid"))
        if (found := plan.get(site["site"])) is not None:
            tokens += f" -> {describe_tokens(found['tokens_out'], found.get('grid_out'))}"
        limits = "; ".join(f"{kind}, {why}" for kind, why in site["limited"].items())
        metrics = f"limited: {limits}" if limits else ", ".join(site["scores"])
        rows.append([site["site"], site["block"], tokens, metrics])
    ui.print_table("Sites", ["after", "block", "tokens", "metrics"], _fold_equal(rows), left=4)
    reasons = document["barred"]
    for why in dict.fromkeys(reasons.values()):
        names = ", ".join(name for name in reasons if reasons[name] == why)
        ui.print_text(f"no site  {names}: {why}")


def _fold_equal(rows: list[list[str]]) -> list[list[str]]:
    """Fold runs of rows that differ in the first cell only: `blocks.1 .. blocks.11`."""
    folded: list[list[str]] = []
    first = ""
    for row in rows:
        if folded and folded[-1][1:] == row[1:]:
            folded[-1][0] = f"{first} .. {row[0]}"
        else:
            first = row[0]
            folded.append(list(row))
    return folded
