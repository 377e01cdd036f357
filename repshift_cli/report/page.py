"""The page: what a checkpoint's document holds and the kept tokens of some images, as one HTML file."""

from __future__ import annotations

import shlex
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.reduction.compressed_model import CompressedModel
from repshift_cli.reduction.reducers.base import Merger, build_reducer
from repshift_cli.report.images import shown_images, stages
from repshift_cli.report.parts import BenchDocument, Calibration, EvalDocument, Measured, Point, Search, read_part
from repshift_cli.report.plots import NAMES, Bars, bar_plot, interval_plot, milliseconds, scatter_plot
from repshift_cli.utils.stats import percent_interval
from repshift_cli.utils.text import describe_metric, describe_tokens, visible
from repshift_cli.version import __version__
from repshift_cli.visualize.view import Visualization

_LONGEST = 300
"""Letters of one text of the document."""

_CANDIDATES = 5
"""Candidates of a site that are listed."""


@dataclass(frozen=True)
class Added:
    """Documents of other commands, None where not given; `images` have their kept tokens, `no_images` says why not."""

    images: Visualization | None = None
    no_images: str = ""
    bench: BenchDocument | None = None
    evaluation: EvalDocument | None = None


def render(opened: Opened, name: str, provenance: Mapping[str, str], added: Added) -> str:
    """The page of a compressed model.

    Args:
        opened: a compressed model.
        name: of the file, for the commands.
        provenance: lines of text by title, which say how the file was made.
    """
    shown = added.images
    compressed, document = opened.compressed, opened.loaded.document or {}
    assert compressed is not None
    measured, bad_measured = read_part(Measured, document, "measured")
    calibration, bad_calibration = read_part(Calibration, document, "calibration")
    search, bad_search = read_part(Search, document, "search")
    titles = {"measured": bad_measured, "calibration": bad_calibration, "search": bad_search}
    unit = opened.loaded.description.preprocessing.unit
    quality = _quality(opened, measured, unit)
    latencies = measured.latencies if measured else {}
    style, script = (files(__package__).joinpath(each).read_text("utf-8") for each in ("page.css", "page.js"))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_finalize
    )
    environment.filters |= {"percent": _percent, "metric": describe_metric, "tokens": describe_tokens}
    environment.filters |= {"ms": milliseconds}
    template = environment.from_string(files(__package__).joinpath("page.html.j2").read_text("utf-8"))
    return template.render(
        style=Markup(style),  # noqa: S704 (files of this package)
        script=Markup(script),  # noqa: S704
        style_hash=_digest(style),
        script_hash=_digest(script),
        version=__version__,
        model=opened.loaded.description.name,
        unit=unit,
        is_random=document.get("source", {}).get("origin") == "random",
        speed=_speed(measured),
        quality=quality,
        measured=measured,
        unreadable=[title for title, bad in titles.items() if bad],
        gmacs=(opened.dense_macs / 1e9, opened.macs / 1e9),
        plan=compressed.plan,
        recovered=len(compressed.replaced.parameters()) if compressed.replaced is not None else 0,
        merges=isinstance(build_reducer(compressed.plan.reducer), Merger),
        bars=token_bars(compressed),
        latencies=latencies,
        latency=interval_plot(latencies) if latencies else None,
        calibration=calibration,
        candidates=_CANDIDATES,
        search=search,
        scatter=scatter_plot(search) if search else None,
        names=NAMES,
        points=_points(search) if search else [],
        provenance=provenance,
        sha256=document.get("source", {}).get("sha256"),
        images=shown_images(shown) if shown else (),
        stages=stages(shown) if shown else (),
        data=shown.samples.description if shown else "",
        unchanged=shown.unchanged if shown else None,
        drawn=len(shown.results) if shown else 0,
        no_images=added.no_images,
        bench=added.bench,
        evaluation=added.evaluation,
        commands=_commands(opened, name, measured),
    )


