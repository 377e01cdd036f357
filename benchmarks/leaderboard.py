"""Quality of the methods to reduce tokens on real images, Fashion-MNIST, at equal cost.

    python benchmarks/leaderboard.py run vit_196 vit_100 --threads 2
    python benchmarks/leaderboard.py speed vit_196 vit_100 --threads 1
    python benchmarks/leaderboard.py publish vit_196 vit_100

`run` evaluates each method at each MAC ratio on the test images and writes each row to the state file at once; a second
run adds what is missing. `speed` times rows in ONNX Runtime, the dense model and the rows in turn; run it alone, on one
thread, for the threads of one session disturb the next one. `publish` writes the page.

At a ratio, the methods of the grid drop the same share after three sites, the first and those at a quarter and at half
of all: the smallest at which the MACs, those of score and reducer included, are within the ratio. In a CNN they drop
rows and columns. Scores are fitted, calibrated and searched on training images without labels. The models are those of
`scripts/train_fashion.py`.
"""

from __future__ import annotations

import argparse
import base64
import copy
import json
import math
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _results import publish, table
from _timing import timed
from torch import Tensor, nn

from repshift_cli.calibration.calibrate import calibrate
from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.data.sources.idx import open_fashion
from repshift_cli.errors import RepshiftError
from repshift_cli.export.job import export
from repshift_cli.export.request import Request
from repshift_cli.measure.device import device_name
from repshift_cli.measure.macs import count_macs
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.compressed_model import CompressedModel, attach
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.plans import has_open_fields, resolve_for
from repshift_cli.search.result import SearchSettings
from repshift_cli.search.search import search
from repshift_cli.search.target import SearchTarget
from repshift_cli.utils.progress import Silent
from repshift_cli.utils.stats import mcnemar, paired_difference, percent_interval

FOLDER = Path(__file__).resolve().parent / "fashion"
RATIOS = (0.8, 0.65, 0.5, 0.35)
BATCH = 50
CALIBRATION_IMAGES = 512
HALVINGS = 12
LARGEST_SHARE = 0.95
SPEED_ROUNDS = 15
TRACED = 200
CHANCE = 0.05

Spec = Mapping[str, Any]
RANDOM: Spec = {"kind": "random", "seed": 0}
SCORES: dict[str, Spec] = {
    "paper's choice": {"kind": "representation_shift", "operation": "mlp", "distance": "l2", "polarity": "largest"},
    "shift": {"kind": "representation_shift"},
    "fitted": {"kind": "fitted"},
    "class row": {"kind": "class_attention"},
    "redundancy": {"kind": "redundancy"},
    "coverage": {"kind": "coverage"},
    "random": RANDOM,
}
REDUCERS = ("prune", "fuse", "merge")


@dataclass(frozen=True)
class Way:
    """What a method makes of the model: a plan, or another model with its preprocessing."""

    plan: Plan | None
    model: nn.Module
    macs: int
    preprocessing: Preprocessing


