"""File formats of figures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repshift_cli.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOT_FORMATS = ("png", "svg", "pdf")


def figure_format(path: Path) -> str:
    """The format named by the extension of a file, in lower case."""
    return path.suffix.lower().removeprefix(".")


def check_figure_path(option: str, path: Path) -> None:
    """Check the extension of a figure that an option names.

    Raises:
        UsageError: it is not one of `PLOT_FORMATS`.
    """
    if figure_format(path) not in PLOT_FORMATS:
        raise UsageError(f"invalid {option} {path}: must end in .png, .svg or .pdf")


def write_figure(figure: Figure, path: Path, **options: Any) -> None:
    """Draw a figure in memory, then write it: on a full disk, matplotlib's PDF writer hides the error."""
    drawn = io.BytesIO()
    figure.savefig(drawn, **options)
    path.write_bytes(drawn.getbuffer())
