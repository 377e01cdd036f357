"""The interface of a family: the sites of a kind of model, and where each tensor of a block can be hooked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from repshift_cli.errors import ModelError
from repshift_cli.ops.tokens import Sized, keep_top_behind
from repshift_cli.planning.layout import Layout, PatchGrid
from repshift_cli.planning.plan import Plan, PlanSite
from repshift_cli.planning.registry import members

Reduce = Callable[[Tensor, Tensor], Tensor]
"""`Pruner.reduce`: tokens `[B, T, C]` and all kept positions, int64 `[B, K]`, to `[B, K, C]`."""

Merge = Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor, Tensor]]
"""`Merger.merge`: tokens `[B, prefix + N, C]`, sizes `[B, prefix + N]`, scores `[B, N]`, how many patch tokens to
remove, and prefix; to tokens, sizes and the positions of the remaining patch tokens."""

ATTENTION_TENSORS = frozenset({"attention_update", "mlp_update", "mlp_stream", "attention_query", "attention_key"})
"""`Family.shows` of a transformer."""


@dataclass(frozen=True)
class Probe:
    """The input or the output of a module; `view` turns it into the tensor that metrics read."""

    module: nn.Module
    side: Literal["input", "output"] = "output"
    view: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class TensorEdit:
    """A change to a tensor at one module: its first argument, its output, or its argument `attn_mask`.

    The mask is made by `change` from the first argument; None is no mask.
    """

    module: nn.Module
    side: Literal["input", "output", "mask"]
    change: Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Site:
    """A block after which tokens can be dropped or merged.

    Attributes:
        name: of the module in the model, `blocks.3`; in a model with several encoders, its name in the reduced one.
        layer: index of the block.
        block: a module whose output the family's `Stream` reads.
        probes: where to find the tensors that metrics read. `block_input` and `block_output` need none.
        missing: why a tensor is not available here, for messages; the key `*` stands for every tensor.
        attention_channels: heads times channels per head of its attention, 0 without attention.
        width, head: channels of a token, and of one head; 0 if tokens cannot be merged.
        attended: a module whose output is the stream between attention and MLP, where it can be reduced as well; None
            if the block has none.
        early: the tensors that are available there; `block_output` is then the stream so far.
    """

    name: str
    layer: int
    block: nn.Module
    probes: Mapping[str, Probe]
    missing: Mapping[str, str]
    attention_channels: int = 0
    width: int = 0
    head: int = 0
    attended: nn.Module | None = None
    early: frozenset[str] = frozenset()


class Stream:
    """The form in which tokens pass from block to block, and how a hook on a block reads and reduces them.

    This class handles a plain tensor `[B, prefix + N, C]`; families override what differs. `enter` converts the output
    of a block, the other methods take the converted value, and `leave` returns the input of the next block.

    Attributes:
        prefix: tokens at the front that metrics do not score.
    """

    def __init__(self, prefix: int = 0) -> None:
        self.prefix = prefix

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the first block: clear the state of the last pass."""

    def enter(self, output: Any) -> Any:
        """The output of a block, with the state that belongs to it."""
        return output

    def leave(self, value: Any) -> Any:
        """The input of the next block."""
        return value

    def shape(self, value: Any) -> tuple[int, ...]:
        """The number of tokens, to compare with `PlanSite.shape_in`."""
        return (value.shape[1],)

    def block_input(self, args: tuple[Any, ...], output: Any) -> Tensor:
        """The tokens `[B, prefix + N, C]` before a block, from its arguments and its output."""
        entered: Tensor = args[0]
        return entered

    def block_output(self, output: Any) -> Tensor:
        """The tokens `[B, prefix + N, C]` after a block."""
        left: Tensor = output
        return left

    def carrier(self, output: Any) -> Tensor:
        """The tensor that the later layers are computed from; its gradient is the influence of each token."""
        tokens: Tensor = output
        return tokens

    def carried(self, carrier: Tensor) -> Tensor:
        """A tensor like `carrier`, such as its gradient, as tokens `[B, prefix + N, C]`."""
        return carrier

    def choose(self, scores: Tensor, output: Any, planned: PlanSite) -> Tensor:
        """The tokens to keep, int64 `[B, K]`: ascending positions, here among all tokens, prefix included.

        `reduce` and `patches` of the same class interpret them. `scores` are float32, one per token that metrics see,
        without the prefix; the largest are kept. `planned` has the counts.
        """
        return keep_top_behind(scores, planned.tokens_out - self.prefix, self.prefix)

    def patches(self, keep: Tensor) -> Tensor:
        """The result of `choose` as ascending positions among the patch tokens."""
        return keep[:, self.prefix :] - self.prefix

    def reduce(self, output: Any, keep: Tensor, planned: PlanSite, reduce: Reduce) -> Any:
        """The output of the block with only the tokens at `keep`."""
        return reduce(output, keep)

    def merge(self, output: Any, scores: Tensor, planned: PlanSite, merge: Merge) -> tuple[Any, Tensor]:
        """The output of the block after a merge, and the positions `[B, K]` of the remaining patch tokens."""
        raise NotImplementedError(type(self).__name__)

    def join(self, outputs: Sequence[Any]) -> Any:
        """Concatenate along the batch."""
        return torch.cat(list(outputs))


