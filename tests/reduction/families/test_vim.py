"""Vim with fewer tokens, against a naive implementation. The contract of all families is in `test_contract.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from tiny import compressed, make_plan, make_recipe, save_weights
from tiny_vim import DEPTH, VARIANTS, Naive, naive_vim, tiny_vim, vim_images
from torch import Tensor
from torch.nn import functional

from repshift_cli.calibration.calibrate import calibrate
from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.errors import RecipeError, UsageError
from repshift_cli.measure.macs import count_macs
from repshift_cli.models.vim import VimStream, VisionMamba, create
from repshift_cli.ops import mamba_kernels
from repshift_cli.ops.selective_scan import selective_scan as plain_scan
from repshift_cli.planning.plan import PlanSite
from repshift_cli.planning.recipe import ComponentSpec, Recipe
from repshift_cli.reduction.compressed_model import CompressedModel, attach, branch
from repshift_cli.reduction.families import vim as family_file
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.metrics.base import build_metric
from repshift_cli.reduction.plans import has_open_fields, with_defaults
from repshift_cli.reduction.stream import Reduce
from repshift_cli.utils.progress import Silent

SHIFT = "{kind: representation_shift, operation: mixer, distance: l2, reading: update, polarity: largest}"
BLOCK = "{kind: representation_shift, operation: block, distance: cosine, polarity: smallest}"
METRICS = {"mixer": SHIFT, "block": BLOCK, "token_norm": "{kind: token_norm}", "random": "{kind: random, seed: 3}"}
DROPS = "[{layer: 0, drop_ratio: 0.3}, {layer: 1, keep_tokens: 7}, {layer: 3, keep_tokens: 2}]"

each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_metric = pytest.mark.parametrize("metric", METRICS)


def recipe(metric: str = SHIFT, layers: str = DROPS) -> Recipe:
    return make_recipe(layers, metric)


def build(variant: str = "middle", metric: str = "mixer", layers: str = DROPS) -> CompressedModel:
    return compressed(tiny_vim(**VARIANTS[variant]), recipe(METRICS[metric], layers))


def images_for(model: CompressedModel, count: int = 3) -> Tensor:
    return vim_images(model.model, count)  # type: ignore[arg-type]


def naive_kept(variant: str, model: CompressedModel, images: Tensor, kept: dict[int, Tensor]) -> list[Naive]:
    """Each image through the naive model, which drops the same patches."""
    weights, stride = model.state_dict(), VARIANTS[variant].get("stride")
    return [
        naive_vim(weights, image, stride=stride, kept={layer: index[row] for layer, index in kept.items()})
        for row, image in enumerate(images)
    ]


def gap(variant: str, model: CompressedModel, images: Tensor) -> float:
    """The difference of the logits from those of the naive model with the same tokens."""
    trace = model.trace(images)
    expected = torch.stack([one.logits for one in naive_kept(variant, model, images, trace.kept)])
    return (trace.output - expected).abs().max().item()


def streams(model: CompressedModel, images: Tensor) -> tuple[list[VimStream], list[VimStream]]:
    """The input of each layer, and its output before tokens are dropped."""
    entered: list[VimStream] = []
    left: list[VimStream] = []
    handles = []
    for layer in model.model.layers:
        handles.append(layer.register_forward_pre_hook(lambda _, args: entered.append(args[0])))
        # a hook before that of the site gets the output of the layer itself
        handles.append(layer.register_forward_hook(lambda _, args, output: left.append(output), prepend=True))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return entered, left


class TestWrittenOut:
    @each_metric
    @each_variant
    def test_it_equals_the_model_on_the_kept_tokens(self, variant: str, metric: str) -> None:
        model = build(variant, metric)
        model.model.double()
        assert gap(variant, model, images_for(model)) < 1e-11

    @each_variant
    def test_every_layer_gets_the_kept_tokens(self, variant: str) -> None:
        model = build(variant)
        model.model.double()
        images = images_for(model)
        _, left = streams(model, images)
        expected = naive_kept(variant, model, images, model.trace(images).kept)
        for layer, row in product(range(DEPTH), range(len(images))):
            one = expected[row]
            torch.testing.assert_close(left[layer].hidden[row], one.hidden[layer], rtol=0, atol=1e-11)
            torch.testing.assert_close(left[layer].residual[row], one.residual[layer], rtol=0, atol=1e-11)
            classes = [place for place, label in enumerate(one.labels[layer]) if isinstance(label, str)]
            assert left[layer].place[row].tolist() == classes

    def test_the_class_token_has_different_positions(self) -> None:
        entered, _ = streams(model := build(), images_for(model, 8))
        assert len(entered[1].place.unique()) > 1

    @pytest.mark.parametrize("variant", ["middle", "double", "odd"])
    @pytest.mark.parametrize("error", ["stale place", "reversed", "hidden and residual apart", "masked"])
    def test_errors_in_reducing_are_detected(self, error: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = family_file._ClassTokensInside
        original = stream.reduce

        def wrong(self: Any, output: VimStream, keep: Tensor, planned: PlanSite, reduce: Reduce) -> VimStream:
            right: VimStream = original(self, output, keep, planned, reduce)
            last = planned.tokens_out - 1
            if error == "stale place":
                return right._replace(place=output.place % planned.tokens_out)
            if error == "reversed":
                return VimStream(right.hidden.flip(1), right.residual.flip(1), last - right.place.flip(1))
            if error == "masked":
                tokens = torch.full((len(keep), planned.tokens_in), True)
                patches = family_file.complement(output.place, planned.tokens_in).gather(1, keep)
                tokens.scatter_(1, patches, False).scatter_(1, output.place, False)
                dropped = tokens.unsqueeze(-1)
                return VimStream(
                    output.hidden.masked_fill(dropped, 0), output.residual.masked_fill(dropped, 0), output.place
                )
            other = family_file.complement(output.place, planned.tokens_in)[:, : keep.shape[1]]
            at = torch.cat((output.place, other), dim=1).sort(dim=1).values
            return right._replace(hidden=reduce(output.hidden, at))

        model = build(variant, layers="[{layer: 1, keep_tokens: 10}]")
        images = images_for(model)
        assert gap(variant, model, images) < 1e-4
        monkeypatch.setattr(stream, "reduce", wrong)
        assert gap(variant, model, images) > 0.1

    def test_the_kernels_give_the_same_result(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernels get the kept tokens in order, so any scan works."""
        model = build("odd")
        images = images_for(model)
        wanted = model.trace(images)
        lengths: list[int] = []

        def scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, *, skip: Tensor, bias: Tensor) -> Tensor:
            lengths.append(u.shape[-1])
            delta = functional.softplus(delta + bias[:, None])
            steps = (part.mT.unsqueeze(0) for part in (u, delta, b, c))
            u_, delta_, b_, c_ = steps
            return plain_scan(u_, delta_, a[None], b_, c_)[0].mT + skip[:, None] * u

        def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            padded = functional.pad(x, (3, 0))
            return functional.silu(functional.conv1d(padded, weight[:, None], bias, groups=x.shape[1]))

        monkeypatch.setattr(mamba_kernels, "usable", lambda x, d_state: True)
        monkeypatch.setattr(mamba_kernels, "selective_scan", scan)
        monkeypatch.setattr(mamba_kernels, "causal_conv", convolve)
        found = model.trace(images)
        torch.testing.assert_close(found.output, wanted.output, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(found.kept[layer], kept) for layer, kept in wanted.kept.items())
        assert lengths == [count for count in model.plan.tokens_at(DEPTH)[:DEPTH] for _ in range(2)]