class Study:
    """The methods on one model.

    Attributes:
        calibration: training images `[n, 3, S, S]`.
    """

    def __init__(self, name: str) -> None:
        self.loaded = load_checkpoint(str(FOLDER / f"{name}.safetensors"))
        self.model = self.loaded.model
        self.preprocessing = self.loaded.description.preprocessing
        self.family = match(self.model)
        self.layout = self.family.layout(self.model)
        self.dense_macs = self.family.macs(self.model, None)
        self.sequence = self.layout.map_size is None
        self.calibration = load_images(self.preprocessing, True, CALIBRATION_IMAGES)[0]

    def methods(self, smaller: Sequence[str]) -> Iterator[tuple[str, Callable[[float], Way]]]:
        """Name and function of each method; the function takes a MAC ratio."""
        for name, given in SCORES.items():
            score = (
                given if self.sequence or given["kind"] != "representation_shift" else {**given, "operation": "block"}
            )
            for reducer in REDUCERS if self.sequence else ("prune",):
                yield f"{name}, {reducer}", partial(self.at_sites, score, {"kind": reducer})
        if self.sequence:
            yield "bipartite", partial(self.at_sites, RANDOM, {"kind": "bipartite"})
            yield "ToMe in every block", self.in_every_block
            yield "searched, merge", partial(self.searched, SCORES["coverage"], {"kind": "merge"})
        score = SCORES["coverage" if self.sequence else "fitted"]
        yield "searched, prune", partial(self.searched, score, {"kind": "prune"})
        yield "smaller images", self.smaller_images
        for name in smaller:
            yield f"model {name}", partial(self.other_model, name)

    def at_sites(self, score: Spec, reducer: Spec, ratio: float) -> Way:
        """Equal shares at the sites."""
        sites = [site.layer for site in self.layout.sites]
        layers = [sites[place] for place in sorted({0, len(sites) // 4, len(sites) // 2})]

        def plan(share: float) -> Plan | None:
            drops = [{"layer": layer, "drop_ratio": round(share, 4)} for layer in layers]
            return self.resolved({"metric": score, "reducer": reducer, "layers": drops})

        low, high = 0.0, LARGEST_SHARE
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            found = plan(middle)  # None if a share is too large for the model or the reducer
            enough = found is None or self.macs(found) <= ratio * self.dense_macs
            low, high = (low, middle) if enough else (middle, high)
        found = plan(high)
        if found is None or self.macs(found) > ratio * self.dense_macs:
            raise RepshiftError("no share is enough")
        return self.way(found)

    def in_every_block(self, ratio: float) -> Way:
        """ToMe (arXiv 2210.09461): as many tokens merged in each block, in later ones one less, within the ratio."""
        blocks = self.layout.blocks - (1 if self.layout.prefix_tokens else 0)  # nothing is gained behind the last block
        for total in range(1, blocks * self.layout.patch_tokens):
            left, drops = self.layout.patch_tokens, []
            for layer in range(blocks):
                dropped = min(total // blocks + (layer < total % blocks), left // 2)
                left -= dropped
                drops += [{"layer": layer, "drop_tokens": dropped}] if dropped else []
            found = self.resolved({"metric": RANDOM, "reducer": {"kind": "bipartite"}, "layers": drops})
            if found is not None and self.macs(found) <= ratio * self.dense_macs:
                return self.way(found)
        raise RepshiftError("no number is enough")

    def searched(self, score: Spec, reducer: Spec, ratio: float) -> Way:
        """`repshift search` with a target of MACs."""
        start = Recipe.model_validate({"version": 1, "metric": score, "reducer": reducer, "budget": {"macs": ratio}})
        settings = SearchSettings(
            target=SearchTarget("macs", ratio),
            images=self.calibration,
            identity={},
            start=start,
            batch_size=64,
            seconds=0,
        )
        found = search(self.model, self.family, settings, Silent())
        if not found.met:
            raise RepshiftError(f"the nearest is {found.nearest:.3f}")
        return self.way(found.plan)

    def smaller_images(self, ratio: float) -> Way:
        """The dense model on the largest images within the ratio."""
        patch: Any = getattr(self.model, "patch_embed", None)
        step = 1 if patch is None else patch.patch_size[0]
        for side in range(self.preprocessing.input_size[1] - step, 0, -step):
            model: Any = copy.deepcopy(self.model)
            if patch is not None:
                model.set_input_size(img_size=(side, side))
            macs = count_macs(model, (3, side, side))
            if macs <= ratio * self.dense_macs:
                return Way(None, model.eval(), macs, replace(self.preprocessing, input_size=(3, side, side)))
        raise RepshiftError("no size is small enough")

    def other_model(self, name: str, ratio: float) -> Way:
        """Another dense model, at the smallest ratio that it fits into."""
        loaded = load_checkpoint(str(FOLDER / f"{name}.safetensors"))
        macs = match(loaded.model).macs(loaded.model, None)
        fitting = [one for one in RATIOS if macs <= one * self.dense_macs]
        if not fitting or ratio != min(fitting):
            raise RepshiftError("at another ratio")
        return Way(None, loaded.model, macs, loaded.description.preprocessing)

    def resolved(self, recipe: Mapping[str, Any]) -> Plan | None:
        """The plan of a recipe; None if it does not fit."""
        try:
            return resolve_for(self.model, Recipe.model_validate({"version": 1, **recipe}))
        except RepshiftError:
            return None

    def macs(self, plan: Plan) -> int:
        compressed = attach(self.model, plan)
        try:
            return compressed.macs()
        finally:
            compressed.detach()

    def way(self, plan: Plan) -> Way:
        """The way of a plan, with its open fields filled."""
        if has_open_fields(plan):
            found = calibrate(
                self.model,
                self.family,
                plan,
                images=self.calibration,
                identity={},
                batch_size=64,
                progress=Silent(),
            )
            plan = plan.with_metrics(found.specs)
        return Way(plan, self.model, self.macs(plan), self.preprocessing)


def load_images(preprocessing: Preprocessing, train: bool, count: int | None = None) -> tuple[Tensor, Tensor]:
    """The first images of a split, `[n, 3, S, S]`, and their labels."""
    data, transform = open_fashion(None, train), preprocessing.transform()
    chosen = range(min(count or len(data), len(data)))
    pixels = torch.stack([transform(data.load(index)[0]) for index in chosen])
    return pixels, torch.from_numpy(data.labels[: len(pixels)].astype(np.int64))


class Board:
    """The rows of one model: a file with a JSON document per line.

    Attributes:
        rows: by method and ratio. A row has `macs`, `classes` and `margins` (see `predicted`), `emptied`, `plan`,
            `seconds`, and `error` where a method has no model at that ratio.
    """

    def __init__(self, name: str) -> None:
        self.path = FOLDER / f"{name}.jsonl"
        self.rows: dict[tuple[str, float], dict[str, Any]] = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.rows[row["method"], row["ratio"]] = row

    def add(self, method: str, ratio: float, **values: Any) -> None:
        row = {"method": method, "ratio": ratio, **values}
        self.rows[method, ratio] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def values(self, method: str, ratio: float, key: str = "classes") -> np.ndarray:
        """`classes` or `margins` of a row, uint8 `[n]`."""
        return np.frombuffer(zlib.decompress(base64.b64decode(self.rows[method, ratio][key])), np.uint8)


def packed(values: Tensor) -> str:
    return base64.b64encode(zlib.compress(values.to(torch.uint8).numpy().tobytes(), 9)).decode("ascii")


@torch.inference_mode()
def predicted(model: nn.Module, pixels: Tensor) -> dict[str, str]:
    """The predicted class of each image, and the margin of its probability over the second, in 255 steps."""
    chances = torch.cat([model(batch).softmax(-1) for batch in pixels.split(BATCH)])
    first, second = chances.topk(2).values.unbind(-1)
    return {"classes": packed(chances.argmax(-1)), "margins": packed((255 * (first - second)).round())}


def evaluate(way: Way, images: dict[tuple[int, ...], Tensor]) -> dict[str, Any]:
    shape = way.preprocessing.input_size
    if shape not in images:
        images[shape] = load_images(way.preprocessing, False)[0]
    if way.plan is None:
        return predicted(way.model, images[shape])
    compressed = attach(way.model, way.plan)
    try:
        found: dict[str, Any] = predicted(compressed, images[shape])
        if not way.plan.grids_kept:
            found["emptied"] = emptied(compressed, images[shape][:TRACED])
        return found
    finally:
        compressed.detach()


def emptied(compressed: CompressedModel, pixels: Tensor) -> float:
    """The share of windows of 2x2 patches of which no token is left after the last site."""
    kept = compressed.trace(pixels).kept
    places = kept[max(kept)]
    side = math.isqrt(compressed.plan.patch_tokens)
    windows = places // side // 2 * (side // 2) + places % side // 2
    left = torch.zeros(len(pixels), (side // 2) ** 2).scatter_(1, windows.cpu(), 1.0)
    return 1.0 - float(left.mean())


def run(name: str, smaller: Sequence[str], wanted: Sequence[str], ratios: Sequence[float]) -> None:
    """Add the rows that are missing."""
    study, board = Study(name), Board(name)
    images: dict[tuple[int, ...], Tensor] = {}
    if ("dense", 1.0) not in board.rows:
        dense = Way(None, study.model, study.dense_macs, study.preprocessing)
        board.add("dense", 1.0, macs=study.dense_macs, plan=None, **evaluate(dense, images))
    for ratio in ratios:
        for method, make in study.methods(smaller):
            if (method, ratio) in board.rows or not chosen(method, wanted):
                continue
            begin = time.monotonic()
            try:
                way = make(ratio)
            except RepshiftError as error:
                board.add(method, ratio, error=error.message)
                continue
            prepared = time.monotonic() - begin
            plan = None if way.plan is None else way.plan.model_dump(mode="json")
            board.add(method, ratio, macs=way.macs, plan=plan, seconds=prepared, **evaluate(way, images))
            right = board.values(method, ratio) == open_fashion(None).labels
            words = f"{name} {ratio} {method}: {right.mean():.2%} at {way.macs / study.dense_macs:.3f}"
            print(f"{words}, {prepared:.0f} + {time.monotonic() - begin - prepared:.0f} s", flush=True)


def speed(name: str, smaller: Sequence[str], wanted: Sequence[str], ratios: Sequence[float], threads: int) -> None:
    """Time rows in ONNX Runtime: the dense model and all rows of a ratio in turn."""
    import onnxruntime

    study, board = Study(name), Board(name)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    dense = Way(None, study.model, study.dense_macs, study.preprocessing)
    makers = dict(study.methods(smaller))
    with tempfile.TemporaryDirectory() as folder:
        for ratio in ratios:
            rows = {method: board.rows.get((method, ratio), {}) for method in makers if chosen(method, wanted)}
            rows = {method: row for method, row in rows.items() if "classes" in row and "speed" not in row}
            ways = {"dense": dense}
            for method, row in rows.items():
                plan = row["plan"] and Plan.model_validate(row["plan"])
                ways[method] = replace(dense, plan=plan) if plan else makers[method](ratio)
            seconds = time_ways(study, ways, Path(folder), options) if rows else {}
            for method, row in rows.items():
                gains = {str(batch): found["dense"] / found[method] for batch, found in seconds.items()}
                values = {key: value for key, value in row.items() if key not in {"method", "ratio"}}
                board.add(method, ratio, **values, speed=gains)
                print(name, ratio, method, gains, flush=True)


def chosen(method: str, wanted: Sequence[str]) -> bool:
    return not wanted or any(word in method for word in wanted)


def time_ways(study: Study, ways: Mapping[str, Way], folder: Path, options: Any) -> dict[int, dict[str, float]]:
    """By batch size, the median seconds of each way as an ONNX graph."""
    import onnxruntime

    feeds: dict[str, tuple[Any, str, tuple[int, ...]]] = {}
    for number, (method, way) in enumerate(ways.items()):
        path = folder / f"{number}.onnx"
        write_onnx(study, way, path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feeds[method] = session, session.get_inputs()[0].name, way.preprocessing.input_size
        path.unlink()
    random = np.random.default_rng(0)
    seconds = {}
    for batch in (1, 8):
        runners = {
            method: partial(session.run, None, {key: random.standard_normal((batch, *shape), dtype=np.float32)})
            for method, (session, key, shape) in feeds.items()
        }
        seconds[batch] = timed(runners, SPEED_ROUNDS)
    return seconds


def write_onnx(study: Study, way: Way, path: Path) -> None:
    description = replace(study.loaded.description, preprocessing=way.preprocessing)
    loaded = replace(study.loaded, model=way.model, description=description)
    compressed = None if way.plan is None else attach(way.model, way.plan)
    try:
        export(Opened(loaded, compressed), Request("onnx", path, verify=False), Silent())
    finally:
        if compressed is not None:
            compressed.detach()


def page(names: Sequence[str], threads: int) -> None:
    body = [NOTE]
    for name in names:
        study, board = Study(name), Board(name)
        labels = open_fashion(None).labels
        dense = board.values("dense", 1.0)
        right = int((dense == labels).sum())
        low, high = percent_interval(right, len(labels))
        tokens = f"{study.layout.patch_tokens} patches, " if study.sequence else ""
        tokens += f"{study.layout.blocks} blocks"
        body.append(
            f"## {name}: {tokens}, {study.dense_macs / 1e6:.0f} MMACs, "
            f"top-1 {right / len(labels):.2%} [{low:.1f}, {high:.1f}]"
        )
        for ratio in sorted({at for _, at in board.rows if at < 1}, reverse=True):
            body += [f"### {ratio} of the MACs", ratio_table(board, ratio, dense, labels, study.dense_macs)]
        if found := two_plans(board, labels):
            body += ["### Two plans", found, TWO_PLANS_NOTE]
    machine = f"{device_name(torch.device('cpu'))}, float32, {threads} threads; onnxruntime {version('onnxruntime')}"
    publish("leaderboard", "Quality on real images at equal cost", machine, body, dry_run=False)


NOTE = (
    "Fashion-MNIST, 10,000 test images. *Against dense*: paired difference of top-1 in points, with its 95% interval. "
    "*Unchanged*: predictions as the dense model's. Rows marked = do not differ from the first row with fewer tokens "
    "beyond chance (McNemar's exact test, p >= 0.05). *Emptied*: windows of 2x2 patches of which no token is left. "
    "*Batch*: speed-up in ONNX Runtime, median of the dense model over that of the row."
)


TWO_PLANS_NOTE = (
    "All images take the shorter plan, and those with the smallest margins of it take the longer one too, so many that "
    "the mean MACs are those of the single plan. Both are the best rows of the searches and of the grid at their ratio."
)


def two_plans(board: Board, labels: np.ndarray) -> str:
    """Easy images by a short plan, the others also by a longer one, at the mean MACs of one plan."""

    def best(ratio: float) -> str:
        rows = [name for name, at in board.rows if at == ratio and board.rows[name, at].get("plan")]
        return max(rows, key=lambda name: (board.values(name, ratio) == labels).sum())

    cells = []
    for short, single, long in ((0.35, 0.5, 0.65), (0.35, 0.5, 0.8), (0.35, 0.5, 1.0)):
        if not {short, single, long} <= {at for _, at in board.rows}:
            continue
        names = [best(short), best(single), best(long) if long < 1 else "dense"]
        costs = [board.rows[name, at]["macs"] for name, at in zip(names, (short, single, long), strict=True)]
        count = int(len(labels) * (costs[1] - costs[0]) / costs[2])
        hard = board.values(names[0], short, "margins").argsort(kind="stable")[:count]
        classes = board.values(names[0], short).copy()
        classes[hard] = board.values(names[2], long)[hard]
        both, one = classes == labels, board.values(names[1], single) == labels
        chance = mcnemar(int((one & ~both).sum()), int((both & ~one).sum()))
        share = f"{count / len(labels):.0%}"
        cells.append([f"{short} and {long}", share, f"{both.mean():.2%}", f"{one.mean():.2%}", f"{chance:.3f}"])
    columns = ["plans", "take both", "top-1", f"one plan, {RATIOS[2]}", "p"]
    return table(columns, cells) if cells else ""


def ratio_table(board: Board, ratio: float, dense: np.ndarray, labels: np.ndarray, dense_macs: int) -> str:
    """The rows of a ratio, the best first."""
    rows = {method: row for (method, at), row in board.rows.items() if at == ratio and "classes" in row}
    right = {method: board.values(method, ratio) == labels for method in rows}
    order = sorted(rows, key=lambda method: -right[method].sum())
    reduced = next(method for method in order if rows[method]["plan"])
    columns = ["method", "top-1", "against dense", "unchanged", "MACs", "emptied"]
    batches = ("1", "8") if any("speed" in row for row in rows.values()) else ()
    cells = []
    for method in order:
        row, own, best, before = rows[method], right[method], right[reduced], dense == labels
        same = mcnemar(int((best & ~own).sum()), int((own & ~best).sum())) >= CHANCE
        lost, won = int((before & ~own).sum()), int((own & ~before).sum())
        low, high = paired_difference(lost, won, len(labels))
        gains = row.get("speed")
        cells.append(
            [
                f"{method}{' =' if same and method != reduced else ''}",
                f"{own.mean():.2%}",
                f"{100 * (won - lost) / len(labels):+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]",
                f"{(board.values(method, ratio) == dense).mean():.1%}",
                f"{row['macs'] / dense_macs:.3f}",
                f"{row['emptied']:.0%}" if "emptied" in row else "",
                *(f"{gains[batch]:.2f}x" if gains else "" for batch in batches),
            ]
        )
    return table([*columns, *(f"batch {batch}" for batch in batches)], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["run", "speed", "publish"])
    parser.add_argument("models", nargs="+", help="names of models in benchmarks/fashion")
    parser.add_argument("--smaller", nargs="*", default=[], help="names of smaller models to compare with")
    parser.add_argument("--methods", nargs="*", default=[], help="only methods whose name contains one of these words")
    parser.add_argument("--ratios", nargs="*", type=float, default=RATIOS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.step == "publish":
        page(options.models, options.threads)
        return
    for name in options.models:
        smaller = [each for each in options.smaller if each != name]
        if options.step == "run":
            run(name, smaller, options.methods, options.ratios)
        else:
            speed(name, smaller, options.methods, options.ratios, options.threads)


if __name__ == "__main__":
    main()
