"""Video question answering from a fixed list: the decoder of a model ranks the answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from repshift_cli.errors import DataError, ModelError
from repshift_cli.evaluation.common import Skipped, alternate_order, check_finite, explain_out_of_memory, per_second
from repshift_cli.evaluation.video_text.encoding import (
    VideoModel,
    encode_timed,
    nothing_readable,
    prepare,
    skipped_of,
)
from repshift_cli.evaluation.video_text.settings import VideoSettings
from repshift_cli.utils.progress import Progress
from repshift_cli.utils.ranges import check_ranges
from repshift_cli.utils.stats import percent_interval

_FIRST = 1  # position of the first token of an answer, after [CLS]
_MATRIX = 2  # dimensions of probabilities [B, V]


class AnsweringModel(VideoModel, Protocol):
    """A module that encodes a question about a video, and returns how likely an answer is."""

    def encode_question(self, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """int64 `[B, L]` each and `[B, N, D]`, to states `[B, L, D']`."""

    def first_token_probabilities(self, states: Tensor, mask: Tensor, start: int) -> Tensor:
        """`[B, L, D']`, `[B, L]` to `[B, V]`: next-token probabilities after `start` ([CLS])."""

    def answer_loss(self, states: Tensor, mask: Tensor, answer_ids: Tensor, answer_mask: Tensor) -> Tensor:
        """`[n, L, D']`, `[n, L]`, `[n, A]`, `[n, A]` to `[n]`: cross-entropy of the next tokens, summed per pair."""


@dataclass(frozen=True)
class QuestionBatch:
    """A batch of videos with the questions about them.

    Attributes:
        indices: of the questions whose video is readable.
        video: `[v, T, 3, H, W]`; None if no video is readable.
        ids, mask: int64 `[b, L]`, the questions.
        broken: questions whose video is unreadable, with the reason.
        video_of: for each question the position of its video in `video`.
    """

    indices: Sequence[int]
    video: Tensor | None
    ids: Tensor
    mask: Tensor
    answers: Sequence[str]
    broken: Sequence[tuple[int, str]]
    video_of: Sequence[int]


@dataclass(frozen=True)
class AnswerList:
    """All possible answers; their `ids` and `mask` are int64 `[A, La]`: `[CLS]`, then the answer."""

    texts: Sequence[str]
    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Ranking:
    """The best answers to each question, best first, on the CPU.

    Attributes:
        topk_ids: int64 `[B, k]`, indices in the list of answers.
        topk_probs: float32 `[B, k]`, softmax over the k.
        log_probs: float32 `[B, k]`, log probability of the first token minus the loss of the whole answer.
    """

    topk_ids: Tensor
    topk_probs: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class AnswerScore:
    """The result of one model.

    Attributes:
        correct: questions answered with exactly the right text.
        videos: number of encoded videos; one in several batches counts several times.
        video_seconds: in the video encoder alone.
        seconds: in the model, with the video encoder.
    """

    questions: int
    correct: int
    videos: int
    video_seconds: float
    seconds: float

    @property
    def accuracy(self) -> float:
        """Percent, 0 to 100."""
        return 100.0 * self.correct / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of `accuracy`, in percent."""
        return percent_interval(self.correct, self.questions)

    @property
    def videos_per_s(self) -> float:
        """Videos per second of encoder time, without decoding and copying."""
        return per_second(self.videos, self.video_seconds)

    @property
    def questions_per_s(self) -> float:
        """Questions per second of model time."""
        return per_second(self.questions, self.seconds)


@dataclass(frozen=True)
class AnswerEvaluation:
    """The result of all models.

    Attributes:
        questions: number of questions that every model answered.
        answers: number of possible answers.
        not_in_list: questions whose right answer is not in the list of answers; they count as wrong.
        k: number of answers that were scored as a whole.
        skipped: questions whose video is unreadable.
        same_answer: number of questions that both models answered alike; None unless there are two.
        seconds: from the first question to the last result, with decoding, of all models.
    """

    dataset: str
    questions: int
    answers: int
    not_in_list: int
    k: int
    skipped: tuple[Skipped, ...]
    scores: Mapping[str, AnswerScore]
    same_answer: int | None
    seconds: float

    @property
    def agreement(self) -> float | None:
        """Share (0 to 1) of questions that both models answered alike; None unless there are two."""
        return None if self.same_answer is None else self.same_answer / self.questions


