"""Evaluation on datasets of videos: reading, scoring, and errors for invalid combinations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_umt import compressed_umt, tiny_umt, umt_clips, umt_recipe

from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.weights import Source
from repshift_cli.data.builtin import moving_shapes
from repshift_cli.data.loader import Sample
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.data.video.annotations import QaSet, Question, RetrievalSet
from repshift_cli.data.video.dataset import Videos
from repshift_cli.data.video.decode import UnreadableVideo
from repshift_cli.data.video.tokenizer import Tokenizer
from repshift_cli.errors import DataError, ModelError, UsageError
from repshift_cli.evaluation.models import DenseVideoView
from repshift_cli.evaluation.video_text.data import DatasetOptions, open_data
from repshift_cli.evaluation.video_text.evaluate import answer, check_missing, retrieve
from repshift_cli.evaluation.video_text.models import choose_pooling, open_tokenizer, task_of
from repshift_cli.evaluation.video_text.settings import VideoSettings
from repshift_cli.models.umt import UmtModel
from repshift_cli.utils.progress import Silent

CPU = torch.device("cpu")
DROPS = "[{layer: 0, drop_ratio: 0.5}]"


def opened(model: UmtModel, compressed: bool = False, name: str = "umt-shapes") -> Opened:
    description = ModelDescription(name, "umt", {}, Preprocessing.of_model(model))
    loaded = LoadedModel(model, description, Source("object", None, None), {})
    return Opened(loaded, compressed_umt(model, umt_recipe(DROPS)) if compressed else None)


def shipped() -> Tokenizer:
    with moving_shapes.vocabulary_file() as path:
        return Tokenizer(path)


@dataclass(frozen=True)
class Noise(Videos):
    """Clips of noise; some cannot be read, some were padded."""

    count: int = 5
    broken: tuple[int, ...] = ()
    padded: tuple[int, ...] = ()
    loaded: Counter[int] = field(default_factory=Counter)

    def __len__(self) -> int:
        return self.count

    def sample_id(self, index: int) -> str:
        return f"noise-{index}"

    def load(self, preprocessing: Preprocessing, transform: Any, index: int) -> Sample:
        if index in self.broken:
            raise UnreadableVideo(self.sample_id(index), "made to fail")
        self.loaded[index] += 1
        noise = torch.randn(*preprocessing.shape, generator=torch.Generator().manual_seed(index))
        return Sample(noise, padded=index in self.padded)


class WithoutPyAV(Noise):
    def load(self, preprocessing: Preprocessing, transform: Any, index: int) -> Sample:
        raise UsageError("reading videos needs PyAV", "Install it.")


def captions(videos: Videos, **changes: Any) -> RetrievalSet:
    texts = [moving_shapes.caption(scene) for scene in moving_shapes.scenes(len(videos), 1)]
    places = tuple((index,) for index in range(len(videos)))
    return RetrievalSet(
        name="noise", description="", videos=videos, captions=tuple(texts), videos_of_caption=places, **changes
    )


def questions(videos: Videos, about: Sequence[int]) -> QaSet:
    asked = tuple(Question(video, "what color is the circle", "red") for video in about)
    return QaSet(name="noise", description="", videos=videos, questions=asked, answers=moving_shapes.ANSWERS)


def run(scorer: Any, model: UmtModel, data: Any, models: Any = None, **changes: Any) -> Any:
    settings = VideoSettings(**{"batch_size": 2, "device": CPU, "dtype": torch.float32, **changes})
    return scorer(
        models or {"dense": model},
        data,
        preprocessing=Preprocessing.of_model(model),
        tokenizer=shipped(),
        settings=settings,
        progress=Silent(),
    )


class TestRunning:
    def test_each_video_is_read_once_for_all_its_questions(self) -> None:
        model, videos = tiny_umt(embed_dim=0), Noise(5, padded=(3,))
        result, padded = run(answer, model, questions(videos, [0, 1, 1, 1, 4, 0, 2, 3, 1]))
        assert videos.loaded == Counter(range(5))
        assert (result.questions, result.scores["dense"].videos, padded) == (9, 5, ("noise-3",))

    @pytest.mark.slow
    def test_answers_do_not_depend_on_the_batch(self) -> None:
        model, about = tiny_umt(embed_dim=0), [0, 1, 1, 1, 4, 0, 2, 3, 1, 2, 2]
        data = questions(Noise(), about)
        correct = {run(answer, model, data, batch_size=size)[0].scores["dense"].correct for size in (1, 2, 3, 50)}
        one_by_one = [run(answer, model, questions(Noise(), [video]))[0].scores["dense"].correct for video in about]
        assert correct == {sum(one_by_one)}

    def test_questions_about_broken_videos_are_left_out(self) -> None:
        result, _ = run(answer, tiny_umt(embed_dim=0), questions(Noise(3, broken=(1,)), [0, 1, 1, 2]))
        assert [entry.sample for entry in result.skipped] == ["noise-1", "noise-1"]
        assert result.questions == 2

    def test_captions_of_broken_videos_are_left_out(self) -> None:
        result, padded = run(retrieve, tiny_umt(), captions(Noise(5, broken=(1,), padded=(0, 2))))
        assert (result.videos, result.captions, padded) == (4, 4, ("noise-0", "noise-2"))
        with pytest.raises(DataError, match="noise-1 cannot be read: made to fail"):
            run(retrieve, tiny_umt(), captions(Noise(5, broken=(1,))), strict=True)

    def test_missing_videos_stop_a_strict_run(self) -> None:
        data = captions(Noise(), missing=("a.mp4", "b.mp4"))
        assert run(retrieve, tiny_umt(), data)[0].videos == 5
        with pytest.raises(DataError, match=r"2 videos of noise are missing, the first is a\.mp4"):
            check_missing(data, VideoSettings(2, CPU, torch.float32, strict=True))

    @pytest.mark.parametrize("workers", [0, 1])
    def test_an_error_of_the_installation_is_raised_unchanged(self, workers: int) -> None:
        with pytest.raises(UsageError, match=r"^reading videos needs PyAV") as caught:
            run(retrieve, tiny_umt(), captions(WithoutPyAV()), workers=workers)
        assert caught.value.hint == "Install it."

    def test_loader_processes_do_not_change_the_result(self) -> None:
        model, data = tiny_umt(), captions(Noise(5, broken=(2,), padded=(4,)))
        here, there = (run(retrieve, model, data, workers=workers, rerank_k=3) for workers in (0, 2))
        assert here[1] == there[1] == ("noise-4",)
        assert here[0].skipped == there[0].skipped
        assert here[0].scores["dense"].matching == there[0].scores["dense"].matching

    def test_the_dense_view_is_the_dense_model_pooled_over_all_tokens(self) -> None:
        dense, compressed_model = tiny_umt(), opened(tiny_umt(), compressed=True)
        clips = umt_clips(dense, 3)
        assert compressed_model.compressed is not None
        dense_view = DenseVideoView(compressed_model.compressed)
        assert torch.equal(dense_view.encode_video(clips), dense.encode_video(clips))
        dense.pooling = "all"
        tokens = dense.encode_video(clips)
        assert torch.equal(dense_view.project_video(tokens), dense.project_video(tokens))  # type: ignore[operator]
        assert compressed_model.loaded.model.encode_video(clips).shape[1] == tokens.shape[1] // 2  # type: ignore[operator]

    def test_compressed_and_dense_are_compared_on_the_same_clips(self) -> None:
        compressed_model = opened(tiny_umt(), compressed=True)
        assert compressed_model.compressed is not None
        models = {"compressed": compressed_model.loaded.model, "dense": DenseVideoView(compressed_model.compressed)}
        result, _ = run(retrieve, tiny_umt(), captions(Noise()), models, rerank_k=2)
        assert {name: score.tokens for name, score in result.scores.items()} == {"compressed": 24, "dense": 48}
        alone, _ = run(retrieve, tiny_umt(), captions(Noise()), {"dense": models["dense"]}, rerank_k=2)
        assert alone.scores["dense"].matching == result.scores["dense"].matching
        assert result.matching_agreement is not None


class TestModels:
    def test_task(self) -> None:
        assert task_of(tiny_umt()) == "retrieval"
        assert task_of(tiny_umt(embed_dim=0)) == "qa"
        with pytest.raises(ModelError):
            task_of(torch.nn.Identity())

    def test_pooling_is_the_models_own_by_default(self) -> None:
        model = tiny_umt()
        assert choose_pooling(opened(model), None) == model.pooling == "frames"
        assert choose_pooling(opened(model), "all") == model.pooling == "all"
        assert choose_pooling(opened(tiny_umt(), compressed=True), None) == "all"

    def test_pooling_without_a_choice(self) -> None:
        with pytest.raises(UsageError, match="no whole frames"):
            choose_pooling(opened(tiny_umt(), compressed=True), "all")
        with pytest.raises(UsageError, match="does not pool"):
            choose_pooling(opened(tiny_umt(embed_dim=0)), "all")

    def test_vocabulary(self, tmp_path: Path) -> None:
        model, own = opened(tiny_umt(), name="umt_base"), captions(Noise())
        scenes = open_data(DatasetOptions("builtin:shapes", limit=2), "retrieval", "model")
        assert open_tokenizer(None, model, scenes).size == 40
        assert open_tokenizer(None, opened(tiny_umt()), own).size == 40
        with pytest.raises(UsageError, match="umt_base needs its vocabulary"):
            open_tokenizer(None, model, own)
        (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
        with pytest.raises(DataError, match="has 4 tokens, but umt_base was trained with 40"):
            open_tokenizer(tmp_path / "vocab.txt", model, own)


def annotate(folder: Path, rows: Sequence[dict[str, Any]]) -> DatasetOptions:
    (folder / "videos").mkdir(exist_ok=True)
    for row in rows:
        (folder / "videos" / row["video"]).write_bytes(b"0")
    (folder / "rows.json").write_text(json.dumps(rows))
    return DatasetOptions(annotations=folder / "rows.json", videos=folder / "videos")


class TestData:
    def test_builtin_captions(self) -> None:
        data = open_data(DatasetOptions("builtin:shapes", limit=7, seed=3), "retrieval", "model")
        assert isinstance(data, RetrievalSet)
        assert data.captions == tuple(map(moving_shapes.caption, moving_shapes.scenes(7, 4)))
        assert len(data.videos) == 7
        assert data.annotations is None

    def test_builtin_questions(self) -> None:
        data = open_data(DatasetOptions("builtin:shapes-qa", limit=5), "qa", "model")
        assert isinstance(data, QaSet)
        assert (len(data.questions), len(data.videos), data.answers) == (5, 3, moving_shapes.ANSWERS)
        first = moving_shapes.two_questions(moving_shapes.scenes(1, 1)[0])
        assert [(one.video, one.question, one.answer) for one in data.questions[:2]] == [(0, *one) for one in first]

    def test_builtin_clips_have_the_shape_of_the_model(self) -> None:
        data = open_data(DatasetOptions("builtin:shapes", limit=1), "retrieval", "model")
        preprocessing = Preprocessing.of_model(tiny_umt())
        clip = data.videos.load(preprocessing, preprocessing.transform(), 0)
        assert (tuple(clip.pixels.shape), clip.padded) == (preprocessing.shape, False)

    def test_own_captions(self, tmp_path: Path) -> None:
        wanted = annotate(tmp_path, [{"video": "a.mp4", "caption": ["One.", "Two!"]}])
        data = open_data(wanted, "retrieval", "model")
        assert isinstance(data, RetrievalSet)
        assert (data.captions, data.videos_of_caption, data.text_length) == (("one", "two"), ((0,), (0,)), 32)
        assert data.annotations is not None
        assert data.annotations.sha256 == sha256((tmp_path / "rows.json").read_bytes()).hexdigest()

    def test_own_questions_share_their_video(self, tmp_path: Path) -> None:
        rows = [{"video": name, "question": "what?", "answer": "it"} for name in ("a.mp4", "b.mp4", "a.mp4")]
        data = open_data(annotate(tmp_path, rows), "qa", "model")
        assert isinstance(data, QaSet)
        assert ([one.video for one in data.questions], len(data.videos)) == ([0, 1, 0], 2)

    def test_the_protocol_of_a_benchmark_is_followed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = [{"video": "a.mp4", "caption": ["One.", "Two!"]}]
        wanted = annotate(tmp_path, rows)
        assert wanted.annotations is not None
        wanted.annotations.rename(tmp_path / "didemo_ret_test.json")
        data = open_data(DatasetOptions("didemo", data_dir=tmp_path), "retrieval", "model")
        assert isinstance(data, RetrievalSet)
        assert (data.captions, data.text_length) == (("one two",), 64)
        assert data.annotations is not None
        assert data.annotations.path.name == "didemo_ret_test.json"
        seen: list[float | None] = []
        monkeypatch.setattr(
            "repshift_cli.data.video.dataset.read_clip",
            lambda path, frames, first, convert, step: seen.append(first) or 1 / 0,
        )
        with pytest.raises(ZeroDivisionError):
            data.videos.load(Preprocessing.of_model(tiny_umt()), lambda image: image, 0)
        assert seen == [30.0]
        apart = open_data(DatasetOptions("didemo", data_dir=tmp_path, paragraph=False), "retrieval", "model")
        assert isinstance(apart, RetrievalSet)
        assert len(apart.captions) == 2

    @pytest.mark.parametrize(
        ("wanted", "task", "message"),
        [
            (DatasetOptions("builtin:shapes-qa"), "retrieval", "for retrieval, but builtin:shapes-qa holds questions"),
            (DatasetOptions("builtin:shapes"), "qa", "for question answering, but builtin:shapes holds captions"),
            (DatasetOptions("msrvtt-qa"), "retrieval", "holds questions"),
            (DatasetOptions("imagenet-val"), "retrieval", "not a dataset of videos"),
            (DatasetOptions("./folder"), "qa", "not a dataset of videos"),
            (DatasetOptions("builtin:digits"), "qa", "not a dataset of videos"),
            (
                DatasetOptions("builtin:shapes", paragraph=True),
                "retrieval",
                "--paragraph is not used by builtin:shapes",
            ),
            (DatasetOptions("builtin:shapes", data_dir=Path("x")), "retrieval", "--data-dir is not used by builtin"),
            (
                DatasetOptions(annotations=Path("x"), data_dir=Path("x")),
                "qa",
                "--data-dir needs the name of a benchmark",
            ),
            (DatasetOptions(annotations=Path("x")), "retrieval", "neither a benchmark nor annotations with videos"),
        ],
    )
    def test_invalid_combinations(self, wanted: DatasetOptions, task: Any, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            open_data(wanted, task, "the model")

    def test_the_kind_of_rows_is_checked(self, tmp_path: Path) -> None:
        wanted = annotate(tmp_path, [{"video": "a.mp4", "caption": "one"}])
        with pytest.raises(UsageError, match=r"question answering, but .*rows\.json holds captions"):
            open_data(wanted, "qa", "the model")

    def test_an_unknown_name_has_a_suggestion(self) -> None:
        with pytest.raises(DataError) as caught:
            open_data(DatasetOptions("msrvt"), "retrieval", "the model")
        assert "Did you mean msrvtt" in str(caught.value)
