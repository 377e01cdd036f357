"""Print the results of `repshift eval` on video-text data, and make their JSON documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from repshift_cli.cli import ui
from repshift_cli.cli.options import Pooling

if TYPE_CHECKING:
    from repshift_cli.checkpoints.artifact import Opened
    from repshift_cli.data.preprocessing import Preprocessing
    from repshift_cli.data.video.annotations import Task, VideoTextSet
    from repshift_cli.data.video.tokenizer import Tokenizer
    from repshift_cli.evaluation.common import Skipped
    from repshift_cli.evaluation.video_text.answering import AnswerEvaluation, AnswerScore
    from repshift_cli.evaluation.video_text.ranking import RankStats
    from repshift_cli.evaluation.video_text.retrieval import RetrievalEvaluation, RetrievalScore


_MAX_NAMES = 10


class EncoderCost(NamedTuple):
    """MACs per video of a video encoder, and its attention kernel."""

    macs: int
    attention: str

    @property
    def gmacs(self) -> float:
        return self.macs / 1e9

    @property
    def words(self) -> str:
        """GMACs, for a table."""
        return f"{self.gmacs:.3g}" if self.gmacs < 1 else f"{self.gmacs:.2f}"


def announce_videos(opened: Opened, data: VideoTextSet, pooling: str | None, tokenizer: Tokenizer) -> None:
    """Log the model, the dataset and the preprocessing."""
    ui.print_text(f"model:         {opened.loaded.description.name}")
    ui.print_text(f"dataset:       {data.description}")
    if data.protocol is not None:
        ui.print_text(f"protocol:      {data.protocol.name}, {data.protocol.split}, as UMT evaluates it")
    if data.annotations is not None:
        ui.print_text(f"annotations:   {data.annotations.path.name}, sha256")
        ui.print_text(f"               {data.annotations.sha256}")
    ui.print_text(f"vocabulary:    {tokenizer.path.name}, {tokenizer.size} tokens; texts of {data.text_length} at most")
    ui.print_text(f"preprocessing: {opened.loaded.description.preprocessing}")
    if pooling is not None:
        ui.print_text(f"pooling:       {_pooling_words(pooling, opened)}")
    ui.print_text("")


def _pooling_words(pooling: str, opened: Opened) -> str:
    if opened.compressed is not None:
        return "over all kept tokens, of the dense model over all tokens"
    return "over each frame" if pooling == Pooling.FRAMES.value else "over all tokens, as compressed models do"


PADDED = "videos are shorter than a clip, so their frames are closer, or the last one is repeated"
"""Heading of a list."""


def list_names(what: str, names: Sequence[str]) -> None:
    """Log how many there are, with the first names."""
    if not names:
        return
    lines = [f"{len(names)} {what}:", *(f"  {name}" for name in names[:_MAX_NAMES])]
    if len(names) > _MAX_NAMES:
        lines.append(f"  and {len(names) - _MAX_NAMES} more (--json lists all)")
    ui.warn("\n".join(lines))


def report_left_out(data: VideoTextSet, skipped: Sequence[Skipped], padded: Sequence[str]) -> dict[str, Any]:
    """Log unreadable and padded videos. Returns the JSON keys about them and about missing videos."""
    broken = {entry.sample: entry.reason for entry in skipped}  # one entry for all questions about a video
    list_names(
        "videos could not be read and were left out (--strict stops at the first)",
        [f"{name}: {reason}" for name, reason in broken.items()],
    )
    list_names(PADDED, padded)
    return {
        "skipped": len(broken),
        "skipped_files": [{"file": name, "reason": reason} for name, reason in broken.items()],
        "missing": len(data.missing),
        "missing_videos": list(data.missing),
        "padded": len(padded),
        "padded_files": list(padded),
    }


def attention_words(attention: Mapping[str, str]) -> str:
    """The attention kernel of each model, or the one of all."""
    kinds = set(attention.values())
    words = kinds.pop() if len(kinds) == 1 else ", ".join(f"{kind} ({name})" for name, kind in attention.items())
    return f"attention: {words}"


def show_retrieval(result: RetrievalEvaluation, costs: Mapping[str, EncoderCost]) -> None:
    """Print the tables of a retrieval evaluation; `costs` by model name."""
    columns = ("model", "ranked by", "R@1", "R@5", "R@10", "median", "mean")
    for direction in ("text_to_video", "video_to_text"):
        rows = [
            (name, words, *_rank_cells(getattr(stats, direction)))
            for name, score in result.scores.items()
            for words, stats in (("matching", score.matching), ("similarity", score.vtc))
            if stats is not None
        ]
        ui.print_table(f"{direction.replace('_', ' ')}, percent and rank", columns, rows, left=2)
    ui.print_table(
        f"{result.dataset}: {result.videos} videos, {result.captions} captions",
        ("model", "tokens/video", "GMACs/video", "videos/s", "matching s"),
        [
            (
                name,
                str(score.tokens),
                costs[name].words,
                f"{score.videos_per_s:.1f}",
                "-" if score.matching_seconds is None else f"{score.matching_seconds:.1f}",
            )
            for name, score in result.scores.items()
        ],
    )
    if result.rerank_k is not None:
        ui.print_text(
            f"matching: the best {result.rerank_k} of each query by similarity, ordered by matching score; the others "
            "are unordered"
        )
        where = "on disk" if result.tokens_where == "disk" else "in memory"
        ui.print_text(
            f"kept for matching: vision tokens {where}, {result.token_bytes / 1e6:.1f} MB; captions in memory, "
            f"{result.text_bytes / 1e6:.1f} MB"
        )
    for words, agreement in (("similarity", result.vtc_agreement), ("matching", result.matching_agreement)):
        if agreement is not None:
            ui.print_text(
                f"same first place as dense, by {words}: text to video {100 * agreement.text_to_video:.1f}%, "
                f"video to text {100 * agreement.video_to_text:.1f}%"
            )
    _show_encoder_notes(result.seconds, costs)


def _rank_cells(stats: RankStats) -> tuple[str, ...]:
    recalls = (f"{value:.1f}" for value in (stats.r1, stats.r5, stats.r10))
    return (*recalls, f"{stats.median_rank:g}", f"{stats.mean_rank:.1f}")


def show_answers(result: AnswerEvaluation, costs: Mapping[str, EncoderCost]) -> None:
    """Print the table of a question answering evaluation; `costs` by model name."""
    columns = ("model", "accuracy %", "95% interval", "GMACs/video", "videos/s", "questions/s")
    rows = [
        (
            name,
            f"{score.accuracy:.2f}",
            "{:.2f} - {:.2f}".format(*score.interval),
            costs[name].words,
            f"{score.videos_per_s:.1f}",
            f"{score.questions_per_s:.1f}",
        )
        for name, score in result.scores.items()
    ]
    ui.print_table(f"{result.dataset}, {result.questions} questions", columns, rows)
    ui.print_text(
        f"{result.answers} answers to choose from, the {result.k} most likely of each question scored as a whole"
    )
    if result.not_in_list:
        ui.print_text(f"{result.not_in_list} questions whose right answer is not in the list count as wrong")
    if result.agreement is not None:
        ui.print_text(f"same answer as dense: {result.same_answer} of {result.questions} questions")
    _show_encoder_notes(result.seconds, costs)


def _show_encoder_notes(seconds: float, costs: Mapping[str, EncoderCost]) -> None:
    ui.print_text(f"GMACs and videos/s are of the video encoder; the evaluation took {seconds:.1f} s")
    ui.print_text(f"{attention_words({name: cost.attention for name, cost in costs.items()})}, in the video encoder")


def dataset_document(model: str, data: VideoTextSet, task: Task) -> dict[str, Any]:
    """The JSON keys of the model and the dataset."""
    protocol, annotations = data.protocol, data.annotations
    return {
        "model": model,
        "task": task,
        "dataset": data.name,
        "protocol": None if protocol is None else {"name": protocol.name, "split": protocol.split},
        "annotations": None
        if annotations is None
        else {"file": annotations.path.name, "path": str(annotations.path), "sha256": annotations.sha256},
    }


def inputs_document(preprocessing: Preprocessing, tokenizer: Tokenizer) -> dict[str, Any]:
    """The JSON keys of the model inputs."""
    return {
        "preprocessing": preprocessing.to_dict(),
        "vocabulary": {"file": tokenizer.path.name, "tokens": tokenizer.size},
    }


def retrieval_document(
    result: RetrievalEvaluation, costs: Mapping[str, EncoderCost], left_out: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON keys of a retrieval evaluation."""
    first, *others = result.scores
    document = {
        "videos": result.videos,
        "captions": result.captions,
        "captions_left_out": result.captions_left_out,
        **left_out,
        **_retrieval_numbers(result.scores[first], costs[first]),
        "rerank_k": result.rerank_k,
        "memory": {"token_bytes": result.token_bytes, "where": result.tokens_where, "text_bytes": result.text_bytes},
        "seconds": result.seconds,
    }
    if others and result.vtc_agreement is not None:
        document["dense"] = _retrieval_numbers(result.scores[others[0]], costs[others[0]])
        agreement = result.matching_agreement or result.vtc_agreement
        document["agreement"] = {**asdict(agreement), "vtc": asdict(result.vtc_agreement)}
    return document