def rank_answers(
    model: AnsweringModel,
    states: Tensor,
    mask: Tensor,
    answer_ids: Tensor,
    answer_mask: Tensor,
    *,
    k: int,
    pair_batch: int = 128,
    name: str = "model",
) -> Ranking:
    """Rank the answers to each question.

    The k answers with the most likely first token are scored as a whole. The first token counts twice, by its
    probability and in the loss, as in UMT. Among equal scores the lower index comes first.

    Args:
        states, mask: of the questions: `[B, L, D']` and int64 `[B, L]`, on the model's device.
        answer_ids, answer_mask: int64 `[A, La]`, `La > 1`, on any device.
        k: number of answers to score as a whole; all if there are fewer.
        pair_batch: pairs of question and answer per batch.

    Raises:
        ModelError: an output has another shape than in `AnsweringModel`.
        CheckFailed: the model returns values that are not finite.
        UsageError: there is not enough memory for the pairs.
    """
    with torch.inference_mode(), explain_out_of_memory(f"{pair_batch} pairs of question and answer"):
        first = _first_token(model, states, mask, answer_ids, name)
        order = first.argsort(dim=1, descending=True, stable=True)[:, :k]
        # A probability that is rounded to 0 has no logarithm; it stays last.
        log_first = first.gather(1, order).clamp_min(torch.finfo(torch.float32).tiny).log()
        loss = _losses(model, (states, mask), (answer_ids, answer_mask), order, pair_batch=pair_batch, name=name)
        log_probs = log_first - loss
        # Sorted by logarithm: probabilities far below the first are all 0.
        best = log_probs.argsort(dim=1, descending=True, stable=True)
        log_probs = log_probs.gather(1, best)
        return Ranking(order.gather(1, best), log_probs.softmax(dim=1), log_probs)


def evaluate_answers(
    models: Mapping[str, AnsweringModel],
    batches: Iterable[QuestionBatch],
    answers: AnswerList,
    *,
    dataset: str,
    questions: int,
    sample_id: Callable[[int], str],
    settings: VideoSettings,
    progress: Progress,
    k: int = 128,
    pair_batch: int = 128,
) -> AnswerEvaluation:
    """Answer every question with every model, on the same decoded videos.

    Args:
        models: by name. They are set to eval mode and moved to the device and dtype in place.
        batches: every question once; read lazily.
        questions: number of questions in `batches`, those with unreadable videos included.
        settings: `batch_size` is the number of questions per batch.
        k, pair_batch: as in `rank_answers`.

    Raises:
        DataError: there is no question or no answer, or (`strict`) a video is unreadable.
        ModelError: an output of a model has another shape than in `AnsweringModel`.
        CheckFailed: a model returns values that are not finite.
        UsageError: `k` is invalid, or there is not enough memory for the batch.
    """
    check_ranges(rerank_k=k)
    if not answers.texts:
        raise DataError(f"the dataset {dataset} has no list of answers")
    prepare(models, settings)
    device = settings.device
    # Copied once, not with every batch.
    answers = AnswerList(answers.texts, answers.ids.to(device), answers.mask.to(device))
    answerers = {name: _Answerer(name, model, answers, k, pair_batch, settings) for name, model in models.items()}
    counts = _Counts()
    started = time.perf_counter()
    with (
        torch.inference_mode(),
        explain_out_of_memory(f"{settings.batch_size} questions"),
        progress.task("questions", questions) as task,
    ):
        for batch in batches:
            counts.skipped += skipped_of(batch.broken, sample_id, settings.strict)
            if batch.video is not None and len(batch.indices) > 0:
                _answer_batch(answerers, batch, counts)
            task.advance(len(batch.indices) + len(batch.broken))
    if counts.questions == 0:
        problem = f"none of the {len(counts.skipped)} questions of {dataset} has a video that can be read"
        raise nothing_readable(problem, counts.skipped)
    return AnswerEvaluation(
        dataset=dataset,
        questions=counts.questions,
        answers=len(answers.texts),
        not_in_list=counts.not_in_list,
        k=min(k, len(answers.texts)),
        skipped=tuple(counts.skipped),
        scores={
            name: AnswerScore(counts.questions, each.correct, counts.videos, each.video_seconds, each.seconds)
            for name, each in answerers.items()
        },
        same_answer=counts.same if len(answerers) == 2 else None,  # noqa: PLR2004
        seconds=time.perf_counter() - started,
    )


@dataclass
class _Counts:
    """Counts that are the same for all models, and `same`, the questions that two models answered alike."""

    questions: int = 0
    videos: int = 0
    not_in_list: int = 0
    same: int = 0
    batches: int = 0
    skipped: list[Skipped] = field(default_factory=list)