class TestCounts:
    @pytest.mark.parametrize(
        ("variant", "layers", "expected"),
        [
            ("middle", "[{layer: 0, drop_ratio: 0.3}]", [17, 13, 13, 13, 13]),
            ("middle", DROPS, [17, 13, 8, 8, 3]),
            ("double", "[{layer: layers.1, keep_tokens: 5}]", [18, 18, 7, 7, 7]),
            ("double", "[{layer: 0, drop_ratio: 0.29}, {layer: 2, drop_ratio: 0.5}]", [18, 14, 14, 8, 8]),
            ("odd", "[{layer: 0, keep_tokens: 1}]", [16, 2, 2, 2, 2]),
            ("overlapping", "[{layer: 0, drop_ratio: 0.5}, {layer: 3, keep_tokens: 1}]", [25, 13, 13, 13, 2]),
        ],
    )
    @each_metric
    def test_token_counts_follow_the_recipe(self, metric: str, variant: str, layers: str, expected: list[int]) -> None:
        model = build(variant, metric, layers)
        entered, _ = streams(model, images_for(model))
        with torch.no_grad():
            last = model.model.forward_features(images_for(model))
        for stream, count in zip([*entered, last], expected, strict=True):
            assert stream.hidden.shape == stream.residual.shape == (3, count, 32)
        assert list(model.plan.tokens_at(DEPTH)) == expected

    @each_variant
    def test_the_class_token_is_unchanged(self, variant: str) -> None:
        model = build(variant)
        images = images_for(model)
        entered, left = streams(model, images)
        with torch.no_grad():
            entered.append(model.model.forward_features(images))
        rows = torch.arange(len(images)).unsqueeze(1)
        for before, after in zip(left, entered[1:], strict=True):
            assert before.place.shape == after.place.shape == (3, model.layout.prefix_tokens)
            assert torch.equal(before.hidden[rows, before.place], after.hidden[rows, after.place])
            assert torch.equal(before.residual[rows, before.place], after.residual[rows, after.place])


