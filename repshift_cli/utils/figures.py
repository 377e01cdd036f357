"""File formats of figures, and writing them."""

from __future__ import annotations

from io import BytesIO
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


def write_figure(figure: Figure, path: Path, file_format: str, **options: Any) -> None:
    """Write a figure; its texts are plain text, without formulas, and what is not Unicode is escaped.

    Raises:
        OSError: writing failed.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if isinstance(text, Text):
            text.set_parse_math(False)
            text.set_text(text.get_text().encode("utf-8", "backslashreplace").decode())
    drawn = BytesIO()  # some writers hide the error of a full disk
    figure.savefig(drawn, format=file_format, **options)
    path.write_bytes(drawn.getvalue())
