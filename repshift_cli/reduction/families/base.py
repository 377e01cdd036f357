"""What a family is: it knows where in a kind of model tokens can go, and where each tensor of a layer can be seen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from repshift_cli.errors import ModelError
from repshift_cli.ops.tokens import Sized, keep_top_behind
from repshift_cli.planning.layout import Layout, PatchGrid
from repshift_cli.planning.plan import Plan, PlanSite
from repshift_cli.planning.registry import members

__all__ = [
    "Family",
    "Merge",
    "Passage",
    "Probe",
    "Reduce",
    "Site",
    "SizedStream",
    "Stream",
    "families",
    "find",
    "match",
    "nothing",
]

Reduce = Callable[[Tensor, Tensor], Tensor]
"""What a reducer does: tokens `[B, T, C]` and all places that stay, int64 `[B, K]`; to `[B, K, C]`."""

Merge = Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor, Tensor]]
"""What one that merges does: tokens `[B, prefix + N, C]`, sizes `[B, prefix + N]`, scores `[B, N]`, how many go, and
prefix; to tokens, sizes and the places of the patch tokens that are left."""


@dataclass(frozen=True)
class Probe:
    """Where a tensor can be seen: at the input or the output of a module, perhaps through a function."""

    module: nn.Module
    side: Literal["input", "output"] = "output"
    view: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Passage:
    """A module at which what passes is changed.

    Attributes:
        side: what is changed: its first argument (`input`), what it returns (`output`), or the `attn_mask` that it is
            handed, which is made from its first argument (`mask`; None for no mask).
    """

    module: nn.Module
    side: Literal["input", "output", "mask"]
    change: Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Site:
    """A block after which tokens can go.

    Attributes:
        name: as the model names the module, `blocks.3`; where it holds several encoders, as the reduced one does.
        layer: index of the block.
        block: its output is what the family's `Stream` can read.
        probes: where the tensors that metrics ask for can be seen. `block_input` and `block_output` need none.
        missing: why a tensor cannot be seen here, for messages; the key `*` stands for every tensor.
        attention_channels: heads times channels per head of its attention, 0 where it has none.
        width, head: channels of a token, and of one head; 0 where tokens cannot be merged.
        attended: a module that passes on the stream between attention and MLP, where it can be reduced as well; None
            where the block has none.
        early: the tensors that can be seen by then; `block_output` is then what is there so far.
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
    """How tokens travel from block to block, and so how the hook on a block reads and reduces them.

    This one is the plain form, a tensor `[B, prefix + N, C]`; other families override what differs with them. What a
    block returns is entered first; the other methods know the entered form, and the next block gets what left.

    Attributes:
        prefix: tokens at the front that metrics do not score.
    """

    def __init__(self, prefix: int = 0) -> None:
        self.prefix = prefix

    def begin(self) -> None:
        """A pass through the model begins."""

    def enter(self, output: Any) -> Any:
        """What a block returned, with all that travels beside it."""
        return output

    def leave(self, value: Any) -> Any:
        """What the next block takes."""
        return value

    def shape(self, value: Any) -> tuple[int, ...]:
        """What `PlanSite.shape_in` is compared with: how many tokens there are."""
        return (value.shape[1],)

    def block_input(self, args: tuple[Any, ...], output: Any) -> Tensor:
        """The tokens that entered a block, `[B, prefix + N, C]`, given its arguments and its output."""
        entered: Tensor = args[0]
        return entered

    def block_output(self, output: Any) -> Tensor:
        """The tokens that leave a block, `[B, prefix + N, C]`."""
        left: Tensor = output
        return left

    def carrier(self, output: Any) -> Tensor:
        """The tensor whose change moves what follows: by its gradient one tells how much hangs on each token."""
        tokens: Tensor = output
        return tokens

    def carried(self, carrier: Tensor) -> Tensor:
        """A tensor like `carrier`, such as its gradient, token by token: `[B, prefix + N, C]`."""
        return carrier

    def choose(self, scores: Tensor, output: Any, planned: PlanSite) -> Tensor:
        """What stays.

        Args:
            scores: float32, one for each token that metrics see without the prefix; the largest stay.
            output: of the block.
            planned: how many.

        Returns:
            int64 `[B, K]`, ascending places, here among all tokens, those of the prefix included. What they mean is a
            matter of `reduce` and `patches`.
        """
        return keep_top_behind(scores, planned.tokens_out - self.prefix, self.prefix)

    def patches(self, keep: Tensor) -> Tensor:
        """What `choose` returned as ascending places among the patch tokens."""
        return keep[:, self.prefix :] - self.prefix

    def reduce(self, output: Any, keep: Tensor, planned: PlanSite, reduce: Reduce) -> Any:
        """The output of the block with only the tokens at `keep` left, by way of a reducer."""
        return reduce(output, keep)

    def merge(self, output: Any, scores: Tensor, planned: PlanSite, merge: Merge) -> tuple[Any, Tensor]:
        """What a reducer that merges makes of the stream, and the place of each patch token that is left, `[B, K]`."""
        raise NotImplementedError(type(self).__name__)

    def join(self, outputs: Sequence[Any]) -> Any:
        """One batch after the other."""
        return torch.cat(list(outputs))


