"""The interface of a family: the sites of a kind of model, and where each tensor of a block can be hooked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from repshift_cli.errors import ModelError
from repshift_cli.models.tensor_model import library_model
from repshift_cli.planning.layout import Layout, PatchGrid
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.registry import members
from repshift_cli.reduction.stream import Stream

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
    """A change to a tensor at one module: its first argument, its output, its argument `attn_mask`, or any argument.

    The mask is made by `change` from the first argument; None is no mask. For `arguments`, `change` gets and returns
    the positional and the keyword arguments.
    """

    module: nn.Module
    side: Literal["input", "output", "mask", "arguments"]
    change: Callable[..., Any]


@dataclass(frozen=True)
class Site:
    """A block after which tokens can be dropped or merged.

    Attributes:
        name: of the module in the model, `blocks.3`; in a model with several encoders, its name in the reduced one.
        layer: index of the block.
        block: a module whose output the family's `Stream` reads.
        probes: where to find the tensors that metrics read. `block_output` needs none. `block_input` needs one only for
            a reduction after attention.
        missing: why a tensor is not available here, for messages; the key `*` stands for every tensor.
        attention_channels: heads times channels per head of its attention, 0 without attention.
        width, head: channels of a token, and of one head; 0 if tokens cannot be merged.
        attended: a module whose output is the stream between attention and MLP, where it can be reduced as well; None
            if the block has none.
        early: the tensors that are available there; `block_output` is then the stream so far.
        grid: `(frames,) rows, columns` of the original patches, in whose order they are counted, where the stream is a
            `TokenStream`, which knows the original positions; else empty.
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
    grid: tuple[int, ...] = ()


@dataclass(frozen=True)
class LastBlockParts:
    """The last block of a model whose output is computed from the prefix tokens alone.

    Attributes:
        model: the module that runs the blocks and the head.
        block: the last block.
        reader: the module in it that reads all tokens first, a norm or the attention.
        attention: timm's `Attention` in it.
        suffices: whether prefix tokens are still all that `model` reads in its next pass.
    """

    model: nn.Module
    block: nn.Module
    reader: nn.Module
    attention: Any
    suffices: Callable[[Any], bool]


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

    def edits(self, model: nn.Module, stream: Stream) -> tuple[list[TensorEdit], Callable[[], None]]:
        """Let tensors with entries per token follow the tokens, whose positions are those of the stream.

        Returns the edits to hook, and a function that undoes all other changes.
        """
        return [], do_nothing

    def restore_refusal(self, model: nn.Module) -> str | None:
        """Why dropped tokens cannot be put back behind the blocks, or None; then its stream is a `TokenStream`."""
        return f"models of the family {self.name} do not pass on a tensor with one row per token"

    def needs_restore(self, model: nn.Module) -> str | None:
        """Why dropped tokens must be put back behind the blocks, or None."""
        return None

    def reads_class_token(self, model: nn.Module) -> bool:
        """Whether the class token is all that the output is computed from."""
        return False

    def last_block(self, model: nn.Module) -> LastBlockParts | str:
        """The last block, which can be computed for the prefix tokens only, or why it cannot."""
        return f"it is not supported for models of the family {self.name}"

    def merge_refusal(self, model: nn.Module, restore: bool = False) -> str | None:
        """Why tokens of this model cannot be merged, or None if they can; then its stream is a `SizedStream`.

        With `restore` all tokens are there behind the blocks, where nothing must be weighted by size.
        """
        return f"models of the family {self.name} do not carry how many tokens each stands for"

    def use_proportional_attention(
        self, model: nn.Module, stream: Stream
    ) -> tuple[list[TensorEdit], Callable[[], None]]:
        """Weight tokens by size in attention and pooling; the sizes are those of the stream.

        A stream that restores has all tokens behind the blocks, so pooling there is plain.

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
    kind = type(library_model(model)).__name__
    if family is None:
        supported = "; ".join(f"{family.name} ({family.covers})" for family in families())
        raise ModelError(f"models of the kind {kind} are not supported", f"Supported: {supported}.")
    if reason := family.refusal(model):
        raise ModelError(f"{kind} cannot be reduced: {reason}")
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


def split_heads(projected: Tensor, size: int) -> Tensor:
    """`[B, T, heads * size]` as `[B, heads, T, size]`, which can be given too."""
    return projected if projected.ndim == 4 else projected.unflatten(-1, (-1, size)).transpose(1, 2)  # noqa: PLR2004 ([B, heads, T, size])


def do_nothing() -> None:
    """Undoes no change. A named function, since hooked models are pickled."""