def token_bars(compressed: CompressedModel) -> Bars:
    """The tokens that enter each block; for a feature map those at its output, before tokens are dropped."""
    layout, plan = compressed.layout, compressed.plan
    if layout.map_size:
        return bar_plot(layout.tokens(plan.grids_kept), layout.tokens())
    counts = compressed.family.tokens_entering(compressed.model, plan)[:-1]
    whole = compressed.family.tokens_entering(compressed.model, None)[:-1]
    return bar_plot(dict(enumerate(counts)), dict(enumerate(whole)))


def _speed(measured: Measured | None) -> str:
    """The headline of speed."""
    latencies, ratio = (measured.latencies, measured.ratio.latency) if measured else ({}, None)
    if not measured or not latencies or not ratio:
        return "speed not measured"
    if measured.ratio.latency_clear:
        return f"{ratio:.2f}x faster"
    if latencies["dense"].p90 < latencies["compressed"].p10:
        return f"{1 / ratio:.2f}x slower"
    return "no clear speed-up"


def _quality(opened: Opened, measured: Measured | None, unit: str) -> dict[str, str]:
    """The headline of quality, its value and the inputs that it was measured on."""
    nothing = {"text": "quality not measured", "value": "not measured", "where": f"give {unit}s with --data"}
    if measured is None or (measured.images.where.startswith("builtin:") and not opened.loaded.is_builtin):
        return nothing
    images = measured.images
    held_out = "held-out " if images.part else ""
    where = f"{images.count} {held_out}{unit}s of {images.where}"
    assert opened.compressed is not None
    if measured.agreement is None:
        if opened.compressed.num_classes:
            return nothing
        value = f"{measured.divergence:.4f}"
        return {"text": f"features moved by {value} (1 - cosine)", "value": value, "where": where}
    share, what = _percent(measured.agreement), "predictions unchanged"
    if unit == "clip":
        what = "clips still closest to their dense embedding"
    if images.count:
        low, high = percent_interval(round(measured.agreement * images.count), images.count)
        where += f"; 95% interval {low:.1f}-{high:.1f}%"
    return {"text": f"{share} of {what}", "value": share, "where": where}


def _points(search: Search) -> list[tuple[str, str, Point, Point | None]]:
    """The named schedules: key, half, values, and the dense model on the same half."""
    found: list[tuple[str, str, Point, Point | None]] = []
    for key, point in search.points.items():
        if point is not None:
            half = "selection" if key == "given" else "held-out"
            dense = search.selection.get("dense") if key == "given" else search.points.get("dense")
            found.append((key, half, point, dense))
    return found


def _commands(opened: Opened, name: str, measured: Measured | None) -> list[tuple[str, str]]:
    """What each command is for, and the command."""
    source, args = (opened.loaded.document or {}).get("source", {}), opened.loaded.description.args
    tower = ("--tower", args["tower"]) if "tower" in args else ()
    how = ("-b", measured.batch, "--dtype", measured.dtype, "--threads", measured.threads) if measured else ()
    assert opened.compressed is not None
    data = "builtin:digits" if opened.loaded.is_builtin else "FOLDER"
    evaluation = ("--dataset", data, "--compare-dense") if opened.compressed.num_classes else ("--embeddings", data)
    found: list[tuple[str, tuple[object, ...]]] = [
        ("Show blocks, tokens and the origin of the file", ("inspect", name)),
        ("Measure the speed on this machine, with intervals", ("bench", name, *how)),
    ]
    if opened.loaded.description.preprocessing.frames is None:
        found.append(("Measure the quality on labelled images", ("eval", name, *evaluation)))
    found += [
        ("Write the recipe that gives the same plan", ("recipes", "show", name, "--calibrated")),
        (
            "Save it as recipe.yaml, then make the file again from the dense model",
            ("compress", source.get("name") or "MODEL", *tower, "--recipe", "recipe.yaml", "-o", "again.safetensors"),
        ),
        ("Write the dense model back", ("dense", name)),
    ]
    return [(title, shlex.join(["repshift", *(visible(str(word)) for word in words)])) for title, words in found]


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _finalize(value: Any) -> Any:
    """Escape control characters and shorten texts of the document; not the parts of the template."""
    if type(value) is not str:
        return value
    return visible(value if len(value) <= _LONGEST else f"{value[:_LONGEST]}...")


def _digest(text: str) -> str:
    """For the content security policy."""
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
