"""Bring a plan to life: the only file that hooks a model.

Forward hooks do it all. At each site one hook per tap remembers a tensor that the metric asks for, and a hook on the
block scores the tokens, selects which to keep, and returns the reduced stream in place of the block's output. Blocks
run the library's code in the dense and in the compressed model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from repshift_cli.errors import ModelError, RecipeError, UsageError
from repshift_cli.families import Family, Probe, Site, Stream, match, nothing
from repshift_cli.metrics import Metric, SiteContext, build_metric
from repshift_cli.plan import After, Layout, Plan, PlanSite, resolve
from repshift_cli.preprocessing import Preprocessing
from repshift_cli.recipe import Part, Place, Recipe
from repshift_cli.reducers import Chooser, Dims, Merger, Reducer, build_reducer
from repshift_cli.tokens import MapState, TokenState

__all__ = [
    "CompressedModel",
    "Seen",
    "Trace",
    "acts_after",
    "attach",
    "branch",
    "check_feeds",
    "check_parts",
    "check_reducer",
    "check_reducer_feeds",
    "feeds",
    "has_open_fields",
    "resolve_for",
    "watching",
    "with_defaults",
]


class _SiteHook:
    """Scores and reduces at one site. A plain object: bound methods of it survive `deepcopy` and `pickle`.

    With several metrics the stream branches here: the batch that goes on holds the first one's choice for all images,
    then the second one's, and so on.
    """

    def __init__(
        self,
        planned: PlanSite,
        stream: Stream,
        context: SiteContext,
        *,
        metrics: tuple[Metric, ...],
        reducer: Reducer,
    ) -> None:
        self.planned = planned
        self.stream = stream
        self.context = context
        self.metrics = metrics
        self.placed = metrics
        self.device: torch.device | None = None
        self.reducer = reducer
        self.wanted = reducer.taps().union(*(metric.taps() for metric in metrics))
        self.enabled = True
        self.seen: dict[str, Tensor] = {}
        self.recorded: list[Tensor] | None = None

    @property
    def tapped(self) -> frozenset[str]:
        """The tensors that taps have to remember; the others the hook is handed itself."""
        return self.wanted - (
            {"block_output"} if self.planned.after == "attention" else {"block_input", "block_output"}
        )

    def place(self, device: torch.device) -> None:
        """Bring what the metrics hold to a device, so that no pass has to copy it."""
        if device != self.device:
            self.placed = tuple(metric.on(device) for metric in self.metrics)
            self.device = device

    def on_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Replace the output of the block by what is left of it."""
        if not self.enabled:
            return output
        arrived = self.stream.enter(output)
        self._check(arrived, kwargs)
        if "block_input" in self.wanted - self.tapped:
            self.seen["block_input"] = self.stream.block_input(args, arrived)
        if "block_output" in self.wanted:
            self.seen["block_output"] = self.stream.block_output(arrived)
        if not torch.compiler.is_compiling():  # a pass that is traced is to leave nothing behind
            self.place(self.stream.carrier(arrived).device)
        branches = [self._reduce(metric, arrived) for metric in self.placed]
        self.seen = {}
        return self.stream.leave(branches[0] if len(branches) == 1 else self.stream.join(branches))

    def _reduce(self, metric: Metric, output: Any) -> Any:
        scores = metric.score(self.seen, self.context)
        if not metric.keeps_largest:
            scores = -scores
        everything = self.planned.tokens_out == self.planned.tokens_in
        if isinstance(self.reducer, Merger) and not everything:
            merge = partial(self.reducer.merge, seen=self.seen)
            reduced, places = self.stream.merge(output, scores, self.planned, merge)
            if self.recorded is not None:
                self.recorded.append(places)
            return reduced
        keep = self.stream.choose(scores, output, self.planned)
        if self.recorded is not None:
            self.recorded.append(self.stream.patches(keep))
        # a copy could differ in its strides, and then in the last bits of what follows
        return output if everything else self._choose(output, keep)

    def _choose(self, output: Any, keep: Tensor) -> Any:
        assert isinstance(self.reducer, Chooser)
        return self.stream.reduce(output, keep, self.planned, self.reducer.reduce)

    def _check(self, output: Any, kwargs: dict[str, Any]) -> None:
        shape, expected = self.stream.shape(output), self.planned.shape_in
        if shape != expected:
            raise UsageError(
                f"{self.planned.site} got {_words(shape)} tokens, but the plan is for {_words(expected)}",
                "A plan holds for one input size: compress the model again for this one.",
            )
        if kwargs.get("attn_mask") is not None:
            raise UsageError(
                f"{self.planned.site} was called with an attention mask, which would not fit the tokens that are left",
                "Run without a mask, or inside `with model.dense():`.",
            )
        if isinstance(self.reducer, Merger) and kwargs.get("is_causal"):
            raise UsageError(
                f"{self.planned.site} was called with causal attention, but merged tokens have no order",
                "Run without it, or inside `with model.dense():`.",
            )

    def __getstate__(self) -> dict[str, Any]:
        # tensors of a pass in flight are nobody's business but that pass's
        return {**self.__dict__, "seen": {}, "recorded": None, "placed": self.metrics, "device": None}


