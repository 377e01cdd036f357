"""Recall of the embeddings of a compressed encoder on an index of dense embeddings.

    python benchmarks/embeddings.py

The encoder is a built-in ViT without its head: its embedding is the class token, as in CLIP. A search on 256 unlabelled
training scenes has a target share of the MACs. Then each of 5,000 test scenes is a query: its nearest neighbours on the
index of all dense embeddings, without itself, are those of its dense embedding.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from _results import publish, table

from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.compression.notes import Notes
from repshift_cli.compression.run import search_loaded
from repshift_cli.compression.settings import Settings
from repshift_cli.data.builtin.digits import DigitDataset
from repshift_cli.evaluation.embeddings import RANDOM, compare, encode, encoders, index_of_images
from repshift_cli.evaluation.models import COMPRESSED
from repshift_cli.measure.device import device_name
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.search.job import SearchRequest
from repshift_cli.search.target import SearchTarget
from repshift_cli.utils.progress import Silent

KS = (1, 10)
TEST_SEED = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="vit-digits")
    parser.add_argument("--targets", nargs="+", default=["macs=0.65"])
    parser.add_argument("--reducers", nargs="+", default=["merge", "prune"])
    parser.add_argument("--scenes", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry-run", action="store_true", help="print the page, write no file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [
        row
        for target in options.targets
        for reducer in options.reducers
        for row in found(options.model, SearchTarget.parse(target), reducer, options.scenes)
    ]
    columns = ["target", "reducer", "tokens", "MACs", "cosine, mean", "p5", *(f"recall@{k}, %" for k in KS)]
    note = (
        f"`builtin:{options.model}` without its head; {options.scenes:,} test scenes are the queries and the index, "
        "and each query's own entry is left out. Beside the recall its standard error. Random: the same token counts, "
        "with the tokens chosen at random."
    )
    machine = f"{device_name(torch.device('cpu'))}, {options.threads} threads"
    publish(
        "embeddings",
        "Recall of embeddings on a dense index",
        machine,
        [note, table(columns, rows)],
        dry_run=options.dry_run,
    )


def found(name: str, target: SearchTarget, reducer: str, scenes: int) -> list[list[str]]:
    """The rows of the found schedule and of random dropping."""
    loaded = load_checkpoint(f"builtin:{name}")
    loaded.model.reset_classifier(0)  # type: ignore[operator]
    request = SearchRequest(target, evaluations=20, reducers=(reducer,), seconds=0.0)
    result = search_loaded(loaded, None, request, Settings(calibration_images=256), Notes(Silent())).result
    compressed = attach(loaded.model, result.plan)
    data = DigitDataset("test", scenes, TEST_SEED)
    functions = encoders(compressed, seed=0)
    embeddings = encode(
        compressed,
        functions,
        data,
        loaded.description.preprocessing,
        batch_size=64,
        device=torch.device("cpu"),
        dtype=torch.float32,
        workers=0,
        strict=True,
        progress=Silent(),
    )
    scores = compare(embeddings, index_of_images(data, embeddings, data, embeddings), KS)
    tokens = " ".join(f"{site.layer}:{site.tokens_out}" for site in result.plan.sites)
    macs = f"{compressed.macs() / compressed.dense_macs():.3f}"
    labels = {COMPRESSED: (str(target), reducer, tokens, macs), RANDOM: ("", "random", "", "")}
    return [[*labels[each], *cells(score)] for each, score in scores.items()]


def cells(score: dict[str, Any]) -> list[str]:
    recall = [f"{100 * entry['share']:.2f} ± {100 * entry['error']:.2f}" for entry in score["recall"]]
    return [f"{score['cosine']['mean']:.4f}", f"{score['cosine']['p5']:.4f}", *recall]


if __name__ == "__main__":
    main()
