"""Every family with every metric and reducer that it supports. A new family adds its models to `MODELS`."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_maps
import tiny_umt
import tiny_vim
import torch
from open_clip.timm_model import TimmModel
from tiny import save_weights, tiny_vit
from tiny_cnn import CNNS, photos, tiny_cnn
from tiny_transformers import MODELS as TRANSFORMERS
from tiny_transformers import as_function, tiny_inputs, tiny_transformer
from torch import Tensor, nn

from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.errors import ModelError, RecipeError
from repshift_cli.measure.macs import count_macs
from repshift_cli.models.vim import VimStream
from repshift_cli.ops.tokens import gather_tokens
from repshift_cli.planning.layout import Layout
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.compressed_model import CompressedModel, attach
from repshift_cli.reduction.families.base import families, match
from repshift_cli.reduction.metrics.base import metric_kinds
from repshift_cli.reduction.plans import resolve_for

BLOCK = "{kind: representation_shift, operation: block}"
SHIFT = "{{kind: representation_shift, operation: {}, distance: {}, polarity: {}}}"


@dataclass(frozen=True)
class Model:
    """A tiny model: how to build it, its inputs `inputs(model, count)`, and how to load its weights."""

    build: Callable[[], Any]
    inputs: Callable[[Any, int], Tensor]
    load: dict[str, Any] | None = None


def vit(**options: Any) -> Model:
    loads = {"heads": 2} if set(options) <= {"reg_tokens", "class_token", "global_pool"} else None
    return Model(partial(tiny_vit, **options), lambda _, count: tiny.images(count), loads)


def cnn(kind: str) -> Model:
    return Model(partial(tiny_cnn, kind), lambda _, count: photos(count))


def network_of_maps(name: str) -> Model:
    return Model(partial(tiny_maps.tiny_map, name), lambda _, count: photos(count, tiny_maps.SIZE))


def umt(**options: Any) -> Model:
    def build() -> nn.Module:
        return tiny_umt.tiny_umt(**options)

    shape = build().vision
    load = {
        "heads": 4,
        "img_size": shape.img_size,
        "frames": shape.frames,
        "checkpoint_frames": shape.checkpoint_frames,
    }
    return Model(build, tiny_umt.umt_clips, load)


def vim(**options: Any) -> Model:
    def inputs(model: Any, count: int) -> Tensor:
        return tiny_vim.vim_images(model.model if isinstance(model, CompressedModel) else model, count)

    return Model(partial(tiny_vim.tiny_vim, **options), inputs, {})


def open_clip_timm(**options: Any) -> Model:
    def build() -> nn.Module:
        model: Any = TimmModel("test_vit", 24, image_size=32, pool="token")
        model.trunk, model.head = tiny_vit(num_classes=0, **options), nn.Sequential(nn.Linear(32, 24))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            nn.init.normal_(model.head[0].weight)
            nn.init.zeros_(model.head[0].bias)
        built: nn.Module = model.eval()
        return built

    return Model(build, lambda _, count: tiny.images(count))


def transformer(name: str) -> Model:
    def inputs(model: Any, count: int) -> Tensor:
        return tiny_inputs(model.model if isinstance(model, CompressedModel) else model, count)

    return Model(lambda: as_function(tiny_transformer(name)), inputs)


MODELS: dict[str, dict[str, Model]] = {
    "timm_vit": {name: vit(**options) for name, options in tiny.VARIANTS.items()},
    "resnet": {name: cnn(name) for name in CNNS},
    "maps": {name: network_of_maps(name) for name in ("EfficientNet SAME", "EfficientVit")},
    "umt": {name: umt(**options) for name, options in tiny_umt.VARIANTS.items()},
    "vim": {name: vim(**options) for name, options in tiny_vim.VARIANTS.items()},
    "open_clip_timm": {
        "map_pooling": open_clip_timm(global_pool="map", class_token=False),
        "plain": open_clip_timm(),
    },
    "transformer": {name: transformer(name) for name in TRANSFORMERS},
}
"""By family and by what differs from its plain model."""

FORMS = {
    "timm_vit": ["registers", "plain", "map_pooling", "qk_norm", "post_norm_block", "parallel_scaling_block"],
    "resnet": ["basic", "convnext_v2"],
    "maps": ["EfficientNet SAME"],
    "umt": ["plain"],
    "vim": ["odd", "double"],
    "open_clip_timm": ["map_pooling"],
    "transformer": ["ViTForImageClassification", "DINOv3ViTModel", "BeitModel", "SiglipVisionModel"],
}
"""Models in which every metric and reducer is run once; the first of each family also passes all other checks."""

SOME_CNNS = ["basic", "bottleneck_d", "blur", "convnext", "convnext_v2", "regnet_y"]
"""One of each form, for checks that do not depend on the kind of block."""

METRICS = [
    *(f"{{kind: {kind}}}" for kind in metric_kinds()),
    *(SHIFT.format(*options) for options in (("block", "l1", "smallest"), ("attention", "cosine", "smallest"))),
    *(SHIFT.format(*options) for options in (("mixer", "l2", "largest"), ("mlp", "cosine", "largest"))),
]
REDUCERS = [
    "prune",
    "merge",
    "merge, similarity: keys",
    "fuse",
    "fuse, carry: true",
    "bipartite",
    "vid_tldr",
]


@cache
def built(family: str, variant: str) -> nn.Module:
    """One dense model of each variant, which tests may not change."""
    model: nn.Module = MODELS[family][variant].build()
    return model


@dataclass(frozen=True)
class Case:
    """A model with a metric and a reducer."""

    family: str
    variant: str
    metric: str = BLOCK
    reducer: str = "prune"

    @property
    def model(self) -> Model:
        return MODELS[self.family][self.variant]

    def supported(self) -> bool:
        """Whether the family has the tensors for the metric, and supports the reducer."""
        model = built(self.family, self.variant)
        try:
            attach(model, resolve_for(model, self.recipe(model))).detach()
        except RecipeError as error:
            assert any(reason in str(error) for reason in ("needs", "merges tokens", "acts after attention"))
            return False
        return True

    def recipe(self, model: nn.Module, keep_all: bool = False) -> Recipe:
        """Drop tokens at the first site and at a later one."""
        layout = match(model).layout(model)
        first, later = layout.sites[0], layout.sites[min(2, len(layout.sites) - 1)]
        if keep_all:
            grids = dict(layout.grids())
            layers = [
                f"keep_grid: {list(grids[site])}" if layout.map_size else f"keep_tokens: {layout.patch_tokens}"
                for site in (first, later)
            ]
        else:
            layers = ["drop_ratio: 0.25", "drop_ratio: 0.4"]
        drops = ", ".join(f"{{layer: {site.name}, {drop}}}" for site, drop in zip((first, later), layers, strict=True))
        restore = "true" if match(model).needs_restore(model) else "false"
        return Recipe.parse(
            f"version: 1\nmetric: {self.metric}\nreducer: {{kind: {self.reducer}}}\nrestore: {restore}\n"
            f"layers: [{drops}]\n"
        )

    def compressed(self, keep_all: bool = False) -> CompressedModel:
        model = self.model.build()
        return attach(model, resolve_for(model, self.recipe(model, keep_all)))

    def inputs(self, model: nn.Module, count: int = 3) -> Tensor:
        return self.model.inputs(model, count)

    def __str__(self) -> str:
        kind = "-".join(self.metric.strip("{}").replace("kind: ", "").replace(": ", "_").split(", "))
        return f"{self.family}-{self.variant}-{kind}-{self.reducer.replace(', ', '-').replace(': ', '_')}"


EACH_MODEL = [Case(family, variant) for family in MODELS for variant in MODELS[family]]
EACH_WAY = [
    case
    for family, variants in FORMS.items()
    for variant in variants
    for case in [
        *(Case(family, variant, metric) for metric in METRICS),
        *(Case(family, variant, BLOCK, reducer) for reducer in REDUCERS[1:]),
    ]
    if case.supported()
]
WAYS = [
    *(case for case in EACH_WAY if case.variant == FORMS[case.family][0]),
    Case("timm_vit", "map_pooling", BLOCK, "merge"),  # edits the mask of the pooling
    Case("timm_vit", "mean_pooling", BLOCK, "merge"),  # edits the input of the head
    Case("timm_vit", "parallel_scaling_block", SHIFT.format("mlp", "cosine", "largest")),  # a probe has a module
    Case("resnet", "convnext_v2"),
    Case("vim", "double"),
]
MERGING = [Case("timm_vit", variant, BLOCK, "merge") for variant in tiny.VARIANTS]
ALL = list(dict.fromkeys([*EACH_MODEL, *WAYS, *(case for case in MERGING if case.supported())]))
SOME = [case for case in ALL if case.family != "resnet" or case.variant in SOME_CNNS]


def quick(case: Case) -> bool:
    """Whether a case is no slow test: a metric does not depend on the family, so one family runs all of them."""
    return case.family == "timm_vit" or case.metric == BLOCK


def quick_first(cases: list[Case], is_quick: Callable[[Case], bool] = quick) -> Any:
    marked = [case if is_quick(case) else pytest.param(case, marks=pytest.mark.slow) for case in cases]
    return pytest.mark.parametrize("case", marked, ids=str)


def in_each_form(case: Case) -> bool:
    """For checks that take long and depend on the form of the blocks: others are slow tests."""
    return quick(case) and case.variant in FORMS[case.family]


def plain(case: Case) -> bool:
    """For checks that do not depend on the metric and the reducer: others are slow tests."""
    return case.metric == BLOCK and case.reducer in ("prune", "merge")


every_case = quick_first(ALL)
some_cases = quick_first(SOME)
one_model = quick_first(WAYS)
pruning = quick_first([case for case in SOME if case.reducer == "prune"])


def dense_model(case: Case) -> nn.Module:
    """The dense model, with the pooling that a compressed one has."""
    model = case.model.build()
    match(model).adapt(model)
    return model


def is_sequence(layout: Layout) -> bool:
    return layout.map_size is None


def size_of(output: Any) -> tuple[int, ...]:
    """Rows and columns of a map, or the number of tokens."""
    tokens = output[0] if isinstance(output, tuple) else output
    return tuple(tokens.shape[2:]) if tokens.ndim == 4 else (tokens.shape[1],)


def split(output: Any, prefix: int) -> tuple[Tensor, Tensor]:
    """Prefix tokens and patch tokens of the output of a block, each `[B, N, C]`."""
    if isinstance(output, VimStream):
        both = torch.cat((output.hidden, output.residual), dim=-1)
        classes = torch.zeros(both.shape[:2], dtype=torch.bool).scatter(1, output.place, True)
        return both[classes].unflatten(0, (len(both), -1)), both[~classes].unflatten(0, (len(both), -1))
    tokens = output[0] if isinstance(output, tuple) else output
    tokens = tokens.flatten(2).mT if tokens.ndim == 4 else tokens
    return tokens[:, :prefix], tokens[:, prefix:]


def block_outputs(model: CompressedModel, inputs: Tensor) -> tuple[dict[int, Any], dict[int, Any]]:
    """By layer: the output of each block, before and after the hook of the site."""
    before: dict[int, Any] = {}
    after: dict[int, Any] = {}
    handles = []
    for site in model.family.sites(model.model):
        for seen, first in ((before, True), (after, False)):
            store = partial(
                lambda _, args, output, seen, layer: seen.update({layer: output}), seen=seen, layer=site.layer
            )
            handles.append(site.block.register_forward_hook(store, prepend=first))
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return before, after


def test_every_family_is_tested() -> None:
    assert {family.name for family in families()} == MODELS.keys() == FORMS.keys()
    ways = {(case.family, case.reducer) for case in EACH_WAY}
    assert {reducer for family, reducer in ways if family == "timm_vit"} == set(REDUCERS) - {"vid_tldr"}
    assert {reducer for family, reducer in ways if family == "umt"} == set(REDUCERS)
    assert {reducer for family, reducer in ways if family in ("vim", "resnet")} == {"prune"}


@every_case
def test_token_counts_at_every_layer(case: Case) -> None:
    model = case.compressed()
    _, after = block_outputs(model, case.inputs(model, 2))
    planned = {site.layer: site for site in model.plan.sites}
    if is_sequence(model.layout):
        counts = model.plan.tokens_at(len(model.layout.sites))
        # with restore, what is around the blocks gets all tokens
        expected = {layer: (counts[0] if model.plan.restore else count,) for layer, count in enumerate(counts[1:])}
    else:
        arriving = {site.layer: grid for site, grid in model.layout.grids(model.plan.grids_kept)}
        expected = {**arriving, **model.plan.grids_kept}
        assert all(site.grid_in == arriving[layer] for layer, site in planned.items())
    assert {layer: size_of(output) for layer, output in after.items()} == expected
    assert all(site.tokens_out < site.tokens_in for site in planned.values())


@pruning
def test_prefix_and_kept_tokens_are_unchanged(case: Case) -> None:
    model = case.compressed()
    inputs, first = case.inputs(model), model.plan.sites[0].layer
    before, after = block_outputs(model, inputs)
    prefix = model.plan.prefix_tokens
    (prefix_before, patches_before), (prefix_after, patches_after) = (
        split(outputs[first], prefix) for outputs in (before, after)
    )
    assert prefix_after.shape[1] == prefix
    assert torch.equal(prefix_after, prefix_before)
    kept = model.trace(inputs).kept[first]
    if model.plan.restore:
        patches_after = gather_tokens(patches_after, kept)
    assert torch.equal(patches_after, gather_tokens(patches_before, kept))


@some_cases
def test_keep_all_is_bit_identical_to_dense(case: Case) -> None:
    model, dense = case.compressed(keep_all=True), dense_model(case)
    with torch.no_grad():
        assert torch.equal(model(case.inputs(model)), dense(case.inputs(dense)))


@quick_first(SOME, in_each_form)
def test_dense_and_detach_restore_the_model(case: Case) -> None:
    model = case.model.build()
    inputs, modules = case.inputs(model), dict(model.named_modules())
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        original, pooled = model(inputs), dense_model(case)(inputs)
        hooked = hook_counts(model)  # transformers records hidden states by hooks of its own
        wrapped = attach(model, resolve_for(model, case.recipe(model)))
        reduced = wrapped(inputs)
        with wrapped.dense() as dense:
            assert torch.equal(dense(inputs), pooled)
            assert torch.equal(wrapped(inputs), pooled)
        assert torch.equal(wrapped(inputs), reduced)
        assert reduced.shape != pooled.shape or not torch.allclose(reduced, pooled, rtol=1e-4, atol=1e-4)
        assert list(wrapped.state_dict()) == list(weights)
        assert all(torch.equal(value, weights[key]) for key, value in wrapped.state_dict().items())
        assert wrapped.detach() is model
        assert torch.equal(model(inputs), original)
    assert {name: id(part) for name, part in model.named_modules()} == {
        name: id(part) for name, part in modules.items()
    }
    assert hook_counts(model) == hooked


def hook_counts(model: nn.Module) -> list[tuple[int, int]]:
    return [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()]


@pytest.mark.parametrize("case", EACH_WAY, ids=str)
def test_kept_indices_are_ascending_nested_and_independent_of_the_batch(case: Case) -> None:
    model = case.compressed()
    inputs = case.inputs(model, 6)
    together, flipped = model.trace(inputs), model.trace(inputs.flip(0))
    torch.testing.assert_close(together.output, flipped.output.flip(0), rtol=1e-4, atol=1e-4)
    for row in (0, 4):
        alone = model.trace(inputs[row : row + 1])
        torch.testing.assert_close(alone.output[0], together.output[row], rtol=1e-4, atol=1e-4)
        assert all(torch.equal(kept[row], alone.kept[layer][0]) for layer, kept in together.kept.items())
    wider = [set(range(model.layout.patch_tokens))] * len(inputs)
    assert list(together.kept) == [site.layer for site in model.plan.sites]
    for planned in model.plan.sites:
        kept = together.kept[planned.layer]
        assert torch.equal(kept, flipped.kept[planned.layer].flip(0))
        assert kept.shape[1] == planned.tokens_out - model.plan.prefix_tokens
        assert all(row == sorted(set(row)) for row in kept.tolist())
        if is_sequence(model.layout):  # the map of a CNN has other positions after a stride
            assert all(set(row) <= outer for row, outer in zip(kept.tolist(), wider, strict=True))
            wider = [set(row) for row in kept.tolist()]
    if case.reducer == "prune" and not any(kind in case.metric for kind in ("random", "grid")):
        assert any(len(kept.unique(dim=0)) > 1 for kept in together.kept.values())


@quick_first(ALL, in_each_form)
def test_macs_equal_the_counter(case: Case) -> None:
    model = case.compressed()
    size = tuple(case.inputs(model, 1).shape[1:])
    assert count_macs(model, size, batch=2) == model.macs(counted=True) < model.dense_macs(counted=True)


@quick_first(WAYS, plain)
def test_dense_macs_equal_the_counter(case: Case) -> None:
    model = case.compressed()
    size = tuple(case.inputs(model, 1).shape[1:])
    with model.dense():
        assert count_macs(model, size) == model.dense_macs(counted=True)
    dense = dense_model(case)
    assert match(dense).macs(dense, None) == model.dense_macs()


@one_model
def test_gradients_reach_every_weight_that_the_dense_model_uses(case: Case) -> None:
    dense, model = dense_model(case), case.compressed()
    for one in (dense, model):
        output = one(case.inputs(one, 2))
        (output * torch.arange(output.shape[-1])).sum().backward()
    used = {name for name, parameter in dense.named_parameters() if parameter.grad is not None}
    gradients = {name: one.grad for name, one in model.model.named_parameters() if one.grad is not None}
    assert gradients.keys() == used
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert any(gradient.any() for gradient in gradients.values())


@quick_first(WAYS, plain)
def test_copies_are_independent(case: Case) -> None:
    model = case.compressed()
    model(case.inputs(model))  # leaves no tensor with gradients, which could not be copied
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    copies: list[Any] = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stored, weights_only=False),
    ]
    inputs, built = case.inputs(model), case.model.build()
    with torch.no_grad():
        wanted, wanted_dense = model(inputs), built(inputs)
        for parameter in model.model.parameters():
            parameter.zero_()
        model(inputs[:1])
        for other in copies:
            assert torch.equal(other(inputs), wanted)
            dense = other.detach()
            assert torch.equal(dense(inputs), wanted_dense)
            assert [type(part) for part in dense.modules()] == [type(part) for part in built.modules()]
    with pytest.raises(ModelError, match="compressed already"):
        attach(model.model, model.plan)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, marks=() if quick(case) else pytest.mark.slow)
        for case, dtype in zip(WAYS, cycle((torch.bfloat16, torch.float64)), strict=False)
    ],
    ids=str,
)
def test_other_dtypes_and_autocast(case: Case, dtype: torch.dtype) -> None:
    model = case.compressed()
    plain = case.inputs(model)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert model(plain).isfinite().all()
    model.model.to(dtype)
    output = model.trace(plain.to(dtype)).output
    assert output.dtype == dtype
    assert output.isfinite().all()


GRAPHS = [
    Case("timm_vit", "registers"),
    Case("timm_vit", "distilled", BLOCK, "merge, similarity: keys"),
    Case("timm_vit", "mean_pooling", BLOCK, "bipartite"),
    Case("timm_vit", "map_pooling_with_prefix", BLOCK, "merge"),
    Case("timm_vit", "plain", BLOCK, "fuse, carry: true"),
    Case("resnet", "basic"),
    Case("resnet", "convnext_v2"),
    Case("umt", "plain", "{kind: attention_entropy}"),
    Case("umt", "answering"),
    Case("umt", "plain", "{kind: attention_entropy}", "vid_tldr"),
    Case("vim", "odd"),
    Case("vim", "double"),
]
QUICK = list({case.family: case for case in reversed(GRAPHS)}.values())
"""The first graph of each family; the others are slow tests."""
one_of_each_form = pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in GRAPHS], ids=str
)


@pytest.mark.slow
@one_of_each_form
def test_export_with_a_dynamic_batch(case: Case) -> None:
    model = case.compressed()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model.model, (case.inputs(model, 2),), dynamic_shapes=shapes).module()
    for count in (1, 5):
        inputs = case.inputs(model, count)
        with torch.no_grad():
            torch.testing.assert_close(program(inputs), model(inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@one_of_each_form
def test_compiles_to_one_graph(case: Case) -> None:
    torch._dynamo.reset()
    model = case.compressed()
    compiled = torch.compile(model.model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for inputs in (case.inputs(model, 2), case.inputs(model, 2) + 1):
            torch.testing.assert_close(compiled(inputs), model(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case("timm_vit", "plain"),
        Case("timm_vit", "registers", BLOCK, "merge"),
        Case("vim", "middle"),
        Case("vim", "double"),
        Case("vim", "no_head"),
        *(Case("umt", variant) for variant in ("plain", "answering", "interpolated")),
        *(Case("umt", variant, BLOCK, "vid_tldr") for variant in ("plain", "answering", "interpolated")),
    ],
    ids=str,
)
def test_a_saved_model_loads_bit_identical(case: Case, tmp_path: Path) -> None:
    dense = save_weights(case.model.build(), tmp_path / "dense.safetensors")
    loaded = load_checkpoint(dense, LoadOptions(**(case.model.load or {})))
    recipe = case.recipe(loaded.model)
    plan = resolve_for(loaded.model, recipe)
    artifact.save(tmp_path / "small.safetensors", loaded, artifact.make_document(loaded, plan, recipe, None, {}))
    opened, model = artifact.load(tmp_path / "small.safetensors"), case.compressed()
    with torch.no_grad():
        assert torch.equal(opened(case.inputs(opened)), model(case.inputs(model)))
