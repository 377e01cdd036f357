"""Print the result of `repshift eval --embeddings`, and make its JSON document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from repshift_cli.cli import ui

if TYPE_CHECKING:
    from repshift_cli.checkpoints.artifact import Opened
    from repshift_cli.evaluation.embeddings import EmbeddingIndex, Embeddings, EmbeddingScore


def embedding_document(
    opened: Opened,
    name: str,
    found: Embeddings,
    index: EmbeddingIndex | None,
    scores: Mapping[str, EmbeddingScore],
) -> dict[str, Any]:
    """The JSON document of the command; null for what a dense model does not have."""
    from repshift_cli.evaluation.embeddings import RANDOM
    from repshift_cli.evaluation.models import COMPRESSED, DENSE

    own = {COMPRESSED: opened.macs, RANDOM: opened.macs}
    rows = {name: scores[name].to_dict() | {"gmacs": own[name] / 1e9} if name in scores else None for name in own}
    return {
        "model": name,
        "images": len(found.images),
        "width": found.by_model[DENSE].shape[1],
        "index": None
        if index is None
        else {"name": index.name, "entries": len(index.entries), "own_left_out": index.with_queries},
        **rows,
        DENSE: {"gmacs": opened.dense_macs / 1e9},
        "skipped": len(found.skipped),
        "skipped_files": [{"file": entry.sample, "reason": entry.reason} for entry in found.skipped],
        "preprocessing": opened.loaded.description.preprocessing.to_dict(),
    }


def show_embeddings(document: Mapping[str, Any], images: str) -> None:
    """Print the document in 80 columns."""
    ui.print_text(f"model:      {document['model']}")
    ui.print_text(f"images:     {images}")
    ui.print_text(f"embeddings: {document['images']} of width {document['width']}")
    index, compressed = document["index"], document["compressed"]
    if index is not None:
        left_out = "; the query's own entry is left out" if index["own_left_out"] else ""
        ui.print_text(f"index:      {index['entries']} dense embeddings of {index['name']}{left_out}", "")
        labels = {"compressed": "compressed", "random": "the same counts at random"}
        recalls = [f"recall@{entry['k']} %" for entry in compressed["recall"]]
        columns = ("", "cosine, mean", "p5", "min", *recalls, "GMACs")
        rows = [_row(labels[name], document[name]) for name in labels if document[name]]
        ui.print_table("Embeddings against those of the dense model", columns, rows)
        ui.print_text(f"dense: {document['dense']['gmacs']:.3g} GMACs")
    for path in document["saved"]:
        ui.print_text(f"wrote {path}")


def _row(label: str, score: Mapping[str, Any]) -> tuple[str, ...]:
    cosine = score["cosine"]
    recalls = [f"{100 * entry['share']:.2f} ± {100 * entry['error']:.2f}" for entry in score["recall"]]
    return (label, *(f"{cosine[key]:.4f}" for key in ("mean", "p5", "min")), *recalls, f"{score['gmacs']:.3g}")
