"""Print the result of `repshift eval --embeddings`, and make its JSON document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from repshift_cli.cli import ui

if TYPE_CHECKING:
    from repshift_cli.checkpoints.artifact import Opened
    from repshift_cli.evaluation.embeddings import EmbeddingIndex, Embeddings

_LABELS = {"compressed": "compressed", "random": "at random"}


def embedding_document(
    opened: Opened, name: str, found: Embeddings, index: EmbeddingIndex | None, scores: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """The JSON document of the command; null for what a dense model does not have."""
    gmacs = opened.macs / 1e9
    where = index and {"name": index.name, "entries": len(index.entries), "own_left_out": index.with_queries}
    return {
        "model": name,
        "images": len(found.images),
        "width": found.by_model["dense"].shape[1],
        "index": where,
        **{each: {**scores[each], "gmacs": gmacs} if each in scores else None for each in _LABELS},
        "dense": {"gmacs": opened.dense_macs / 1e9},
        "skipped": len(found.skipped),
        "skipped_files": [{"file": entry.sample, "reason": entry.reason} for entry in found.skipped],
        "preprocessing": opened.loaded.description.preprocessing.to_dict(),
    }


def show_embeddings(document: Mapping[str, Any], images: str) -> None:
    """Print the document in 80 columns."""
    ui.print_text(f"model:      {document['model']}")
    ui.print_text(f"images:     {images}")
    ui.print_text(f"embeddings: {document['images']} of width {document['width']}")
    if index := document["index"]:
        left_out = "; the query's own entry is left out" if index["own_left_out"] else ""
        ui.print_text(f"index:      {index['entries']} dense embeddings of {index['name']}{left_out}", "")
        recalls = [f"recall@{entry['k']}" for entry in document["compressed"]["recall"]]
        columns = ("", "cosine", "p5", "min", *recalls, "GMACs")
        rows = [_row(label, document[name]) for name, label in _LABELS.items() if document[name]]
        ui.print_table("Embeddings against the dense ones: cosine, recall in %", columns, rows)
        ui.print_text(f"dense: {document['dense']['gmacs']:.3g} GMACs")
    ui.print_text(*(f"wrote {path}" for path in document["saved"]))


def _row(label: str, score: Mapping[str, Any]) -> tuple[str, ...]:
    cosine = score["cosine"]
    recalls = [f"{100 * entry['share']:.2f} ±{100 * entry['error']:.2f}" for entry in score["recall"]]
    return (label, *(f"{cosine[key]:.4f}" for key in ("mean", "p5", "min")), *recalls, f"{score['gmacs']:.3g}")