@dataclass
class _Answerer:
    """One model, its time and its right answers so far."""

    name: str
    model: AnsweringModel
    answers: AnswerList
    k: int
    pair_batch: int
    settings: VideoSettings
    correct: int = 0
    video_seconds: float = 0.0
    seconds: float = 0.0

    def answer(self, video: Tensor, ids: Tensor, mask: Tensor, video_of: Tensor) -> list[str]:
        """The best answer to each question."""
        tokens, video_seconds = encode_timed(self.name, self.model, video, self.settings.device)
        started = time.perf_counter()
        given: list[str] = []
        # Each question gets the tokens of its video. One video may have many questions, so they are split.
        parts = (part.split(self.settings.batch_size) for part in (ids, mask, video_of))
        for part_ids, part_mask, places in zip(*parts, strict=True):
            states = self.model.encode_question(part_ids, part_mask, tokens[places])
            listed = self.answers.ids, self.answers.mask
            options: dict[str, Any] = {"k": self.k, "pair_batch": self.pair_batch, "name": self.name}
            ranking = rank_answers(self.model, states, part_mask, *listed, **options)
            given += [self.answers.texts[best] for best in ranking.topk_ids[:, 0].tolist()]
        self.video_seconds += video_seconds
        # No wait for the device: the ranking is on the CPU already.
        self.seconds += video_seconds + time.perf_counter() - started
        return given


def _answer_batch(answerers: Mapping[str, _Answerer], batch: QuestionBatch, counts: _Counts) -> None:
    """Run all models on one batch and count their answers."""
    assert batch.video is not None
    first = next(iter(answerers.values()))
    device, listed = first.settings.device, set(first.answers.texts)
    video = batch.video.to(device=device, dtype=first.settings.dtype)
    ids, mask, places = batch.ids.to(device), batch.mask.to(device), torch.tensor(batch.video_of, device=device)
    if counts.batches == 0:
        # Warm-up, not timed: the first pass allocates memory pools and selects kernels.
        for each in answerers.values():
            encode_timed(each.name, each.model, video, device)
    given: dict[str, list[str]] = {}
    for name in alternate_order(list(answerers), counts.batches):
        given[name] = answerers[name].answer(video, ids, mask, places)
        answerers[name].correct += _equal(given[name], batch.answers)
    counts.batches += 1
    counts.questions += len(batch.indices)
    counts.videos += len(batch.video)
    counts.not_in_list += sum(right not in listed for right in batch.answers)
    if len(given) == 2:  # noqa: PLR2004
        counts.same += _equal(*given.values())


def _equal(texts: Sequence[str], others: Sequence[str]) -> int:
    return sum(text == other for text, other in zip(texts, others, strict=True))


def _first_token(model: AnsweringModel, states: Tensor, mask: Tensor, answer_ids: Tensor, name: str) -> Tensor:
    """Probability of the first token of each answer: float32 `[B, A]` on the CPU."""
    start = int(answer_ids[0, 0])  # the same for every answer
    probabilities = check_finite(name, model.first_token_probabilities(states, mask, start))
    if probabilities.dim() != _MATRIX or len(probabilities) != len(states):
        raise ModelError(f"{name}: probabilities of {len(states)} questions have shape {tuple(probabilities.shape)}")
    first, vocabulary = answer_ids[:, _FIRST], probabilities.shape[1]
    if int(first.max()) >= vocabulary:
        raise ModelError(f"{name}: token {int(first.max())} of an answer is not among its {vocabulary} tokens")
    return probabilities[:, first.to(probabilities.device)].float().cpu()


def _losses(
    model: AnsweringModel,
    questions: tuple[Tensor, Tensor],
    answers: tuple[Tensor, Tensor],
    chosen: Tensor,
    *,
    pair_batch: int,
    name: str,
) -> Tensor:
    """The loss of the chosen answers `[B, k]` to each question: float32 `[B, k]` on the CPU.

    `questions` are states and mask, `answers` ids and mask of the whole list.
    """
    device, home = questions[0].device, answers[0].device
    rows = torch.arange(len(chosen)).repeat_interleave(chosen.shape[1])
    losses = []
    for row, answer in zip(rows.split(pair_batch), chosen.flatten().split(pair_batch), strict=True):
        states = (part[row.to(device)] for part in questions)
        candidates = (part[answer.to(home)].to(device) for part in answers)
        loss = model.answer_loss(*states, *candidates)
        if tuple(loss.shape) != (len(row),):
            raise ModelError(f"{name}: the losses of {len(row)} answers have shape {tuple(loss.shape)}")
        losses.append(check_finite(name, loss).float().cpu())
    return torch.cat(losses).view(chosen.shape)