class TestMacs:
    @pytest.mark.slow
    def test_vim_tiny_by_hand(self) -> None:
        with torch.device("meta"):
            model = create("vim_tiny_patch16_224")
        family = match(model)
        assert family.macs(model, None) == 1_536_001_536
        convolutions = 24 * 2 * 197 * 384 * 4
        assert family.macs(model, None) - family.scan_macs(model, None) == 1_292_717_568 - convolutions
        assert count_macs(model, (3, 224, 224)) == 1_278_193_152 == 1_292_717_568 - convolutions

    @each_variant
    def test_a_plan_term_by_term(self, variant: str) -> None:
        model = build(variant)
        assert model.macs() == self.by_hand(model.model, model.plan.tokens_at(DEPTH))  # type: ignore[arg-type]
        assert model.dense_macs() == self.by_hand(model.model, (model.plan.sites[0].tokens_in,) * 5)  # type: ignore[arg-type]
        assert model.macs() < model.dense_macs()

    @staticmethod
    def by_hand(model: VisionMamba, tokens: tuple[int, ...]) -> int:
        width, inner, states, rank = 32, 64, 4, 2
        total = model.patch_embed.num_patches * 3 * 8 * 8 * width + width * model.num_classes
        for length in tokens[:DEPTH]:
            total += length * (width * 2 * inner + inner * width)
            for _ in range(2):
                total += length * inner * 4  # the convolution
                total += length * inner * (rank + 2 * states) + length * rank * inner
                total += length * inner * states * 4  # delta A, B delta u, decay times state, C times state
                total += length * inner * 3  # delta u, D u, the gate
        return total


def naive_score(metric: str, one: Naive, layer: int, distance: str, reading: str) -> dict[int, float]:
    """The score of each patch, by its position."""
    scores = {}
    for row in one.patches(layer):
        before, update = one.residual[layer][row], one.hidden[layer][row]
        place = one.labels[layer][row]
        assert isinstance(place, int)
        after = update if reading == "literal" and metric == "mixer" else before + update
        if metric == "token_norm":
            scores[place] = after.square().sum().sqrt().item()
        elif distance == "cosine":
            scores[place] = 1 - (after @ before / (after.norm() * before.norm())).item()
        else:
            scores[place] = (after - before).norm(p=1 if distance == "l1" else 2).item()
    return scores


def best(scores: dict[int, float], count: int, polarity: str) -> list[int]:
    order = sorted(scores, key=lambda place: scores[place], reverse=polarity == "largest")
    return sorted(order[:count])


