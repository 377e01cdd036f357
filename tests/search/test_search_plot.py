"""The plot of a search: its front, and the position of every mark."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from repshift_cli.errors import UsageError
from repshift_cli.search.plot import MARKS, Chart, figure, save
from repshift_cli.search.result import MeasuredSchedule, pareto_front


def point_at(macs: float, latency: float | None, top1: float) -> MeasuredSchedule:
    return MeasuredSchedule("", (), macs, latency, 0.0, 0.0, None, top1, 1)


def quality(point: MeasuredSchedule) -> float:
    return point.top1 or 0.0


DENSE, PAPER, FOUND = point_at(1.0, 1.0, 100.0), point_at(0.65, 0.75, 30.0), point_at(0.64, 0.7, 95.0)
TRIED = tuple(point_at(macs, None, quality) for macs, quality in ((0.64, 95.0), (0.7, 96.0), (0.83, 57.0), (0.5, 20.0)))


def chart(**changes: object) -> Chart:
    named = {"dense": DENSE, "paper": PAPER, "found": FOUND}
    values = {"title": "tiny", "label": "top-1, %", "quality": quality, "named": named, "tried": TRIED, **changes}
    return Chart(**values)  # type: ignore[arg-type]


def pixels(drawn: Figure) -> np.ndarray:
    """The drawn page, uint8 `[H, W, 3]`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def color_at(page: np.ndarray, drawn: Figure, panel: int, x: float, y: float) -> tuple[int, ...]:
    """The color of the page at the values `x` and `y` of a panel."""
    column, row = drawn.axes[panel].transData.transform((x, y))
    return tuple(int(value) for value in page[page.shape[0] - 1 - round(row), round(column)])


def rgb(color: str) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in to_rgb(color))


class TestFront:
    def test_dominated_points_are_left_out(self) -> None:
        assert pareto_front([DENSE, PAPER, FOUND, *TRIED], quality) == [TRIED[3], FOUND, TRIED[1], DENSE]

    def test_of_equal_costs_the_better_point_is_kept(self) -> None:
        assert pareto_front([point_at(0.5, None, 1.0), point_at(0.5, None, 2.0)], quality) == [point_at(0.5, None, 2.0)]

    def test_points_without_a_latency_are_left_out(self) -> None:
        assert pareto_front([DENSE, PAPER, FOUND, *TRIED], quality, "latency") == [FOUND, DENSE]

    def test_no_points(self) -> None:
        assert pareto_front([], quality) == []


class TestFigure:
    def test_every_mark_is_at_its_values_in_both_panels(self) -> None:
        drawn = figure(chart())
        page = pixels(drawn)
        assert [axes.get_xlabel() for axes in drawn.axes] == ["MACs, fraction of dense", "latency, fraction of dense"]
        for role, point in (("dense", DENSE), ("paper", PAPER), ("found", FOUND)):
            wanted = rgb(MARKS[role]["color"])
            assert color_at(page, drawn, 0, point.macs, quality(point)) == wanted
            assert color_at(page, drawn, 1, point.latency or 0.0, quality(point)) == wanted
        assert color_at(page, drawn, 0, 0.55, 57.0) == (255, 255, 255)

    def test_tried_schedules_are_drawn(self) -> None:
        drawn = figure(chart())
        assert color_at(pixels(drawn), drawn, 0, 0.83, 57.0) == rgb("#b3b3b3")
        assert color_at(pixels(figure(chart(tried=()))), drawn, 0, 0.83, 57.0) == (255, 255, 255)

    def test_without_timings_there_is_one_panel(self) -> None:
        points = {"dense": DENSE, "paper": PAPER, "found": FOUND}
        named = {name: replace(point, latency=None) for name, point in points.items()}
        assert len(figure(chart(named=named)).axes) == 1

    @pytest.mark.parametrize(
        ("limit", "panel", "place"),
        [
            (("macs", 0.6), 0, (0.6, 50.3)),
            (("latency", 0.8), 1, (0.8, 50.3)),
            (("quality", 40.0), 0, (0.55, 40.0)),
        ],
    )
    def test_the_target_is_a_line(self, limit: tuple[str, float], panel: int, place: tuple[float, float]) -> None:
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
        legend = figure(chart(limit=("latency", 0.7))).legends[0]
        assert [text.get_text() for text in legend.get_texts()] == [
            "tried",
            "front of these",
            "dense",
            "the paper's schedule",
            "found",
            "target",
        ]


class TestSave:
    @pytest.mark.parametrize(("ending", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
    def test_the_suffix_gives_the_format(self, ending: str, begin: bytes, tmp_path: Path) -> None:
        save(chart(), tmp_path / f"p.{ending}", force=False)
        assert (tmp_path / f"p.{ending}").read_bytes().startswith(begin)

    def test_the_file_shows_the_figure(self, tmp_path: Path) -> None:
        save(chart(), tmp_path / "p.png", force=False)
        with Image.open(tmp_path / "p.png") as opened:
            written = np.asarray(opened.convert("RGB"))
        assert np.array_equal(written, pixels(figure(chart())))

    def test_an_existing_file_is_kept(self, tmp_path: Path) -> None:
        (tmp_path / "p.png").write_text("mine")
        with pytest.raises(UsageError, match="already exists"):
            save(chart(), tmp_path / "p.png", force=False)
        assert (tmp_path / "p.png").read_text() == "mine"