class SizedStream(Stream):
    """Tokens with their sizes, which the blocks pass on as `tokens.Sized`.

    Attributes:
        normed: `[B, N, C]`, the tokens after the last norm, for a mean over them.
    """

    normed: Tensor | None = None

    def remember(self, normed: Tensor) -> Tensor:
        """Store the tokens after the last norm."""
        self.normed = normed
        return normed

    def shape(self, value: Sized) -> tuple[int, ...]:
        return (value.tokens.shape[1],)

    def block_input(self, args: tuple[Any, ...], output: Sized) -> Tensor:
        entered: Tensor = args[0].tokens
        return entered

    def block_output(self, output: Sized) -> Tensor:
        return output.tokens

    def carrier(self, output: Sized) -> Tensor:
        return output.tokens

    def reduce(self, output: Sized, keep: Tensor, planned: PlanSite, reduce: Reduce) -> Sized:
        sizes = None if output.sizes is None else output.sizes.gather(1, keep)
        return Sized(reduce(output.tokens, keep), sizes)

    def merge(self, output: Sized, scores: Tensor, planned: PlanSite, merge: Merge) -> tuple[Sized, Tensor]:
        tokens, sizes = output
        if sizes is None:
            sizes = torch.ones(tokens.shape[:2], dtype=torch.float32, device=tokens.device)
        tokens, sizes, places = merge(tokens, sizes, scores, planned.tokens_in - planned.tokens_out, self.prefix)
        return Sized(tokens, sizes), places

    def join(self, outputs: Sequence[Sized]) -> Sized:
        sizes = [output.sizes for output in outputs if output.sizes is not None]
        return Sized(torch.cat([output.tokens for output in outputs]), torch.cat(sizes) if sizes else None)


