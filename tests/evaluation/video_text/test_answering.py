"""Ranking of answers against UMT's code, and counts with missing videos or answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paths import VECTORS
from safetensors.torch import load_file
from torch import Tensor, nn

from repshift_cli.errors import CheckFailed, DataError, ModelError, UsageError
from repshift_cli.evaluation.common import Skipped
from repshift_cli.evaluation.video_text.answering import (
    AnswerEvaluation,
    AnsweringModel,
    AnswerList,
    QuestionBatch,
    Ranking,
    evaluate_answers,
    rank_answers,
)
from repshift_cli.evaluation.video_text.settings import VideoSettings
from repshift_cli.utils.progress import Silent
from repshift_cli.utils.stats import wilson_interval

VECTORS = {
    name.removeprefix("qa/"): tensor
    for name, tensor in load_file(VECTORS / "umt_ranks.safetensors").items()
    if name.startswith("qa/")
}


class Table(nn.Module):
    """Looks up the outputs of a decoder: states hold the number of the question, each answer has its own first word."""

    def __init__(self, probabilities: Tensor, loss: Tensor, first: Tensor) -> None:
        super().__init__()
        self.probabilities = probabilities
        self.loss = loss
        self.first = first.tolist()
        self.pairs: list[tuple[int, int]] = []
        self.largest = 0

    def first_token_probabilities(self, states: Tensor, mask: Tensor, start: int) -> Tensor:
        assert states.shape[:2] == mask.shape
        return self.probabilities[states[:, 0, 0].long()]

    def answer_loss(self, states: Tensor, mask: Tensor, answer_ids: Tensor, answer_mask: Tensor) -> Tensor:
        assert len(states) == len(mask) == len(answer_ids) == len(answer_mask)
        questions = states[:, 0, 0].long().tolist()
        answers = [self.first.index(word) for word in answer_ids[:, 1].tolist()]
        self.pairs += list(zip(questions, answers, strict=True))
        self.largest = max(self.largest, len(states))
        return self.loss[questions, answers]


def ranked(model: Any, ids: Tensor, k: int, pair_batch: int = 4, questions: int = 2) -> Ranking:
    states = torch.arange(questions, dtype=torch.float32)[:, None, None]
    mask = torch.ones(questions, 1, dtype=torch.int64)
    return rank_answers(model, states, mask, ids, torch.ones_like(ids), k=k, pair_batch=pair_batch)


def umt() -> tuple[Table, Tensor]:
    """UMT's first words and losses, the losses in the order of the list of answers."""
    ids = VECTORS["in/answer_input_ids"]
    loss = torch.empty_like(VECTORS["all/answer_loss"]).scatter_(
        1, VECTORS["all/first_topk_ids"], VECTORS["all/answer_loss"]
    )
    return Table(VECTORS["out/start_logits"].softmax(dim=-1), loss, ids[:, 1]), ids


@pytest.mark.parametrize(("case", "k"), [("out", 3), ("all", 6), ("all", 128)])
def test_the_ranking_equals_umts(case: str, k: int) -> None:
    model, ids = umt()
    found = ranked(model, ids, k)
    assert found.topk_ids.tolist() == VECTORS[f"{case}/topk_ids"].tolist()
    torch.testing.assert_close(found.topk_probs, VECTORS[f"{case}/topk_probs"], atol=2e-6, rtol=1e-5)
    expected = VECTORS[f"{case}/log_probs_sum"].sort(dim=1, descending=True).values
    torch.testing.assert_close(found.log_probs, expected, atol=1e-5, rtol=0)


def test_the_first_tokens_select_umts_candidates() -> None:
    model, ids = umt()
    torch.testing.assert_close(model.probabilities[:, ids[:, 1]], VECTORS["out/prob_first_token"])
    ranked(model, ids, 3)
    chosen = [[answer for question, answer in model.pairs if question == row] for row in (0, 1)]
    assert chosen == VECTORS["out/first_topk_ids"].tolist()


@pytest.mark.parametrize("pair_batch", [1, 5, 1000])
def test_the_pair_batch_does_not_change_the_result(pair_batch: int) -> None:
    model, ids = umt()
    found, expected = ranked(model, ids, 5, pair_batch), ranked(umt()[0], ids, 5)
    assert torch.equal(found.topk_ids, expected.topk_ids)
    assert torch.equal(found.log_probs, expected.log_probs)
    assert torch.equal(found.topk_probs, expected.topk_probs)
    assert model.largest <= pair_batch