SHIFTS = [
    (operation, distance, reading, polarity)
    for operation in ("mixer", "block")
    for distance in ("l2", "l1", "cosine")
    for reading in ("update", "literal")
    for polarity in ("largest", "smallest")
]


class TestMetrics:
    @pytest.mark.parametrize(
        ("operation", "distance", "reading", "polarity"),
        [*SHIFTS, ("token_norm", "", "", "largest"), ("token_norm", "", "", "smallest")],
    )
    def test_kept_tokens_are_those_of_the_formula(
        self, operation: str, distance: str, reading: str, polarity: str
    ) -> None:
        if operation == "token_norm":
            text = f"{{kind: token_norm, polarity: {polarity}}}"
        else:
            options = f"operation: {operation}, distance: {distance}, reading: {reading}, polarity: {polarity}"
            text = f"{{kind: representation_shift, {options}}}"
        model = compressed(tiny_vim(**VARIANTS["odd"]).double(), recipe(text))
        images = images_for(model)
        kept = model.trace(images).kept
        for row, one in enumerate(naive_kept("odd", model, images, kept)):
            for layer, index in kept.items():
                scores = naive_score(operation, one, layer, distance, reading)
                assert index[row].tolist() == best(scores, index.shape[1], polarity)

    def test_random_keeps_the_same_positions_in_every_image(self) -> None:
        model = build(metric="random")
        kept = model.trace(images_for(model)).kept
        assert all(len(index.unique(dim=0)) == 1 for index in kept.values())
        other = compressed(tiny_vim(), recipe("{kind: random, seed: 4}"))
        assert not torch.equal(other.trace(images_for(other)).kept[0], kept[0])

    @pytest.mark.parametrize(
        ("metric", "needs"),
        [
            ("{kind: class_attention}", "class_attention needs attention_key"),
            ("{kind: representation_shift, operation: mlp}", "representation_shift needs mlp_update"),
            ("{kind: representation_shift, operation: attention}", "representation_shift needs attention_update"),
        ],
    )
    def test_metrics_of_attention_and_mlp_are_refused(self, metric: str, needs: str) -> None:
        with pytest.raises(RecipeError, match=needs) as caught:
            compressed(tiny_vim(), recipe(metric))
        assert "a state space model has a mixer, and neither attention nor an MLP" in str(caught.value)

    @pytest.mark.parametrize(
        "open_metric", ["{kind: representation_shift}", "{kind: representation_shift, reading: literal}"]
    )
    def test_defaults_fall_back_to_the_mixer(self, open_metric: str) -> None:
        model = tiny_vim()
        sites = {site.name: site for site in match(model).sites(model)}
        plan = with_defaults(make_plan(model, recipe(open_metric)), sites)
        assert not has_open_fields(plan)
        assert {site.metric.model_dump()["operation"] for site in plan.sites} == {"mixer"}
        attach(model, plan)(vim_images(model))


class TestCalibration:
    def test_open_fields_are_filled(self) -> None:
        model = tiny_vim()
        plan = make_plan(
            model, recipe("{kind: representation_shift}", "[{layer: 0, keep_tokens: 11}, {layer: 2, keep_tokens: 5}]")
        )
        images = vim_images(model, 16)
        found = calibrate(model, match(model), plan, images=images, identity={}, batch_size=8, progress=Silent())
        for choice in found.sites:
            assert len(choice.candidates) == 18
            assert {candidate.metric.operation for candidate in choice.candidates} == {"mixer", "block"}  # type: ignore[attr-defined]
        chosen = attach(model, plan.with_metrics(found.specs))
        assert gap("middle", chosen, images[:2]) < 1e-4

    @pytest.mark.parametrize("variant", ["middle", "double"])
    def test_a_branch_equals_its_metric_alone(self, variant: str) -> None:
        model = tiny_vim(**VARIANTS[variant])
        images = vim_images(model)
        plan = make_plan(model, recipe(SHIFT, "[{layer: 0, keep_tokens: 11}, {layer: 2, keep_tokens: 5}]"))
        part = ComponentSpec(kind="representation_shift")
        sites = match(model).sites(model)
        candidates = [
            *(
                metric
                for metric in build_metric(part).variants()
                if metric.taps() <= {"block_input", "block_output", *sites[2].probes}
            ),
            build_metric(ComponentSpec(kind="token_norm")),
            build_metric(ComponentSpec(kind="random", seed=1)),
        ]
        branched = branch(model, plan, candidates)
        with torch.no_grad():
            outputs = branched(images).chunk(len(candidates))
        branched.detach()
        assert len(candidates) == 20
        for metric, output in zip(candidates, outputs, strict=True):
            alone = attach(model, plan.with_metrics([plan.sites[0].metric, metric.spec()]))
            with torch.no_grad():
                torch.testing.assert_close(output, alone(images), rtol=1e-5, atol=1e-5)
            alone.detach()
        assert len({output.sum().item() for output in outputs}) > 5


