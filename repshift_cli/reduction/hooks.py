"""Forward hooks that score and reduce tokens; bound methods and partial functions, which can be copied and pickled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from repshift_cli.errors import UsageError
from repshift_cli.planning.layout import shape_text
from repshift_cli.planning.plan import PlanSite
from repshift_cli.reduction.families.base import Probe, TensorEdit
from repshift_cli.reduction.metrics.base import Metric, SiteContext
from repshift_cli.reduction.reducers.base import Merged, Merger, Pruner, Reducer
from repshift_cli.reduction.stream import Stream

Change = Callable[[Tensor], Tensor | None]


class SiteHook:
    """Scores and reduces the tokens at one site.

    With several metrics the batch is repeated here: the rows of the first metric's choice, then the second's, etc.

    Attributes:
        wanted: the tensors that the metrics and the reducer read.
        tapped: those of them that `register_tap` stores in `seen`. The hook itself reads the others.
        placed: the metrics with their tensors on `device`.
        recorded: while the model is traced, places of the kept patch tokens, one entry per metric.
        merges: likewise, the merges.
    """

    def __init__(
        self, planned: PlanSite, stream: Stream, context: SiteContext, *, metrics: tuple[Metric, ...], reducer: Reducer
    ) -> None:
        self.planned = planned
        self.stream = stream
        self.context = context
        self.metrics = self.placed = metrics
        self.device: torch.device | None = None
        self.reducer = reducer
        self.wanted = reducer.taps().union(*(metric.taps() for metric in metrics))
        direct = {"block_output"} if planned.after == "attention" else {"block_input", "block_output"}
        self.tapped = self.wanted - direct - {"patch_place"}
        self.enabled = True
        self.seen: dict[str, Tensor] = {}
        self.recorded: list[Tensor] | None = None
        self.merges: list[Merged] = []

    def place(self, device: torch.device) -> None:
        """Move the tensors of the metrics to a device, so that no forward pass has to."""
        if device != self.device:
            self.placed = tuple(metric.on(device) for metric in self.metrics)
            self.device = device

    def score_by(self, metrics: tuple[Metric, ...], wanted: frozenset[Any]) -> None:
        """Use other metrics, which read `wanted`."""
        self.metrics = self.placed = metrics
        self.wanted, self.device = wanted, None

    def on_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: replace the output of the block by the reduced stream."""
        if not self.enabled:
            return output
        arrived = self.stream.enter(output)
        self._check(arrived, kwargs)
        if "block_input" in self.wanted - self.tapped:
            self.seen["block_input"] = self.stream.block_input(args, arrived)
        if "block_output" in self.wanted:
            self.seen["block_output"] = self.stream.block_output(arrived)
        if "patch_place" in self.wanted:
            self.seen["patch_place"] = self.stream.patch_place(arrived)
        if not torch.compiler.is_compiling():  # a traced pass must not change state
            self.place(self.stream.carrier(arrived).device)
        branches = [self._reduce(metric, arrived) for metric in self.placed]
        self.seen = {}
        return self.stream.leave(branches[0] if len(branches) == 1 else self.stream.join(branches))

    def _reduce(self, metric: Metric, output: Any) -> Any:
        scores = metric.score(self.seen, self.context)
        if not metric.keeps_largest:
            scores = -scores
        keeps_all = self.planned.tokens_out == self.planned.tokens_in
        if isinstance(self.reducer, Merger) and not keeps_all:
            merge = partial(self.reducer.merge, seen=self.seen)
            return self.stream.merge(output, scores, self.planned, partial(self._merge, merge))
        keep = self.stream.choose(scores, output, self.planned)
        if self.recorded is not None:
            self.recorded.append(self.stream.patches(keep))
        if keeps_all:
            return output  # a copy could differ in its strides, and then in the last bits of later layers
        assert isinstance(self.reducer, Pruner)
        return self.stream.reduce(output, keep, self.planned, self.reducer.reduce)

    def _merge(self, merge: Callable[..., Merged], *args: Any) -> Merged:
        merged = merge(*args)
        if self.recorded is not None:
            self.recorded.append(merged.places)
            self.merges.append(merged)
        return merged

    def _check(self, output: Any, kwargs: dict[str, Any]) -> None:
        shape, expected = self.stream.shape(output), self.planned.shape_in
        if shape != expected:
            raise UsageError(
                f"{self.planned.site} got {shape_text(shape)} tokens, but the plan is for {shape_text(expected)}",
                "A plan holds for one input size: compress the model again for this one.",
            )
        if kwargs.get("attn_mask") is not None:
            raise UsageError(
                f"{self.planned.site} was called with an attention mask, which does not fit the remaining tokens",
                "Run without a mask, or inside `with model.dense():`.",
            )
        if isinstance(self.reducer, Merger) and kwargs.get("is_causal"):
            raise UsageError(
                f"{self.planned.site} was called with causal attention, but merged tokens have no order",
                "Run without it, or inside `with model.dense():`.",
            )

    def __getstate__(self) -> dict[str, Any]:
        # a copy does not take over the tensors of a running pass
        return {**self.__dict__, "seen": {}, "recorded": None, "merges": [], "placed": self.metrics, "device": None}


def register_tap(hook: SiteHook, name: str, probe: Probe) -> RemovableHandle:
    """Store a tensor in `hook.seen` whenever its module runs."""
    return probe.module.register_forward_hook(
        partial(_tap, hook=hook, name=name, from_input=probe.side == "input", view=probe.view)
    )


def register_edit(edit: TensorEdit) -> RemovableHandle:
    """Change a tensor whenever its module runs."""
    if edit.side == "output":
        return edit.module.register_forward_hook(partial(_edit_output, change=edit.change))
    if edit.side == "input":
        return edit.module.register_forward_pre_hook(partial(_edit_input, change=edit.change))
    change = _edit_mask if edit.side == "mask" else _edit_arguments
    return edit.module.register_forward_pre_hook(partial(change, change=edit.change), with_kwargs=True)


def _tap(
    module: nn.Module,
    args: tuple[Any, ...],
    output: Tensor,
    *,
    hook: SiteHook,
    name: str,
    from_input: bool,
    view: Callable[[Tensor], Tensor] | None,
) -> None:
    if hook.enabled:
        value = args[0] if from_input else output
        hook.seen[name] = view(value) if view else value


def _edit_input(module: nn.Module, args: tuple[Any, ...], *, change: Change) -> tuple[Any, ...]:
    return (change(args[0]), *args[1:])


def _edit_output(module: nn.Module, args: tuple[Any, ...], output: Tensor, *, change: Change) -> Tensor | None:
    return change(output)


def _edit_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, change: Change) -> Any:
    mask = change(args[0])
    return args, kwargs if mask is None else {**kwargs, "attn_mask": mask}


def _edit_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, change: Any) -> Any:
    return change(args, kwargs)
