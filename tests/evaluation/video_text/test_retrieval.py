"""Retrieval against UMT's evaluation, ranks with ties, and galleries on disk or with unreadable videos."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paths import VECTORS
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import normalize

from repshift_cli.data.loader import Batch
from repshift_cli.data.video.tokenizer import TextBatch
from repshift_cli.errors import CheckFailed, DataError, ModelError, OutputError, UsageError
from repshift_cli.evaluation.common import Skipped
from repshift_cli.evaluation.video_text.ranking import (
    NOT_MATCHED,
    Directions,
    RankStats,
    RetrievalModel,
    matching_scores,
    rank_stats,
    ranks,
    similarity,
)
from repshift_cli.evaluation.video_text.retrieval import (
    RetrievalEvaluation,
    evaluate_retrieval,
)
from repshift_cli.evaluation.video_text.settings import VideoSettings
from repshift_cli.utils.progress import Silent

RANKS = VECTORS / "umt_ranks.safetensors"
"""Scores and metrics of UMT's own code, and answers of its question model; cut from larger files."""

with safe_open(RANKS, "pt") as file:
    TENSORS = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    METRICS = json.loads(file.metadata()["metrics"])
    TXT2VIDEO = [[video] for video in json.loads(file.metadata()["videos_of_caption"])]

CASES = {
    "itm_eval": (METRICS["itm_eval/"], "itm_eval/scores_t2i", "itm_eval/scores_i2t", [[j % 20] for j in range(30)]),
    **{
        f"{case}{kind}": (METRICS[case][kind], f"{case}t2i_{form}", f"{case}i2t_{form}", TXT2VIDEO)
        for case in ("eval/ktest/", "eval/full/", "eval/full_nokt/")
        for kind, form in (("itm", "x"), ("vtc", "emb"))
    },
}
WITH_TIES = "eval/ktest/itm"


def the_other_way(videos_of: Sequence[Sequence[int]], videos: int) -> list[list[int]]:
    return [[caption for caption, its in enumerate(videos_of) if video in its] for video in range(videos)]


def official(metrics: dict[str, float], direction: str) -> list[float]:
    return [metrics[f"{direction}_r{top}"] for top in (1, 5, 10)]


def recall(scores: Tensor, truths: Sequence[Sequence[int]]) -> list[float]:
    stats = rank_stats(ranks(scores, truths))
    return [round(value, 2) for value in (stats.r1, stats.r5, stats.r10)]


@pytest.mark.parametrize("case", [case for case in CASES if case != WITH_TIES])
def test_recall_equals_umts(case: str) -> None:
    metrics, text_to_video, video_to_text, truths = CASES[case]
    assert recall(TENSORS[text_to_video], truths) == official(metrics, "img")
    back = TENSORS[video_to_text]
    assert recall(back, the_other_way(truths, len(back))) == official(metrics, "txt")


@pytest.mark.parametrize("case", CASES)
def test_recall_equals_umts_where_ties_go_to_the_higher_index(case: str) -> None:
    """UMT reverses an ascending sort: of equal scores the last comes first. The gallery is mirrored for that order."""
    metrics, text_to_video, video_to_text, truths = CASES[case]
    for name, right, direction in (
        (text_to_video, truths, "img"),
        (video_to_text, the_other_way(truths, len(TENSORS[video_to_text])), "txt"),
    ):
        scores = TENSORS[name]
        mirrored = [[scores.shape[1] - 1 - one for one in its] for its in right]
        assert recall(scores.flip(1), mirrored) == official(metrics, direction)


def test_unmatched_candidates_are_ordered_by_index() -> None:
    metrics, text_to_video, video_to_text, truths = CASES[WITH_TIES]
    assert recall(TENSORS[text_to_video], truths) == official(metrics, "img")
    back = TENSORS[video_to_text]
    here, there = recall(back, the_other_way(truths, len(back))), official(metrics, "txt")
    # Three of seven were matched: R@5 includes unmatched candidates, which UMT orders differently.
    assert (here[0], here[2]) == (there[0], there[2])
    assert (here[1], there[1]) == (60.0, 80.0)


