"""Hook a model so that it follows a plan.

Forward hooks do all the work. At each site, one tap per tensor stores what the metric reads, and a hook on the block
scores the tokens, selects which to keep and returns the reduced stream in place of the block's output. Blocks run the
library's code in the dense and in the compressed model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import ModelError, UsageError
from repshift_cli.models.tensor_model import library_model
from repshift_cli.ops.tokens import owners_after
from repshift_cli.planning.layout import shape_text
from repshift_cli.planning.plan import Plan
from repshift_cli.reduction.checks import check_plan
from repshift_cli.reduction.families.base import LastBlockParts, Site, match
from repshift_cli.reduction.hooks import SiteHook, register_edit, register_tap
from repshift_cli.reduction.last_block import ExactLastBlock, register_last_block
from repshift_cli.reduction.metrics.base import Metric, SiteContext, build_metric
from repshift_cli.reduction.metrics.random import Random
from repshift_cli.reduction.reducers.base import Dims, Merger, Pruner, build_reducer
from repshift_cli.reduction.replaced import ReplacedParameters
from repshift_cli.reduction.restore import register_restore
from repshift_cli.reduction.token_stream import TokenStream
from repshift_cli.reduction.token_trace import MapState

_ATTACHMENT = "_repshift_attachment"
"""Attribute of a hooked model, which keeps the plan when the `CompressedModel` is lost."""

_MAP_METHODS = ("forward_intermediates", "get_intermediate_layers")
"""Methods of timm's models that arrange tokens in the dense grid."""


class _Attachment:
    """The functions that remove a plan from a model."""

    def __init__(self, undo: list[Callable[[], None]]) -> None:
        self.undo = undo


def attach(model: nn.Module, plan: Plan) -> CompressedModel:
    """Hook a dense model in place, so that it follows a plan made for it; `detach` undoes it.

    Raises a ModelError if the model is not supported or is compressed already, a RecipeError if the plan does not fit
    it or a metric reads a tensor that a block does not have.
    """
    return CompressedModel(model, plan, [(build_metric(planned.metric).with_defaults(),) for planned in plan.sites])


def branch(model: nn.Module, plan: Plan, metrics: Sequence[Metric]) -> CompressedModel:
    """Hook a model so that at the last site of the plan each of several metrics selects its own tokens.

    The layers before that site run once for all metrics. The output of a batch of B images has `len(metrics) * B` rows:
    those of the first metric, then those of the second, and so on. Errors as `attach`.
    """
    before = [(build_metric(planned.metric).with_defaults(),) for planned in plan.sites[:-1]]
    return CompressedModel(model, plan, [*before, tuple(metrics)])


@dataclass(frozen=True)
class Trace:
    """What the model returned for one batch, and which patches are kept after each site.

    `kept` is int64 `[B, K]` for each site's layer: original patch positions, ascending (row-major in the patch grid, or
    in the dense model's feature map there; frame by frame in a clip). Where tokens are merged, the positions of those
    that were merged into. `groups`, empty where tokens are dropped, is int64 `[B, N]` for each site's layer: for all N
    original patches the position in `kept` of the token that each is part of.
    """

    output: Tensor
    kept: dict[int, Tensor]
    groups: dict[int, Tensor] = field(default_factory=dict)


def is_attached(model: nn.Module) -> bool:
    """Whether a plan is attached to the model."""
    return _ATTACHMENT in model.__dict__


def detach(model: nn.Module) -> nn.Module:
    """Remove the plan of a hooked model, and return the dense model; raises ModelError if it has no plan."""
    model = model.model if isinstance(model, CompressedModel) else model
    attachment: _Attachment | None = model.__dict__.pop(_ATTACHMENT, None)
    if attachment is None:
        raise ModelError("the model has no plan, so there is nothing to detach")
    for remove in attachment.undo:
        remove()
    for name in _MAP_METHODS:
        model.__dict__.pop(name, None)
    return model


