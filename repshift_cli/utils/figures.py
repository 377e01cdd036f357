"""File formats of figures."""

from __future__ import annotations

from pathlib import Path

from repshift_cli.errors import UsageError

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
