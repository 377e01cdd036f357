"""Convolutional networks drop rows and columns; later layers run on the smaller map. See also `test_contract.py`."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import BlurPool2d
from tiny_cnn import CNNS, SIZE, compressed_cnn, every_site, line_plan, photos, shrink, tiny_cnn
from torch import Tensor, nn

from repshift_cli.calibration.calibrate import calibrate
from repshift_cli.checkpoints.artifact import load
from repshift_cli.checkpoints.weights import read_weights
from repshift_cli.compression.run import compress_checkpoint
from repshift_cli.compression.settings import Settings
from repshift_cli.errors import ModelError, RecipeError, UsageError
from repshift_cli.measure.macs import count_macs
from repshift_cli.planning.layout import Grid
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import ComponentSpec
from repshift_cli.reduction.compressed_model import CompressedModel, attach, branch
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.metrics.base import build_metric
from repshift_cli.utils.progress import Silent

FEW = ["basic", "bottleneck_d", "squeeze_bottleneck", "group_norm", "blur", "convnext", "convnext_v2", "regnet_y"]
"""One of each form, for tests whose result is the same for all."""

SIZES: list[Grid] = [(64, 64), (95, 120), (130, 67)]
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}

each_form = pytest.mark.parametrize("kind", FEW)
each_format = pytest.mark.parametrize("layout", FORMATS)


def maps(model: CompressedModel, batch: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of each block that is a site: its own output, and the output after the hook."""
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    handles = []
    for site in model.layout.sites:
        block = model.model.get_submodule(site.name)
        note = partial(_note, before, site.name)
        handles += [block.register_forward_hook(note, prepend=True)]
        handles += [block.register_forward_hook(partial(_note, after, site.name))]
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    return before, after


def _note(seen: dict[str, Tensor], name: str, module: nn.Module, args: Any, output: Tensor) -> None:
    seen[name] = output


def grid(value: Tensor) -> Grid:
    return (value.shape[2], value.shape[3])


def plans(model: nn.Module) -> Iterator[Plan]:
    """Ratios at the first, at a later and at all sites; very different numbers of rows and columns."""
    yield line_plan(model, f"[{{layer: {match(model).layout(model).sites[0].name}, drop_ratio: 0.3}}]")
    yield every_site(model)
    yield shrink(model, {0: (6, 0), 2: (0, 1)})
    yield shrink(model, {0: (1, 9)})


class TestSizes:
    @pytest.mark.parametrize(
        ("kind", "size"), [*((kind, SIZES[1]) for kind in CNNS), *((kind, size) for kind in FEW for size in SIZES[::2])]
    )
    def test_maps_of_sites_equal_the_layout(self, kind: str, size: Grid) -> None:
        model = tiny_cnn(kind, size)
        layout = match(model).layout(model)
        wrapped = attach(model, shrink(model, {0: (0, 0)}))
        seen, _ = maps(wrapped, photos(1, size))
        assert {site.name: found for site, found in layout.grids()} == {
            name: grid(value) for name, value in seen.items()
        }
        assert layout.patch_tokens == math.prod(next(found for _, found in layout.grids()))

    @each_form
    def test_maps_of_sites_equal_the_plan(self, kind: str) -> None:
        for plan in plans(tiny_cnn(kind)):
            wrapped = attach(tiny_cnn(kind), plan)
            before, after = maps(wrapped, photos(2))
            expected = {site.name: found for site, found in wrapped.layout.grids(plan.grids_kept)}
            assert {name: grid(value) for name, value in before.items()} == expected
            planned = {site.site: site for site in plan.sites}
            for name, value in after.items():
                assert grid(value) == (planned[name].grid_out if name in planned else expected[name])
            assert all(planned[name].grid_in == expected[name] for name in planned)

    @each_form
    def test_macs_for_another_image_size(self, kind: str) -> None:
        model = tiny_cnn(kind, (160, 131))
        first = match(model).layout(model).sites[0].name
        wrapped = attach(model, line_plan(model, f"[{{layer: {first}, drop_ratio: 0.3}}]"))
        assert count_macs(wrapped, (3, 160, 131)) == wrapped.macs() < wrapped.dense_macs()

    @each_form
    def test_the_output_has_the_shape_of_the_dense_one_and_differs(self, kind: str) -> None:
        with torch.no_grad():
            dense = tiny_cnn(kind)(photos(3))
            output = compressed_cnn(kind)(photos(3))
        assert output.shape == dense.shape
        assert output.isfinite().all()
        assert not torch.allclose(output, dense, rtol=1e-3, atol=1e-3)

    @each_form
    def test_keep_all_is_bit_identical_in_channels_last(self, kind: str) -> None:
        model = tiny_cnn(kind).to(memory_format=torch.channels_last)
        batch = photos(2).to(memory_format=torch.channels_last)
        keep_all = dict.fromkeys(range(len(match(model).layout(model).sites)), (0, 0))
        with torch.no_grad():
            wanted = model(batch)
            assert torch.equal(attach(model, shrink(model, keep_all))(batch), wanted)

    def test_another_image_size_is_refused(self) -> None:
        with pytest.raises(UsageError, match=r"layer1\.1 got 16x16 tokens, but the plan is for 25x33"):
            compressed_cnn("basic")(photos(1, (64, 64)))

    def test_an_image_size_with_the_same_maps_works(self) -> None:
        assert compressed_cnn("basic")(photos(1, (98, 131))).shape == (1, 10)

    def test_one_channel(self) -> None:
        model = tiny_cnn("basic", in_chans=1)
        assert attach(model, shrink(model, {0: (3, 4)}))(photos(2)[:, :1]).shape == (2, 10)