@pytest.mark.parametrize("case", ["out", "nokt"])
def test_similarity_equals_umts(case: str) -> None:
    found = similarity(TENSORS[f"{case}/vision_proj_l2"], TENSORS["out/text_proj_l2"])
    torch.testing.assert_close(found, TENSORS[f"{case}/sim_v2t"], atol=2e-7, rtol=0)


def test_similarity_is_the_mean_of_the_frames_cosines() -> None:
    video, text = normalize(torch.randn(3, 4, 5), dim=-1), normalize(torch.randn(2, 5), dim=-1)
    expected = torch.stack([torch.stack([(frames @ one).mean() for one in text]) for frames in video])
    torch.testing.assert_close(similarity(video, text), expected)


SCORES = st.integers(1, 6).flatmap(
    lambda gallery: st.lists(
        st.tuples(
            st.lists(st.integers(-3, 3), min_size=gallery, max_size=gallery),
            st.lists(st.integers(0, gallery - 1), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=5,
    )
)


@given(SCORES)
def test_ranks_equal_a_plain_sort(queries: list[tuple[list[int], list[int]]]) -> None:
    expected = []
    for scores, right in queries:
        order = sorted(range(len(scores)), key=lambda one: (-scores[one], one))
        expected.append(min(order.index(one) for one in right))
    found = ranks(torch.tensor([scores for scores, _ in queries]).float(), [right for _, right in queries])
    assert found.dtype == torch.int64
    assert found.tolist() == expected


@given(SCORES)
def test_ranks_depend_on_the_order_of_the_scores_alone(queries: list[tuple[list[int], list[int]]]) -> None:
    scores, truths = torch.tensor([scores for scores, _ in queries]).float(), [right for _, right in queries]
    assert ranks(3 * scores.exp() - 7, truths).tolist() == ranks(scores, truths).tolist()


@given(SCORES)
def test_more_right_answers_are_never_worse(queries: list[tuple[list[int], list[int]]]) -> None:
    scores, truths = torch.tensor([scores for scores, _ in queries]).float(), [right for _, right in queries]
    assert bool((ranks(scores, truths) <= ranks(scores, [right[:1] for right in truths])).all())


@given(SCORES)
def test_without_ties_the_order_of_the_gallery_does_not_matter(queries: list[tuple[list[int], list[int]]]) -> None:
    gallery = len(queries[0][0])
    scores = torch.tensor([scores for scores, _ in queries]).float() + torch.arange(gallery) / 100
    truths = [right for _, right in queries]
    mirrored = [[gallery - 1 - one for one in right] for right in truths]
    assert ranks(scores, truths).tolist() == ranks(scores.flip(1), mirrored).tolist()


def test_constant_scores_get_no_advantage() -> None:
    assert ranks(torch.zeros(4, 4), [[0], [1], [2], [3]]).tolist() == [0, 1, 2, 3]


def test_the_best_of_several_right_answers_counts() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7]])
    assert ranks(scores, [[0, 2]]).tolist() == [2]
    assert ranks(scores, [[0, 3, 2]]).tolist() == [1]


def test_rank_stats_count_from_one() -> None:
    assert rank_stats(torch.tensor([0, 4, 5, 99])) == RankStats(25.0, 50.0, 75.0, 5.5, 28.0, 4)


