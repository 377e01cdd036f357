"""Questions about videos, answered from a fixed list: the decoder of a model ranks the answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from repshift_cli.errors import DataError, ModelError, UsageError
from repshift_cli.evaluation.common import Skipped, alternate_order, check_finite, explain_out_of_memory, per_second
from repshift_cli.measure.device import wait_for
from repshift_cli.utils.progress import Progress
from repshift_cli.utils.stats import percent_interval

__all__ = [
    "AnswerEvaluation",
    "AnswerList",
    "AnswerScore",
    "AnsweringModel",
    "QuestionBatch",
    "Ranking",
    "evaluate_answers",
    "rank_answers",
]

_FIRST = 1  # where the first token of an answer stands: behind [CLS]
_MATRIX = 2  # dimensions of probabilities: [B, V]
_TOKENS_RANK = 3  # dimensions of tokens and states: [B, N, D]


class AnsweringModel(Protocol):
    """A module that reads a question with a video in view, and says how likely an answer is."""

    def encode_video(self, video: Tensor) -> Tensor:
        """`[B, T, 3, H, W]` to tokens `[B, N, D]`."""
        ...

    def encode_question(self, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """int64 `[B, L]` each and `[B, N, D]`, to states `[B, L, D']`."""
        ...

    def first_token_probabilities(self, states: Tensor, mask: Tensor, start: int) -> Tensor:
        """`[B, L, D']`, `[B, L]` to `[B, V]`: what the decoder expects behind the token `start` ([CLS]) alone."""
        ...

    def answer_loss(self, states: Tensor, mask: Tensor, answer_ids: Tensor, answer_mask: Tensor) -> Tensor:
        """Of n pairs `[n, L, D']`, `[n, L]`, `[n, A]`, `[n, A]` the summed cross-entropy of the next tokens, `[n]`."""
        ...

    def to(self, *, device: torch.device, dtype: torch.dtype) -> object:
        """As of `nn.Module`."""
        ...

    def eval(self) -> object:
        """As of `nn.Module`."""
        ...


@dataclass(frozen=True)
class QuestionBatch:
    """Questions with their videos; only those whose video was read.

    Attributes:
        indices: of the questions.
        video: `[v, T, 3, H, W]`; None where no video was read.
        ids, mask: int64 `[b, L]`, the questions.
        answers: the right answer of each.
        broken: questions whose video could not be read, with the reason.
        video_of: for each question the place of its video in `video`; None where each has one of its own, in order.
    """

    indices: Sequence[int]
    video: Tensor | None
    ids: Tensor
    mask: Tensor
    answers: Sequence[str]
    broken: Sequence[tuple[int, str]] = ()
    video_of: Sequence[int] | None = None


@dataclass(frozen=True)
class AnswerList:
    """All answers that a model can give.

    Attributes:
        texts: as they are compared with the right answers.
        ids, mask: int64 `[A, La]`; `[CLS]` first, then the answer.
    """

    texts: Sequence[str]
    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Ranking:
    """The best answers of each question, best first, on the CPU.

    Attributes:
        topk_ids: int64 `[B, k]`, places in the list of answers.
        topk_probs: float32 `[B, k]`, softmax over the k.
        log_probs: float32 `[B, k]`, log of the first token's probability minus the loss of the whole answer.
    """

    topk_ids: Tensor
    topk_probs: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class AnswerScore:
    """What one model reached.

    Attributes:
        questions: that were asked.
        correct: answered with the very string.
        videos: that they were asked about; one that came in several batches counts so often.
        video_seconds: time in the video encoder alone, for all videos.
        seconds: time in the model, the encoder included.
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
        """Videos per second of encoder time: no decoding, no copying."""
        return per_second(self.videos, self.video_seconds)

    @property
    def questions_per_s(self) -> float:
        """Questions per second of model time."""
        return per_second(self.questions, self.seconds)


