from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from repshift_cli.utils.figures import write_figure


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_any_text_can_be_drawn(kind: str, tmp_path: Path) -> None:
    figure = Figure(figsize=(2, 2))
    figure.suptitle("$_{ [/red] \udcff")
    figure.subplots().plot([0, 1], [0, 1], label="$x")
    write_figure(figure, tmp_path / "figure", kind)
    assert (tmp_path / "figure").stat().st_size > 100


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_a_full_disk_is_an_os_error(kind: str) -> None:
    with pytest.raises(OSError, match="No space left"):
        write_figure(Figure(figsize=(2, 2)), Path("/dev/full"), kind)
