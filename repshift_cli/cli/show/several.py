"""Print the results of `repshift eval` on several models, and make their part of the JSON document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from repshift_cli.cli import ui
from repshift_cli.cli.show.evaluate import gmacs_words, numbers_of, show_speed, title_of

if TYPE_CHECKING:
    from repshift_cli.evaluation.classification.result import Evaluation
    from repshift_cli.evaluation.classification.several import Paired
    from repshift_cli.evaluation.models import Candidate


def show_several(result: Evaluation, paired: Paired, models: Mapping[str, Candidate]) -> None:
    """Print one row per model; `models` by name."""
    columns = ("model", "top-1 %", "95%", "top-5 %", "same %", "points", "GMACs", f"{result.unit}/s")
    rows = [
        (
            name,
            f"{score.top1:.2f}",
            "{:.1f}-{:.1f}".format(*score.top1_interval),
            f"{score.top5:.2f}",
            f"{100 * paired.predictions[name].same / result.images:.2f}" if name in paired.predictions else "-",
            _points(paired, name),
            gmacs_words(models[name].macs),
            f"{score.images_per_s:.1f}",
        )
        for name, score in result.scores.items()
    ]
    ui.print_table(title_of(result), columns, rows)
    ui.print_text(
        f"same %: predictions that are those of {paired.reference}; points: top-1 against {paired.first} on the same "
        f"{result.unit}, * beyond chance (McNemar's exact test, 5% for all rows together)"
    )
    show_speed(result)


def _points(paired: Paired, name: str) -> str:
    if name not in paired.accuracy:
        return "-"
    return f"{paired.accuracy[name].difference:+.2f}{'*' if paired.beyond_chance(name) else ' '}"


def several_numbers(result: Evaluation, paired: Paired, models: Mapping[str, Candidate]) -> dict[str, Any]:
    """The numbers of all models, for `evaluation_document`. Those of a comparison with itself are null."""
    macs = {name: candidate.macs for name, candidate in models.items()}
    rows = []
    for name in result.scores:
        row = {"name": name, **numbers_of(result, name, macs), "preprocessing": models[name].preprocessing.to_dict()}
        predictions, accuracy = (
            each[name].to_dict() if name in each else {} for each in (paired.predictions, paired.accuracy)
        )
        row |= {key: predictions.get(key) for key in ("agreement", "agreement_interval")}
        row |= {key: accuracy.get(key) for key in ("difference", "difference_interval", "lost", "won", "mcnemar_p")}
        rows.append(row | {"beyond_chance": paired.beyond_chance(name) if accuracy else None})
    return {"reference": paired.reference, "first": paired.first, "models": rows}