@dataclass(frozen=True)
class AnswerEvaluation:
    """The outcome for all models of a run.

    Attributes:
        dataset: name of the dataset.
        questions: that were asked, of every model.
        answers: length of the list of answers.
        not_in_list: questions whose right answer is not in the list, so that no model can give it; they count as wrong.
        k: how many answers were ranked by the whole answer.
        skipped: questions whose video could not be read.
        scores: by the name of the model.
        same_answer: where there are two models, how many questions both answered alike; else None.
        seconds: from the first question to the last result, decoding and all models included.
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

    The k answers whose first token is the likeliest are scored as a whole. The first token counts twice, by its
    probability and in the loss, as in UMT. Among equal ones the lower index comes first.

    Args:
        model: in eval mode.
        states: `[B, L, D']`, the questions, on the model's device.
        mask: int64 `[B, L]`.
        answer_ids, answer_mask: int64 `[A, La]`, `La > 1`, on any device.
        k: how many answers to score as a whole; all, where there are no more.
        pair_batch: pairs of question and answer at a time.
        name: what the model is called, in messages.

    Raises:
        ModelError: the model does not return tensors of the forms that `AnsweringModel` says.
        CheckFailed: it returns numbers that are not finite.
        UsageError: not enough memory for the pairs.
    """
    with torch.inference_mode(), explain_out_of_memory(f"{pair_batch} pairs of question and answer"):
        first = _first_token(model, states, mask, answer_ids, name)
        order = first.argsort(dim=1, descending=True, stable=True)[:, :k]
        # A probability that is rounded to 0 has no logarithm; it stays the last one.
        log_first = first.gather(1, order).clamp_min(torch.finfo(torch.float32).tiny).log()
        loss = _losses(model, (states, mask), (answer_ids, answer_mask), order, pair_batch=pair_batch, name=name)
        log_probs = log_first - loss
        # By the logarithm: probabilities far behind the first are all 0.
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
    batch_size: int,
    device: torch.device | str,
    dtype: torch.dtype,
    strict: bool,
    progress: Progress,
    k: int = 128,
    pair_batch: int = 128,
) -> AnswerEvaluation:
    """Ask every model every question, on the same decoded videos.

    Args:
        models: by name. They are set to eval mode and moved to `device` and `dtype` in place.
        batches: every question once, read while this runs.
        answers: the list to answer from.
        dataset: its name.
        questions: how many questions `batches` has, those with broken videos included.
        sample_id: what a question is called, by its index.
        batch_size: questions at a time, and for the message when memory runs out.
        strict: stop at the first video that cannot be read, instead of leaving its question out.
        k: how many answers to score as a whole; all, where the list has no more.
        pair_batch: pairs of question and answer at a time.

    Raises:
        DataError: no question, no answer, or (`strict`) a video that cannot be read.
        ModelError: a model does not return tensors of the forms that `AnsweringModel` says.
        CheckFailed: a model returns values that are not finite.
        UsageError: not enough memory for the batch.
    """
    _check_answers(answers, dataset)
    if k < 1:
        raise UsageError(f"{k} answers cannot be ranked", "Take 1 or more.")
    device = torch.device(device)
    for model in models.values():
        model.to(device=device, dtype=dtype)
        model.eval()
    # On the device once, not with every batch.
    answers = AnswerList(answers.texts, answers.ids.to(device), answers.mask.to(device))
    sides = {name: _Side(name, model, answers, k, pair_batch, batch_size, device) for name, model in models.items()}
    tally = _Tally(frozenset(answers.texts))
    started = time.perf_counter()
    with (
        torch.inference_mode(),
        explain_out_of_memory(f"{batch_size} questions"),
        progress.task("questions", questions) as task,
    ):
        for batch in batches:
            _note_broken(batch, sample_id, strict, tally)
            if batch.video is not None and len(batch.indices) > 0:
                _ask(sides, batch, tally, device=device, dtype=dtype)
            task.advance(len(batch.indices) + len(batch.broken))
    listed = len(answers.texts)
    return _result(sides, tally, dataset, answers=listed, k=min(k, listed), seconds=time.perf_counter() - started)


@dataclass
class _Side:
    """One model with the answers to choose from, and how it did so far."""

    name: str
    model: AnsweringModel
    answers: AnswerList
    k: int
    pair_batch: int
    batch_size: int
    device: torch.device
    correct: int = 0
    video_seconds: float = 0.0
    seconds: float = 0.0

    def look(self, video: Tensor) -> tuple[Tensor, float]:
        """The tokens of videos, and how long they took."""
        wait_for(self.device)
        started = time.perf_counter()
        tokens = self.model.encode_video(video)
        wait_for(self.device)
        seconds = time.perf_counter() - started
        if tokens.dim() != _TOKENS_RANK or len(tokens) != len(video):
            raise ModelError(f"{self.name}: the videos {tuple(video.shape)} become {tuple(tokens.shape)}")
        return tokens, seconds

    def answer(self, video: Tensor, ids: Tensor, mask: Tensor, video_of: Tensor) -> list[str]:
        """The best answer to each question."""
        tokens, seconds = self.look(video)
        started = time.perf_counter()
        said: list[str] = []
        # Each question gets the tokens of its video: there may be many about one, so not all at once.
        parts = (part.split(self.batch_size) for part in (ids, mask, video_of))
        for some_ids, some_mask, places in zip(*parts, strict=True):
            states = self.model.encode_question(some_ids, some_mask, tokens[places])
            ranking = rank_answers(
                self.model,
                states,
                some_mask,
                self.answers.ids,
                self.answers.mask,
                k=self.k,
                pair_batch=self.pair_batch,
                name=self.name,
            )
            said += [self.answers.texts[best] for best in ranking.topk_ids[:, 0].tolist()]
        self.video_seconds += seconds
        # The ranking is on the CPU: the device has nothing left to do.
        self.seconds += seconds + time.perf_counter() - started
        return said


@dataclass
class _Tally:
    known: frozenset[str]
    questions: int = 0
    videos: int = 0
    not_in_list: int = 0
    batches: int = 0
    same: int = 0
    skipped: list[Skipped] = field(default_factory=list)


