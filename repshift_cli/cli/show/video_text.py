"""Print the results of `repshift eval` on video-text data, and make their JSON documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from repshift_cli.cli.options import Pooling

if TYPE_CHECKING:
    from repshift_cli.checkpoints.artifact import Opened
    from repshift_cli.data.video.tokenizer import Tokenizer
    from repshift_cli.evaluation.video_text.answering import AnswerEvaluation, AnswerScore
    from repshift_cli.evaluation.video_text.data import Task, VideoData
    from repshift_cli.evaluation.video_text.evaluate import Settings
    from repshift_cli.evaluation.video_text.ranking import RankStats
    from repshift_cli.evaluation.video_text.retrieval import Directions, RetrievalEvaluation, RetrievalScore


__all__ = [
    "Run",
    "announce_videos",
    "answers_document",
    "attention_words",
    "input_numbers",
    "left_out_numbers",
    "list_names",
    "origin_numbers",
    "report_broken",
    "retrieval_document",
    "show_answers",
    "show_retrieval",
]


_SHOWN = 10


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


_STEP = 1024.0


@dataclass(frozen=True)
class Run:
    """What goes into an evaluation.

    Attributes:
        opened: the model.
        name: how the user calls it.
        models: what to run, by name; the first one is what was asked for.
        settings: how.
        attention: what computes it in the video encoder, by the names of the models.
    """

    opened: Opened
    name: str
    models: Mapping[str, Any]
    settings: Settings
    attention: Mapping[str, str] = field(default_factory=dict)

    @property
    def macs(self) -> dict[str, int]:
        """Per video, by the names of the models."""
        return dict(zip(self.models, (self.opened.macs, self.opened.dense_macs), strict=False))

    def side(self, name: str) -> dict[str, Any]:
        """What is known of a model before it is evaluated, for the JSON document."""
        return {"gmacs": self.macs[name] / 1e9, "attention": self.attention.get(name)}


def announce_videos(opened: Opened, data: VideoData, pooling: str | None, tokenizer: Tokenizer) -> None:
    """Log the model, the dataset and the preprocessing."""
    from repshift_cli.cli import ui

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
        return "over all tokens that are left, of the dense model over all tokens"
    return "over each frame" if pooling == Pooling.FRAMES.value else "over all tokens, as compressed models do"


def list_names(what: str, names: Sequence[str]) -> None:
    """Say on stderr how many there are, and which."""
    from repshift_cli.cli import ui

    if not names:
        return
    lines = [f"{len(names)} {what}:", *(f"  {name}" for name in names[:_SHOWN])]
    if len(names) > _SHOWN:
        lines.append(f"  and {len(names) - _SHOWN} more (--json lists all)")
    ui.warn("\n".join(lines))


def report_broken(broken: Mapping[str, str], padded: Sequence[str]) -> None:
    """Log the videos that could not be read."""
    list_names(
        "videos could not be read and were left out (--strict stops at the first)",
        [f"{name}: {reason}" for name, reason in broken.items()],
    )
    list_names("videos have fewer frames than a clip, so their last one is repeated", padded)


def attention_words(attention: Mapping[str, str]) -> str:
    """What computed the attention of each model, in one line where it is the same for all."""
    kinds = set(attention.values())
    told = kinds.pop() if len(kinds) == 1 else ", ".join(f"{kind} ({name})" for name, kind in attention.items())
    return f"attention: {told}"


def show_retrieval(result: RetrievalEvaluation, job: Run) -> None:
    """Print the table of a retrieval evaluation."""
    from repshift_cli.cli import ui

    columns = ("model", "ranked by", "R@1", "R@5", "R@10", "median", "mean")
    for direction in ("text_to_video", "video_to_text"):
        rows = [
            (name, words, *_rank_cells(getattr(ranked, direction)))
            for name, score in result.scores.items()
            for words, ranked in _rankings(score)
        ]
        ui.print_table(f"{direction.replace('_', ' ')}, percent and rank", columns, rows, left=2)
    ui.print_table(
        f"{result.dataset}: {result.videos} videos, {result.captions} captions",
        ("model", "tokens/video", "GMACs/video", "videos/s", "matching s"),
        [
            (
                name,
                str(score.tokens),
                _gmacs(job.macs[name]),
                f"{score.videos_per_s:.1f}",
                _seconds(score.matching_seconds),
            )
            for name, score in result.scores.items()
        ],
    )
    if result.rerank_k is not None:
        ui.print_text(
            f"matching: the best {result.rerank_k} of each query by similarity, in the order of the matching score; "
            "what lies behind them is in no order"
        )
        where = "on disk" if result.tokens_where == "disk" else "in memory"
        ui.print_text(
            f"the vision tokens waited for that {where}: {_size(result.token_bytes)}; the captions in memory: "
            f"{_size(result.text_bytes)}"
        )
    _say_agreement(result)
    _say_video_side(result.seconds, job)


def _say_agreement(result: RetrievalEvaluation) -> None:
    from repshift_cli.cli import ui

    for words, agreement in (("similarity", result.vtc_agreement), ("matching", result.matching_agreement)):
        if agreement is not None:
            ui.print_text(
                f"same first place as dense, by {words}: text to video {100 * agreement.text_to_video:.1f}%, "
                f"video to text {100 * agreement.video_to_text:.1f}%"
            )


def _rankings(score: RetrievalScore) -> list[tuple[str, Directions]]:
    """The best one that there is first."""
    return [*([("matching", score.matching)] if score.matching else []), ("similarity", score.vtc)]


def _rank_cells(stats: RankStats) -> tuple[str, ...]:
    recalls = (f"{value:.1f}" for value in (stats.r1, stats.r5, stats.r10))
    return (*recalls, f"{stats.median_rank:g}", f"{stats.mean_rank:.1f}")


def show_answers(result: AnswerEvaluation, job: Run) -> None:
    """Print the table of a question answering evaluation."""
    from repshift_cli.cli import ui

    columns = ("model", "accuracy %", "95% interval", "GMACs/video", "videos/s", "questions/s")
    rows = [
        (
            name,
            f"{score.accuracy:.2f}",
            "{:.2f} - {:.2f}".format(*score.interval),
            _gmacs(job.macs[name]),
            f"{score.videos_per_s:.1f}",
            f"{score.questions_per_s:.1f}",
        )
        for name, score in result.scores.items()
    ]
    ui.print_table(f"{result.dataset}, {result.questions} questions", columns, rows)
    ui.print_text(
        f"{result.answers} answers to choose from, the {result.k} likeliest of each question ranked as a whole"
    )
    if result.not_in_list:
        ui.print_text(f"{result.not_in_list} questions whose right answer is not among them count as wrong")
    if result.agreement is not None:
        ui.print_text(f"same answer as dense: {result.same_answer} of {result.questions} questions")
    _say_video_side(result.seconds, job)


def _say_video_side(seconds: float, job: Run) -> None:
    from repshift_cli.cli import ui

    ui.print_text(f"GMACs and videos/s are those of the video side alone; all together took {seconds:.1f} s")
    ui.print_text(f"{attention_words(job.attention)}, on that side")


def _gmacs(macs: int) -> str:
    gmacs = macs / 1e9
    return f"{gmacs:.3g}" if gmacs < 1 else f"{gmacs:.2f}"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f}"


def _size(count: float) -> str:
    """Bytes for people."""
    unit = 0
    while count >= _STEP and unit < len(_UNITS) - 1:
        count, unit = count / _STEP, unit + 1
    return f"{count:.3g} {_UNITS[unit]}"


def origin_numbers(job: Run, data: VideoData, task: Task) -> dict[str, Any]:
    """The JSON keys of the dataset."""
    protocol, annotations = data.protocol, data.annotations
    return {
        "model": job.name,
        "task": task,
        "dataset": data.name,
        "protocol": None if protocol is None else {"name": protocol.name, "split": protocol.split},
        "annotations": None
        if annotations is None
        else {"file": annotations.path.name, "path": str(annotations.path), "sha256": annotations.sha256},
    }


def left_out_numbers(data: VideoData, broken: Mapping[str, str], padded: Sequence[str]) -> dict[str, Any]:
    """The JSON keys of the videos that were left out."""
    return {
        "skipped": len(broken),
        "skipped_files": [{"file": name, "reason": reason} for name, reason in broken.items()],
        "missing": len(data.missing),
        "missing_videos": list(data.missing),
        "padded": len(padded),
        "padded_files": list(padded),
    }


def input_numbers(job: Run, tokenizer: Tokenizer) -> dict[str, Any]:
    """The JSON keys of the model inputs."""
    return {
        "preprocessing": job.opened.loaded.description.preprocessing.to_dict(),
        "vocabulary": {"file": tokenizer.path.name, "tokens": tokenizer.size},
    }


def retrieval_document(result: RetrievalEvaluation, job: Run) -> dict[str, Any]:
    """The JSON document of a retrieval evaluation."""
    first, *others = result.scores
    found = {
        **_retrieval_numbers(result.scores[first], job.side(first)),
        "rerank_k": result.rerank_k,
        "memory": {
            "token_bytes": result.token_bytes,
            "where": result.tokens_where,
            "text_bytes": result.text_bytes,
        },
        "seconds": result.seconds,
    }
    if others and result.vtc_agreement is not None:
        found["dense"] = _retrieval_numbers(result.scores[others[0]], job.side(others[0]))
        found["agreement"] = {
            **vars(result.matching_agreement or result.vtc_agreement),
            "vtc": vars(result.vtc_agreement),
        }
    return found


def _retrieval_numbers(score: RetrievalScore, side: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "scoring": "vtc" if score.matching is None else "matching",
        **_both(score.matching or score.vtc),
        "vtc": _both(score.vtc),
        **side,
        "tokens": score.tokens,
        "videos_per_s": score.videos_per_s,
        "matching_seconds": score.matching_seconds,
    }


def _both(found: Directions) -> dict[str, Any]:
    return {"text_to_video": vars(found.text_to_video), "video_to_text": vars(found.video_to_text)}


def answers_document(result: AnswerEvaluation, job: Run) -> dict[str, Any]:
    """The JSON document of a question answering evaluation."""
    first, *others = result.scores
    found = {
        **_answers_numbers(result.scores[first], job.side(first)),
        "videos": result.scores[first].videos,
        "answers": result.answers,
        "unanswerable": result.not_in_list,
        "k": result.k,
        "seconds": result.seconds,
    }
    if others:
        found["dense"] = _answers_numbers(result.scores[others[0]], job.side(others[0]))
        found["agreement"] = result.agreement
    return found


def _answers_numbers(score: AnswerScore, side: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "accuracy": score.accuracy,
        "accuracy_interval": list(score.interval),
        "correct": score.correct,
        **side,
        "videos_per_s": score.videos_per_s,
        "questions_per_s": score.questions_per_s,
    }