class SizedStream(Stream):
    """Tokens beside which their sizes travel. Here the blocks themselves pass on both, as `tokens.Sized`."""

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
        name: what plans call it.
        covers: the models that it covers, in words for people.
        shows: the tensors that its sites can show beside `block_input` and `block_output`.
        format_version: the first version of the checkpoint format whose readers can load plans of this family.
    """

    name: ClassVar[str]
    covers: ClassVar[str]
    shows: ClassVar[frozenset[str]]
    format_version: ClassVar[int]

    @abstractmethod
    def accepts(self, model: nn.Module) -> bool:
        """Whether the model is of this kind (even if something in it is not supported)."""

    @abstractmethod
    def refusal(self, model: nn.Module) -> str | None:
        """Why this particular model cannot be reduced, or None where it can."""

    @abstractmethod
    def layout(self, model: nn.Module) -> Layout:
        """Tokens and sites for the model's input size."""

    @abstractmethod
    def sites(self, model: nn.Module) -> list[Site]:
        """The sites, in the order of the forward pass."""

    @abstractmethod
    def macs(self, model: nn.Module, plan: Plan | None) -> int:
        """Multiply-accumulates of one image, from the shapes alone; None is the dense model.

        Counts matrix products and convolutions, as the field does, and the products of a scan; norms, activations and
        scores are left out.
        """

    def scan_macs(self, model: nn.Module, plan: Plan | None) -> int:
        """The part of `macs` that is element by element, which counters of operations do not see."""
        return 0

    def stream(self, model: nn.Module) -> Stream:
        """How tokens travel between the blocks of the model."""
        return Stream(self.layout(model).prefix_tokens)

    def merge_refusal(self, model: nn.Module) -> str | None:
        """Why tokens of this model cannot be merged, or None where they can, for its stream is a `SizedStream`."""
        return f"models of the family {self.name} do not carry how many tokens each stands for"

    def heed_sizes(self, model: nn.Module, stream: Stream) -> tuple[list[Passage], Callable[[], None]]:
        """Let attention and pooling heed the sizes of the tokens in a stream that was made for the model.

        Returns:
            Where what passes must be changed, and what undoes the rest.
        """
        return [], nothing

    def output_name(self, model: nn.Module) -> str:
        """Name of the output in exported files."""
        return "logits" if getattr(model, "num_classes", 0) else "features"

    def patch_grid(self, model: nn.Module) -> PatchGrid:
        """Where the patch tokens lie in the input.

        Raises:
            ModelError: the model has no grid of patches.
        """
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
        """Prepare what comes behind the blocks for fewer tokens, in the dense pass as well; returns what undoes it."""
        return nothing


def families() -> list[Family]:
    """One of each family."""
    # mypy objects to an abstract class as argument, though `members` only compares with it
    return [found() for found in members("repshift_cli.reduction.families", Family)]  # type: ignore[type-abstract]


def find(model: nn.Module) -> Family | None:
    """The family of a model, also of one that cannot be reduced; None for other models."""
    return next((family for family in families() if family.accepts(model)), None)


def match(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        ModelError: no family supports the model, or it cannot be reduced.
    """
    family = find(model)
    if family is None:
        supported = "; ".join(f"{family.name} ({family.covers})" for family in families())
        raise ModelError(f"models of the kind {type(model).__name__} are not supported", f"Supported: {supported}.")
    if reason := family.refusal(model):
        raise ModelError(f"{type(model).__name__} cannot be reduced: {reason}")
    return family


def nothing() -> None:
    """Undoes what was not done. A function with a name, since hooked models are pickled."""
