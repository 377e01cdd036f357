"""`repshift visualize`: kept tokens, figures, documents, and the command."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from outcome import Command, explained
from PIL import Image
from safetensors.torch import save_file
from tiny import DEPTH, PATCHES, compressed, images, make_recipe, tiny_vit
from tiny_umt import compressed_umt, tiny_umt, umt_clips, umt_recipe
from torch import nn

from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.weights import Source
from repshift_cli.data.builtin import moving_shapes
from repshift_cli.data.inputs import ImageBatch, load_inputs
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.data.sources.class_labels import imagenet_wnids
from repshift_cli.errors import CheckFailed, DataError, ModelError, UsageError
from repshift_cli.planning.layout import PatchGrid
from repshift_cli.reduction.compressed_model import CompressedModel
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.families.timm_vit import TimmViT
from repshift_cli.visualize.draw import kept_clips_figure, kept_tokens_figure, save_figure
from repshift_cli.visualize.patches import (
    fade_dropped,
    kept_masks,
    kept_per_frame,
    restore_images,
)
from repshift_cli.visualize.predictions import Prediction, SampleResult
from repshift_cli.visualize.view import class_words, kept_document, trace_samples, visualize

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
PREPROCESSING = Preprocessing((3, 32, 32), MEAN, STD, "bicubic", 1.0)
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": DEPTH, "num_heads": 2, "num_classes": 10}


def opened(model: nn.Module, preprocessing: Preprocessing = PREPROCESSING, *, dense: bool = False) -> Opened:
    loaded = LoadedModel(model, ModelDescription("tiny", None, {}, preprocessing), Source("object", None, None), {})
    return Opened(loaded, None if dense else compressed(model))


def save_images(folder: Path, count: int, size: tuple[int, int] = (40, 40)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        noise = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")


def patch_grid(model: nn.Module) -> PatchGrid:
    return match(model).patch_grid(model)


class TestPatches:
    def test_of_a_square_model(self) -> None:
        assert patch_grid(tiny_vit()) == PatchGrid(4, 4, 8, 8)

    def test_neither_grid_nor_patch_need_be_square(self) -> None:
        found = patch_grid(tiny_vit(img_size=(48, 64), patch_size=(8, 16), reg_tokens=3))
        assert found == PatchGrid(rows=6, columns=4, height=8, width=16)
        assert found.patches == 24

    def test_a_model_without_a_grid(self) -> None:
        with pytest.raises(ModelError, match="Linear has no grid of patches"):
            TimmViT().patch_grid(nn.Linear(2, 2))

    def test_masks_cover_exactly_the_patches(self) -> None:
        patches = PatchGrid(rows=2, columns=3, height=4, width=5)
        mask = kept_masks(np.array([[1, 5]]), patches, 8, 15)[0]
        assert mask[:4, 5:10].all()
        assert mask[4:, 10:].all()
        assert mask.sum() == 2 * 4 * 5

    def test_pixels_beyond_the_last_patch_are_not_kept(self) -> None:
        mask = kept_masks(np.array([[0, 1, 2, 3]]), PatchGrid(2, 2, 4, 4), 9, 10)[0]
        assert mask[:8, :8].all()
        assert mask.sum() == 64


class TestPixels:
    def test_normalization_is_undone(self) -> None:
        pixels = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        restored = restore_images((pixels / 255 - mean) / std, MEAN, STD)
        assert restored.dtype == np.uint8
        assert np.array_equal(restored, pixels.permute(0, 2, 3, 1).numpy())

    def test_values_out_of_range_are_clipped(self) -> None:
        restored = restore_images(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2), (0.5,), (0.5,))
        assert restored.tolist() == [[[[0, 0, 0], [255, 255, 255]]]]

    def test_four_channels_are_refused(self) -> None:
        with pytest.raises(ModelError, match="4 channels"):
            restore_images(torch.zeros(1, 4, 2, 2), (0.5,) * 4, (0.5,) * 4)

    def test_kept_pixels_stay_and_others_fade_to_grey(self) -> None:
        images = np.random.default_rng(0).integers(0, 256, (1, 6, 6, 3), dtype=np.uint8)
        masks = np.zeros((1, 6, 6), dtype=bool)
        masks[:, :3] = True
        faded = fade_dropped(images, masks)
        assert np.array_equal(faded[masks], images[masks])
        rest = faded[~masks]
        assert (rest == rest[:, :1]).all()  # no colour
        assert rest.min() >= 170
        assert rest.max() - rest.min() > 10  # but shapes still show


class TestTraceSamples:
    def test_agrees_with_the_model(self) -> None:
        model, batch = compressed(), images(3)
        found = trace_samples(model, batch)
        trace = model.trace(batch)
        assert torch.equal(found.compressed, trace.output)
        with model.dense() as dense, torch.inference_mode():
            assert torch.equal(found.dense, dense(batch))
        assert list(found.kept) == [0, 2]
        for layer, rows in found.kept.items():
            assert np.array_equal(rows, trace.kept[layer].numpy())

    def test_more_images_than_one_batch(self) -> None:
        model, batch = compressed(), images(20)
        found = trace_samples(model, batch)
        assert {layer: rows.shape for layer, rows in found.kept.items()} == {0: (20, 12), 2: (20, 5)}
        alone = trace_samples(model, batch[17:18])
        assert np.array_equal(found.kept[2][17:18], alone.kept[2])

    def test_indices_ascend_and_later_ones_are_among_earlier(self) -> None:
        kept = trace_samples(compressed(), images(4)).kept
        for early, late in zip(kept[0], kept[2], strict=True):
            assert (np.diff(early) > 0).all()
            assert set(late) <= set(early) <= set(range(PATCHES))


def load_samples(where: str, count: int, num_classes: int, seed: int) -> ImageBatch:
    return load_inputs(where, count, PREPROCESSING, seed, num_classes=num_classes, test_scenes=True)


def drawn_clips(where: str, count: int, seed: int) -> ImageBatch:
    return load_inputs(where, count, CLIP, seed, test_scenes=True)


class TestSamples:
    def test_scenes_have_labels_and_follow_the_seed(self) -> None:
        first, again, other = (load_samples("builtin:digits", 3, 10, seed) for seed in (0, 0, 1))
        assert torch.equal(first.tensor, again.tensor)
        assert not torch.equal(first.tensor, other.tensor)
        assert first.labels is not None
        assert first.classes is not None
        assert first.tensor.shape == (3, 3, 32, 32)

    def test_scenes_for_another_head_have_no_labels(self) -> None:
        found = load_samples("builtin:digits", 2, 1000, 0)
        assert (found.labels, found.classes) == (None, None)

    def test_class_folders_that_fit_the_head(self, tmp_path: Path) -> None:
        for name in ("cat", "dog"):
            save_images(tmp_path / name, 2)
        found = load_samples(str(tmp_path), 4, 2, 0)
        assert found.classes == ("cat", "dog")
        assert found.labels is not None
        assert sorted(found.labels.tolist()) == [0, 0, 1, 1]
        for name, label in zip(found.names, found.labels.tolist(), strict=True):
            assert Path(name).parent.name == ("cat", "dog")[label]

    def test_other_folders_have_no_labels(self, tmp_path: Path) -> None:
        save_images(tmp_path / "holiday" / "beach", 2)
        save_images(tmp_path, 1)
        found = load_samples(str(tmp_path), 9, 10, 0)
        assert found.labels is None
        assert len(found.tensor) == 3

    def test_an_unreadable_image_is_skipped(self, tmp_path: Path) -> None:
        save_images(tmp_path, 2)
        (tmp_path / "broken.png").write_bytes(b"")
        found = load_samples(str(tmp_path), 3, 10, 0)
        assert len(found.tensor) == 2
        assert len(found.skipped) == 1
        assert "broken.png: the file is empty" in found.skipped[0]

    def test_nothing_to_draw(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no images"):
            load_samples(str(tmp_path), 3, 10, 0)
        (tmp_path / "broken.png").write_bytes(b"x")
        with pytest.raises(DataError, match="none of the 1 images"):
            load_samples(str(tmp_path), 3, 10, 0)
        with pytest.raises(DataError, match="does not exist"):
            load_samples(str(tmp_path / "nowhere"), 3, 10, 0)
        with pytest.raises(DataError, match="no dataset 'builtin:digit'"):
            load_samples("builtin:digit", 3, 10, 0)

    def test_imagenet_classes_are_words(self) -> None:
        classes = class_words(imagenet_wnids())
        assert classes is not None
        assert (classes[0], classes[281], len(classes)) == ("tench", "tabby", 1000)
        assert class_words(("a", "b")) == ("a", "b")


class TestView:
    def test_of_a_model_with_registers(self) -> None:
        view = visualize(opened(tiny_vit(reg_tokens=3)), "builtin:digits", 3)
        assert view.images.shape == (3, 32, 32, 3)
        assert [result.label is not None for result in view.results] == [True] * 3
        assert view.unchanged is not None
        assert 0 <= view.unchanged <= 3
        assert "fewer MACs" in view.remark

    def test_without_a_head_features_are_compared(self) -> None:
        view = visualize(opened(tiny_vit(num_classes=0)), "builtin:digits", 2)
        assert view.unchanged is None
        for result in view.results:
            assert result.dense is result.compressed is None
            assert result.cosine is not None
            assert -1 <= result.cosine <= 1.0001

    def test_a_dense_model_is_refused(self) -> None:
        with pytest.raises(UsageError, match="nothing to show"):
            visualize(opened(tiny_vit(), dense=True), "builtin:digits", 2)

    def test_a_count_of_zero(self) -> None:
        with pytest.raises(UsageError, match="invalid images 0"):
            visualize(opened(tiny_vit()), "builtin:digits", 0)


class TestDocument:
    def test_holds_every_index_of_every_image(self) -> None:
        kept = {0: np.array([[0, 2, 3], [1, 2, 3]]), 2: np.array([[2], [3]])}
        results = (
            SampleResult("a.png", 1, "one", Prediction(1, "one", 0.5), Prediction(0, "zero", 0.25)),
            SampleResult("b.png"),
        )
        grids = dict.fromkeys(kept, PatchGrid(2, 2, 4, 8))
        document = json.loads(json.dumps(kept_document(kept, grids, results)))
        assert document["grid"] == {"rows": 2, "columns": 2}
        assert document["patch"] == {"height": 4, "width": 8}
        grid = {key: document[key] for key in ("grid", "patch")}
        assert document["layers"] == [{"layer": 0, "kept": 3, **grid}, {"layer": 2, "kept": 1, **grid}]
        first, second = document["images"]
        assert first["kept"] == {"0": [0, 2, 3], "2": [2]}
        assert first["compressed"] == {"class": 0, "name": "zero", "probability": 0.25}
        assert (second["image"], second["label"], second["dense"]) == ("b.png", None, None)


def texts(figure: Any) -> list[str]:
    """All lines that are written in a figure."""
    found = [text for text in figure.findobj(Text) if text.get_visible()]
    return [line for text in found for line in text.get_text().splitlines()]


def drawn(figure: Any) -> np.ndarray:
    """The figure as it is drawn, uint8 `[H, W, 3]`."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def pixels(page: np.ndarray, panel: Any, height: int, width: int) -> np.ndarray:
    """The pixels of an image, each once, read in the middle of the square that shows it."""
    box = panel.get_window_extent()
    down = page.shape[0] - box.y1 + (np.arange(height) + 0.5) * box.height / height
    right = box.x0 + (np.arange(width) + 0.5) * box.width / width
    return page[np.ix_(down.astype(int), right.astype(int))]


