"""Say in a few lines how a compressed checkpoint was made: `repshift inspect` and `repshift diff`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from repshift_cli.checkpoints.builtin import BUILTIN

_DIGITS = 12
"""Of a SHA-256, to recognise a file."""

_PARTS = ("created", "repshift_version", "versions", "source", "recipe", "calibration", "search", "measured")


def provenance(document: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of the document of a compressed checkpoint that say how it was made, for JSON."""
    parts = {name: document.get(name) for name in _PARTS}
    if recovered := document.get("recovered"):
        parts["recovered"] = {name: part for name, part in recovered.items() if name != "values"}
    return parts


def describe(document: Mapping[str, Any]) -> dict[str, str]:
    """Lines of text by their title. The content of these parts is not checked when a file is read."""
    found = {}
    for title, line in _LINES.items():
        try:
            text = line(document)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
            text = "cannot be read"
        if text:
            found[title] = text
    return found


def _source(document: Mapping[str, Any]) -> str:
    source = document["source"]
    digest = f" (SHA-256 {source['sha256'][:_DIGITS]})" if source["sha256"] else ""
    return f"{source['name'] or source['origin']}{digest}"


def _calibration(document: Mapping[str, Any]) -> str:
    calibration = document.get("calibration")
    if not calibration:
        return ""
    text = f"calibrated on {calibration['images']} inputs of {calibration['data']['where']}"
    chosen, random = (calibration["checked"][name]["agreement"] for name in ("chosen", "random"))
    if chosen is None or random is None:
        return text
    return f"{text}: {chosen:.1%} of predictions unchanged, random dropping {random:.1%}"


def _search(document: Mapping[str, Any]) -> str:
    search = document.get("search")
    return f"for {search['target']}, on {search['data']['where']}" if search else ""


def _recovered(document: Mapping[str, Any]) -> str:
    recovered = document.get("recovered")
    if not recovered:
        return ""
    before, after = (recovered[name]["distance"] for name in ("before", "after"))
    return (
        f"{len(recovered['tensors'])} tensors (norms, biases, last layer) changed by --recover on "
        f"{recovered['images']} inputs: held-out distance {before:.4f} -> {after:.4f}"
    )


def _speed(document: Mapping[str, Any]) -> str:
    measured = document.get("measured")
    if not measured or measured["ratio"]["latency"] is None:
        return ""
    threads = f"{measured['threads']} thread{'s' if measured['threads'] > 1 else ''}"
    how = f"batch {measured['batch']}, {measured['dtype']}, {threads}, {measured['device']}"
    unclear = "" if measured["ratio"]["latency_clear"] else ", not clearly faster"
    return f"{measured['ratio']['latency']:.2f}x as fast as dense{unclear} ({how})"


def _quality(document: Mapping[str, Any]) -> str:
    measured = document.get("measured")
    if not measured or measured["agreement"] is None:
        return ""
    images = measured["images"]
    if images["where"].startswith("builtin:") and f"builtin:{document['model']['name']}" not in BUILTIN:
        return "not measured on images of the model's own kind"
    return f"{measured['agreement']:.1%} of predictions unchanged on {images['count']} inputs of {images['where']}"


_LINES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "made": lambda document: f"{document['created'][:10]} by repshift {document['repshift_version']}",
    "source": _source,
    "recipe": lambda document: str(document["recipe"]["name"]),
    "metrics": _calibration,
    "search": _search,
    "weights": _recovered,
    "speed": _speed,
    "quality": _quality,
}
