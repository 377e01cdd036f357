"""Forward hooks that score and reduce tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from repshift_cli.errors import UsageError
from repshift_cli.planning.plan import PlanSite
from repshift_cli.reduction.families.base import Probe, Stream
from repshift_cli.reduction.metrics.base import Metric, SiteContext
from repshift_cli.reduction.reducers.base import Merger, Pruner, Reducer

__all__ = [
    "BeginHook",
    "SiteHook",
    "TapHook",
    "TensorEditHook",
    "shape_text",
]


class SiteHook:
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
        assert isinstance(self.reducer, Pruner)
        return self.stream.reduce(output, keep, self.planned, self.reducer.reduce)

    def _check(self, output: Any, kwargs: dict[str, Any]) -> None:
        shape, expected = self.stream.shape(output), self.planned.shape_in
        if shape != expected:
            raise UsageError(
                f"{self.planned.site} got {shape_text(shape)} tokens, but the plan is for {shape_text(expected)}",
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


class TensorEditHook:
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


class BeginHook:
    """Tells the stream that a pass begins."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def on_begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the first block."""
        self.stream.begin()


class TapHook:
    """Remembers one tensor for the hook on the block."""

    def __init__(self, owner: SiteHook, name: str, probe: Probe) -> None:
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


def shape_text(shape: tuple[int, ...]) -> str:
    """A tensor shape as text."""
    return "x".join(map(str, shape))
