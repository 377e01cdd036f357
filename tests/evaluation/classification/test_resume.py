"""An interrupted run resumes with the same numbers; the state of another run is refused."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import make_plan, tiny_vit
from torch import Tensor, nn

from repshift_cli.checkpoints.exported import Runtime
from repshift_cli.checkpoints.schema import ExportDocument
from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.decode import UnreadableSample
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import DataError, OutputError, UsageError
from repshift_cli.evaluation.classification.evaluate import evaluate, finish
from repshift_cli.evaluation.classification.result import Evaluation
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.utils.distributed import Processes
from repshift_cli.utils.progress import Silent

SMALL = Preprocessing((3, 32, 32), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "nearest", 1.0)


class Colours(ImageDataset):
    """Images of one colour; reading one can interrupt the run."""

    def __init__(self, count: int = 23, ends_at: int | None = None, label: int = 0) -> None:
        self.name = "colours"
        self.count = count
        self.ends_at = ends_at
        self.label = label
        self.read: list[int] = []

    @property
    def description(self) -> str:
        return "colours"

    @property
    def classes(self) -> None:
        return None

    def __len__(self) -> int:
        return self.count

    def sample_id(self, index: int) -> str:
        return f"colour-{index}"

    def stamp(self, index: int) -> str:
        return f"{index}:{self.label}"

    def load(self, index: int) -> tuple[Image.Image, int]:
        if index == self.ends_at:
            raise KeyboardInterrupt
        self.read.append(index)
        if index == 6:
            raise UnreadableSample(self.sample_id(index), "made to fail")
        return Image.new("RGB", (32, 32), (index * 11, 255 - index * 7, index)), (index + self.label) % 10


class Warnings(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def warn(self, text: str) -> None:
        self.texts.append(text)


EXPORT = ExportDocument.model_construct(num_classes=10)
"""The fields of an exported file that are needed here."""


class Exported(Runtime):
    """An exported file, whose weights are not in its state dict."""

    def forward(self, images: Tensor) -> Tensor:
        return self.outputs(images)[0]

    def outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        return (images.flatten(1)[:, :10],)


def models() -> dict[str, nn.Module]:
    dense = tiny_vit()
    return {"compressed": attach(tiny_vit(), make_plan(dense)), "dense": dense}


def run(data: ImageDataset, resume: Path | None, running: dict[str, nn.Module] | None = None, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "batch_size": 4,
        "device": "cpu",
        "dtype": torch.float32,
        "workers": 0,
        "strict": False,
        "num_classes": 10,
        "progress": Silent(),
        "keep_rows": True,
    }
    return evaluate(running or models(), data, SMALL, resume=resume, **{**settings, **changes})


def numbers(result: Evaluation) -> Any:
    """Everything that must not depend on where a run was interrupted."""
    rows = result.rows
    assert rows is not None
    return (
        result.images,
        result.skipped,
        {name: (score.top1_correct, score.top5_correct) for name, score in result.scores.items()},
        result.same_top1,
        rows.indices,
        rows.answers.tolist(),
        {name: (each.top.tolist(), each.probabilities.tolist()) for name, each in rows.top_k.items()},
    )


@pytest.fixture(scope="module")
def whole() -> Any:
    return numbers(run(Colours(), None))


class TestResume:
    @pytest.mark.parametrize("ends_at", [4, 5, 13, 22])
    def test_numbers_equal_those_of_an_uninterrupted_run(self, tmp_path: Path, whole: Any, ends_at: int) -> None:
        first = run(Colours(ends_at=ends_at), tmp_path / "state")
        assert first.interrupted
        rest = Colours()
        second = run(rest, tmp_path / "state")
        assert not second.interrupted
        assert numbers(second) == whole
        assert rest.read == list(range(ends_at // 4 * 4, 23))  # only what was not completed
        assert second.fresh == len([index for index in rest.read if index != 6])

    def test_several_interruptions_and_a_completed_run(self, tmp_path: Path, whole: Any) -> None:
        for ends_at in (5, 9, 9, 21):
            assert run(Colours(ends_at=ends_at), tmp_path / "s").interrupted
        assert numbers(run(Colours(), tmp_path / "s")) == whole
        again = Colours()
        done = run(again, tmp_path / "s")
        assert numbers(done) == whole
        assert again.read == []
        assert {score.attention for score in done.scores.values()} == {None}

    def test_interruption_before_the_first_batch(self, tmp_path: Path, whole: Any) -> None:
        with pytest.raises(KeyboardInterrupt):
            run(Colours(ends_at=0), tmp_path / "s")
        assert numbers(run(Colours(), tmp_path / "s")) == whole

    def test_damaged_files_are_evaluated_again(self, tmp_path: Path, whole: Any) -> None:
        run(Colours(ends_at=20), tmp_path / "s")
        shards = sorted((tmp_path / "s").glob("0*.json"))
        shards[0].write_text(shards[0].read_text()[:-40])
        shards[1].write_text(shards[2].read_text())
        (tmp_path / "s" / ".000003.json.abc.part").write_text("{")
        warnings = Warnings()
        assert numbers(run(Colours(), tmp_path / "s", progress=warnings)) == whole
        assert len(warnings.texts) == 2
        assert all("is damaged" in text for text in warnings.texts)
        assert not list((tmp_path / "s").glob(".*"))

    def test_strict_raises_for_images_skipped_before(self, tmp_path: Path) -> None:
        run(Colours(), tmp_path / "s")
        with pytest.raises(UnreadableSample, match="colour-6 cannot be read: made to fail"):
            run(Colours(), tmp_path / "s", strict=True)

    @pytest.mark.slow
    def test_the_number_of_files_is_limited(self, tmp_path: Path) -> None:
        run(Colours(2100), tmp_path / "s", {"one": tiny_vit(depth=1)}, batch_size=4, keep_rows=False)
        assert len(list((tmp_path / "s").glob("0*.json"))) == 175  # 525 batches, three to a shard

    def test_finish_removes_the_folder(self, tmp_path: Path) -> None:
        run(Colours(), tmp_path / "s")
        finish(tmp_path / "s", Processes())
        assert not (tmp_path / "s").exists()

    def test_other_files_stay(self, tmp_path: Path) -> None:
        run(Colours(), tmp_path / "s")
        (tmp_path / "s" / "notes.txt").write_text("mine")
        finish(tmp_path / "s", Processes())
        assert [path.name for path in (tmp_path / "s").iterdir()] == ["notes.txt"]


class TestFilesOfTheUser:
    NAMES = ("2024-my-results.json", "000099.json", "123456.json", ".notes.json.x.part", "0000001.json")

    def test_they_stay(self, tmp_path: Path) -> None:
        run(Colours(ends_at=9), tmp_path / "s")
        for name in self.NAMES:
            (tmp_path / "s" / name).write_text('{"mine": true}')
        run(Colours(), tmp_path / "s")
        finish(tmp_path / "s", Processes())
        found = {path.name: path.read_text() for path in (tmp_path / "s").iterdir()}
        assert found == dict.fromkeys(self.NAMES, '{"mine": true}')

    def test_a_fifo_in_place_of_a_shard(self, tmp_path: Path, whole: Any) -> None:
        run(Colours(ends_at=9), tmp_path / "s")
        (tmp_path / "s" / "000001.json").unlink()
        os.mkfifo(tmp_path / "s" / "000001.json")
        warnings = Warnings()
        assert numbers(run(Colours(), tmp_path / "s", progress=warnings)) == whole
        assert "is damaged" in warnings.texts[0]
        assert "is not a regular file; the run continues" in warnings.texts[1]

    def test_a_fifo_in_place_of_the_header(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "run.json")
        with pytest.raises(UsageError, match="is damaged"):
            run(Colours(), tmp_path)


def changed(shard: dict[str, Any], change: str) -> Any:
    """The second of the shards, images 4 to 7 of which 6 is unreadable, edited."""
    rows = shard["rows"][0]
    match change:
        case "far" | "negative" | "earlier":
            shard["skipped"][0][0] = {"far": 10**9, "negative": -1, "earlier": 2}[change]
        case "twice":
            shard["skipped"] *= 2
        case "fewer":
            shard["images"] = 2
        case "counts":
            name = next(name for name, each in shard["counts"].items() if each["top1"] != 1)
            shard["counts"][name] |= {"top1": 1, "top5": 3}
        case "row":
            rows["indices"][0] = 5
        case "wide":
            rows["answers"][0][0] = 2**40
        case "output":
            rows["said"]["dense"]["top"][0][0] = -3
        case "no rows":
            shard["rows"] = []
        case "type":
            shard["skipped"] = {"6": "x"}
    return shard


@pytest.mark.parametrize(
    "change", ["far", "negative", "earlier", "twice", "fewer", "counts", "row", "wide", "output", "no rows", "type"]
)
def test_an_edited_shard_is_evaluated_again(tmp_path: Path, whole: Any, change: str) -> None:
    run(Colours(ends_at=9), tmp_path / "s")
    path = tmp_path / "s" / "000001.json"
    path.write_text(json.dumps(changed(json.loads(path.read_text()), change)))
    warnings = Warnings()
    assert numbers(run(Colours(), tmp_path / "s", progress=warnings)) == whole
    assert len(warnings.texts) == 1
    assert "000001.json is damaged" in warnings.texts[0]


class TestOtherRuns:
    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"batch_size": 8}, "batch size"),
            ({"dtype": torch.bfloat16}, "dtype, models"),
            ({"keep_rows": False}, "saved predictions"),
            ({"attention": "explicit"}, "attention"),
        ],
    )
    def test_other_settings(self, tmp_path: Path, changes: dict[str, Any], what: str) -> None:
        run(Colours(), tmp_path / "s")
        with pytest.raises(UsageError, match=f"differs in {what}") as caught:
            run(Colours(), tmp_path / "s", **changes)
        assert caught.value.exit_code == 2

    def test_other_weights_and_another_plan(self, tmp_path: Path) -> None:
        run(Colours(), tmp_path / "s")
        changed = models()
        with torch.no_grad():
            next(changed["dense"].parameters()).flatten()[0] += 1e-3
        from tiny import make_recipe

        other_plan = {**models(), "compressed": attach(tiny_vit(), make_plan(tiny_vit(), make_recipe(KEPT)))}
        for running in (changed, other_plan):
            with pytest.raises(UsageError, match="differs in models"):
                run(Colours(), tmp_path / "s", running)

    def test_another_exported_file(self, tmp_path: Path) -> None:
        files = [tmp_path / name for name in ("one.pt2", "same.pt2", "other.pt2")]
        for path, content in zip(files, ("weights", "weights", "others"), strict=True):
            path.write_text(content)
        one, same, other = ({"dense": Exported(path, EXPORT)} for path in files)
        run(Colours(), tmp_path / "s", one)
        run(Colours(), tmp_path / "s", same)
        with pytest.raises(UsageError, match="differs in models"):
            run(Colours(), tmp_path / "s", other)

    @pytest.mark.parametrize(
        ("data", "what"), [(Colours(22), "data, pictures"), (Colours(label=1), "data")], ids=["fewer", "labels"]
    )
    def test_other_data(self, tmp_path: Path, data: Colours, what: str) -> None:
        run(Colours(), tmp_path / "s")
        with pytest.raises(UsageError, match=f"differs in {what}"):
            run(data, tmp_path / "s")
        assert data.read == []

    @pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, '{"evaluation": 1}'])
    def test_invalid_headers(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(UsageError, match=r"state|damaged"):
            run(Colours(), tmp_path)

    def test_a_folder_with_other_files_and_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "photo.jpg").touch()
        with pytest.raises(UsageError, match="other files"):
            run(Colours(), tmp_path)
        with pytest.raises(UsageError, match="is a file"):
            run(Colours(), tmp_path / "photo.jpg")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["photo.jpg"]

    def test_data_errors_are_raised_before_the_folder_is_made(self, tmp_path: Path) -> None:
        with pytest.raises(DataError):
            run(Colours(0), tmp_path / "s")
        assert not (tmp_path / "s").exists()


KEPT = "[{layer: 1, keep_tokens: 9}]"


class TestFullDisk:
    def test_the_run_continues_with_one_warning(
        self, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written = Path.write_text

        def full(self: Path, text: str, **options: Any) -> int:
            if self.name.startswith(".0"):
                raise OSError(errno.ENOSPC, "No space left on device")
            return written(self, text, **options)

        monkeypatch.setattr(Path, "write_text", full)
        warnings = Warnings()
        assert numbers(run(Colours(), tmp_path / "s", progress=warnings)) == whole
        assert len(warnings.texts) == 1
        assert "No space left on device; the run continues" in warnings.texts[0]
        assert [path.name for path in (tmp_path / "s").iterdir()] == ["run.json"]

    def test_a_full_disk_at_the_start_is_an_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(self: Path, text: str, **options: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(OutputError, match="No space left"):
            run(Colours(), tmp_path / "s")


def test_files_are_strict_json(tmp_path: Path) -> None:
    run(Colours(), tmp_path / "s")
    for path in (tmp_path / "s").iterdir():
        json.loads(path.read_text(), parse_constant=pytest.fail)