class _PassageHook:
    """Changes what passes at one module while the sites are at work."""

    def __init__(self, change: Callable[[Tensor], Tensor | None]) -> None:
        self.change = change

    def on_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before the module runs: its first argument."""
        return (self.change(args[0]), *args[1:])

    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """After it: what it returns."""
        return self.change(output)

    def on_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before it runs: the mask that it is handed."""
        mask = self.change(args[0])
        return args, kwargs if mask is None else {**kwargs, "attn_mask": mask}


class _BeginHook:
    """Tells the stream that a pass begins."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def on_begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the first block."""
        self.stream.begin()


class _TapHook:
    """Remembers one tensor for the hook on the block."""

    def __init__(self, owner: _SiteHook, name: str, probe: Probe) -> None:
        self.owner = owner
        self.name = name
        self.side = probe.side
        self.view = probe.view

    def on_forward(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Store the tensor that passes."""
        if not self.owner.enabled:
            return
        value = args[0] if self.side == "input" else output
        self.owner.seen[self.name] = self.view(value) if self.view else value


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
        self._hooks: list[_SiteHook] = []
        self._handles: list[Any] = []
        self._undo_sizes = (
            self._heed_sizes(stream) if isinstance(reducer, Merger) and reducer.pooled_by_size else nothing
        )
        sites = {site.name: site for site in family.sites(model)}
        for planned, here in zip(plan.sites, metrics, strict=True):
            context = SiteContext(planned.layer, stream.prefix, class_token)
            hook = _SiteHook(planned, stream, context, metrics=here, reducer=reducer)
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

    def _heed_sizes(self, stream: Stream) -> Callable[[], None]:
        passages, undo = self.family.heed_sizes(self.model, stream)
        first = self.family.sites(self.model)[0].block
        self._handles.append(first.register_forward_pre_hook(_BeginHook(stream).on_begin))
        for passage in passages:
            hook, module = _PassageHook(passage.change), passage.module
            if passage.side == "output":
                self._handles.append(module.register_forward_hook(hook.on_output))
            elif passage.side == "input":
                self._handles.append(module.register_forward_pre_hook(hook.on_input))
            else:
                self._handles.append(module.register_forward_pre_hook(hook.on_mask, with_kwargs=True))
        return undo

    def _install(self, site: Site, hook: _SiteHook) -> None:
        for name in sorted(hook.tapped):
            probe = site.probes[name]
            tap = _TapHook(hook, name, probe)
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
            _check_channels(metric, sites[planned.site])
        check_reducer_feeds(reducer, sites[planned.site])
    return CompressedModel(model, family, plan, metrics, reducer)


@dataclass(frozen=True)
class Seen:
    """What left one block in a pass.

    Attributes:
        tokens: `[B, T, C]`, as metrics see them, without the prefix.
        carrier: the tensor that what follows was computed from.
        view: turns a tensor like `carrier` into one like `tokens`.
    """

    tokens: Tensor
    carrier: Tensor
    view: Callable[[Tensor], Tensor]


@contextmanager
def watching(model: nn.Module, after: After = "block") -> Iterator[dict[int, Seen]]:
    """Inside the context each pass of a dense model leaves what left each block, by layer.

    Raises:
        ModelError: the model is not supported.
    """
    family = match(model)
    stream, seen = family.stream(model), dict[int, Seen]()
    handles = []
    for site in family.sites(model):
        place = site.attended if after == "attention" else site.block
        assert place is not None
        handles.append(place.register_forward_hook(_Watch(stream, site.layer, seen).on_block))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """Remembers what left one block."""

    def __init__(self, stream: Stream, layer: int, seen: dict[int, Seen]) -> None:
        self.stream = stream
        self.layer = layer
        self.seen = seen

    def on_block(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Store it."""
        value, prefix = self.stream.enter(output), self.stream.prefix
        tokens = self.stream.block_output(value)[:, prefix:]
        self.seen[self.layer] = Seen(tokens, self.stream.carrier(value), self._view)

    def _view(self, value: Tensor) -> Tensor:
        return self.stream.carried(value)[:, self.stream.prefix :]


def resolve_for(model: nn.Module, recipe: Recipe) -> Plan:
    """Lay a recipe over a dense model of a supported family.

    Raises:
        ModelError: the model is not supported.
        RecipeError: the recipe cannot be followed.
    """
    family, reducer = match(model), build_reducer(recipe.reducer, recipe.place)
    check_reducer(reducer, family, model, recipe.place)
    most = reducer.most if isinstance(reducer, Merger) else None
    plan = resolve(recipe, family.layout(model), reducer.after, most)
    sites = {site.name: site for site in family.sites(model)}
    for planned in plan.sites:
        check_reducer_feeds(reducer, sites[planned.site], recipe.place)
    return plan


def check_reducer(reducer: Reducer, family: Family, model: nn.Module, place: Place | None = None) -> None:
    """Refuse a reducer that the model's family cannot carry out.

    Raises:
        RecipeError: with its place in the recipe.
    """
    where = f"{place.at(('reducer',))}: " if place else ""
    if isinstance(reducer, Merger) and (reason := family.merge_refusal(model)) is not None:
        raise RecipeError(f"{where}{reducer.kind} merges tokens, and {reason}", "Use reducer: {kind: prune}.")
    if reducer.after == "attention" and any(site.attended is None for site in family.sites(model)):
        raise RecipeError(f"{where}{reducer.kind} acts after attention, where {family.name} models cannot be reduced")


def check_reducer_feeds(reducer: Reducer, site: Site, place: Place | None = None) -> None:
    """Refuse a reducer that asks for a tensor which the block at `site` cannot show when it acts.

    Raises:
        RecipeError: with the reason that the family gives, and its place in the recipe.
    """
    lacking = sorted(reducer.taps() - _shown(site, reducer.after))
    if lacking:
        where = f"{place.at(('reducer',))}: " if place else ""
        raise RecipeError(
            f"{where}{reducer.kind} needs {lacking[0]}, which {site.name} cannot show: {_reason(site, lacking[0])}",
            "Use reducer: {kind: merge} (by the hidden state) or {kind: prune}.",
        )


def check_parts(recipe: Recipe) -> None:
    """Build every metric and the reducer that a recipe names, to refuse what cannot be before any work.

    Raises:
        RecipeError: an unknown kind or option, with its place in the recipe.
    """
    build_metric(recipe.metric, recipe.place)
    for index, drop in enumerate(recipe.layers):
        if drop.metric is not None:
            build_metric(drop.metric, recipe.place, ("layers", index, "metric"))
    build_reducer(recipe.reducer, recipe.place)


def acts_after(reducer: Part) -> After:
    """What of a block has been computed when a reducer acts."""
    return build_reducer(reducer).after


def has_open_fields(plan: Plan) -> bool:
    """Whether the plan leaves something for calibration to choose."""
    return build_reducer(plan.reducer).scored and any(build_metric(planned.metric).open for planned in plan.sites)


def with_defaults(plan: Plan, sites: Mapping[str, Site]) -> Plan:
    """The plan with the open fields of its metrics as the paper has them, or as a site allows where it cannot."""
    chosen = []
    for planned in plan.sites:
        metric = build_metric(planned.metric)
        choices = [metric.with_defaults(), *metric.variants()]
        fitting = (choice for choice in choices if feeds(choice, sites[planned.site], planned.after))
        chosen.append(next(fitting, choices[0]).part())
    return plan.with_metrics(chosen)


def feeds(metric: Metric, site: Site, after: After = "block") -> bool:
    """Whether the block at `site` can show every tensor that the metric asks for, at the time when it is asked."""
    return metric.taps() <= _shown(site, after)


def _shown(site: Site, after: After) -> frozenset[str]:
    return site.early if after == "attention" else frozenset({"block_input", "block_output", *site.probes})


def check_feeds(
    metric: Metric,
    site: Site,
    after: After = "block",
    place: Place | None = None,
    path: tuple[str | int, ...] = ("metric",),
) -> None:
    """Refuse a metric, which stands at `path` of a recipe, if the block at `site` can feed no variant of it.

    Raises:
        RecipeError: with the reason that the family gives.
    """
    if any(feeds(variant, site, after) for variant in metric.variants()):
        return
    lacking = min(metric.variants()[0].taps() - _shown(site, after))
    where = f"{place.at(path)}: " if place else ""
    if after == "attention" and feeds(metric.variants()[0], site):
        raise RecipeError(
            f"{where}{metric.kind} needs {lacking}, which is not there yet after the attention of {site.name}, where "
            "tokens are merged",
            "Possible are representation_shift with operation: attention or block, and the other metrics.",
        )
    raise RecipeError(
        f"{where}{metric.kind} needs {lacking}, which {site.name} cannot show: {_reason(site, lacking)}",
        "representation_shift with operation: block works on every block.",
    )


def _check_channels(metric: Metric, site: Site) -> None:
    if site.width and metric.channels not in (None, site.width):
        raise RecipeError(
            f"{metric.kind} has weights for {metric.channels} channels, and tokens at {site.name} have {site.width}",
            "Its weights are of another model: leave them out, and calibration fits them.",
        )


def _reason(site: Site, lacking: str) -> str:
    return site.missing.get(lacking) or site.missing.get("*", "the family does not show it")


def _reducer_macs(hook: _SiteHook, site: Site) -> int:
    """Of one image, at a site where tokens go."""
    planned = hook.planned
    patches = planned.tokens_in - hook.stream.prefix
    return hook.reducer.macs(patches, planned.tokens_in - planned.tokens_out, Dims(site.width, site.head))


def _start(layout: Layout, images: Tensor) -> TokenState | MapState:
    """The tokens before the first site."""
    if layout.map_size is None:
        return TokenState.start(images.shape[0], layout.patch_tokens, images.device)
    return MapState.start(images.shape[0], layout.map_size, images.device)


def _words(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


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
                f"the plan has {_words(planned.shape_in)} tokens at {planned.site}, "
                f"the model has {_words(arriving.get(planned.layer) or ())}"
            )


def _is_attached(model: nn.Module) -> bool:
    return any(
        isinstance(getattr(hook, "__self__", None), _SiteHook)
        for module in model.modules()
        for hook in module._forward_hooks.values()
    )
