"""The fitted score: its weights in a recipe, its target, and its quality on the built-in models."""

from __future__ import annotations

import base64
import copy
import itertools
import pickle
from array import array
from typing import Any

import pytest
import torch
from tiny import images, tiny_vit
from torch import Tensor, nn

from repshift_cli.calibration.calibrate import calibrate, with_weights
from repshift_cli.calibration.fit import fit_scores, influence
from repshift_cli.calibration.outputs import agreement
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.compression.api import compress
from repshift_cli.data.inputs import load_inputs
from repshift_cli.errors import CheckFailed, RecipeError
from repshift_cli.measure.macs import count_macs
from repshift_cli.planning.recipe import ComponentSpec, Recipe
from repshift_cli.reduction.compressed_model import CompressedModel, attach
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.metrics.base import SiteContext, build_metric
from repshift_cli.reduction.metrics.fitted import Fitted
from repshift_cli.reduction.plans import resolve_for
from repshift_cli.reduction.watch import BlockOutput, record_block_outputs
from repshift_cli.utils.progress import Silent

SITE = SiteContext(layer=0, prefix=1, class_token=True)
LAYERS = "[{layer: 0, drop_ratio: 0.3}, {layer: 2, drop_ratio: 0.4}]"


def recipe(metric: str, layers: str = LAYERS, reducer: str = "prune") -> Recipe:
    return Recipe.parse(f"version: 1\nmetric: {metric}\nreducer: {{kind: {reducer}}}\nlayers: {layers}\n", "r.yaml")


class Counted:
    """A task that counts."""

    def __init__(self) -> None:
        self.steps = 0

    def advance(self, steps: int = 1) -> None:
        self.steps += steps


class TestWeights:
    def test_the_string_builds_the_metric_again(self) -> None:
        metric = Fitted.of([0.5, -1.25, 3.0e-7])
        again = build_metric(ComponentSpec.model_validate(metric.spec().model_dump()))
        assert again == metric
        assert isinstance(again, Fitted)
        assert again.channels == 3
        assert not again.open
        assert str(again) == "fitted (3 weights)"

    def test_score_is_their_product_with_the_patch_tokens(self) -> None:
        tokens = torch.randn(2, 6, 3)
        scores = Fitted.of([1.0, 0.0, -2.0]).score({"block_output": tokens}, SITE)
        assert scores.dtype == torch.float32
        assert torch.allclose(scores, tokens[:, 1:, 0] - 2 * tokens[:, 1:, 2], atol=1e-6)

    @pytest.mark.parametrize("kind", ["{kind: fitted}", "{kind: coverage}"])
    @pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}], ids=["class", "mean"])
    def test_the_plan_has_the_counted_operations(self, kind: str, options: dict[str, Any]) -> None:
        """Without a class token the tokens keep the strides of the patch embedding, which selects another kernel."""
        model = tiny_vit(**options)
        plan = resolve_for(model, recipe(kind, reducer="merge"))
        weights = Fitted.of([0.5] * 32).spec()
        fitted = attach(model, plan.with_metrics([with_weights(site.metric, weights) for site in plan.sites]))
        assert count_macs(model, (3, 32, 32)) == fitted.macs(counted=True)

    def test_half_precision_is_summed_in_float32(self) -> None:
        tokens = torch.randn(1, 200, 64)
        metric = Fitted.of(torch.randn(64).tolist())
        half = metric.score({"block_output": tokens.bfloat16()}, SITE)
        assert half.dtype == torch.float32
        assert len(half.unique()) == half.numel()  # in bfloat16 many would be the same
        wanted = metric.score({"block_output": tokens.bfloat16().float()}, SITE)
        assert torch.allclose(half, wanted, atol=1e-5)

    def test_autocast_does_not_round_them(self) -> None:
        tokens, metric = torch.randn(1, 201, 64), Fitted.of(torch.randn(64).tolist())
        wanted = metric.score({"block_output": tokens}, SITE)
        with torch.autocast("cpu", torch.bfloat16):
            found = metric.score({"block_output": tokens}, SITE)
        assert found.dtype == torch.float32
        assert torch.allclose(found, wanted, atol=1e-4)

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ("'###'", "should be base64"),
            ("AAA=", "it is 2 bytes"),
            ("''", "it is 0 bytes"),
            ("7", "should be a valid string"),
            (base64.b64encode(array("f", [1.0, float("nan")]).tobytes()).decode(), "should be finite"),
        ],
    )
    def test_invalid_weights_are_refused_with_their_place(self, weights: str, message: str) -> None:
        with pytest.raises(RecipeError, match=message) as caught:
            resolve_and_build(recipe(f"{{kind: fitted, weights: {weights}}}"))
        assert "r.yaml:2:" in str(caught.value)

    def test_those_of_another_model_are_refused(self) -> None:
        weights = Fitted.of([1.0] * 7).weights
        with pytest.raises(RecipeError, match=r"weights for 7 channels, and tokens at blocks\.0 have 32"):
            compress(tiny_vit(), recipe(f"{{kind: fitted, weights: {weights}}}"))

    def test_unfitted_it_is_the_shift_over_the_block(self) -> None:
        default = build_metric(ComponentSpec(kind="fitted")).with_defaults().spec()
        assert default.kind == "representation_shift"
        assert default.options["operation"] == "block"
        assert build_metric(ComponentSpec(kind="fitted")).open