class CompressedModel(nn.Module):
    """A model that drops or merges tokens between layers, with the parameters and `state_dict` keys of the dense model.

    Made by `attach`. `self.model` is the hooked model itself and can be used on its own.

    Attributes:
        layout: the tokens and sites of the dense model.
        preprocessing: the evaluation transform of the model if it is known (`load` and `compress` set it).
        writer: writes the model to a path for `save` (set as `preprocessing`).
        replaced: the parameters that differ from the dense model's; None if all are the same.
    """

    preprocessing: Preprocessing | None = None
    writer: Callable[[CompressedModel, Path, bool], Path] | None = None
    replaced: ReplacedParameters | None = None

    def __init__(self, model: nn.Module, plan: Plan, metrics: Sequence[tuple[Metric, ...]]) -> None:
        """Check the plan and hook the model; `metrics` has one tuple per site of the plan."""
        super().__init__()
        if isinstance(model, CompressedModel) or _is_attached(model):
            raise ModelError(
                "the model is compressed already", "Call `repshift_cli.detach(model)` first, or load it again."
            )
        self.family = match(model)
        reducer = build_reducer(plan.reducer)
        check_plan(plan, model, self.family, metrics, reducer)

        self.model = model
        self.plan = plan
        self.layout = self.family.layout(model)
        undo = [self.family.adapt(model)]
        handles: list[Any] = []
        self._hooks: list[SiteHook] = []
        stream, sites = self.family.stream(model), self.family.sites(model)
        placed = any("patch_place" in metric.taps() for site_metrics in metrics for metric in site_metrics)
        if placed:
            assert isinstance(stream, TokenStream)
            stream.keeps_places = True
        restoring: list[Any] = []
        if plan.restore:  # its hooks gather tokens before those of `edits` see them
            assert isinstance(stream, TokenStream)
            restoring = register_restore(stream, sites, plan.tokens_at(len(sites)), plan.sites[0].layer)
        changes = [self.family.edits(model, stream)]
        if isinstance(reducer, Merger) and reducer.pooled_by_size:
            changes.append(self.family.use_proportional_attention(model, stream))
        if placed or restoring or any(edits for edits, _ in changes):
            handles.append(sites[0].block.register_forward_pre_hook(stream.begin))
        handles.extend(restoring)
        for edits, undo_edits in changes:
            undo.append(undo_edits)
            handles.extend(map(register_edit, edits))
        for planned, site_metrics in zip(plan.sites, metrics, strict=True):
            site = _site(sites, planned.site)
            context = _context(site, stream.prefix, self.layout.class_token)
            hook = SiteHook(planned, stream, context, metrics=site_metrics, reducer=reducer)
            handles.extend(register_tap(hook, name, site.probes[name]) for name in sorted(hook.tapped))
            place = site.attended if planned.after == "attention" else site.block
            assert place is not None
            # first, so that hooks of the library record the tokens that the next block gets
            handles.append(place.register_forward_hook(hook.on_block, with_kwargs=True, prepend=True))
            self._hooks.append(hook)
        self._last_block: list[ExactLastBlock] = []
        if plan.last_block == "exact":
            parts = self.family.last_block(model)
            assert isinstance(parts, LastBlockParts)
            last_block, undo_last_block = register_last_block(parts, plan.prefix_tokens)
            self._last_block, undo = [last_block], [*undo, *undo_last_block]
        self._attachment = _Attachment([*undo, *(handle.remove for handle in handles)])
        model.__dict__[_ATTACHMENT] = self._attachment
        if not plan.restore:
            model.__dict__.update({name: _refuse_maps for name in _MAP_METHODS if hasattr(model, name)})
        self._place_metrics()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        if self._hooks and not (torch.compiler.is_compiling() or self._attached):
            raise UsageError("the plan of this model was detached", "Use the result of the last `compress`.")
        return self.model(*args, **kwargs)

    @contextmanager
    def dense(self) -> Iterator[nn.Module]:
        """Run as the dense model, on its own weights, inside the context."""
        hooks: list[SiteHook | ExactLastBlock] = [*self._hooks, *self._last_block]
        before = [(hook, hook.enabled) for hook in hooks]
        refusing = {name: self.model.__dict__.pop(name) for name in _MAP_METHODS if name in self.model.__dict__}
        for hook in hooks:
            hook.enabled = False
        replaced = self.replaced if self.replaced is not None and self.replaced.active else None
        if replaced is not None:
            replaced.exchange()
        try:
            yield self.model
        finally:
            if replaced is not None and self._attached:
                replaced.exchange()
            for hook, enabled in before:
                hook.enabled = enabled
            if self._hooks:
                self.model.__dict__.update(refusing)

    def replace_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Use other values for some parameters. `dense` and `detach` have the dense model's, and those are not changed.

        Args:
            values: by the name of the parameter in the library's model, of its shape; none for the dense model's.
        """
        if self.replaced is not None:
            self.replaced.restore()
        self.replaced = ReplacedParameters(library_model(self.model), values) if values else None
        if self.replaced is not None:
            self._attachment.undo.append(self.replaced.restore)

    @contextmanager
    def at_random(self, seed: int = 0) -> Iterator[None]:
        """Drop tokens at random inside the context, with the token counts of the plan."""
        before = [(hook, hook.metrics, hook.wanted) for hook in self._hooks]
        metric = Random(seed=seed)
        for hook in self._hooks:
            hook.score_by((metric,), hook.wanted | metric.taps())
        try:
            yield
        finally:
            for hook, metrics, wanted in before:
                hook.score_by(metrics, wanted)

    @torch.no_grad()
    def trace(self, *args: Any, **kwargs: Any) -> Trace:
        """Run the model, such as on preprocessed images `[B, C, H, W]`, and return which patches it kept."""
        for hook in self._hooks:
            hook.recorded, hook.merges = [], []
        try:
            output = self.model(*args, **kwargs)
            recorded = {hook.planned.layer: (hook.recorded or [])[-1] for hook in self._hooks}
            merges = {hook.planned.layer: hook.merges[-1][2:] for hook in self._hooks if hook.merges}
        finally:
            for hook in self._hooks:
                hook.recorded, hook.merges = None, []
        planned = {site.layer: site for site in self.plan.sites}
        merged = isinstance(build_reducer(self.plan.reducer), Merger)
        first = next(iter(recorded.values()))
        state = MapState.start(first.shape[0], self.layout.map_size or (1, self.layout.patch_tokens), first.device)
        kept, groups, owners = {}, {}, None
        for site in self.layout.sites:
            state = state.through(site.windows)
            if site.layer in recorded:
                state = state.keep(recorded[site.layer], planned[site.layer].grid_out)
                kept[site.layer] = state.index.sort(dim=1).values if merged else state.index  # merges may reorder
                if site.layer in merges:
                    owners = owners_after(owners, *merges[site.layer])
                if merged:
                    groups[site.layer] = state.index if owners is None else state.index.gather(1, owners)
        return Trace(output, kept, groups)

    @property
    def num_classes(self) -> int:
        """Number of classes of the head, 0 without a head."""
        config = getattr(self.model, "config", None)  # of transformers
        return int(getattr(self.model, "num_classes", getattr(config, "num_labels", 0)) or 0)

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `forward_features`: the tokens that remain (all with `restore`), or the feature map."""
        features: Any = self.model.forward_features
        return features(*args, **kwargs)

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the weights as they are now, such as after fine-tuning, with the plan.

        Args:
            path: a `.safetensors` file, or a folder for a model of transformers or open_clip.
            force: replace an existing file.

        Raises:
            ModelError: the model was attached without a description, its description is not known, or `compress
                --recover` changed its weights.
            UsageError: the file exists, or the name does not fit.
            OutputError: it cannot be written.
        """
        if self.replaced is not None:
            raise ModelError(
                "the model has recovered weights, and `save` writes one set of weights",
                "Copy its checkpoint. To fine-tune, compress without --recover.",
            )
        if self.writer is None:
            raise ModelError(
                "the model has no description, so a reader could not build it",
                "Use `repshift_cli.compress` or `repshift_cli.load`, which keep one.",
            )
        return self.writer(self, Path(path), force)

    def macs(self, counted: bool = False) -> int:
        """Multiply-accumulates of one image, from the shapes alone, those of metric and reducer included.

        `counted` leaves out the element-wise products of a scan, which operation counters do not count.
        """
        sites, total = self.family.sites(self.model), self._model_macs(self.plan, counted)
        for hook in self._hooks:
            planned, site = hook.planned, _site(sites, hook.planned.site)
            total += sum(metric.macs(planned.tokens_in, hook.context) for metric in hook.metrics)
            if dropped := planned.tokens_in - planned.tokens_out:
                patches = planned.tokens_in - hook.stream.prefix
                total += hook.reducer.macs(patches, dropped, Dims(site.width, site.head))
                if self.plan.restore and isinstance(hook.reducer, Pruner):  # the most similar token of each dropped one
                    total += dropped * (patches - dropped) * site.width
        return total

    def dense_macs(self, counted: bool = False) -> int:
        """Multiply-accumulates of one image through the dense model; `counted` as for `macs`."""
        return self._model_macs(None, counted)

    def _model_macs(self, plan: Plan | None, counted: bool) -> int:
        return self.family.macs(self.model, plan) - (self.family.scan_macs(self.model, plan) if counted else 0)

    def detach(self) -> nn.Module:
        """Remove all hooks and return the dense model."""
        if self._attached:
            detach(self.model)
        self._hooks = []
        return self.model

    @property
    def _attached(self) -> bool:
        return self.model.__dict__.get(_ATTACHMENT) is self._attachment

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """With the keys of the dense model: no prefix for this wrapper."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """With the keys of the dense model."""
        return self.model.load_state_dict(*args, **kwargs)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """timm's feature maps of several blocks; raises UsageError without `restore`, since they need all tokens."""
        return self._dense_maps("forward_intermediates")(*args, **kwargs)

    def get_intermediate_layers(self, *args: Any, **kwargs: Any) -> Any:
        """As `forward_intermediates`."""
        return self._dense_maps("get_intermediate_layers")(*args, **kwargs)

    def _dense_maps(self, name: str) -> Any:
        return getattr(self.model, name) if self.plan.restore else _refuse_maps

    def __repr__(self) -> str:
        name = type(library_model(self.model)).__name__
        if not self._attached:
            return f"CompressedModel({name}, detached)"
        lines = [
            f"  {site.site}: {shape_text(site.shape_in)} -> {shape_text(site.grid_out or (site.tokens_out,))} tokens, "
            f"{self.plan.reducer.kind} by {site.metric.kind}"
            for site in self.plan.sites
        ]
        lines += ["  last block: prefix tokens only"] if self._last_block else []
        share = self.macs() / self.dense_macs()
        return "\n".join((f"CompressedModel({name}, {share:.1%} of the MACs", *lines, ")"))

    def _apply(self, fn: Any, recurse: bool = True) -> CompressedModel:
        # torch calls this to move a module; placing the metrics now keeps copies out of a model compiled next
        moved: CompressedModel = super()._apply(fn, recurse)
        self._place_metrics()
        return moved

    def _place_metrics(self) -> None:
        parameter = next(self.model.parameters(), None)
        if parameter is not None:
            for hook in self._hooks:
                hook.place(parameter.device)


def _refuse_maps(*_: Any, **__: Any) -> None:
    raise UsageError(
        "a compressed model has no dense feature maps: their tokens were dropped",
        "Put `restore: true` into the recipe, or use `with model.dense() as dense: dense.forward_intermediates(...)`.",
    )


def _context(site: Site, prefix: int, class_token: bool) -> SiteContext:
    return SiteContext(site.layer, prefix, class_token, site.attention_channels, site.width, site.head, site.grid)


def _site(sites: Sequence[Site], name: str) -> Site:
    return next(site for site in sites if site.name == name)


def _is_attached(model: nn.Module) -> bool:
    hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
    return any(isinstance(getattr(hook, "__self__", None), SiteHook) for hook in hooks)