class TestFigure:
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 48, 3), dtype=np.uint8)
    patches = dict.fromkeys((1, 5), PatchGrid(rows=3, columns=3, height=8, width=16))
    kept = {1: np.array([[0, 1, 4, 8], [2, 3, 4, 5]]), 5: np.array([[4], [5]])}  # noqa: RUF012

    def test_one_row_per_image_and_one_column_per_site(self) -> None:
        figure = kept_tokens_figure(self.images, self.kept, self.patches)
        assert len(figure.axes) == 2 * 3
        written = texts(figure)
        for text in ("original", "9 patches", "after block 1", "4 of 9 kept", "after block 5", "1 of 9 kept"):
            assert text in written

    @pytest.mark.slow
    def test_pixels_are_sharp(self) -> None:
        figure = kept_tokens_figure(
            self.images, self.kept, self.patches, [SampleResult("a.png"), SampleResult("b.png")]
        )
        page = drawn(figure)
        for row, panel in enumerate(figure.axes[::3]):  # the originals
            assert panel.get_window_extent().width >= 7 * 48
            assert np.array_equal(pixels(page, panel, 24, 48), self.images[row])

    def test_text_next_to_a_row(self) -> None:
        right, wrong = Prediction(7, "seven", 0.98), Prediction(1, "one", 0.51)
        results = [SampleResult("x/a.png", 7, "seven", right, wrong), SampleResult("b.png", cosine=0.987)]
        written = texts(kept_tokens_figure(self.images, self.kept, self.patches, results))
        assert "true: seven" in written
        assert "dense: seven (98%)" in written
        assert "compressed: one (51%) \N{BALLOT X}" in written
        assert "a.png" in written
        assert "features: cosine 0.987" in written

    def test_without_a_label_a_changed_prediction_is_marked(self) -> None:
        same, other = Prediction(7, "seven", 0.98), Prediction(1, "one", 0.51)
        results = [
            SampleResult("a.png", dense=same, compressed=other),
            SampleResult("b.png", dense=same, compressed=same),
        ]
        written = texts(kept_tokens_figure(self.images, self.kept, self.patches, results))
        assert written.count("compressed: one (51%) \N{BALLOT X}") == 1
        assert "compressed: seven (98%)" in written

    def test_long_names_are_shortened_and_dollars_are_text(self, tmp_path: Path) -> None:
        results = [SampleResult(f"{'long' * 20}.png", 0, "$x$ " + "w" * 80)] * 2
        figure = kept_tokens_figure(self.images, self.kept, self.patches, results, title="$_{", remark="$^{")
        assert max(map(len, texts(figure))) < 40
        save_figure(figure, tmp_path / "kept.svg", False)

    @pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")])
    def test_the_suffix_selects_the_format(self, tmp_path: Path, ending: str, start: bytes) -> None:
        path = tmp_path / f"kept.{ending}"
        save_figure(kept_tokens_figure(self.images, self.kept, self.patches), path, False)
        assert path.read_bytes().startswith(start)
        assert list(tmp_path.iterdir()) == [path]

    def test_no_format_and_no_overwriting(self, tmp_path: Path) -> None:
        figure = kept_tokens_figure(self.images, self.kept, self.patches)
        with pytest.raises(UsageError, match=r"kept\.tiff: unknown image format"):
            save_figure(figure, tmp_path / "kept.tiff", False)
        path = tmp_path / "kept.png"
        path.write_text("precious")
        with pytest.raises(UsageError, match="already exists"):
            save_figure(figure, path, False)
        assert path.read_text() == "precious"
        save_figure(figure, path, True)
        assert path.read_bytes().startswith(b"\x89PNG")