def resolve_and_build(given: Recipe) -> None:
    build_metric(given.metric, given.place)


class TestPlacing:
    """The weights go to the device of the model once. `meta` is a device as well, and every machine has it."""

    @staticmethod
    def hooked() -> CompressedModel:
        weights = torch.randn(32, generator=torch.Generator().manual_seed(0)).tolist()
        model = tiny_vit()
        part = Fitted.of(weights).spec()
        plan = resolve_for(model, recipe("{kind: fitted}"))
        return attach(model, plan.with_metrics([part] * len(plan.sites)))

    @staticmethod
    def devices(model: CompressedModel) -> set[str]:
        return {metric.vector.device.type for hook in model._hooks for metric in hook.placed}  # type: ignore[attr-defined]

    def test_a_metric_on_another_device(self) -> None:
        metric = Fitted.of([1.0, 2.0])
        assert metric.on(torch.device("cpu")) is metric
        with torch.inference_mode():
            moved = metric.on(torch.device("meta"))
        assert isinstance(moved, Fitted)
        assert (moved, moved.vector.device.type, moved.vector.is_inference()) == (metric, "meta", False)
        assert metric.vector.device.type == "cpu"
        assert moved.spec() == metric.spec()

    @pytest.mark.parametrize("moved", ["the wrapper", "the model inside"])
    def test_once(self, moved: str) -> None:
        model = self.hooked()
        assert self.devices(model) == {"cpu"}
        (model if moved == "the wrapper" else model.model).to("meta")
        # moving the inner model bypasses the wrapper: the first pass moves the weights
        assert self.devices(model) == {"meta" if moved == "the wrapper" else "cpu"}
        model(images().to("meta"))
        assert self.devices(model) == {"meta"}
        placed = [hook.placed for hook in model._hooks]
        model(images().to("meta"))
        assert all(hook.placed is before for hook, before in zip(model._hooks, placed, strict=True))

    @pytest.mark.parametrize("way", ["deepcopy", "pickle"])
    def test_copies_start_from_the_weights_themselves(self, way: str) -> None:
        model = self.hooked()
        wanted = model(images())
        for hook in model._hooks:
            hook.place(torch.device("meta"))
        other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert self.devices(other) == {"cpu"}
        assert torch.equal(other(images()), wanted)
        assert torch.equal(model(images()), wanted)

    @pytest.mark.slow
    def test_tracing_does_not_change_the_model(self) -> None:
        model = self.hooked()
        with torch.no_grad():
            wanted = model(images())
            for hook in model._hooks:
                hook.place(torch.device("meta"))
                hook.placed = hook.metrics
            program = torch.compile(model, fullgraph=True, backend="eager")
            assert torch.equal(program(images()), wanted)
            exported = torch.export.export(model.model, (images(),)).module()
            assert torch.equal(exported(images()), wanted)
        assert {str(hook.device) for hook in model._hooks} == {"meta"}


class TestInfluence:
    def test_is_the_fisher_information_along_the_dropped_part(self) -> None:
        """The mean over all patterns of signs equals the sum over the classes."""
        model = tiny_vit(num_classes=3).double()
        batch = images(2).double()
        with record_block_outputs(model) as seen:
            output = model(batch)
            logs = output.log_softmax(-1)
            here = {1: seen[1]}
            exact = torch.zeros(seen[1].tokens.shape[:2])
            tokens = seen[1].tokens.detach()
            apart = tokens - tokens.mean(dim=1, keepdim=True)
            for index in range(3):
                (gradient,) = torch.autograd.grad(logs[:, index].sum(), [seen[1].carrier], retain_graph=True)
                moved = (gradient[:, 1:] * apart).sum(-1).square()
                exact += logs[:, index].exp().detach().unsqueeze(1).float() * moved.float()
            responses = logs.detach().mul(0.5).exp() * logs
            total = torch.zeros_like(exact)
            patterns = list(itertools.product((-1.0, 1.0), repeat=3))
            for pattern in patterns:
                total += drawn(responses * torch.tensor(pattern), here)
        assert torch.allclose(total / len(patterns), exact, rtol=1e-4)

    def test_is_zero_for_unused_tokens(self) -> None:
        """If the output depends on one position only, the other tokens have no influence."""
        tokens = torch.randn(1, 5, 4, requires_grad=True)
        seen = {0: BlockOutput(tokens, tokens, lambda value: value)}
        found = influence(tokens[:, 3] * 2.0, seen, torch.Generator().manual_seed(0))[0]
        assert found[0, 3] > 0
        assert found[0, [0, 1, 2, 4]].eq(0).all()