def stretches(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The network up to the head, block by block."""
    children = dict(model.named_children())
    if "layer1" in children:
        names = ["conv1", "bn1", "act1", "maxpool"]
        names += [
            f"layer{stage}.{name}" for stage in (1, 2, 3, 4) for name, _ in children[f"layer{stage}"].named_children()
        ]
    elif "stages" in children:
        names = ["stem"]
        for stage, part in children["stages"].named_children():
            names += [f"stages.{stage}.downsample", *(f"stages.{stage}.blocks.{i}" for i in range(len(part.blocks)))]
        names += ["norm_pre"]
    else:
        names = [
            "stem",
            *(f"s{stage}.{name}" for stage in (1, 2, 3, 4) for name, _ in children[f"s{stage}"].named_children()),
        ]
        names += ["final_conv"]
    return ((name, model.get_submodule(name)) for name in names)


def naive_score(before: list[float], after: list[float], distance: str) -> float:
    if distance == "l1":
        return sum(abs(a - b) for a, b in zip(after, before, strict=True))
    if distance == "l2":
        return sum((a - b) ** 2 for a, b in zip(after, before, strict=True)) ** 0.5
    product = sum(a * b for a, b in zip(after, before, strict=True))
    return 1 - product / (sum(a * a for a in after) * sum(b * b for b in before)) ** 0.5


def naive_lines(scores: list[list[float]], kept: Grid, polarity: str) -> tuple[list[int], list[int]]:
    sign = -1 if polarity == "largest" else 1
    found = []
    for lines, count in zip((scores, list(zip(*scores, strict=True))), kept, strict=True):
        means = [sum(line) / len(line) for line in lines]
        found.append(sorted(sorted(range(len(means)), key=lambda place: (sign * means[place], place))[:count]))
    return found[0], found[1]


def naive_forward(model: Any, plan: Plan, batch: Tensor, distance: str, polarity: str) -> tuple[Tensor, dict[int, Any]]:
    """The compressed model one image at a time, without a hook, and the kept positions of the dense map."""
    planned = {site.site: site for site in plan.sites}
    outputs, kept = [], {site.layer: [] for site in plan.sites}
    for image in batch:
        value, dense = image[None], image[None]
        rows, columns = range(image.shape[1]), range(image.shape[2])
        for name, module in stretches(model):
            before, value, was = value, module(value), grid(dense)
            dense = module(dense)
            stride = round(was[0] / dense.shape[2])
            if stride > 1:
                # the middle tap of output line i reads line stride * i; there it stands for the dense line
                rows = [rows[stride * i] // stride for i in range(value.shape[2])]
                columns = [columns[stride * i] // stride for i in range(value.shape[3])]
            if name in planned:
                site = planned[name]
                old, new = before[0].permute(1, 2, 0).tolist(), value[0].permute(1, 2, 0).tolist()
                scores = [
                    [naive_score(b, a, distance) for b, a in zip(*lines, strict=True)]
                    for lines in zip(old, new, strict=True)
                ]
                best_rows, best_columns = naive_lines(scores, site.grid_out, polarity)
                value = value[:, :, best_rows][:, :, :, best_columns].contiguous()
                rows, columns = [rows[i] for i in best_rows], [columns[i] for i in best_columns]
                kept[site.layer].append([row * dense.shape[3] + column for row in rows for column in columns])
        outputs.append(model.forward_head(value))
    return torch.cat(outputs), kept


class TestAgainstNaiveReference:
    @pytest.mark.parametrize("layout", FORMATS)
    @pytest.mark.parametrize(
        ("kind", "distance", "polarity"),
        [
            ("basic", "l2", "largest"),
            ("basic_d", "l1", "smallest"),
            ("bottleneck", "cosine", "largest"),
            ("bottleneck_d", "l2", "smallest"),
            ("group_norm", "l2", "largest"),
            ("squeeze_bottleneck", "l1", "largest"),
            ("convnext", "l2", "largest"),
            ("convnext", "cosine", "smallest"),
            ("convnext_v2", "l1", "largest"),
            ("regnet_y", "l2", "largest"),
            ("regnet_v", "cosine", "largest"),
        ],
    )
    def test_the_same_lines_and_the_same_output(self, kind: str, distance: str, polarity: str, layout: str) -> None:
        metric = f"{{kind: representation_shift, operation: block, distance: {distance}, polarity: {polarity}}}"
        wrapped = compressed_cnn(kind, {0: (3, 5), 1: (1, 1), 3: (1, 2)}, metric)
        batch = photos(2)
        with torch.no_grad():
            wanted, kept = naive_forward(tiny_cnn(kind), wrapped.plan, batch, distance, polarity)
        wrapped.to(memory_format=FORMATS[layout])
        trace = wrapped.trace(batch.to(memory_format=FORMATS[layout]))
        assert {layer: index.tolist() for layer, index in trace.kept.items()} == kept
        torch.testing.assert_close(trace.output, wanted, rtol=1e-5, atol=1e-5)


class TestMemory:
    @each_form
    @each_format
    def test_the_smaller_map_is_contiguous_in_the_memory_format_of_the_block(self, kind: str, layout: str) -> None:
        wrapped = compressed_cnn(kind).to(memory_format=FORMATS[layout])
        before, after = maps(wrapped, photos(2).to(memory_format=FORMATS[layout]))
        for planned in wrapped.plan.sites:
            whole, left = before[planned.site], after[planned.site]
            found = next(one for one in FORMATS.values() if whole.is_contiguous(memory_format=one))
            assert left.is_contiguous(memory_format=found)
            assert left.untyped_storage().nbytes() == left.numel() * left.element_size()
            assert left.shape[:2] == whole.shape[:2]
            if layout == "channels_last" or not kind.startswith("convnext"):
                assert found is FORMATS[layout]

    @each_form
    @each_format
    def test_kept_positions_are_unchanged(self, kind: str, layout: str) -> None:
        wrapped = compressed_cnn(kind).to(memory_format=FORMATS[layout])
        batch = photos(2).to(memory_format=FORMATS[layout])
        before, after = maps(wrapped, batch)
        first = wrapped.plan.sites[0]
        kept = wrapped.trace(batch).kept[first.layer]
        whole, left = before[first.site], after[first.site]
        expected = torch.stack([image.flatten(1)[:, places] for image, places in zip(whole, kept, strict=True)])
        assert torch.equal(left.flatten(2), expected)

    @each_form
    def test_both_memory_formats_agree(self, kind: str) -> None:
        one, other = compressed_cnn(kind), compressed_cnn(kind).to(memory_format=torch.channels_last)
        plain, last = one.trace(photos(3)), other.trace(photos(3).to(memory_format=torch.channels_last))
        torch.testing.assert_close(plain.output, last.output, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(plain.kept[layer], last.kept[layer]) for layer in plain.kept)


class TestTrace:
    @each_form
    def test_kept_places_are_whole_lines_of_the_dense_map(self, kind: str) -> None:
        model = tiny_cnn(kind)
        wrapped = attach(model, every_site(model))
        dense = {site.layer: found for site, found in wrapped.layout.grids()}
        kept = wrapped.trace(photos(3)).kept
        assert list(kept) == [site.layer for site in wrapped.plan.sites]
        for planned in wrapped.plan.sites:
            height, width = dense[planned.layer]
            for places in kept[planned.layer].tolist():
                rows, columns = (sorted(set(part)) for part in zip(*(divmod(p, width) for p in places), strict=True))
                assert (len(rows), len(columns)) == planned.grid_out
                assert rows[-1] < height
                assert places == [row * width + column for row in rows for column in columns]

    def test_kept_positions_are_nested_between_strides(self) -> None:
        kept = compressed_cnn("basic_d", {0: (3, 4), 1: (2, 3)}).trace(photos(4)).kept
        for first, second in zip(kept[0].tolist(), kept[1].tolist(), strict=True):
            assert set(second) < set(first)

    def test_a_dropped_line_is_missing_after_a_stride(self) -> None:
        """The first eight rows are dropped; the first four of the next, smaller map are missing."""
        wrapped = compressed_cnn("basic", {0: (8, 0), 1: (0, 0)}, "{kind: token_norm}")
        batch = photos(2)
        model = wrapped.model
        model.get_submodule("layer1.1").register_forward_hook(_without_upper_rows, prepend=True)
        kept = wrapped.trace(batch).kept
        assert kept[1].tolist() == [list(range(8 * 33, 25 * 33))] * 2
        assert kept[3].tolist() == [list(range(4 * 17, 13 * 17))] * 2

    def test_trace_returns_the_output_of_the_model(self) -> None:
        wrapped = compressed_cnn("convnext")
        with torch.no_grad():
            assert torch.equal(wrapped.trace(photos()).output, wrapped(photos()))


def _without_upper_rows(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    output = output.clone()
    output[:, :, :8] = 0.0
    return output


class TestModule:
    @each_form
    def test_float64_keeps_the_same_lines(self, kind: str) -> None:
        trace = compressed_cnn(kind).to(torch.float64).trace(photos().to(torch.float64))
        plain = compressed_cnn(kind).trace(photos())
        assert all(torch.equal(plain.kept[layer], trace.kept[layer]) for layer in plain.kept)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("kind", "layout"),
        [("basic", "nchw"), ("basic", "channels_last"), ("convnext_v2", "nchw")],
    )
    def test_export_with_a_dynamic_batch(self, kind: str, layout: str) -> None:
        wrapped = compressed_cnn(kind).to(memory_format=FORMATS[layout])
        sample, batch = (photos(n, seed=n).to(memory_format=FORMATS[layout]) for n in (2, 5))
        shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
        program = torch.export.export(wrapped.model, (sample,), dynamic_shapes=shapes)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(batch), wrapped(batch), rtol=1e-4, atol=1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize(("kind", "layout"), [("basic", "nchw"), ("convnext", "channels_last")])
    def test_compile_as_one_graph(self, kind: str, layout: str) -> None:
        torch._dynamo.reset()
        wrapped = compressed_cnn(kind).to(memory_format=FORMATS[layout])
        batch = photos().to(memory_format=FORMATS[layout])
        with torch.no_grad():
            run = torch.compile(wrapped.model, fullgraph=True, backend="eager")
            torch.testing.assert_close(run(batch), wrapped(batch), rtol=1e-5, atol=1e-5)

    @each_format
    @pytest.mark.parametrize("kind", ["basic", "convnext", "regnet_y"])
    def test_a_branch_equals_each_candidate_alone(self, kind: str, layout: str) -> None:
        metrics = [
            build_metric(
                ComponentSpec(kind="representation_shift", operation="block", distance=distance, polarity=polarity)
            )
            for distance in ("l2", "cosine")
            for polarity in ("largest", "smallest")
        ]
        model = tiny_cnn(kind).to(memory_format=FORMATS[layout])
        batch, plan = photos(2).to(memory_format=FORMATS[layout]), shrink(model, {0: (2, 3), 2: (2, 3)})
        with torch.no_grad():
            branched = branch(copy.deepcopy(model), plan, [metric.with_defaults() for metric in metrics])(batch)
            for place, metric in enumerate(metrics):
                own = plan.with_metrics([plan.sites[0].metric, metric.spec()])
                alone = attach(copy.deepcopy(model), own)(batch)
                torch.testing.assert_close(branched[2 * place : 2 * place + 2], alone, rtol=1e-4, atol=1e-4)
        assert len(branched.unique(dim=0)) > 4

    @pytest.mark.parametrize("kind", ["basic", "convnext"])
    def test_calibration_chooses_among_available_tensors(self, kind: str) -> None:
        size = (96, 97)
        model = tiny_cnn(kind, size)
        first = match(model).layout(model).sites[0].name
        plan = line_plan(model, f"[{{layer: {first}, drop_ratio: 0.3}}]", "{kind: representation_shift}")
        found = calibrate(
            model, match(model), plan, images=photos(16, size), identity={}, batch_size=8, progress=Silent()
        )
        candidates = found.sites[0].candidates
        assert {candidate.metric.operation for candidate in candidates} == {"block"}
        assert len(candidates) == 6
        assert math.isfinite(found.result.distance)
        attach(tiny_cnn(kind, size), plan.with_metrics(found.specs))

    def test_checkpointed_blocks_are_reduced_too(self) -> None:
        wrapped = compressed_cnn("convnext")
        wanted = wrapped(photos())
        wrapped.model.set_grad_checkpointing()
        wrapped.model.train()
        output = wrapped(photos())
        torch.testing.assert_close(output, wanted)
        output.sum().backward()
        assert wrapped.model.stem[0].weight.grad.isfinite().all()


class Flipped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(3)


class TestRefusals:
    @pytest.mark.parametrize(
        "metric",
        [
            "{kind: class_attention}",
            "{kind: representation_shift, operation: mlp}",
            "{kind: representation_shift, operation: attention}",
            "{kind: representation_shift, operation: mixer}",
        ],
    )
    @pytest.mark.parametrize("kind", ["basic", "convnext", "regnet_x"])
    def test_a_metric_without_its_tensors(self, kind: str, metric: str) -> None:
        with pytest.raises(
            RecipeError, match=r"does not provide: a residual block of convolutions has neither"
        ) as caught:
            compressed_cnn(kind, metric=metric)
        assert "operation: block works on every block" in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "options", "reason"),
        [
            ("resnest14d", {}, "its output differs in size or width from its input"),
            ("resnetaa50", CNNS["bottleneck"][1], "path and shortcut of layer2.0 have outputs of different sizes"),
            ("resnetaa50d", CNNS["bottleneck_d"][1], "path and shortcut of layer2.0 have outputs of different sizes"),
            (
                "basic",
                {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 24)},
                "nothing can be dropped after any of its blocks",
            ),
            *(
                (kind, {"global_pool": "", "num_classes": 0}, "without global pooling")
                for kind in ("basic", "convnext")
            ),
            ("regnet_x", {"global_pool": "", "num_classes": 0}, "it was built without global pooling"),
        ],
    )
    def test_a_network_with_maps_of_fixed_size(self, name: str, options: dict[str, Any], reason: str) -> None:
        with pytest.raises(ModelError, match=re.escape(reason)):
            match(tiny_cnn(name, **options))

    @pytest.mark.parametrize("name", ["vgg11", "densenet121"])
    def test_another_kind_of_network(self, name: str) -> None:
        with pytest.raises(ModelError, match="are not supported"):
            match(tiny_cnn(name))

    @pytest.mark.parametrize(
        ("part", "reason"),
        [
            (BlurPool2d(64, pad_mode="circular"), "pads with lines of the other side of the map"),
            (
                nn.LPPool2d(2, 2),
                "maxpool (LPPool2d) calls lp_pool2d, whose effect on a map of another size is not known",
            ),
            (nn.Upsample(scale_factor=2), "maxpool (Upsample) calls interpolate, whose effect"),
            (nn.AdaptiveAvgPool2d(7), "maxpool (AdaptiveAvgPool2d) pools to a map of fixed size"),
            (nn.ZeroPad2d((-1, 0, 0, 0)), "maxpool (ZeroPad2d) pads by [-1, 0, 0, 0]"),
            (nn.Flatten(), "maxpool (Flatten) takes maps apart"),
            (Flipped(), "calls flip, whose effect"),
        ],
    )
    def test_a_part_with_another_effect_on_the_map(self, part: nn.Module, reason: str) -> None:
        model = tiny_cnn("basic")
        model.maxpool = part
        with pytest.raises(ModelError, match=re.escape(reason)):
            match(model)

    @pytest.mark.parametrize(
        ("kind", "stride"), [("basic", 8), ("bottleneck", 16), ("bottleneck_d", 16), ("blur_basic", 8), ("regnet_x", 8)]
    )
    def test_dilated_networks_work(self, kind: str, stride: int) -> None:
        model = tiny_cnn(kind, output_stride=stride)
        wrapped = attach(model, every_site(model))
        seen, _ = maps(wrapped, photos(1))
        expected = {site.name: found for site, found in wrapped.layout.grids(wrapped.plan.grids_kept)}
        assert {name: grid(value) for name, value in seen.items()} == expected
        assert count_macs(wrapped, (3, *SIZE)) == wrapped.macs()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"size": (97, 98)}, r"the plan is for resnet with 0 \+ 825 tokens, the model is resnet with 0 \+ 625"),
            ({"size": (130, 97)}, r"the plan has 25x33 tokens at layer1\.1, the model has 33x25"),
            ({"kind": "regnet_x"}, r"the plan is for resnet with 0 \+ 825 tokens"),
            ({"layers": (2, 2, 1, 2)}, r"the plan names layer3\.1 as layer 5, which the model does not have"),
        ],
    )
    def test_a_plan_for_another_network(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            attach(tiny_cnn(**change), shrink(tiny_cnn("basic"), {0: (1, 1), 2: (1, 1)}))

    def test_a_map_that_contradicts_an_earlier_one(self) -> None:
        document = shrink(tiny_cnn("basic"), {0: (1, 1), 2: (0, 0)}).model_dump(mode="json")
        document["sites"][1] |= {"grid_in": [7, 8], "grid_out": [7, 8], "tokens_in": 56, "tokens_out": 56}
        with pytest.raises(RecipeError, match=r"the plan has 7x8 tokens at layer3\.1, the model has 6x8"):
            attach(tiny_cnn("basic"), Plan.model_validate(document))

    def test_a_plan_without_maps(self) -> None:
        document = shrink(tiny_cnn("basic"), {0: (1, 1)}).model_dump(mode="json")
        for key in ("grid_in", "grid_out"):
            del document["sites"][0][key]
        with pytest.raises(RecipeError, match=r"the plan has 825 tokens at layer1\.1, the model has 25x33"):
            attach(tiny_cnn("basic"), Plan.model_validate(document))


@pytest.mark.parametrize("side", [1, 2, 16])
def test_images_too_small_for_the_network_are_refused(side: int) -> None:
    model = timm.create_model("convnext_atto", num_classes=10).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, side, side)}
    with pytest.raises(UsageError, match=f"images of {side}x{side} are too small for this model: nothing is left"):
        match(model).layout(model)


@pytest.mark.parametrize("norm", ["rmsnorm2d", "simplenorm2d"])
def test_other_norms_of_convnext(norm: str) -> None:
    model = timm.create_model("convnext_atto", norm_layer=norm, num_classes=10).eval()
    assert match(model).macs(model, None) == count_macs(model, (3, 224, 224))


@pytest.mark.slow
def test_an_older_repshift_gets_a_hint_to_upgrade(tmp_path: Path) -> None:
    """Version 1 supports sequences of vision transformers only, so a plan for maps has version 2."""
    path = tmp_path / "fast.safetensors"
    compress_checkpoint("builtin:cnn-digits", Settings(output=path, calibrate=False, seconds=0.0), Silent())
    document = read_weights(path).document
    assert document is not None
    assert document["format_version"] == 2
    assert document["plan"]["sites"][0]["grid_in"] == [18, 18]
    with torch.no_grad():
        assert load(path)(torch.randn(2, 3, 72, 72)).shape == (2, 10)
