"""Print the results of `repshift eval` on images, and make their JSON document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from repshift_cli.cli import ui
from repshift_cli.cli.show.video_text import PADDED, attention_words, list_names

if TYPE_CHECKING:
    from repshift_cli.checkpoints.artifact import Opened
    from repshift_cli.data.dataset import ImageDataset
    from repshift_cli.data.preprocessing import Preprocessing
    from repshift_cli.evaluation.classification.result import Evaluation, Pace, Score

_SCORE_KEYS = ("top1", "top5", "top1_interval", "top5_interval", "top1_correct", "top5_correct", "images_per_s")


def announce_dataset(opened: Mapping[str, Opened], data: ImageDataset) -> None:
    """Print the models, the dataset and the preprocessing."""
    descriptions = {label: each.loaded.description for label, each in opened.items()}
    for label, each in descriptions.items():
        ui.print_text(f"model:         {each.name}" + (f" ({label})" if len(opened) > 1 else ""))
    ui.print_text(f"dataset:       {data.description}")
    if data.outputs is not None:
        ui.print_text(f"classes:       {len(data.outputs)} of the head, those of the dataset")
    for how in dict.fromkeys(each.preprocessing for each in descriptions.values()):
        ui.print_text(f"preprocessing: {how}")
    ui.print_text("")


def warn_of_skipped(result: Evaluation) -> None:
    """List what could not be read, and videos that are shorter than a clip."""
    names = [f"{entry.sample}: {entry.reason}" for entry in result.skipped]
    list_names(f"{result.unit} could not be read and were skipped (--strict stops at the first)", names)
    list_names(PADDED, result.padded)


def warn_of_guessing(result: Evaluation, name: str) -> None:
    """Warn if a model is not better than guessing."""
    score, verdict = result.scores[name], result.against_guessing(name)
    found = f"top-1 of the {name} model is {score.top1:.2f}%, guessing among {result.outputs} classes gives"
    chance = f"{100 / result.outputs:.4g}%"
    if verdict == "below":
        ui.warn(
            f"{found} {chance}: it is worse than guessing, so the labels are probably in another order than the "
            "outputs of its head"
        )
    elif verdict == "not above":
        ui.warn(
            f"{found} {chance}: it is no better than guessing among {result.outputs} classes. Check that the labels "
            "are those of its head, that the preprocessing is that of its training and that its weights are trained"
        )


def show_evaluation(result: Evaluation, macs: Mapping[str, int]) -> None:
    """Print the result in 80 columns; `macs` per image by model name."""
    from repshift_cli.evaluation.models import COMPRESSED, DENSE
    from repshift_cli.utils.stats import percent_interval

    columns = ("model", "top-1 %", "95%", "top-5 %", "95%", "GMACs", f"{result.unit}/s")
    rows = [_row(name, score, macs[name]) for name, score in result.scores.items()]
    ui.print_table(title_of(result), columns, rows)
    if result.same_top1 is not None:
        low, high = percent_interval(result.same_top1, result.images)
        change = result.scores[COMPRESSED].top1 - result.scores[DENSE].top1
        ui.print_text(
            f"top-1 {change:+.2f} points against dense; {result.same_top1} of {result.images} predictions are the same "
            f"({100 * result.same_top1 / result.images:.2f}%, 95%: {low:.2f}-{high:.2f})"
        )
    show_speed(result)


def title_of(result: Evaluation) -> str:
    """The dataset, and how many of its images were classified."""
    part = f" of {result.total}" if result.images < result.total else ""
    unreadable = f", {len(result.skipped)} could not be read" if result.skipped else ""
    return f"{result.dataset}, {result.images}{part} {result.unit}{unreadable}"


def show_speed(result: Evaluation) -> None:
    """Print the speed from end to end, what limits it, and the attention kernels."""
    ui.print_text(f"{result.unit}/s is model time only; end to end: {result.images_per_s:.1f} {result.unit}/s")
    ui.print_text(_pace_words(result.pace))
    observed = {name: score.attention for name, score in result.scores.items() if score.attention is not None}
    if observed:
        ui.print_text(attention_words(observed))


def _row(name: str, score: Score, macs: int) -> tuple[str, ...]:
    return (
        name,
        f"{score.top1:.2f}",
        "{:.2f}-{:.2f}".format(*score.top1_interval),
        f"{score.top5:.2f}",
        "{:.2f}-{:.2f}".format(*score.top5_interval),
        gmacs_words(macs),
        f"{score.images_per_s:.1f}",
    )


def gmacs_words(macs: int) -> str:
    """1e9 multiply-accumulates, in three digits or two decimals."""
    return f"{macs / 1e9:.3g}" if macs < 1e9 else f"{macs / 1e9:.2f}"  # noqa: PLR2004


def _pace_words(pace: Pace) -> str:
    """Time spent waiting for data, and the bottleneck."""
    workers = f"{pace.workers} worker process{'es' if pace.workers > 1 else ''}" if pace.workers else "no workers"
    ranks = f", {pace.processes} ranks" if pace.processes > 1 else ""
    cpu = f"; CPU time: decoding {pace.decoding:.1f} s, model {pace.models:.1f} s" if pace.shares_cores else ""
    hint = " (try more --workers)" if pace.bottleneck == "data" and not pace.shares_cores else ""
    return (
        f"waiting for data: {pace.waiting:.0%} of the time ({workers}{ranks}){cpu}; bottleneck: {pace.bottleneck}{hint}"
    )


def evaluation_document(
    result: Evaluation,
    macs: Mapping[str, int],
    model: str,
    preprocessing: Preprocessing,
    data: ImageDataset | None = None,
    *,
    several: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The JSON document of the command; `several` of `several_numbers` in place of the numbers of `model`."""
    first, *others = result.scores
    found = {
        "model": model,
        "dataset": result.dataset,
        "images": result.images,
        "of": result.total,
        "outputs": result.outputs,
        "skipped": len(result.skipped),
        **(several or numbers_of(result, first, macs)),
        "interrupted": result.interrupted,
        "end_to_end_images_per_s": result.images_per_s,
        "data": {
            "waiting": result.pace.waiting,
            "bottleneck": result.pace.bottleneck,
            "decoding_s": result.pace.decoding,
            "model_s": result.pace.models,
            "workers": result.pace.workers,
            "processes": result.pace.processes,
        },
        "skipped_files": [{"file": entry.sample, "reason": entry.reason} for entry in result.skipped],
        "preprocessing": preprocessing.to_dict(),
    }
    if result.unit == "videos":
        found |= {"padded": len(result.padded), "padded_files": list(result.padded)}
    if data is not None:
        order = found["class_order"] = data.info.class_order
        found["classes"] = None if order is None else list(data.classes or ())
        found["left_out"] = dict(data.info.left_out)
    if others and several is None:
        found["dense"] = numbers_of(result, others[0], macs)
        found["agreement"] = result.agreement
    return found


def numbers_of(result: Evaluation, name: str, macs: Mapping[str, int]) -> dict[str, Any]:
    """What the JSON document has of one model."""
    score = result.scores[name]
    return {
        **{key: getattr(score, key) for key in _SCORE_KEYS},
        "against_guessing": result.against_guessing(name),
        "gmacs": macs[name] / 1e9,
        "attention": score.attention,
    }