class TestModule:
    @each_metric
    def test_gradients_reach_every_weight(self, metric: str) -> None:
        model = build("odd", metric, "[{layer: 0, keep_tokens: 9}, {layer: 2, keep_tokens: 4}]")
        model.requires_grad_(True)
        model(images_for(model)).square().sum().backward()
        for name, parameter in model.model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name

    def test_gradients_are_those_of_the_kept_tokens(self) -> None:
        model = compressed(tiny_vim(**VARIANTS["odd"]).double(), recipe())
        images, weights = images_for(model, 1), dict(model.model.named_parameters())
        kept = {layer: index[0] for layer, index in model.trace(images).kept.items()}
        expected = torch.autograd.grad(
            naive_vim(weights, images[0], kept=kept).logits.square().sum(), [*weights.values()]
        )
        found = torch.autograd.grad(model(images).square().sum(), [*weights.values()])
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        model = build("middle")
        model.model.to(dtype)
        entered, left = streams(model, images_for(model))
        assert all(stream.residual.dtype == torch.promote_types(dtype, torch.float32) for stream in left)
        assert all(stream.hidden.dtype == dtype for stream in entered)
        output = model.trace(images_for(model)).output
        assert output.dtype == dtype
        assert output.isfinite().all()

    def test_another_image_size_is_refused(self) -> None:
        with pytest.raises(UsageError, match="takes images of 32x32, not 40x40"):
            build()(torch.zeros(1, 3, 40, 40))

    def test_a_plan_for_another_class_token_is_refused(self) -> None:
        with pytest.raises(RecipeError, match=r"with 1 \+ 16 tokens, the model is vim with 2 \+ 16"):
            attach(tiny_vim(class_token="double"), make_plan(tiny_vim(), recipe()))


class TestArtifact:
    @pytest.mark.slow
    def test_in_another_process(self, tmp_path: Path) -> None:
        wanted, path = self.written("middle", tmp_path)
        torch.save(vim_images(tiny_vim(), 3), tmp_path / "images.pt")
        code = (
            "import sys, torch; from repshift_cli.checkpoints import artifact; torch.set_num_threads(1);"
            "model, images = artifact.load(sys.argv[1]), torch.load(sys.argv[2]);"
            "torch.save(model(images).detach(), sys.argv[3])"
        )
        arguments = [path, tmp_path / "images.pt", tmp_path / "logits.pt"]
        root = str(ROOT)
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=os.environ | {"PYTHONPATH": root})
        assert torch.equal(torch.load(tmp_path / "logits.pt"), wanted)

    @staticmethod
    def written(variant: str, folder: Path) -> tuple[Tensor, Path]:
        """The output of a compressed model, and its file."""
        dense = save_weights(tiny_vim(**VARIANTS[variant]), folder / "dense.safetensors")
        loaded = load_checkpoint(dense)
        plan = make_plan(loaded.model, recipe())
        path = folder / "small.safetensors"
        artifact.save(path, loaded, artifact.make_document(loaded, plan, recipe(), None, {}))
        model = build(variant)
        with torch.no_grad():
            return model(images_for(model)), path
