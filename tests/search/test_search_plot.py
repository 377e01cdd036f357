"""The picture of a search: what is on the front, and that every mark stands where its numbers say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from repshift_cli.errors import UsageError
from repshift_cli.search.plot import MARKS, Chart, Limit, Mark, Point, figure, front, save

DENSE, PAPER, FOUND = Point(1.0, 1.0, 100.0), Point(0.65, 0.75, 30.0), Point(0.64, 0.7, 95.0)
TRIED = (Point(0.64, None, 95.0), Point(0.7, None, 96.0), Point(0.83, None, 57.0), Point(0.5, None, 20.0))


def chart(**changes: object) -> Chart:
    marks = (
        Mark("dense", "dense", DENSE),
        Mark("paper", "the paper's schedule", PAPER),
        Mark("found", "found", FOUND),
    )
    values = {"title": "tiny", "quality": "predictions unchanged, %", "marks": marks, "tried": TRIED, **changes}
    return Chart(**values)  # type: ignore[arg-type]


def pixels(drawn: Figure) -> np.ndarray:
    """The page as it is drawn, uint8 `[H, W, 3]`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def color_at(page: np.ndarray, drawn: Figure, panel: int, x: float, y: float) -> tuple[int, ...]:
    """The colour of the page where a panel has the values `x` and `y`."""
    column, row = drawn.axes[panel].transData.transform((x, y))
    return tuple(int(value) for value in page[page.shape[0] - 1 - round(row), round(column)])


def rgb(color: str) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in to_rgb(color))


class TestFront:
    def test_only_what_nothing_beats_stays(self) -> None:
        assert front([DENSE, PAPER, FOUND, *TRIED]) == [TRIED[3], FOUND, TRIED[1], DENSE]

    def test_of_equals_in_cost_the_better_one_stays(self) -> None:
        assert front([Point(0.5, None, 1.0), Point(0.5, None, 2.0)]) == [Point(0.5, None, 2.0)]

    def test_what_was_not_timed_is_not_on_the_front_of_latency(self) -> None:
        assert front([DENSE, PAPER, FOUND, *TRIED], "latency") == [FOUND, DENSE]

    def test_of_nothing(self) -> None:
        assert front([]) == []


class TestFigure:
    def test_every_mark_stands_at_its_numbers_in_both_panels(self) -> None:
        drawn = figure(chart())
        page = pixels(drawn)
        assert [axes.get_xlabel() for axes in drawn.axes] == ["MACs, fraction of dense", "latency, fraction of dense"]
        for role, point in (("dense", DENSE), ("paper", PAPER), ("found", FOUND)):
            wanted = rgb(MARKS[role].color)
            assert color_at(page, drawn, 0, point.macs, point.quality) == wanted
            assert color_at(page, drawn, 1, point.latency or 0.0, point.quality) == wanted
        assert color_at(page, drawn, 0, 0.55, 57.0) == (255, 255, 255)

    def test_what_was_tried_is_drawn_too(self) -> None:
        drawn = figure(chart())
        assert color_at(pixels(drawn), drawn, 0, 0.83, 57.0) == rgb("#b3b3b3")
        assert color_at(pixels(figure(chart(tried=()))), drawn, 0, 0.83, 57.0) == (255, 255, 255)

    def test_without_timings_there_is_one_panel(self) -> None:
        marks = tuple(
            Mark(role, role, Point(point.macs, None, point.quality))
            for role, point in (("dense", DENSE), ("paper", PAPER), ("found", FOUND))
        )
        assert len(figure(chart(marks=marks)).axes) == 1

    @pytest.mark.parametrize(
        ("limit", "panel", "place"),
        [
            (Limit("macs", 0.6), 0, (0.6, 50.3)),
            (Limit("latency", 0.8), 1, (0.8, 50.3)),
            (Limit("quality", 40.0), 0, (0.55, 40.0)),
        ],
    )
    def test_the_target_is_a_line(self, limit: Limit, panel: int, place: tuple[float, float]) -> None:
        drawn = figure(chart(limit=limit))
        page = pixels(drawn)
        column, row = drawn.axes[panel].transData.transform(place)
        near = page[
            page.shape[0] - 12 - round(row) : page.shape[0] + 12 - round(row), round(column) - 12 : round(column) + 12
        ]
        assert (np.abs(near.astype(int) - rgb("#009e73")).sum(axis=-1) < 60).any()
        clean = pixels(figure(chart()))
        assert not (np.abs(clean.astype(int) - rgb("#009e73")).sum(axis=-1) < 60).any()

    def test_the_legend_names_everything(self) -> None:
        legend = figure(chart(limit=Limit("latency", 0.7))).legends[0]
        assert [text.get_text() for text in legend.get_texts()] == [
            "tried, on the half that chose",
            "front of these",
            "dense",
            "the paper's schedule",
            "found",
            "target",
        ]


class TestSave:
    @pytest.mark.parametrize(("ending", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
    def test_the_ending_tells_the_format(self, ending: str, begin: bytes, tmp_path: Path) -> None:
        save(chart(), tmp_path / f"p.{ending}", force=False)
        assert (tmp_path / f"p.{ending}").read_bytes().startswith(begin)

    def test_the_file_shows_what_the_figure_does(self, tmp_path: Path) -> None:
        save(chart(), tmp_path / "p.png", force=False)
        with Image.open(tmp_path / "p.png") as opened:
            written = np.asarray(opened.convert("RGB"))
        assert np.array_equal(written, pixels(figure(chart())))

    def test_an_existing_file_is_kept(self, tmp_path: Path) -> None:
        (tmp_path / "p.png").write_text("mine")
        with pytest.raises(UsageError, match="already exists"):
            save(chart(), tmp_path / "p.png", force=False)
        assert (tmp_path / "p.png").read_text() == "mine"