CLIP_GRID = PatchGrid(rows=2, columns=2, height=8, width=8, frames=3)
"""12 tokens: position 7 is the lower right patch of frame 1."""

CLIP = Preprocessing((3, 32, 32), MEAN, STD, "bicubic", 1.0, "squash", frames=3)
PRUNE = "{kind: representation_shift, operation: mlp, distance: l2, reading: update, polarity: largest}"
STAGES = "[{layer: 0, drop_ratio: 0.25}, {layer: 2, drop_ratio: 0.5}]"


def smaller_umt(reducer: str = "prune", **options: Any) -> CompressedModel:
    """A tiny UMT with 3 frames of 4x4 patches that keeps 36, then 18 tokens."""
    metric = PRUNE if reducer == "prune" else "{kind: attention_entropy}"
    return compressed_umt(tiny_umt(**options), umt_recipe(STAGES, metric, reducer))


def opened_umt(reducer: str = "prune", **options: Any) -> Opened:
    model = smaller_umt(reducer, **options)
    description = ModelDescription("tiny", "umt", {}, Preprocessing.of_model(model.model))
    return Opened(LoadedModel(model.model, description, Source("object", None, None), {}), model)


class TestClipPositions:
    def test_the_grid_of_a_model(self) -> None:
        assert patch_grid(tiny_umt(img_size=48, frames=5)) == PatchGrid(6, 6, 8, 8, frames=5)
        assert patch_grid(tiny_umt()).patches == 48

    def test_positions_equal_those_of_the_patch_embedding(self) -> None:
        model = tiny_umt()
        grid = patch_grid(model)
        embed = model.vision_encoder.encoder.patch_embed
        with torch.no_grad():
            empty = embed(torch.zeros(1, 3, 3, 32, 32))
            for place in range(grid.patches):
                mask = kept_masks(np.array([[place]]), grid, 3 * 32, 32)
                clip = torch.from_numpy(mask.reshape(1, 3, 1, 32, 32)).float().expand(-1, -1, 3, -1, -1)
                lit = (embed(clip) != empty).any(dim=-1)[0]
                assert lit.nonzero().flatten().tolist() == [place]

    def test_masks_of_neighbouring_frames(self) -> None:
        mask = kept_masks(np.array([[3, 7]]), CLIP_GRID, 3 * 16, 16)[0].reshape(3, 16, 16)
        assert mask[:2, 8:, 8:].all()
        assert mask.sum() == 2 * 64

    def test_tokens_of_each_frame(self) -> None:
        assert kept_per_frame(np.array([[0, 1, 3, 11], [4, 5, 6, 7]]), CLIP_GRID).tolist() == [[3, 0, 1], [0, 4, 0]]

    @pytest.mark.parametrize("reducer", ["prune", "vid_tldr"])
    def test_positions_agree_with_the_trace(self, reducer: str) -> None:
        model = smaller_umt(reducer)
        clips = umt_clips(model, 7)
        found, trace = trace_samples(model, clips), model.trace(clips)
        assert {layer: rows.shape for layer, rows in found.kept.items()} == {0: (7, 36), 2: (7, 18)}
        for layer, rows in found.kept.items():
            assert (np.diff(rows, axis=1) > 0).all()
            assert np.array_equal(rows, np.sort(trace.kept[layer].numpy(), axis=1))
        torch.testing.assert_close(found.compressed, trace.output)


