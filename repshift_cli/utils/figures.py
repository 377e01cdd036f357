"""Figure file formats."""

from __future__ import annotations

__all__ = [
    "PLOT_FORMATS",
]


PLOT_FORMATS = ("png", "svg", "pdf")
