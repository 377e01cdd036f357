"""Bring a plan to life: the only file that hooks a model.

Forward hooks do it all. At each site one hook per tap remembers a tensor that the metric asks for, and a hook on the
block scores the tokens, selects which to keep, and returns the reduced stream in place of the block's output. Blocks
run the library's code in the dense and in the compressed model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import ModelError, RecipeError, UsageError
from repshift_cli.planning.layout import Layout
from repshift_cli.planning.plan import Plan
from repshift_cli.reduction.checks import check_channels, check_feeds, check_reducer, check_reducer_feeds
from repshift_cli.reduction.families.base import Family, Site, Stream, match, nothing
from repshift_cli.reduction.hooks import BeginHook, SiteHook, TapHook, TensorEditHook, shape_text
from repshift_cli.reduction.metrics.base import Metric, SiteContext, build_metric
from repshift_cli.reduction.reducers.base import Dims, Merger, Reducer, build_reducer
from repshift_cli.reduction.token_trace import MapState, TokenState

__all__ = [
    "CompressedModel",
    "Trace",
    "attach",
    "branch",
]


@dataclass(frozen=True)
class Trace:
    """Which patches were still there after each site, for one batch.

    Attributes:
        output: what the model returned.
        kept: int64 `[B, K]` for each site's layer: original patch positions (row-major in the patch grid, or in the map
            that the dense model has there; frame by frame in a clip), ascending. Where tokens are merged, the positions
            of those that the others went into.
    """

    output: Tensor
    kept: dict[int, Tensor]


class CompressedModel(nn.Module):
    """A model that lets tokens go between layers: same parameters, same `state_dict` keys, fewer tokens.

    Made by `attach`. `self.model` is the hooked model itself and can be used on its own.

    Attributes:
        model: the hooked model.
        plan: what it follows.
        layout: the tokens and sites of the dense model.
        preprocessing: the evaluation transform of the model where it is known (`load` and `compress` set it).
    """

    preprocessing: Preprocessing | None = None

    def __init__(
        self, model: nn.Module, family: Family, plan: Plan, metrics: list[tuple[Metric, ...]], reducer: Reducer
    ) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        self.family = family
        self.layout = family.layout(model)
        self._undo = family.adapt(model)
        stream, class_token = family.stream(model), self.layout.class_token
        self._hooks: list[SiteHook] = []
        self._handles: list[Any] = []
        self._undo_sizes = (
            self._use_proportional_attention(stream)
            if isinstance(reducer, Merger) and reducer.pooled_by_size
            else nothing
        )
        sites = {site.name: site for site in family.sites(model)}
        for planned, here in zip(plan.sites, metrics, strict=True):
            context = SiteContext(planned.layer, stream.prefix, class_token)
            hook = SiteHook(planned, stream, context, metrics=here, reducer=reducer)
            self._install(sites[planned.site], hook)
        self._place()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own forward."""
        return self.model(*args, **kwargs)

    @contextmanager
    def dense(self) -> Iterator[nn.Module]:
        """Inside the context the model runs as the original, on the same weights."""
        before = [(hook, hook.enabled) for hook in self._hooks]
        for hook in self._hooks:
            hook.enabled = False
        try:
            yield self.model
        finally:
            for hook, enabled in before:
                hook.enabled = enabled

    @torch.no_grad()
    def trace(self, images: Tensor) -> Trace:
        """Run the model and tell which patches it kept.

        Args:
            images: `[B, C, H, W]`, preprocessed.
        """
        records: list[list[Tensor]] = [[] for _ in self._hooks]
        for hook, record in zip(self._hooks, records, strict=True):
            hook.recorded = record
        try:
            output = self.model(images)
        finally:
            for hook in self._hooks:
                hook.recorded = None
        found = {hook.planned.layer: (hook, record[-1]) for hook, record in zip(self._hooks, records, strict=True)}
        state, kept = _start(self.layout, images), {}
        for site in self.layout.sites:
            state = state.through(site.windows)
            if site.layer in found:
                hook, index = found[site.layer]
                state = state.keep(index, hook.planned.grid_out)
                # some merges leave their tokens in an order of their own
                merged = isinstance(hook.reducer, Merger)
                kept[site.layer] = state.index.sort(dim=1).values if merged else state.index
        return Trace(output, kept)

    def macs(self, counted: bool = False) -> int:
        """Multiply-accumulates of one image, from the shapes alone, those of metric and reducer included.

        Args:
            counted: leave out those that counters of operations do not see, the products of a scan.
        """
        sites = {site.name: site for site in self.family.sites(self.model)}
        scores = sum(
            metric.macs(hook.planned.tokens_in, sites[hook.planned.site].attention_channels)
            for hook in self._hooks
            for metric in hook.metrics
        )
        merging = sum(
            _reducer_macs(hook, sites[hook.planned.site])
            for hook in self._hooks
            if hook.planned.tokens_out < hook.planned.tokens_in
        )
        return self._family_macs(self.plan, counted) + scores + merging

    def dense_macs(self, counted: bool = False) -> int:
        """Multiply-accumulates of one image through the original model; `counted` as for `macs`."""
        return self._family_macs(None, counted)

    def _family_macs(self, plan: Plan | None, counted: bool) -> int:
        unseen = self.family.scan_macs(self.model, plan) if counted else 0
        return self.family.macs(self.model, plan) - unseen

    def detach(self) -> nn.Module:
        """Take all hooks off and return the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooks = [], []
        undoing, self._undo, self._undo_sizes = (self._undo, self._undo_sizes), nothing, nothing
        for undo in undoing:
            undo()
        return self.model

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original keys, without a prefix for this wrapper."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Takes the original keys."""
        return self.model.load_state_dict(*args, **kwargs)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: dense feature maps need the tokens that are gone."""
        raise UsageError(
            "a compressed model has no dense feature maps: the tokens for them are gone",
            "Use `with model.dense() as dense: dense.forward_intermediates(...)`.",
        )

    def _apply(self, fn: Any, recurse: bool = True) -> CompressedModel:
        # by which torch moves a module: whoever compiles the model next finds all in place
        moved: CompressedModel = super()._apply(fn, recurse)
        self._place()
        return moved

    def _place(self) -> None:
        for parameter in islice(self.model.parameters(), 1):
            for hook in self._hooks:
                hook.place(parameter.device)

    def _use_proportional_attention(self, stream: Stream) -> Callable[[], None]:
        edits, undo = self.family.use_proportional_attention(self.model, stream)
        first = self.family.sites(self.model)[0].block
        self._handles.append(first.register_forward_pre_hook(BeginHook(stream).on_begin))
        for edit in edits:
            hook, module = TensorEditHook(edit.change), edit.module
            if edit.side == "output":
                self._handles.append(module.register_forward_hook(hook.on_output))
            elif edit.side == "input":
                self._handles.append(module.register_forward_pre_hook(hook.on_input))
            else:
                self._handles.append(module.register_forward_pre_hook(hook.on_mask, with_kwargs=True))
        return undo

    def _install(self, site: Site, hook: SiteHook) -> None:
        for name in sorted(hook.tapped):
            probe = site.probes[name]
            tap = TapHook(hook, name, probe)
            self._handles.append(probe.module.register_forward_hook(tap.on_forward))
        place = site.attended if hook.planned.after == "attention" else site.block
        assert place is not None
        self._handles.append(place.register_forward_hook(hook.on_block, with_kwargs=True))
        self._hooks.append(hook)


def attach(model: nn.Module, plan: Plan) -> CompressedModel:
    """Hook a model so that it follows the plan.

    Args:
        model: dense, of a supported family; it is changed in place (`detach` undoes it).
        plan: made by `plan.resolve` for this model.

    Raises:
        ModelError: the model is not supported, or is compressed already.
        RecipeError: the plan does not fit the model, or a metric asks for what a block cannot show.
    """
    return _attach(model, plan, [(build_metric(planned.metric).with_defaults(),) for planned in plan.sites])


def branch(model: nn.Module, plan: Plan, metrics: Sequence[Metric]) -> CompressedModel:
    """Hook a model so that at the last site of the plan each of several metrics makes its own choice.

    What lies before that site runs once for all of them. The output of a batch of B images has `len(metrics) * B`
    rows: those of the first metric, then those of the second, and so on. Errors as `attach`.
    """
    before = [(build_metric(planned.metric).with_defaults(),) for planned in plan.sites[:-1]]
    return _attach(model, plan, [*before, tuple(metrics)])


def _attach(model: nn.Module, plan: Plan, metrics: list[tuple[Metric, ...]]) -> CompressedModel:
    if _is_attached(model):
        raise ModelError("the model is compressed already", "Call `detach()` first, or start from the dense model.")
    family = match(model)
    layout = family.layout(model)
    _check_fit(plan, layout)
    reducer = build_reducer(plan.reducer)
    check_reducer(reducer, family, model)
    sites = {site.name: site for site in family.sites(model)}
    for planned, here in zip(plan.sites, metrics, strict=True):
        if planned.after != reducer.after:
            raise RecipeError(f"the plan reduces after the {planned.after}, which {reducer.kind} does not do")
        for metric in here:
            check_feeds(metric, sites[planned.site], planned.after)
            check_channels(metric, sites[planned.site])
        check_reducer_feeds(reducer, sites[planned.site])
    return CompressedModel(model, family, plan, metrics, reducer)


def _reducer_macs(hook: SiteHook, site: Site) -> int:
    """Of one image, at a site where tokens go."""
    planned = hook.planned
    patches = planned.tokens_in - hook.stream.prefix
    return hook.reducer.macs(patches, planned.tokens_in - planned.tokens_out, Dims(site.width, site.head))


def _start(layout: Layout, images: Tensor) -> TokenState | MapState:
    """The tokens before the first site."""
    if layout.map_size is None:
        return TokenState.start(images.shape[0], layout.patch_tokens, images.device)
    return MapState.start(images.shape[0], layout.map_size, images.device)


def _check_fit(plan: Plan, layout: Layout) -> None:
    expected = (layout.family, layout.prefix_tokens, layout.patch_tokens)
    if (plan.family, plan.prefix_tokens, plan.patch_tokens) != expected:
        raise RecipeError(
            f"the plan is for {plan.family} with {plan.prefix_tokens} + {plan.patch_tokens} tokens, "
            f"the model is {layout.family} with {layout.prefix_tokens} + {layout.patch_tokens}"
        )
    known = {(site.name, site.layer) for site in layout.sites}
    for planned in plan.sites:
        if (planned.site, planned.layer) not in known:
            raise RecipeError(f"the plan names {planned.site} as layer {planned.layer}, which the model does not have")
    arriving = {site.layer: grid for site, grid in layout.grids(plan.grids_kept)} if layout.map_size else {}
    for planned in plan.sites:
        if planned.grid_in != arriving.get(planned.layer):
            raise RecipeError(
                f"the plan has {shape_text(planned.shape_in)} tokens at {planned.site}, "
                f"the model has {shape_text(arriving.get(planned.layer) or ())}"
            )


def _is_attached(model: nn.Module) -> bool:
    return any(
        isinstance(getattr(hook, "__self__", None), SiteHook)
        for module in model.modules()
        for hook in module._forward_hooks.values()
    )