def _retrieval_numbers(score: RetrievalScore, cost: EncoderCost) -> dict[str, Any]:
    return {
        "scoring": "vtc" if score.matching is None else "matching",
        **asdict(score.matching or score.vtc),
        "vtc": asdict(score.vtc),
        "gmacs": cost.gmacs,
        "attention": cost.attention,
        "tokens": score.tokens,
        "videos_per_s": score.videos_per_s,
        "matching_seconds": score.matching_seconds,
    }


def answers_document(
    result: AnswerEvaluation, costs: Mapping[str, EncoderCost], left_out: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON keys of a question answering evaluation."""
    first, *others = result.scores
    document = {
        "questions": result.questions,
        "questions_left_out": len(result.skipped),
        **left_out,
        **_answers_numbers(result.scores[first], costs[first]),
        "videos": result.scores[first].videos,
        "answers": result.answers,
        "unanswerable": result.not_in_list,
        "k": result.k,
        "seconds": result.seconds,
    }
    if others:
        document["dense"] = _answers_numbers(result.scores[others[0]], costs[others[0]])
        document["agreement"] = result.agreement
    return document


def _answers_numbers(score: AnswerScore, cost: EncoderCost) -> dict[str, Any]:
    return {
        "accuracy": score.accuracy,
        "accuracy_interval": list(score.interval),
        "correct": score.correct,
        "gmacs": cost.gmacs,
        "attention": cost.attention,
        "videos_per_s": score.videos_per_s,
        "questions_per_s": score.questions_per_s,
    }