def _ask(
    sides: Mapping[str, _Side], batch: QuestionBatch, tally: _Tally, *, device: torch.device, dtype: torch.dtype
) -> None:
    """Run the models over one batch and add up what they say."""
    assert batch.video is not None
    video_of = range(len(batch.video)) if batch.video_of is None else batch.video_of
    if not len(batch.indices) == len(video_of) == len(batch.ids) == len(batch.answers):
        raise ValueError("a batch needs one video and one answer for each question")
    video = batch.video.to(device=device, dtype=dtype)
    ids, mask, places = batch.ids.to(device), batch.mask.to(device), torch.tensor(video_of, device=device)
    if tally.batches == 0:
        # The first pass pays for memory pools and kernel selection; it is not part of the speed.
        for side in sides.values():
            side.look(video)
    said: dict[str, list[str]] = {}
    for name in alternate_order(list(sides), tally.batches):
        said[name] = sides[name].answer(video, ids, mask, places)
        sides[name].correct += sum(one == right for one, right in zip(said[name], batch.answers, strict=True))
    tally.batches += 1
    tally.questions += len(batch.indices)
    tally.videos += len(batch.video)
    tally.not_in_list += sum(right not in tally.known for right in batch.answers)
    if len(said) == 2:  # noqa: PLR2004
        one, other = said.values()
        tally.same += sum(mine == yours for mine, yours in zip(one, other, strict=True))


def _result(
    sides: Mapping[str, _Side], tally: _Tally, dataset: str, *, answers: int, k: int, seconds: float
) -> AnswerEvaluation:
    if tally.questions == 0:
        first = tally.skipped[0] if tally.skipped else None
        raise DataError(
            f"none of the {len(tally.skipped)} questions of {dataset} has a video that can be read",
            f"The first: {first.sample}: {first.reason}" if first else None,
        )
    scores = {
        name: AnswerScore(tally.questions, side.correct, tally.videos, side.video_seconds, side.seconds)
        for name, side in sides.items()
    }
    return AnswerEvaluation(
        dataset=dataset,
        questions=tally.questions,
        answers=answers,
        not_in_list=tally.not_in_list,
        k=k,
        skipped=tuple(tally.skipped),
        scores=scores,
        same_answer=tally.same if len(sides) == 2 else None,  # noqa: PLR2004
        seconds=seconds,
    )


def _note_broken(batch: QuestionBatch, sample_id: Callable[[int], str], strict: bool, tally: _Tally) -> None:
    for index, reason in batch.broken:
        if strict:
            raise DataError(f"{sample_id(index)} cannot be read: {reason}")
        tally.skipped.append(Skipped(sample_id(index), reason))


def _check_answers(answers: AnswerList, dataset: str) -> None:
    if not answers.texts:
        raise DataError(f"the dataset {dataset} has no list of answers")
    if answers.ids.dim() != _MATRIX or answers.ids.shape != answers.mask.shape:
        raise ValueError(f"answers {tuple(answers.ids.shape)} with a mask {tuple(answers.mask.shape)}")
    if len(answers.texts) != len(answers.ids) or answers.ids.shape[1] <= _FIRST:
        raise ValueError(f"answers {tuple(answers.ids.shape)} for {len(answers.texts)} texts")


def _first_token(model: AnsweringModel, states: Tensor, mask: Tensor, answer_ids: Tensor, name: str) -> Tensor:
    """How likely the first token of each answer is: float32 `[B, A]` on the CPU."""
    # Every answer begins with the same token.
    start = int(answer_ids[0, 0])
    probabilities = check_finite(name, model.first_token_probabilities(states, mask, start))
    if probabilities.dim() != _MATRIX or len(probabilities) != len(states):
        raise ModelError(f"{name}: {len(states)} questions become the probabilities {tuple(probabilities.shape)}")
    first, words = answer_ids[:, _FIRST], probabilities.shape[1]
    if int(first.max()) >= words:
        raise ModelError(f"{name}: token {int(first.max())} of an answer is not among the {words} of the model")
    return probabilities[:, first.to(probabilities.device)].float().cpu()


def _losses(
    model: AnsweringModel,
    asked: tuple[Tensor, Tensor],
    said: tuple[Tensor, Tensor],
    chosen: Tensor,
    *,
    pair_batch: int,
    name: str,
) -> Tensor:
    """The loss of the chosen answers `[B, k]` of each question: float32 `[B, k]` on the CPU.

    `asked` holds the states and the mask of the questions, `said` the ids and the mask of all answers.
    """
    device, home = asked[0].device, said[0].device
    questions, answers = torch.arange(len(chosen)).repeat_interleave(chosen.shape[1]), chosen.flatten()
    losses = []
    for question, answer in zip(questions.split(pair_batch), answers.split(pair_batch), strict=True):
        loss = model.answer_loss(
            *(part[question.to(device)] for part in asked), *(part[answer.to(home)].to(device) for part in said)
        )
        if tuple(loss.shape) != (len(question),):
            raise ModelError(f"{name}: {len(question)} answers have the losses {tuple(loss.shape)}")
        losses.append(check_finite(name, loss).float().cpu())
    return torch.cat(losses).view(chosen.shape)