def drawn(responses: Tensor, seen: dict[int, BlockOutput]) -> Tensor:
    """`influence` for one pattern of signs: all draws are plus one."""
    (gradient,) = torch.autograd.grad(responses.sum(), [seen[1].carrier], retain_graph=True)
    tokens = seen[1].tokens.detach()
    moved = (seen[1].view(gradient) * (tokens - tokens.mean(dim=1, keepdim=True))).sum(-1).square()
    return moved.float()


class TestFit:
    def test_does_not_change_the_model_also_in_inference_mode(self) -> None:
        model, task = tiny_vit(), Counted()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.inference_mode():
            found = fit_scores(model, [0, 2], images(6), 4, 0, task)
        assert set(found) == {0, 2}
        assert all(metric.channels == 32 for metric in found.values())
        assert task.steps == 6
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert not any(module._forward_hooks for module in model.modules())

    def test_depends_on_the_seed_and_hardly_on_the_batch_size(self) -> None:
        model = tiny_vit()
        one, two = (fit_scores(model, [1], images(8), 4, 3, Counted())[1] for _ in range(2))
        assert one == two

    def test_one_token_alone_gives_finite_weights(self) -> None:
        model = tiny_vit(img_size=8, patch_size=8)
        found = fit_scores(model, [0], images(4, size=8), 4, 0, Counted())[0]
        assert torch.isfinite(found.score({"block_output": torch.randn(1, 2, 32)}, SITE)).all()

    def test_the_uncalibrated_metric_is_not_fitted(self) -> None:
        model = tiny_vit()
        plan = resolve_for(model, recipe("{kind: fitted}"))
        found = calibrate(model, match(model), plan, images=images(32), identity={}, batch_size=8, progress=Silent())
        assert found.default.distances != found.result.distances

    def test_values_that_are_not_finite_are_refused(self) -> None:
        model = tiny_vit()
        nn.init.constant_(model.blocks[3].norm1.weight, float("inf"))
        with pytest.raises(CheckFailed, match="not finite"):
            fit_scores(model, [0], images(2), 2, 0, Counted())

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "layers", "least"),
        [
            (
                "vit-digits",
                "[{layer: 0, drop_ratio: 0.3}, {layer: 3, drop_ratio: 0.3}, {layer: 6, drop_ratio: 0.3}]",
                0.97,
            ),
            ("cnn-digits", "[{layer: 1, drop_ratio: 0.3}, {layer: 4, drop_ratio: 0.3}]", 0.9),
            ("vim-digits", "[{layer: 0, drop_ratio: 0.15}, {layer: 3, drop_ratio: 0.15}]", 0.75),
        ],
    )
    def test_beats_chance_in_every_family(self, name: str, layers: str, least: float) -> None:
        loaded = load_checkpoint(f"builtin:{name}")
        scenes = load_inputs(None, 96, loaded.description.preprocessing, 0)
        plan = resolve_for(loaded.model, recipe("{kind: fitted}", layers))
        found = calibrate(
            loaded.model,
            match(loaded.model),
            plan,
            images=scenes.tensor[:48],
            identity={},
            batch_size=16,
            progress=Silent(),
        )
        assert found.clear
        assert all(part.kind == "fitted" for part in found.specs)
        fitted = unchanged(loaded.model, plan.with_metrics(found.specs), scenes.tensor[48:])
        chance = unchanged(loaded.model, plan.with_metric(ComponentSpec(kind="random")), scenes.tensor[48:])
        assert fitted >= least
        assert fitted >= chance + 0.05


@torch.inference_mode()
def unchanged(model: nn.Module, plan: object, batch: Tensor) -> float:
    """Share of unchanged predictions."""
    wanted = model(batch)
    reduced = attach(model, plan)  # type: ignore[arg-type]
    try:
        return float(agreement(wanted, reduced(batch)).mean())
    finally:
        reduced.detach()