class Family(ABC):
    """One kind of model.

    Attributes:
        name: of the family in plans.
        covers: the supported models, for messages.
        shows: the tensors that its sites have besides `block_input` and `block_output`.
        format_version: the first version of the checkpoint format whose readers can load plans of this family.
    """

    name: ClassVar[str]
    covers: ClassVar[str]
    shows: ClassVar[frozenset[str]]
    format_version: ClassVar[int]

    @abstractmethod
    def accepts(self, model: nn.Module) -> bool:
        """Whether the model is of this kind, supported or not."""

    def refusal(self, model: nn.Module) -> str | None:
        """Why this model of the kind is not supported, or None."""
        return None

    @abstractmethod
    def layout(self, model: nn.Module) -> Layout:
        """Tokens and sites for the model's input size."""

    @abstractmethod
    def sites(self, model: nn.Module) -> list[Site]:
        """The sites, in the order of the forward pass."""

    @abstractmethod
    def macs(self, model: nn.Module, plan: Plan | None) -> int:
        """Multiply-accumulates of one image, from the shapes alone; None is the dense model.

        Counts matrix products, convolutions and the products of a scan; not norms, activations and scores.
        """

    def tokens_entering(self, model: nn.Module, plan: Plan | None) -> tuple[int, ...]:
        """Tokens of a sequence that enter each block and the head; None is the dense model."""
        layout = self.layout(model)
        blocks = len(layout.sites)
        return plan.tokens_at(blocks) if plan else (layout.prefix_tokens + layout.patch_tokens,) * (blocks + 1)

    def scan_macs(self, model: nn.Module, plan: Plan | None) -> int:
        """The element-wise part of `macs`, which operation counters do not count."""
        return 0

    def stream(self, model: nn.Module) -> Stream:
        """The form in which tokens pass between the blocks of the model."""
        return Stream(self.layout(model).prefix_tokens)

    def merge_refusal(self, model: nn.Module) -> str | None:
        """Why tokens of this model cannot be merged, or None if they can; then its stream is a `SizedStream`."""
        return f"models of the family {self.name} do not carry how many tokens each stands for"

    def use_proportional_attention(
        self, model: nn.Module, stream: Stream
    ) -> tuple[list[TensorEdit], Callable[[], None]]:
        """Weight tokens by size in attention and pooling; the sizes are those of the stream.

        Returns the edits to hook, and a function that undoes all other changes.
        """
        return [], do_nothing

    def output_name(self, model: nn.Module) -> str:
        """Name of the output in exported files."""
        return "logits" if getattr(model, "num_classes", 0) else "features"

    def patch_grid(self, model: nn.Module) -> PatchGrid:
        """Where the patch tokens lie in the input; raises a ModelError without a grid of patches."""
        embedding = getattr(model, "patch_embed", None)
        grid, patch = getattr(embedding, "grid_size", None), getattr(embedding, "patch_size", None)
        if grid is None or patch is None:
            raise ModelError(f"{type(model).__name__} has no grid of patches, so they cannot be shown")
        rows, columns = (int(number) for number in grid)
        # patches can overlap: then each stands for the pixels up to the next one
        height, width = (int(number) for number in getattr(embedding, "stride", patch))
        return PatchGrid(rows, columns, height, width)

    def after_load(self, model: nn.Module) -> None:  # noqa: B027 (most models need nothing)
        """Compute what no checkpoint stores, in a model that was built on the meta device."""

    def adapt(self, model: nn.Module) -> Callable[[], None]:
        """Prepare the head for fewer tokens, in the dense pass as well; returns a function that undoes it."""
        return do_nothing


def families() -> list[Family]:
    """One instance of each family."""
    # mypy rejects an abstract class as argument, but `members` only compares with it
    return [found() for found in members("repshift_cli.reduction.families", Family)]  # type: ignore[type-abstract]


def find(model: nn.Module) -> Family | None:
    """The family of a model, also of one that cannot be reduced; None for other models."""
    return next((family for family in families() if family.accepts(model)), None)


def match(model: nn.Module) -> Family:
    """The family of a model; raises a ModelError if it is of none, or its family does not support it."""
    family = find(model)
    if family is None:
        supported = "; ".join(f"{family.name} ({family.covers})" for family in families())
        raise ModelError(f"models of the kind {type(model).__name__} are not supported", f"Supported: {supported}.")
    if reason := family.refusal(model):
        raise ModelError(f"{type(model).__name__} cannot be reduced: {reason}")
    return family


def weight_count(module: nn.Module, *kinds: type[nn.Module]) -> int:
    """Weights of the layers of these kinds (by default linear layers and 2d convolutions), without biases."""
    parts: list[Any] = [part for part in module.modules() if isinstance(part, kinds or (nn.Linear, nn.Conv2d))]
    return sum(part.weight.numel() for part in parts)


def query_and_key(  # noqa: PLR0917
    projection: nn.Module,
    heads: int,
    size: int,
    start: int = 0,
    query_norm: nn.Module | None = None,
    key_norm: nn.Module | None = None,
) -> dict[str, Probe]:
    """Probes of queries and keys in the output of a fused projection, with `size` channels per head.

    The queries begin at channel `start`; the keys follow them.
    """
    query = partial(_heads, start=start, heads=heads, size=size, norm=query_norm)
    key = partial(_heads, start=start + heads * size, heads=heads, size=size, norm=key_norm)
    return {
        "attention_query": Probe(projection, "output", query),
        "attention_key": Probe(projection, "output", key),
    }


def _heads(projected: Tensor, start: int, heads: int, size: int, norm: nn.Module | None) -> Tensor:
    """Channels `start : start + heads * size` of `[B, T, *]` as heads: `[B, heads, T, size]`."""
    part = projected[..., start : start + heads * size].unflatten(-1, (heads, size)).transpose(1, 2)
    return norm(part) if norm is not None else part


def do_nothing() -> None:
    """Undoes no change. A named function, since hooked models are pickled."""