class TestClipSamples:
    def test_scenes_are_named_by_what_they_show(self) -> None:
        first, again, other = (drawn_clips("builtin:shapes", 3, seed) for seed in (0, 0, 1))
        assert first.tensor.shape == (3, 3, 3, 32, 32)
        assert torch.equal(first.tensor, again.tensor)
        assert not torch.equal(first.tensor, other.tensor)
        scenes = moving_shapes.scenes(3, moving_shapes.TEST_SEED)
        assert first.names == tuple(map(moving_shapes.caption, scenes))
        pixels = restore_images(first.tensor, MEAN, STD)
        assert np.array_equal(pixels[0], moving_shapes.render(scenes[0], 3, 32))

    def test_folders_of_frames(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            save_images(tmp_path / name, 4)
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "0.png").write_bytes(b"x")
        found = drawn_clips(str(tmp_path), 5, 0)
        assert found.tensor.shape == (2, 3, 3, 32, 32)
        assert sorted(found.names) == [str(tmp_path / "one"), str(tmp_path / "two")]
        assert len(found.skipped) == 1
        assert "broken" in found.skipped[0]

    def test_nothing_to_draw(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no clips named builtin:digits"):
            drawn_clips("builtin:digits", 1, 0)
        with pytest.raises(DataError, match="no videos in"):
            drawn_clips(str(tmp_path), 1, 0)
        (tmp_path / "0.png").write_bytes(b"x")
        with pytest.raises(DataError, match="none of the 1 videos"):
            drawn_clips(str(tmp_path), 1, 0)


class TestClipView:
    def test_of_kept_tokens(self) -> None:
        view = visualize(opened_umt(), "builtin:shapes", 2)
        assert (view.of_clips, view.merged, view.unchanged) == (True, False, None)
        assert view.images.shape == (2, 3, 32, 32, 3)
        assert all(0 < result.moved < 1 for result in view.results)
        written = texts(view.figure())
        assert "tiny: tokens that are kept" in written
        assert written.count("18 of 48 kept") == 2
        assert not any("dense:" in text or "compressed:" in text for text in written)

    def test_of_merged_tokens(self) -> None:
        view = visualize(opened_umt("vid_tldr", embed_dim=0), "builtin:shapes", 1)
        assert view.merged
        assert view.document()["tokens"] == "merged"
        written = texts(view.figure())
        assert "tiny: where tokens are left after merging" in written
        assert "merged into 36 of 48" in written
        assert not any("kept" in text for text in written)

    def test_features_are_compared_with_the_dense_model(self) -> None:
        opened = opened_umt()
        assert opened.compressed is not None
        view = visualize(opened, "builtin:shapes", 1)
        with torch.no_grad(), opened.compressed.dense() as dense:
            original = dense(view.samples.tensor)
        likeness = torch.nn.functional.cosine_similarity(original, opened.compressed(view.samples.tensor))
        assert view.results[0].moved == pytest.approx(1 - likeness.item(), abs=1e-6)

    def test_invalid_counts(self) -> None:
        with pytest.raises(UsageError, match="invalid images 0"):
            visualize(opened_umt(), "builtin:shapes", 0)
        with pytest.raises(UsageError, match="64 clips with 2 sites do not fit on one page") as caught:
            visualize(opened_umt(), "builtin:shapes", 64)
        assert caught.value.hint == "Give --count 33."


class TestClipDocument:
    def test_positions_and_grid(self) -> None:
        kept = {0: np.array([[0, 3, 4, 11], [4, 5, 6, 7]]), 2: np.array([[11], [4]])}
        results = (SampleResult("a/b.mp4", cosine=0.75), SampleResult("c"))
        document = json.loads(json.dumps(kept_document(kept, dict.fromkeys(kept, CLIP_GRID), results, False)))
        grid = {"grid": {"frames": 3, "rows": 2, "columns": 2}, "patch": {"height": 8, "width": 8}}
        layers = [{"layer": 0, "kept": 4, **grid}, {"layer": 2, "kept": 1, **grid}]
        first, second = document.pop("clips")
        assert document == {**grid, "layers": layers, "tokens": "kept"}
        assert first == {
            "clip": "a/b.mp4",
            "features_moved": 0.25,
            "kept": {"0": [0, 3, 4, 11], "2": [11]},
            "per_frame": {"0": [2, 1, 1], "2": [0, 0, 1]},
        }
        assert second["per_frame"] == {"0": [0, 4, 0], "2": [0, 1, 0]}


class TestClipFigure:
    clips = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16, 3), dtype=np.uint8)
    patches = dict.fromkeys((1, 5), CLIP_GRID)
    kept = {1: np.array([[0, 1, 2, 7], [4, 5, 6, 11]]), 5: np.array([[7], [5]])}  # noqa: RUF012
    gap = 2
    """Pixels between two frames of this size."""

    def test_words(self) -> None:
        results = [SampleResult("x/a.mp4", cosine=0.987), SampleResult("a ring moves up", cosine=1.0000001)]
        written = texts(kept_clips_figure(self.clips, self.kept, self.patches, results, remark="fast"))
        for text in (
            "input",
            "12 patches",
            "3 frames",
            "after block 1",
            "4 of 12 kept",
            "after block 5",
            "1 of 12 kept",
        ):
            assert written.count(text) == 2, text
        assert {"a.mp4", "features moved by 0.0130 (1 - cosine)", "a ring moves up", "fast"} <= set(written)
        assert "features moved by 0.0000 (1 - cosine)" in written
        assert written.count("in 2 of 3 frames") == 2
        assert [text for text in written if text.endswith("of 4")][:6] == [
            "3 of 4", "1 of 4", "0 of 4", "0 of 4", "1 of 4", "0 of 4"
        ]  # fmt: skip

    def test_dropped_patches_fade_in_their_own_frame(self) -> None:
        figure = kept_clips_figure(self.clips, self.kept, self.patches)
        page = drawn(figure)
        assert len(figure.axes) == 2 * 3
        panels = iter(figure.axes)
        for clip in range(2):
            for kept in (np.arange(12), self.kept[1][clip], self.kept[5][clip]):
                panel = next(panels)
                film = pixels(page, panel, 16, 3 * 16 + 2 * self.gap)
                assert panel.get_window_extent().height >= 10 * 16
                for frame in range(3):
                    shown = film[:, frame * (16 + self.gap) :][:, :16]
                    for row, column in np.ndindex(2, 2):
                        place = frame * 4 + row * 2 + column
                        part = (slice(row * 8 + 1, row * 8 + 7), slice(column * 8 + 1, column * 8 + 7))  # no outline
                        if place in kept:
                            assert np.array_equal(shown[part], self.clips[clip, frame][part])
                        else:
                            assert (shown[part] == shown[part][..., :1]).all()
                            assert shown[part].min() >= 170

    def test_kept_cells_are_outlined(self) -> None:
        figure: Any = kept_clips_figure(self.clips[:1], {5: np.array([[7]])}, {5: CLIP_GRID})
        lines = [panel.collections[0].get_segments() if panel.collections else [] for panel in figure.axes]
        left = 16 + self.gap  # of the second frame; the first pixel has its middle at 0
        assert [len(segments) for segments in lines] == [0, 2]
        found = np.array(lines[1]) - (left - 0.5, -0.5)
        assert sorted(found.tolist()) == [[[8, 8], [8, 16]], [[8, 8], [16, 8]]]

    def test_of_many_frames_some_are_shown(self) -> None:
        clips = np.repeat(self.clips[:1], 4, axis=1)
        grid = PatchGrid(2, 2, 8, 8, frames=12)
        figure = kept_clips_figure(clips, {1: np.array([[0, 23, 24]])}, {1: grid}, remark="fast", merged=True)
        written = texts(figure)
        assert len(figure.axes) == 2
        assert "fast; 8 of 12 frames are shown" in written
        assert [text for text in written if text.startswith("frame ")] == [
            f"frame {frame}" for frame in (0, 1, 3, 4, 6, 7, 9, 10)
        ]
        assert {"merged into 3 of 48", "in 3 of 12 frames"} <= set(written)
        counts = [text for text in written if text.endswith("of 4")]
        assert counts == ["1 of 4"] + ["0 of 4"] * 3 + ["1 of 4"] + ["0 of 4"] * 3

    @pytest.mark.parametrize("frames", [1, 3])
    def test_text_does_not_overlap_or_leave_the_page(self, frames: int) -> None:
        grid = PatchGrid(2, 2, 8, 8, frames=frames)
        results = [SampleResult("many words " * 20), SampleResult("/videos/a.mp4")]
        figure = kept_clips_figure(
            self.clips[:, :frames],
            {1: np.array([[0], [1]])},
            {1: grid},
            results,
            title="a long title " * 4,
            remark="fast",
            merged=True,
        )
        drawn(figure)
        boxes = [text.get_window_extent() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
        boxes += [panel.get_window_extent() for panel in figure.axes]
        for index, box in enumerate(boxes):
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
            assert not any(box.overlaps(other) for other in boxes[:index])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `dense.safetensors` and `compressed.safetensors` of one tiny model."""
    from repshift_cli.checkpoints.artifact import make_document, save
    from repshift_cli.checkpoints.load import load_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")
    description = ModelDescription("tiny", None, ARGS, PREPROCESSING)
    metadata = {"repshift": json.dumps({"model": description.to_dict()})}
    save_file(tiny_vit().state_dict(), folder / "dense.safetensors", metadata=metadata)
    loaded = load_checkpoint(folder / "dense.safetensors")
    plan = compressed(loaded.model).plan
    save(folder / "compressed.safetensors", loaded, make_document(loaded, plan, make_recipe(), None, {}))
    return folder


class TestCommand:
    @pytest.mark.slow
    def test_writes_an_image_and_the_indices(self, shell: Command, checkpoints: Path, tmp_path: Path) -> None:
        model = str(checkpoints / "compressed.safetensors")
        save_images(tmp_path / "photos", 3, size=(60, 40))
        done = shell("visualize", model, "--data", "photos", "--count", "2", "--indices", "kept.json")
        assert done.rc == 0, done.stderr
        assert "12 of 16 after block 0, 5 of 16 after block 2" in done.stdout
        assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
        document = json.loads((tmp_path / "kept.json").read_text())
        assert len(document["images"]) == 2
        for entry in document["images"]:
            assert {layer: len(kept) for layer, kept in entry["kept"].items()} == {"0": 12, "2": 5}

    @pytest.mark.slow
    def test_json_and_nothing_else(self, shell: Command, checkpoints: Path, tmp_path: Path) -> None:
        model = str(checkpoints / "compressed.safetensors")
        done = shell("visualize", model, "--data", "builtin:digits", "--count", "2", "-o", "a.svg", "--json")
        assert done.rc == 0, done.stderr
        document = json.loads(done.stdout)
        assert (document["output"], document["indices"]) == ("a.svg", None)
        assert [(layer["layer"], layer["kept"]) for layer in document["layers"]] == [(0, 12), (2, 5)]
        assert [entry["image"] for entry in document["images"]] == [f"builtin:digits/test/0/{i}" for i in range(2)]

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["dense"], 2, "Run: repshift compress"),
            (["compressed"], 2, "Add --data FOLDER"),
            (["compressed", "-o", "kept.gif"], 2, "invalid --output kept.gif: must end in"),
            (["compressed", "-o", "old.png"], 2, "already exists"),
            (["compressed", "-o", "a.png", "--indices", "a.png"], 2, "both name a.png"),
            (["compressed", "--data", "./nowhere"], 4, "does not exist"),
            (["none"], 3, "there is no file"),
        ],
    )
    def test_errors_before_anything_is_written(
        self, *, cli: Command, checkpoints: Path, tmp_path: Path, arguments: list[str], code: int, message: str
    ) -> None:
        (tmp_path / "old.png").write_text("precious")
        explained(cli("visualize", checkpoints / f"{arguments[0]}.safetensors", *arguments[1:]), code, message)
        assert [path.name for path in tmp_path.iterdir()] == ["old.png"]


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compressed tiny UMT under the name of a built-in one."""
    from repshift_cli.checkpoints.artifact import make_document, save
    from repshift_cli.checkpoints.load import load_checkpoint

    folder = tmp_path_factory.mktemp("clips")
    model = tiny_umt()
    args = {"vision": asdict(model.vision), "text": asdict(model.text), "embed_dim": 24}
    description = ModelDescription("umt-shapes", "umt", args, Preprocessing.of_model(model))
    tensors = {key: value.clone().contiguous() for key, value in model.state_dict().items()}
    save_file(
        tensors, folder / "dense.safetensors", metadata={"repshift": json.dumps({"model": description.to_dict()})}
    )
    loaded, recipe = load_checkpoint(folder / "dense.safetensors"), umt_recipe(STAGES, PRUNE)
    path = folder / "small.safetensors"
    save(path, loaded, make_document(loaded, smaller_umt().plan, recipe, None, {}))
    return str(path)


class TestCommandOnClips:
    @pytest.mark.slow
    def test_built_in_scenes_of_a_built_in_model(self, shell: Command, clip_model: str, tmp_path: Path) -> None:
        done = shell("visualize", clip_model, "--indices", "kept.json")
        assert done.rc == 0, done.stderr
        assert "36 of 48 after block 0, 18 of 48 after block 2" in done.stdout
        assert "moved   features by 0." in done.stdout
        assert "3 built-in test clips" in done.stdout
        assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
        document = json.loads((tmp_path / "kept.json").read_text())
        assert [list(map(len, clip["kept"].values())) for clip in document["clips"]] == [[36, 18]] * 3

    @pytest.mark.slow
    def test_a_folder_as_json(self, shell: Command, clip_model: str, tmp_path: Path) -> None:
        save_images(tmp_path / "videos" / "walk", 5)
        done = shell("visualize", clip_model, "--data", "videos", "--json")
        assert done.rc == 0, done.stderr
        document = json.loads(done.stdout)
        assert document["grid"] == {"frames": 3, "rows": 4, "columns": 4}
        assert document["tokens"] == "kept"
        (clip,) = document["clips"]
        assert clip["clip"] == "videos/walk"
        assert 0 < clip["features_moved"] < 1
        assert not {"images", "unchanged"} & set(document)


def test_weights_that_are_not_finite() -> None:
    model = compressed()
    model.model.head.bias.data.fill_(float("nan"))
    with pytest.raises(CheckFailed, match="not finite"):
        trace_samples(model, images(1))
