"""The page of `repshift report`: its numbers, and that it is safe, self-contained and accessible."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from dataclasses import replace
from functools import cache
from hashlib import sha256
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import stored
from outcome import Command, explained
from PIL import Image
from tiny import save_weights, tiny_vit

from repshift_cli.checkpoints.artifact import Opened, open_model
from repshift_cli.report.images import borders_path, cells_path, data_uri, shown_images
from repshift_cli.report.page import Added, render
from repshift_cli.report.parts import Search
from repshift_cli.report.plots import bar_plot, nice_values, scatter_plot
from repshift_cli.visualize.view import visualize

HOSTILE = "<script>alert(1)</script>\x1b[31m[red]"
LARGEST = 3_000_000


def latency(median: float) -> dict[str, Any]:
    spread = {"median": median, "p10": median - 1, "p90": median + 2}
    return {"gmacs": 1.0, "latency_ms": spread, "throughput": 30.5, "peak_memory_mb": 12.0}


def measured(**changes: Any) -> dict[str, Any]:
    return {
        "dense": latency(27.1),
        "compressed": latency(20.4),
        "ratio": {"macs": 1.2, "latency": 1.328, "latency_clear": True},
        "agreement": 0.96875,
        "divergence": 0.0123,
        "images": {"where": "photos", "count": 64, "seed": 0, "sha256": "0", "part": "held back"},
        **{"batch": 8, "device": "A fast CPU", "dtype": "float32", "threads": 2, "attention": "sdpa:flash"},
        **changes,
    }


def numbers(agreement: float, **others: Any) -> dict[str, Any]:
    return {"images": 64, "distance": 0.0456, "agreement": agreement, **others}


CALIBRATION = {
    **{"clear": True, "mild": False, "sigmas": 7.5, "images": 128, "data": {"where": "photos", "count": 128}},
    "checked": {"chosen": numbers(0.984), "random": numbers(0.421), "default": numbers(0.777)},
    "sites": [{"site": "blocks.1", "candidates": [{"metric": {"kind": "token_norm"}, **numbers(0.9)}]}],
}


def point(macs: float, top1: float | None = None, agreement: float | None = 0.9) -> dict[str, Any]:
    values = {"macs": macs, "latency": None, "distance": 0.1, "kl": 0.2, "agreement": agreement, "top1": top1}
    return {"name": "x", "tokens": [[0, 8]], "images": 64, "recall": None, **values}


def search(**changes: Any) -> dict[str, Any]:
    named = {"dense": point(1.0, 90.0, 1.0), "paper": None, "found": point(0.6, 88.5), "random": point(0.6, 50.0)}
    return {
        **{"target": "macs=0.65", "met": True, "evaluations": 21, "interrupted": False, "points": named},
        "data": {"where": "photos", "count": 128},
        "measured_on": {"device": "A fast CPU", "dtype": "float32", "batch": 8, "threads": 2},
        **changes,
    }


class Page(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.text = html, ""
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open = ""
        self.data: dict[str, list[str]] = {"style": [], "script": []}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open = tag

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open in self.data:
            self.data[self.open].append(data)
        else:
            self.text += " ".join(data.split()) + " "

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


@cache
def stored_model(version: int) -> Opened:
    return open_model(stored(version))


def opened(version: int, **parts: Any) -> Opened:
    """A stored checkpoint, with these parts of its document."""
    found = stored_model(version)
    loaded = replace(found.loaded, document={**(found.loaded.document or {}), **parts})
    return Opened(loaded, found.compressed)


def page_of(found: Opened, folder: Path | None = None, name: str = "fast.safetensors", **added: Any) -> Page:
    shown = visualize(found, str(folder), 2) if folder else None
    return Page(render(found, name, {"made": "2026 by repshift 1"}, Added(shown, "No images were given.", **added)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "photos"
    path.mkdir()
    random = np.random.default_rng(0)
    for name in ("<b>&'\".png", "large.png"):
        side = 900 if name == "large.png" else 40
        Image.fromarray(random.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(path / name)
    return path


def test_the_numbers_are_those_of_the_document() -> None:
    limit = {"target": "max-drop=2", "reached": 1.5}
    page = page_of(opened(1, measured=measured(), calibration=CALIBRATION, search=search(limit=limit)))
    assert "max-drop=2, reached 1.5" in page.text
    assert "1.33x faster, 96.9% of predictions unchanged" in page.text
    for text in ("A fast CPU", "2 threads", "batch 8", "27.1 → 20.4 ms", "26.1 - 29.1", "64 held-out images of photos"):
        assert text in page.text, text
    for text in ("98.4%", "42.1%", "77.7%", "7.5 standard errors", "token_norm", "macs=0.65", "-1.50", "0.600"):
        assert text in page.text, text
    for text in ("repshift bench fast.safetensors -b 8 --dtype float32 --threads 2", "sdpa:flash"):
        assert text in page.text, text


def test_what_was_not_measured_is_said() -> None:
    page = page_of(opened(1))
    assert "Speed not measured, quality not measured" in page.text
    assert "No images were given." in page.text
    assert not re.search(r"faster|%\s+of predictions", page.text)
    slower = measured(ratio={"macs": 1.2, "latency": 0.5, "latency_clear": False}, compressed=latency(54.2))
    assert "2.00x slower" in page_of(opened(1, measured=slower)).text
    unclear = measured(ratio={"macs": 1.2, "latency": 1.01, "latency_clear": False}, compressed=latency(26.9))
    assert "No clear speed-up" in page_of(opened(1, measured=unclear)).text
    foreign = measured(images={"where": "builtin:digits", "count": 32})
    assert "quality not measured" in page_of(opened(1, measured=foreign)).text


def test_a_file_without_timings() -> None:
    untimed = {"latency_ms": None, "throughput": None, "peak_memory_mb": None}
    ratio = {"macs": 1.2, "latency": None, "latency_clear": None}
    page = page_of(opened(1, measured=measured(dense=untimed, compressed=untimed, ratio=ratio)))
    assert "Speed not measured, 96.9% of predictions unchanged" in page.text
    assert "Peak memory" not in page.text
    assert "Not measured. Run: repshift bench." in page.text
    assert "cannot be read" not in page.text


def test_a_damaged_part_is_left_out() -> None:
    for part in (3, "text", {"agreement": "x"}, [[]], {"ratio": {"latency": 10**400}}):
        page = page_of(opened(1, measured=part, calibration=part, search=part))
        assert page.text.count("of the file cannot be read") == 3


def test_models_of_other_families() -> None:
    clips = page_of(opened(3, measured=measured()))
    assert "96.9% of clips still closest to their dense embedding" in clips.text
    vim = page_of(opened(2, measured=measured(agreement=None)))
    assert "quality not measured" in vim.text  # it has a head, so it was not measured
    assert "1.33x faster" in page_of(opened(5, measured=measured())).text


def test_texts_of_the_file_are_escaped(folder: Path) -> None:
    bad = measured(device=HOSTILE, images={"where": HOSTILE, "count": 8}, dtype=HOSTILE, attention=HOSTILE)
    found = opened(4, measured=bad, search=search(target=HOSTILE * 500), calibration=CALIBRATION)
    page = page_of(found, folder, f"{HOSTILE}.safetensors")
    scripts = [each.get("type") for each in page.all("script")]
    assert scripts == [*["application/json"] * 3, None]  # two images, the texts of the slider
    assert not page.all("b")[4:]
    assert "\x1b" not in page.html
    assert "<script>alert(1)</script>\\x1b[31m[red]" in page.text
    assert len(page.html) < LARGEST


def test_nothing_is_loaded_from_elsewhere(folder: Path) -> None:
    page = page_of(opened(4, measured=measured()), folder)
    for _, attrs in page.elements:
        for name in ("src", "href", "data", "srcset", "action"):
            assert not attrs.get(name) or str(attrs[name]).startswith(("data:image/", "#")), attrs
        assert not any(name == "style" or name.startswith("on") for name in attrs), attrs
    (policy,) = [each["content"] for each in page.all("meta") if each.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    for kind, text in (("style", page.data["style"][0]), ("script", page.data["script"][-1])):
        assert f"{kind}-src 'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" in policy
        assert "//" not in text
    assert len(page.html) < LARGEST


def test_readable_with_a_keyboard_and_a_screen_reader(folder: Path) -> None:
    page = page_of(opened(4, measured=measured(), calibration=CALIBRATION, search=search()), folder)
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    labelled = {each.get("for") for each in page.all("label")}
    assert page.all("input")
    assert all(each.get("id") in labelled for each in page.all("input"))
    assert len(page.all("img")) == 2
    assert all(each.get("alt") for each in page.all("img"))
    plots = page.all("svg")
    assert all(each.get("aria-hidden") or (each.get("role") == "img" and each.get("aria-label")) for each in plots)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(later <= before + 1 for before, later in pairwise(levels))
    assert all(each.get("scope") for each in page.all("th"))
    assert page.all("html")[0]["lang"] == "en"
    named = {name for _, attrs in page.elements for name in str(attrs.get("aria-labelledby") or "").split()}
    assert named <= set(ids)


def test_colours_have_enough_contrast() -> None:
    style = files("repshift_cli.report").joinpath("page.css").read_text("utf-8")
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in style.split("prefers-color-scheme: dark"))

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    for colours in (light, dark):
        for text in ("ink", "quiet", "main"):
            for ground in ("page", "card", "soft"):
                low, high = sorted(luminance(colours[each]) for each in (text, ground))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def test_the_groups_of_merged_tokens_are_those_of_the_trace(folder: Path) -> None:
    found = stored_model(4)
    shown = visualize(found, str(folder), 2)
    page = Page(render(found, "x", {}, Added(shown)))
    embedded = [json.loads(text) for text in page.data["script"][:2]]
    (layer,) = shown.groups
    assert [each[1] for each in embedded] == shown.groups[layer].tolist()
    assert embedded[0][0] == list(range(9))
    assert "tokens, merged from 9 patches" in page.html
    assert not page_of(opened(1), folder).data["script"][0].startswith("[[")


def test_the_page_stays_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (1000, 800, 3), dtype=np.uint8)
    assert len(data_uri(noise)) < 120_000
    shown = visualize(stored_model(4), str(folder), 2)
    first, second = shown_images(shown)
    monkeypatch.setattr("repshift_cli.report.images.MOST_BYTES", first.size + second.size - 1)
    page = Page(render(stored_model(4), "x", {}, Added(shown)))
    assert len(page.all("img")) == 1
    assert "The first 1 are shown" in page.text


def test_paths() -> None:
    cells = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=bool)
    assert cells_path(cells) == "M0 0H2V2H0zM2 2H3V3H2z"
    assert borders_path(cells) == "M0 2H3M2 0V3"
    assert cells_path(~cells[:0]) == ""


def test_each_point_is_against_the_dense_model_of_its_half() -> None:
    selection = {"dense": point(1.0, 80.0, 1.0), "found": point(0.6, 79.0)}
    plot = scatter_plot(
        Search.model_validate(search(target="max-drop=2", front=[point(0.5, 79.0)], selection=selection))
    )
    assert plot is not None
    assert [mark.text.split(", ")[-1].split()[0] for mark in plot.marks] == ["0.00", "-40.00", "-1.50"]
    assert [mark.text.split(", ")[-1].split()[0] for mark in plot.front] == ["-1.00"]
    old = scatter_plot(Search.model_validate(search()))
    assert old is not None
    assert not old.front
    assert "no Pareto front" in page_of(opened(1, search=search())).text


def test_plots() -> None:
    plot = bar_plot({0: 100, 1: 100, 2: 50}, dict.fromkeys(range(3), 100))
    assert [round(bar.height / plot.bars[0].height, 6) for bar in plot.bars] == [1, 1, 0.5]
    assert [bar.label for bar in plot.bars] == ["100", "", "50"]
    assert nice_values(0.0, 300.0) == [0, 100, 200, 300]
    assert all(2 <= len(nice_values(0.0, high)) <= 6 for high in (0.003, 0.07, 1.0, 3.3, 7e7))


def test_the_command(cli: Command, folder: Path, tmp_path: Path) -> None:
    made, page = stored(4), tmp_path / "r.html"
    outcome = cli("report", made, "--data", folder, "--count", 1, "-o", page, "--json")
    assert outcome.rc == 0, outcome.stderr
    document = json.loads(outcome.stdout)
    assert document["output"] == str(page)
    assert document["bytes"] == page.stat().st_size
    explained(cli("report", made, "-o", page), 2, "already exists", "--force")
    assert cli("report", made, "-o", page, "--force").rc == 0
    assert "No images were given" in page.read_text("utf-8")
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["r.html"]
    clips = cli("report", stored(3), "-o", "clips.html")
    assert "Clips are not shown" in clips.stdout


def test_results_of_other_commands(cli: Command, tmp_path: Path) -> None:
    made = stored(1)
    macs = open_model(made).macs / 1e9
    setting = {"batch": 8, "dtype": "float32", "compile": "off", "image_size": 24, "attention_mode": "auto"}
    times = {"latency_ms": {"median": 33.3, "p10": 31.1, "p90": 35.5}, "throughput": 240.1}
    runs = [
        {"name": "dense", "role": "dense", "gmacs": 2 * macs, **setting, **times},
        {"name": "fast", "role": "compressed", "gmacs": macs, **setting, **times},
    ]
    ratio = {
        "name": "fast",
        "against": "dense",
        "latency": 1.445,
        "latency_p10": 1.4,
        "latency_p90": 1.5,
        "clear": True,
    }
    bench = {"device": "A fast CPU", "threads": 2, "runs": runs, "ratios": [{**ratio, **setting}]}
    score = {"top1": 81.25, "top1_interval": [79.5, 83.0], "gmacs": macs}
    evaluation = {**score, "dataset": "val", "images": 900, "dense": {**score, "top1": 82.0}, "agreement": 0.955}
    for name, document in (("bench.json", bench), ("eval.json", evaluation)):
        (tmp_path / name).write_text(json.dumps(document))
    assert cli("report", made, "--bench", "bench.json", "--eval", "eval.json", "-o", "r.html").rc == 0
    text = Page((tmp_path / "r.html").read_text("utf-8")).text
    for part in (
        "33.3",
        "31.1 - 35.5",
        "1.45x faster (1.40 - 1.50)",
        "-0.75 points of top-1",
        "95.5%",
        "79.50 - 83.00",
    ):
        assert part in text, part
    explained(cli("report", made, "--eval", "bench.json", "-o", "x.html"), 2, "not a document", "repshift eval")
    other = stored(4)
    explained(cli("report", other, "--eval", "eval.json", "-o", "x.html"), 2, "no model in it has")


def test_what_the_command_refuses(cli: Command, tmp_path: Path) -> None:
    dense = save_weights(tiny_vit(embed_dim=128), tmp_path / "dense.safetensors")
    explained(cli("report", dense), 2, "dense model", f"repshift compress {dense}")
    made = stored(1)
    explained(cli("report", made, "-o", "missing/r.html"), 1, "does not exist")
    explained(cli("report", made, "-o", "r.pdf"), 2, "must end in .html")
    assert [each.name for each in tmp_path.iterdir()] == ["dense.safetensors"]