NUMBERS = st.integers(1, 6).flatmap(
    lambda answers: st.tuples(
        st.lists(st.integers(0, 3), min_size=answers, max_size=answers),
        st.lists(st.integers(0, 3), min_size=answers, max_size=answers),
        st.integers(1, 8),
    )
)


@given(NUMBERS)
def test_the_ranking_equals_a_plain_sort(drawn: tuple[list[int], list[int], int]) -> None:
    likely, loss, k = drawn
    answers = len(likely)
    ids = torch.stack([torch.zeros(answers, dtype=torch.int64), torch.arange(answers)], dim=1)
    # Powers of two: their logarithms differ by as much as the losses, so that there are ties.
    steps = torch.tensor(2.0).log()
    found = ranked(Table(2.0 ** torch.tensor([likely]), torch.tensor([loss]) * steps, ids[:, 1]), ids, k, questions=1)
    chosen = sorted(range(answers), key=lambda one: (-likely[one], one))[:k]
    scores = {one: float((likely[one] - loss[one]) * steps) for one in chosen}
    assert sorted(found.topk_ids[0].tolist()) == sorted(chosen)
    assert found.log_probs[0].tolist() == pytest.approx([scores[one] for one in found.topk_ids[0].tolist()], abs=1e-5)
    assert found.log_probs[0].tolist() == sorted(found.log_probs[0].tolist(), reverse=True)
    assert found.topk_probs.sum().item() == pytest.approx(1.0)


def test_ties_go_to_the_lower_index() -> None:
    ids = torch.tensor([[0, word] for word in range(4)])
    found = ranked(Table(torch.full((1, 4), 0.25), torch.zeros(1, 4), ids[:, 1]), ids, 3, questions=1)
    assert found.topk_ids.tolist() == [[0, 1, 2]]


def test_a_probability_of_zero_is_ranked_last() -> None:
    ids = torch.tensor([[0, word] for word in range(3)])
    found = ranked(Table(torch.tensor([[0.0, 0.9, 0.1]]), torch.zeros(1, 3), ids[:, 1]), ids, 3, questions=1)
    assert found.topk_ids.tolist() == [[1, 2, 0]]
    assert bool(torch.isfinite(found.log_probs).all())


WORDS = ["red", "blue", "green", "two", "three"]
LIST = AnswerList(
    WORDS,
    torch.tensor([[9, word, 8] for word in range(len(WORDS))]),
    torch.ones(len(WORDS), 3, dtype=torch.int64),
)


