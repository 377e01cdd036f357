"""Several models on the same images: passes over the data, and comparisons paired by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckFailed, UsageError
from repshift_cli.evaluation.classification.comparison import Comparison, compare_predictions
from repshift_cli.evaluation.classification.counts import PredictionRows
from repshift_cli.evaluation.classification.evaluate import evaluate
from repshift_cli.evaluation.classification.result import Evaluation, Pace, predictions_of
from repshift_cli.evaluation.models import Candidate, head_size
from repshift_cli.models.tensor_model import class_names

_LEVEL = 0.05
"""Probability that chance marks any difference of a table."""

_ALONE = "Evaluate them one by one."


@dataclass(frozen=True)
class Paired:
    """Comparisons of the models of an evaluation on the same images.

    Attributes:
        first, reference: the first model that was given, and its dense model, or itself if it has none here.
        predictions: each other model after `reference`.
        accuracy: each other model after `first`.
    """

    first: str
    reference: str
    predictions: Mapping[str, Comparison]
    accuracy: Mapping[str, Comparison]

    def beyond_chance(self, name: str) -> bool:
        """Whether top-1 differs from that of `first`: McNemar's test at 5% for all models together (Bonferroni)."""
        return self.accuracy[name].p_value * len(self.accuracy) < _LEVEL


def compare_models(result: Evaluation, dataset: ImageDataset, models: Mapping[str, Candidate]) -> Paired:
    """Compare the models of an evaluation with `keep_rows`; `models` as for `evaluate_passes`."""
    rows = {name: predictions_of(result, name, dataset, name) for name in result.scores}
    first, *others = rows
    reference = next((name for name in others[:1] if not models[name].given), first)
    accuracy, predictions = (
        {name: compare_predictions(rows[one], rows[name]) for name in rows if name != one} for one in (first, reference)
    )
    return Paired(first, reference, predictions, accuracy)


def label_for_all(dataset: ImageDataset, opened: Mapping[str, Opened]) -> ImageDataset:
    """The images with the labels of the heads of all models.

    Raises:
        DataError: as `dataset.for_head`.
        ModelError: as `head_size`.
        UsageError: the models have different inputs or classes.
    """
    first, *others = opened
    units = {label: model.loaded.description.preprocessing.unit for label, model in opened.items()}
    heads = {label: head_size(model.loaded.model) for label, model in opened.items()}
    for other in others:
        if units[first] != units[other]:
            raise UsageError(f"{first} takes {units[first]}s, and {other} takes {units[other]}s", _ALONE)
        if heads[first] != heads[other]:
            raise UsageError(f"{first} has {heads[first]} classes, and {other} has {heads[other]}", _ALONE)
    labelled = {
        label: dataset.for_head(heads[label], class_names(model.loaded.model)) for label, model in opened.items()
    }
    for other in others:
        if labelled[first].classes != labelled[other].classes:
            raise UsageError(
                f"{first} and {other} order or name their classes differently, so their labels differ",
                "State the order with --class-order, or evaluate them one by one.",
            )
    return labelled[first]


def evaluate_passes(models: Mapping[str, Candidate], dataset: ImageDataset, **settings: Any) -> Evaluation:
    """`evaluate` in one pass over the data for each preprocessing, with its `settings`.

    If a later pass is interrupted, the result has the models of those before it.

    Raises:
        CheckFailed: other images could be read in one pass than in another; or as `evaluate`, with its other errors. A
            `resume` is for one pass.
    """
    groups: dict[Preprocessing, dict[str, nn.Module]] = {}
    for name, candidate in models.items():
        groups.setdefault(candidate.preprocessing, {})[name] = candidate.module
    passes: list[Evaluation] = []
    for preprocessing, modules in groups.items():
        try:
            found = evaluate(modules, dataset, preprocessing, **settings)
        except KeyboardInterrupt:
            if not passes:
                raise
            found = replace(passes[-1], interrupted=True)
        if passes and found.interrupted:
            passes[-1] = replace(passes[-1], interrupted=True)
            break
        passes.append(found)
        if found.interrupted:
            break
    return passes[0] if len(passes) == 1 else _joined(passes, list(models))


def _joined(passes: Sequence[Evaluation], order: Sequence[str]) -> Evaluation:
    first = passes[0]
    rows = [each.rows for each in passes if each.rows is not None]
    if any(each.indices != rows[0].indices for each in rows):
        raise CheckFailed(
            "not the same images could be read for all models",
            "Find the cause with --strict, or evaluate them one by one.",
        )
    top_k = {name: top for each in rows for name, top in each.top_k.items()}
    return replace(
        first,
        scores={name: each.scores[name] for name in order for each in passes if name in each.scores},
        same_top1=None,
        seconds=sum(each.seconds for each in passes),
        fresh=sum(each.fresh for each in passes),
        interrupted=passes[-1].interrupted,
        pace=replace(Pace.joined([each.pace for each in passes]), processes=first.pace.processes),
        batch_size=min(each.batch_size for each in passes),
        rows=PredictionRows(rows[0].indices, rows[0].answers, top_k),
    )
