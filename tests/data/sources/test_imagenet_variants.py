"""Test sets of ImageNet models: labels, compared outputs, and errors for data that does not fit."""

from __future__ import annotations

import io
import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from repshift_cli.data.catalog import open_dataset
from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.data.sources.class_labels import imagenet_wnids
from repshift_cli.errors import DataError
from repshift_cli.evaluation.classification.evaluate import evaluate
from repshift_cli.evaluation.classification.result import Evaluation
from repshift_cli.utils.progress import Silent

WNIDS = imagenet_wnids()
PLAIN = Preprocessing((3, 8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "nearest", 1.0)


def timm_list(name: str) -> list[str]:
    return files("timm.data").joinpath("_info").joinpath(name).read_text().split()


def put(path: Path, output: int = 0) -> None:
    """An image whose pixels encode the most likely output of `Reader`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (output // 10, output % 10, 0)).save(stream, "PNG")
    path.write_bytes(stream.getvalue())


class Reader(nn.Module):
    """Predicts the output that an image encodes; the following outputs are the next most likely."""

    def __init__(self, outputs: int = 1000) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        tens, ones = ((images[:, channel, 0, 0] * 255).round().long() for channel in (0, 1))
        named = tens * 10 + ones
        return -((torch.arange(self.outputs)[None] - named[:, None]) % self.outputs).float()


def run(data: ImageDataset, outputs: int = 1000) -> Evaluation:
    return evaluate(
        {"dense": Reader(outputs)},
        data,
        PLAIN,
        batch_size=4,
        device="cpu",
        dtype=torch.float32,
        workers=0,
        strict=True,
        num_classes=outputs,
        progress=Silent(),
        keep_rows=True,
    )


class TestReassessed:
    REAL = json.loads(" ".join(timm_list("imagenet_real_labels.json")))

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        """Images 1 (without labels), 2 and 3 (with two), 4 (with one), in folders of other classes."""
        assert [len(self.REAL[number - 1]) for number in (1, 2, 3, 4)] == [0, 2, 2, 1]
        second = self.REAL[1][1], self.REAL[2][1]
        for number, output in ((1, 5), (2, second[0]), (3, second[1]), (4, (self.REAL[3][0] + 1) % 1000)):
            put(tmp_path / WNIDS[7] / f"ILSVRC2012_val_{number:08d}.png", output)
        return tmp_path

    def test_images_with_several_labels_and_without_labels(self, root: Path) -> None:
        data = open_dataset("imagenet-real", root)
        assert len(data) == 3
        assert [data.answers(index, 0) for index in range(3)] == [tuple(self.REAL[number]) for number in (1, 2, 3)]
        assert "1 without a reassessed label" in data.description
        result = run(data)
        assert (result.images, result.scores["dense"].top1_correct) == (3, 2)
        assert result.rows is not None
        assert result.rows.answers.tolist() == [self.REAL[1], self.REAL[2], [self.REAL[3][0], -1]]
        limited = open_dataset("imagenet-real", root, limit=1)
        assert limited.answers(0, 0) == tuple(self.REAL[2])

    def test_other_file_names_have_no_label(self, root: Path) -> None:
        put(root / WNIDS[7] / "holiday.png")
        with pytest.raises(DataError, match="is not named like ILSVRC2012_val"):
            open_dataset("imagenet-real", root)

    def test_only_images_without_labels(self, tmp_path: Path) -> None:
        put(tmp_path / WNIDS[7] / "ILSVRC2012_val_00000001.png")
        with pytest.raises(DataError, match="none of the 1 images"):
            open_dataset("imagenet-real", tmp_path)


class TestV2:
    @pytest.mark.parametrize("inner", [".", "imagenetv2-matched-frequency-format-val"])
    def test_folder_names_are_labels_by_value(self, tmp_path: Path, inner: str) -> None:
        for label in (0, 2, 10, 999):
            put(tmp_path / inner / str(label) / "a.png", label)
        data = open_dataset("imagenet-v2", tmp_path)
        assert [data.load(index)[1] for index in range(4)] == [0, 2, 10, 999]
        assert data.classes == WNIDS
        assert run(data).scores["dense"].top1_correct == 4

    @pytest.mark.parametrize("name", ["1000", "007", "cat", "n01440764"])
    def test_folders_that_are_not_labels(self, tmp_path: Path, name: str) -> None:
        put(tmp_path / "3" / "a.png")
        put(tmp_path / name / "a.png")
        with pytest.raises(DataError, match=f"not classes of imagenet-v2: {name}"):
            open_dataset("imagenet-v2", tmp_path)

    def test_several_versions_are_an_error(self, tmp_path: Path) -> None:
        for version in ("imagenetv2-matched-frequency-format-val", "imagenetv2-top-images-format-val"):
            put(tmp_path / version / "3" / "a.png")
        with pytest.raises(DataError, match="has 2 versions"):
            open_dataset("imagenet-v2", tmp_path)

    def test_numbers_that_sort_differently_as_text_are_refused(self, tmp_path: Path) -> None:
        for label in range(12):
            put(tmp_path / str(label) / "a.png", label)
        data = open_dataset("folder", tmp_path)
        with pytest.raises(DataError, match="some tools sort as text") as caught:
            run(data, outputs=12)
        assert "imagenet-v2" in str(caught.value)
        for path in tmp_path.iterdir():
            path.rename(tmp_path / f"{int(path.name):02d}")
        assert run(open_dataset("folder", tmp_path), outputs=12).scores["dense"].top1_correct == 12


@pytest.mark.parametrize("subset", ["a", "r"])
class TestSubsets:
    @pytest.fixture
    def indices(self, subset: str) -> list[int]:
        return [int(place) for place in timm_list(f"imagenet_{subset}_indices.txt")]

    def test_classes_are_those_of_timm(self, subset: str, indices: list[int]) -> None:
        wnids = timm_list(f"imagenet_{subset}_synsets.txt")
        assert len(indices) == 200
        assert [WNIDS[place] for place in indices] == wnids

    def test_a_head_of_1000_chooses_among_the_200(self, tmp_path: Path, subset: str, indices: list[int]) -> None:
        # two images encode an output outside of this set: the next output in the set is predicted
        barred = next(place for place in range(1000) if place not in indices and place > indices[0])
        follower = next(place for place in indices if place > barred)
        put(tmp_path / WNIDS[indices[0]] / "a.png", indices[0])
        put(tmp_path / WNIDS[follower] / "a.png", barred)
        put(tmp_path / WNIDS[indices[-1]] / "a.png", barred)
        data = open_dataset(f"imagenet-{subset}", tmp_path)
        assert data.for_head(1000).outputs == tuple(indices)
        result = run(data)
        assert result.rows is not None
        assert set(result.rows.top_k["dense"].top.flatten().tolist()) <= set(indices)
        assert (result.images, result.scores["dense"].top1_correct, result.outputs) == (3, 2, 200)
        assert open_dataset(f"imagenet-{subset}", tmp_path, limit=2).for_head(1000).outputs == tuple(indices)

    def test_a_head_of_200_has_them_in_their_order(self, tmp_path: Path, subset: str, indices: list[int]) -> None:
        for place in (0, 7, 199):
            put(tmp_path / WNIDS[indices[place]] / "a.png", place)
        result = run(open_dataset(f"imagenet-{subset}", tmp_path), outputs=200)
        assert result.scores["dense"].top1_correct == 3

    def test_other_heads_and_other_classes(self, tmp_path: Path, subset: str, indices: list[int]) -> None:
        put(tmp_path / WNIDS[indices[0]] / "a.png")
        with pytest.raises(DataError, match="has 200 classes, but the head of the model has 10"):
            run(open_dataset(f"imagenet-{subset}", tmp_path), outputs=10)
        other = next(wnid for place, wnid in enumerate(WNIDS) if place not in indices)
        put(tmp_path / other / "a.png")
        with pytest.raises(DataError, match=f"not classes of imagenet-{subset}: {other}"):
            open_dataset(f"imagenet-{subset}", tmp_path)

    def test_missing_folders(self, tmp_path: Path, subset: str) -> None:
        with pytest.raises(DataError, match="have no images"):
            open_dataset(f"imagenet-{subset}", tmp_path)


class TestWnids:
    def test_ids_of_another_list_are_refused(self, tmp_path: Path) -> None:
        for place in range(999):
            (tmp_path / WNIDS[place]).mkdir()
        put(tmp_path / "n99999999" / "a.png")
        with pytest.raises(DataError, match="are not ImageNet-1k classes: n99999999"):
            run(open_dataset("folder", tmp_path))

    def test_a_subset_in_plain_folders_competes_with_all_outputs(self, tmp_path: Path) -> None:
        put(tmp_path / WNIDS[3] / "a.png", 3)
        put(tmp_path / WNIDS[900] / "a.png", 901)
        result = run(open_dataset("folder", tmp_path))
        assert (result.outputs, result.scores["dense"].top1_correct) == (1000, 1)