class Toy(nn.Module):
    """The video shows the index of the right word, and the model answers with the word `shift` later."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))
        self.seen: list[int] = []

    def encode_video(self, video: Tensor) -> Tensor:
        assert not self.training
        self.seen += video[:, 0, 0, 0, 0].long().tolist()
        return video[:, :, 0, 0] + self.shift

    def encode_question(self, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        return tokens[:, :1, :1] + (ids * mask)[:, :, None].to(tokens.dtype)

    def first_token_probabilities(self, states: Tensor, mask: Tensor, start: int) -> Tensor:
        assert start == 9
        return (-(torch.arange(10) - states[:, 0]).abs()).softmax(dim=1)

    def answer_loss(self, states: Tensor, mask: Tensor, answer_ids: Tensor, answer_mask: Tensor) -> Tensor:
        return (answer_ids[:, 1] - states[:, 0, 0]).abs()


def batches_of(shown: Sequence[int], right: Sequence[str], broken: Sequence[int] = ()) -> Iterator[QuestionBatch]:
    for start in range(0, len(shown), 2):
        part = range(start, min(start + 2, len(shown)))
        good = [index for index in part if index not in broken]
        yield QuestionBatch(
            good,
            torch.stack([torch.full((2, 3, 2, 2), float(shown[index])) for index in good]) if good else None,
            torch.zeros(len(good), 4, dtype=torch.int64),
            torch.ones(len(good), 4, dtype=torch.int64),
            [right[index] for index in good],
            [(index, "made to fail") for index in part if index in broken],
            range(len(good)),
        )


def run(models: dict[str, Any], batches: Iterator[QuestionBatch], **options: Any) -> AnswerEvaluation:
    chosen: dict[str, Any] = {
        "dataset": "toys",
        "questions": 5,
        "sample_id": lambda index: f"question-{index}",
        "settings": VideoSettings(2, torch.device("cpu"), torch.float32, strict=options.pop("strict", False)),
        "progress": Silent(),
        **options,
    }
    return evaluate_answers(models, batches, chosen.pop("answers", LIST), **chosen)


def test_answers_are_compared_as_strings() -> None:
    result = run({"toy": Toy()}, batches_of([0, 1, 2, 3, 4], ["red", "blue", "Green", "two", "yellow"]))
    score = result.scores["toy"]
    # "Green" is written otherwise in the list, and "yellow" is not there at all.
    assert (score.correct, result.questions, result.not_in_list) == (3, 5, 2)
    assert score.accuracy == 60.0
    assert score.interval == tuple(100 * end for end in wilson_interval(3, 5))
    assert (result.answers, result.k, result.agreement, result.skipped) == (5, 5, None, ())
    assert score.seconds >= score.video_seconds > 0
    assert score.videos_per_s == 5 / score.video_seconds
    assert score.questions_per_s == 5 / score.seconds


def test_two_models_see_the_same_videos_and_are_compared() -> None:
    models = {"one": Toy(), "other": Toy(shift=1.0)}
    result = run(models, batches_of([0, 1, 2, 3, 4], [WORDS[index] for index in range(5)]))
    assert models["one"].seen == models["other"].seen
    # The other is one word late, except at the end of the list.
    assert (result.scores["one"].correct, result.scores["other"].correct) == (5, 1)
    assert result.same_answer == 1
    assert result.agreement == 0.2


def test_broken_videos_are_left_out() -> None:
    result = run({"toy": Toy()}, batches_of([0, 1, 2, 3, 4], WORDS, broken=(1, 2, 3)))
    assert result.skipped == tuple(Skipped(f"question-{index}", "made to fail") for index in (1, 2, 3))
    assert (result.questions, result.scores["toy"].correct) == (2, 2)


def test_strict_stops_at_the_first_broken_video() -> None:
    with pytest.raises(DataError, match="question-1 cannot be read: made to fail"):
        run({"toy": Toy()}, batches_of([0, 1, 2, 3, 4], WORDS, broken=(1,)), strict=True)


def test_no_question_and_no_answer_raise() -> None:
    with pytest.raises(DataError, match="none of the 5 questions of toys") as caught:
        run({"toy": Toy()}, batches_of([0, 1, 2, 3, 4], WORDS, broken=range(5)))
    assert caught.value.hint == "The first: question-0: made to fail"
    with pytest.raises(DataError, match="no list of answers"):
        run({"toy": Toy()}, batches_of([0], WORDS), answers=AnswerList([], LIST.ids[:0], LIST.mask[:0]))


def test_k_is_at_most_the_list() -> None:
    assert run({"toy": Toy()}, batches_of([0], WORDS), k=3).k == 3
    assert run({"toy": Toy()}, batches_of([0], WORDS), k=5).k == 5
    assert run({"toy": Toy()}, batches_of([0], WORDS), k=6).k == 5
    with pytest.raises(UsageError):
        run({"toy": Toy()}, batches_of([0], WORDS), k=0)


def test_wrong_shapes_raise() -> None:
    class Flat(Toy):
        def encode_video(self, video: Tensor) -> Tensor:
            return super().encode_video(video)[:, 0]

    class One(Toy):
        def first_token_probabilities(self, states: Tensor, mask: Tensor, start: int) -> Tensor:
            return super().first_token_probabilities(states, mask, start)[0]

    class Few(Toy):
        def first_token_probabilities(self, states: Tensor, mask: Tensor, start: int) -> Tensor:
            return super().first_token_probabilities(states, mask, start)[:, :3]

    class Summed(Toy):
        def answer_loss(self, states: Tensor, mask: Tensor, answer_ids: Tensor, answer_mask: Tensor) -> Tensor:
            return super().answer_loss(states, mask, answer_ids, answer_mask).sum()

    for model in (Flat(), One(), Few(), Summed()):
        with pytest.raises(ModelError, match="toy"):
            run({"toy": model}, batches_of([0, 1], WORDS))


def test_values_have_to_be_finite() -> None:
    with pytest.raises(CheckFailed, match="toy: the model returns values that are not finite in float32"):
        run({"toy": Toy(shift=float("nan"))}, batches_of([0], WORDS))


def test_running_out_of_memory_raises() -> None:
    class Greedy(Toy):
        def encode_video(self, video: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("made to fail")

    class GreedyDecoder(Toy):
        def answer_loss(self, states: Tensor, mask: Tensor, answer_ids: Tensor, answer_mask: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("made to fail")

    for model, what in ((Greedy(), "2 questions"), (GreedyDecoder(), "128 pairs of question and answer")):
        with pytest.raises(UsageError, match=f"{what} at a time") as caught:
            run({"toy": model}, batches_of([0], WORDS))
        assert caught.value.hint == "Lower --batch-size."


def test_a_module_with_these_methods_is_a_model() -> None:
    model: AnsweringModel = Toy()
    assert callable(model.answer_loss)
