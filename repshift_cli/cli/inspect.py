"""`repshift inspect`: what a checkpoint holds and where its tokens can go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from repshift_cli.cli import options
from repshift_cli.cli.compress import describe_metric

if TYPE_CHECKING:
    from repshift_cli.artifact import Opened

__all__ = ["command"]


def command(
    checkpoint: Annotated[str, typer.Argument(help="As for compress.")],
    *,
    model: options.ModelName = None,
    heads: options.Heads = None,
    json: options.AsJson = False,
) -> None:
    """Show a model's blocks, tokens and sites, what can be reduced, and why something cannot."""
    from repshift_cli import ui
    from repshift_cli.artifact import open_model

    opened = open_model(checkpoint, model, heads)
    document = _describe(opened)
    for note in opened.loaded.notes:
        ui.remark(note)
    if json:
        ui.print_json(document)
    else:
        _show(opened, document)


def _describe(opened: Opened) -> dict[str, Any]:
    from repshift_cli.attach import feeds
    from repshift_cli.families import match
    from repshift_cli.metrics import metric_kinds

    loaded = opened.loaded
    family = match(loaded.model)
    layout = family.layout(loaded.model)
    plan = opened.compressed.plan if opened.compressed else None
    counts = plan.tokens_at(len(layout.sites)) if plan else None
    total = layout.prefix_tokens + layout.patch_tokens
    metrics = {kind: found() for kind, found in metric_kinds().items()}
    sites = []
    for index, site in enumerate(family.sites(loaded.model)):
        variants = {kind: metric.variants() for kind, metric in metrics.items()}
        possible = {kind: sum(feeds(each, site) for each in found) for kind, found in variants.items()}
        entry = {"site": site.name, "layer": site.layer, "block": type(site.block).__name__}
        entry |= {"tokens": counts[index] if counts else total}
        entry["scores"] = [kind for kind, count in possible.items() if count]
        entry["limited"] = {
            kind: f"{count} of {len(variants[kind])} variants: {site.missing.get('*', 'not shown')}"
            for kind, count in possible.items()
            if count < len(variants[kind])
        }
        sites.append(entry)
    return {
        "model": {
            "name": loaded.description.name,
            "family": family.name,
            "params": sum(tensor.numel() for tensor in loaded.tensors.values()),
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
    }


def _show(opened: Opened, document: dict[str, Any]) -> None:
    from repshift_cli import ui

    model = document["model"]
    ui.print_text(
        f"model    {model['name']} ({model['family']}), {model['params']:,} parameters, {model['classes']} classes"
    )
    ui.print_text(f"input    {opened.loaded.description.preprocessing}")
    prefix, patches = document["prefix_tokens"], document["patch_tokens"]
    ui.print_text(f"tokens   {prefix} prefix (never dropped) + {patches} patches")
    told = f"{document['dense_gmacs']:.3f} GMACs per image dense"
    if document["compressed"]:
        told += f", {document['gmacs']:.3f} with its plan"
    ui.print_text(f"cost     {told}")
    for row in document["plan"] or ():
        ui.print_text(f"kept     after {row['site']} by {describe_metric(row['metric'])}")
    ui.print_text("")
    dropping = {row["site"]: row["tokens_out"] for row in document["plan"] or ()}
    rows = []
    for site in document["sites"]:
        after = f"-> {dropping[site['site']]}" if site["site"] in dropping else ""
        limits = "; ".join(f"{kind}, {why}" for kind, why in site["limited"].items())
        scores = f"limited: {limits}" if limits else "all"
        rows.append([site["site"], site["block"], f"{site['tokens']} {after}".strip(), scores])
    ui.print_table("Sites", ["after", "block", "tokens", "scores"], _same_as_above(rows), left=4)


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