class Table(nn.Module):
    """Looks up a matching score: tokens hold the number of the video, hidden states that of the text."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table
        self.pairs: list[tuple[int, int]] = []
        self.largest = 0

    def match(self, hidden: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        assert len(tokens) == 1
        videos, texts = tokens[:, 0, 0].long().expand(len(hidden)), hidden[:, 0, 0].long()
        assert bool((mask[:, 0] == texts).all())
        self.pairs += list(zip(videos.tolist(), texts.tolist(), strict=True))
        self.largest = max(self.largest, len(texts))
        return self.table[videos, texts]


def matched(table: Tensor, sim: Tensor, k: int, pair_batch: int = 4) -> tuple[Directions[Tensor], Table]:
    model: Any = Table(table)
    videos, texts = sim.shape
    numbers = torch.arange(max(videos, texts), dtype=torch.float32)[:, None, None]
    found = matching_scores(
        model,
        sim,
        numbers[:texts],
        numbers[:texts, :, 0].long(),
        numbers[:videos].expand(-1, 2, 3),
        k=k,
        pair_batch=pair_batch,
        device="cpu",
        progress=Silent(),
    )
    return found, model


@pytest.mark.parametrize(("case", "k"), [("ktest", 3), ("full", 128)])
def test_reranking_equals_umts(case: str, k: int) -> None:
    found, _ = matched(TENSORS["eval/full/i2t_x"], TENSORS[f"eval/{case}/i2t_emb"], k)
    torch.testing.assert_close(found.video_to_text, TENSORS[f"eval/{case}/i2t_x"], atol=2e-6, rtol=0)
    torch.testing.assert_close(found.text_to_video, TENSORS[f"eval/{case}/t2i_x"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("pair_batch", [1, 3, 1000])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_pair_batch_does_not_change_the_result(k: int, pair_batch: int) -> None:
    torch.manual_seed(k)
    table, sim = torch.randn(7, 5), torch.randn(7, 5)
    found, model = matched(table, sim, k, pair_batch)
    expected, _ = matched(table, sim, k)
    assert torch.equal(found.text_to_video, expected.text_to_video)
    assert torch.equal(found.video_to_text, expected.video_to_text)
    assert model.largest <= pair_batch
    assert len(set(model.pairs)) == len(model.pairs)
    assert [video for video, _ in model.pairs] == sorted(video for video, _ in model.pairs)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.integers(0, 99))
def test_the_best_candidates_of_each_query_are_matched(videos: int, texts: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(videos, texts, generator=generator)
    sim = torch.randint(0, 3, (videos, texts), generator=generator).float()
    found, _ = matched(table, sim, k)
    for scores, by, truth in ((found.video_to_text, sim, table), (found.text_to_video, sim.T, table.T)):
        for row, likes in enumerate(by.tolist()):
            best = sorted(range(len(likes)), key=lambda one, likes=likes: (-likes[one], one))[:k]  # type: ignore[misc]
            expected = [truth[row, one].item() if one in best else NOT_MATCHED for one in range(len(likes))]
            assert scores[row].tolist() == expected


def test_all_candidates_are_matched_where_k_is_large() -> None:
    table = torch.randn(3, 4)
    found, model = matched(table, torch.randn(3, 4), 4)
    assert torch.equal(found.video_to_text, table)
    assert torch.equal(found.text_to_video, table.T)
    assert len(model.pairs) == 12


def test_matching_scores_have_to_be_finite() -> None:
    with pytest.raises(CheckFailed, match="not finite in float32"):
        matched(torch.full((2, 2), torch.nan), torch.zeros(2, 2), 2)


SIDE = 2
FRAMES = 3


class Toy(nn.Module):
    """A video shows one whole number in each frame and channel; texts name it. Whole numbers make all sums exact."""

    def __init__(self, shift: float = 0.0, frames: int = FRAMES) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))
        self.frames = frames
        self.seen: list[int] = []

    def encode_video(self, video: Tensor) -> Tensor:
        assert not self.training
        self.seen += video[:, 0, 0, 0, 0].long().tolist()
        return video.mean(dim=(3, 4))[:, : self.frames] + self.shift

    def project_video(self, tokens: Tensor) -> Tensor:
        return on_circle(tokens[:, :, 0])

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        return (ids * mask)[:, :, None].to(self.shift.dtype).expand(-1, -1, 2)

    def project_text(self, hidden: Tensor) -> Tensor:
        return on_circle(hidden[:, 1, 0])

    def match(self, hidden: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        assert len(hidden) == len(mask)
        assert len(tokens) == 1
        return -(tokens[:, 0, 0] - hidden[:, 1, 0]).abs() - tokens[:, :, 1].sum(1) / 64


def on_circle(number: Tensor) -> Tensor:
    angle = number / 20
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def video_of(number: int) -> Tensor:
    clip = torch.full((FRAMES, 3, SIDE, SIDE), float(number))
    clip[:, 1] = number * 7 % 5
    return clip


def clips_of(numbers: Sequence[int], batch_size: int = 2, broken: Sequence[int] = ()) -> Iterator[Batch]:
    for start in range(0, len(numbers), batch_size):
        part = range(start, min(start + batch_size, len(numbers)))
        good = [index for index in part if index not in broken]
        pixels = torch.stack([video_of(numbers[index]) for index in good]) if good else None
        yield batch_of(good, pixels, [(index, "made to fail") for index in part if index in broken])


def batch_of(indices: list[int], pixels: Tensor | None, broken: list[tuple[int, str]]) -> Batch:
    return Batch(0, pixels, torch.zeros(len(indices), 0, dtype=torch.int64), indices, broken, [], 0.0)


def texts_of(numbers: Sequence[int], videos: Sequence[Sequence[int]]) -> tuple[TextBatch, Sequence[Sequence[int]]]:
    ids = torch.tensor([[1, number, 9] for number in numbers])
    return TextBatch(ids, torch.tensor([[1, 1, 0]]).expand(len(numbers), -1)), videos


NUMBERS = [3, 11, 7, 0, 9, 5, 13]


def run(models: dict[str, Any], clips: Iterator[Batch] | None = None, **options: Any) -> RetrievalEvaluation:
    chosen: dict[str, Any] = {
        "dataset": "toys",
        "videos": len(NUMBERS),
        "sample_id": lambda index: f"video-{index}",
        "progress": Silent(),
        "pair_batch": 4,
        **options,
    }
    defaults: dict[str, Any] = {"batch_size": 2, "device": torch.device("cpu"), "dtype": torch.float32, "rerank_k": 128}
    settings = {name: chosen.pop(name) for name in ("batch_size", "dtype", "strict", "rerank_k") if name in options}
    chosen["settings"] = VideoSettings(**{**defaults, **settings})
    texts = chosen.pop("texts", texts_of(NUMBERS, [[index] for index in range(len(NUMBERS))]))
    return evaluate_retrieval(models, clips_of(NUMBERS) if clips is None else clips, *texts, **chosen)


def without_times(result: RetrievalEvaluation) -> dict[str, Any]:
    return {name: (score.videos, score.vtc, score.matching, score.tokens) for name, score in result.scores.items()}


def test_a_model_that_reads_the_number_finds_everything() -> None:
    result = run({"toy": Toy()})
    score = result.scores["toy"]
    perfect = RankStats(100.0, 100.0, 100.0, 1.0, 1.0, len(NUMBERS))
    assert score.vtc.text_to_video == score.vtc.video_to_text == perfect
    assert (score.videos, score.tokens) == (7, FRAMES)
    assert score.matching is not None
    assert score.seconds > 0
    assert score.videos_per_s == score.videos / score.seconds
    assert score.matching_seconds is not None
    assert (result.videos, result.captions, result.skipped, result.captions_left_out) == (7, 7, (), 0)
    assert (result.vtc_agreement, result.matching_agreement) == (None, None)
    assert (result.tokens_where, result.token_bytes) == ("memory", 7 * FRAMES * 3 * 4)


def test_both_directions_by_hand() -> None:
    """Two captions of one video: four texts have three videos, and the shifted model errs in one direction."""
    texts = texts_of([3, 4, 11, 7], [[0], [0], [1], [2]])
    result = run({"toy": Toy(shift=3.0)}, clips_of([3, 11, 7]), texts=texts, videos=3, rerank_k=None)
    score = result.scores["toy"]
    # Texts 3, 4, 11, 7 look among 6, 14, 10 and find 6, 6, 10 (wrong), 6 (wrong).
    assert score.vtc.text_to_video == RankStats(50.0, 100.0, 100.0, 1.5, 1.5, 4)
    # Videos 6, 14, 10 look among 3, 4, 11, 7 and find 7 (4 is second), 11, 11 (7 is second).
    assert score.vtc.video_to_text == RankStats(100 / 3, 100.0, 100.0, 2.0, 5 / 3, 3)


def test_without_reranking_no_token_is_kept() -> None:
    result = run({"toy": Toy()}, rerank_k=None, token_bytes=0)
    assert result.scores["toy"].matching is None
    assert result.scores["toy"].matching_seconds is None
    assert (result.tokens_where, result.token_bytes, result.rerank_k) == (None, 0, None)
    assert without_times(result)["toy"][1] == without_times(run({"toy": Toy()}))["toy"][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_on_disk_give_the_same_result(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []
    inside: list[list[str]] = []

    def spy(model: Any, *args: Any, **options: Any) -> Directions[Tensor]:
        found = matching_scores(model, *args, **options)
        seen.append({"tokens": args[3].clone(), "t2v": found.text_to_video, "v2t": found.video_to_text})
        inside.append([path.name for path in tmp_path.rglob("*.tokens")])
        return found

    monkeypatch.setattr("repshift_cli.evaluation.video_text.retrieval.matching_scores", spy)
    models = {"wide": Toy(), "narrow": Toy(0.5, frames=2)}
    size = 7 * (FRAMES + 2) * 3 * dtype.itemsize
    memory = run(models, token_bytes=size, rerank_k=2, dtype=dtype, spill_to=tmp_path)
    disk = run(models, token_bytes=size - 1, rerank_k=2, dtype=dtype, spill_to=tmp_path)
    assert (memory.tokens_where, disk.tokens_where) == ("memory", "disk")
    assert memory.token_bytes == disk.token_bytes == size
    assert without_times(memory) == without_times(disk)
    assert memory.matching_agreement == disk.matching_agreement
    assert [len(files) for files in inside] == [0, 0, 2, 2]
    for one, other in zip(seen[:2], seen[2:], strict=True):
        assert one["tokens"].dtype == dtype
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert list(tmp_path.iterdir()) == []


def test_the_files_are_deleted_after_an_error(tmp_path: Path) -> None:
    class Fails(Toy):
        def match(self, hidden: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
            assert list(tmp_path.rglob("*.tokens"))
            raise torch.OutOfMemoryError("made to fail")

    with pytest.raises(UsageError, match="4 pairs of video and text") as caught:
        run({"toy": Fails()}, token_bytes=0, spill_to=tmp_path)
    assert caught.value.hint == "Lower --batch-size."
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_raises_before_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(OutputError, match=r"0\.0 GiB left"):
        run({"toy": Toy()}, token_bytes=0, spill_to=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("batch_size", "pair_batch"), [(1, 1), (3, 5), (7, 100)])
def test_the_batch_size_does_not_change_the_result(batch_size: int, pair_batch: int) -> None:
    models = {"toy": Toy(shift=1.5)}
    found = run(models, clips_of(NUMBERS, batch_size), batch_size=batch_size, pair_batch=pair_batch, rerank_k=3)
    assert without_times(found) == without_times(run(models, rerank_k=3))


def test_the_order_of_the_clips_does_not_change_the_result() -> None:
    class Turned:
        def __iter__(self) -> Iterator[Batch]:
            for index in reversed(range(len(NUMBERS))):
                yield batch_of([index], video_of(NUMBERS[index])[None], [])

    models = {"toy": Toy(shift=1.25)}
    assert without_times(run(models, iter(Turned()), rerank_k=3)) == without_times(run(models, rerank_k=3))


def test_a_gallery_as_large_as_k_is_matched_in_full() -> None:
    models = {"toy": Toy(shift=1.5)}
    assert without_times(run(models, rerank_k=7)) == without_times(run(models, rerank_k=128))


def test_captions_of_broken_videos_are_left_out() -> None:
    # Caption 2 has another readable video; caption 1 has none. Video 2 is broken, and so is all of the second batch.
    texts = texts_of([3, 7, 9, 13, 5], [[0], [2], [2, 4], [6], [5]])
    result = run({"toy": Toy()}, clips_of(NUMBERS, 2, broken=(2, 3)), texts=texts)
    assert result.skipped == (Skipped("video-2", "made to fail"), Skipped("video-3", "made to fail"))
    assert (result.videos, result.captions, result.captions_left_out) == (5, 4, 1)
    score = result.scores["toy"]
    assert score.vtc.text_to_video == RankStats(100.0, 100.0, 100.0, 1.0, 1.0, 4)
    # Video 1 has no caption: it is a candidate and not a query.
    assert score.vtc.video_to_text == RankStats(100.0, 100.0, 100.0, 1.0, 1.0, 4)
    assert result.token_bytes == 7 * FRAMES * 3 * 4


def test_left_out_videos_do_not_change_the_ranks_of_others() -> None:
    few = [NUMBERS[index] for index in (0, 1, 3, 4, 6)]
    expected = run({"toy": Toy(2.0)}, clips_of(few), texts=texts_of(few, [[i] for i in range(5)]), videos=5, rerank_k=2)
    found = run({"toy": Toy(2.0)}, clips_of(NUMBERS, 2, broken=(2, 5)), rerank_k=2)
    assert without_times(found) == without_times(expected)


def test_strict_stops_at_the_first_broken_video() -> None:
    with pytest.raises(DataError, match="video-2 cannot be read: made to fail"):
        run({"toy": Toy()}, clips_of(NUMBERS, 2, broken=(2,)), strict=True)


def test_no_readable_video_raises() -> None:
    with pytest.raises(DataError, match="none of the 7 videos of toys") as caught:
        run({"toy": Toy()}, clips_of(NUMBERS, 2, broken=range(7)))
    assert caught.value.hint == "The first: video-0: made to fail"
    with pytest.raises(DataError, match="no caption of toys"):
        run({"toy": Toy()}, clips_of(NUMBERS, 2, broken=(0,)), texts=texts_of([3], [[0]]))


def test_a_caption_of_an_unknown_video_raises() -> None:
    with pytest.raises(DataError, match="caption 1 of toys"):
        run({"toy": Toy()}, texts=texts_of([3, 4], [[0], [70]]))


def test_two_models_see_the_same_clips_and_are_compared() -> None:
    models = {"one": Toy(), "other": Toy(shift=100.0)}
    result = run(models)
    assert models["one"].seen == models["other"].seen
    assert result.vtc_agreement is not None
    assert result.matching_agreement is not None
    # With a large shift, one video is the nearest to all texts, and one text to all videos.
    assert result.matching_agreement.text_to_video == pytest.approx(1 / 7)
    assert result.matching_agreement.video_to_text == pytest.approx(1 / 7)
    same = run({"one": Toy(), "other": Toy()})
    assert same.vtc_agreement == same.matching_agreement == Directions(1.0, 1.0)


def test_wrong_shapes_raise() -> None:
    class Changing(Toy):
        def encode_video(self, video: Tensor) -> Tensor:
            return super().encode_video(video)[:, : len(video)]

    class Flat(Toy):
        def encode_video(self, video: Tensor) -> Tensor:
            return super().encode_video(video)[:, 0]

    class Unpooled(Toy):
        def project_video(self, tokens: Tensor) -> Tensor:
            return super().project_video(tokens)[:, 0]

    class Two(Toy):
        def match(self, hidden: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
            return super().match(hidden, mask, tokens)[:, None].expand(-1, 2)

    class Pooled(Toy):
        def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
            return super().encode_text(ids, mask)[:, 0]

    for model in (Changing(), Flat(), Unpooled(), Two(), Pooled()):
        with pytest.raises(ModelError, match="toy"):
            run({"toy": model})


def test_values_have_to_be_finite() -> None:
    with pytest.raises(CheckFailed, match="toy: the model returns values that are not finite"):
        run({"toy": Toy(shift=float("nan"))})


def test_running_out_of_memory_raises() -> None:
    class Greedy(Toy):
        def encode_video(self, video: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("made to fail")

    with pytest.raises(UsageError, match="2 videos at a time"):
        run({"toy": Greedy()})


def test_invalid_arguments_raise() -> None:
    with pytest.raises(UsageError):
        run({"toy": Toy()}, rerank_k=0)
    with pytest.raises(ValueError, match="twice"):
        run({"toy": Toy()}, iter([*clips_of(NUMBERS), *clips_of(NUMBERS[:1])]))


def test_a_module_with_these_methods_is_a_model() -> None:
    model: RetrievalModel = Toy()
    assert callable(model.match)
