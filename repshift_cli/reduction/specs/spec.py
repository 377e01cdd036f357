"""What a transformer needs when tokens are dropped, as data.

A `Spec` describes one architecture of a library: where its blocks are, in which form they pass tokens on, what else has
one entry per token, and what reads the tokens behind the blocks. `families/transformer.py` interprets it. Paths are
dotted names of attributes; a number in a path is an index.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

Pooling = Literal["class", "mean", "probe", "tokens"]
"""The class token, a mean over tokens, an attention with one query, or a part that reads all tokens."""


@dataclass(frozen=True)
class PerToken:
    """A tensor with entries per token, which must follow the tokens: an argument of a block, or made inside it.

    Its last dimensions are `[..., tokens, channels]`, or `[..., tokens, tokens]` for pairs of tokens. After tokens were
    dropped it is given as `[B, heads or 1, ...]`. A tuple of such tensors is treated one by one.

    Attributes:
        name: keyword of the block's forward; with `source` "output" the path of a module inside the block whose output
            it is; with "method" that of a method inside the block which returns it.
        position: index of the argument, if callers can give it by position.
        pairs: whether it has an entry per pair of tokens.
        prefix: whether prefix tokens have entries too.
        source: where the tensor is found.
    """

    name: str
    position: int | None = None
    pairs: bool = False
    prefix: bool = False
    source: Literal["argument", "output", "method"] = "argument"


@dataclass(frozen=True)
class Output:
    """How a model of a library is run on a batch of images, and which tensor `[B, C]` of its result is used.

    Attributes:
        tensor: `logits`, `pooler_output` or another attribute of the result; `class` and `mean` are the first token and
            the mean over patch tokens of `last_hidden_state`, and `feature_maps` are the positions of all maps,
            `[B, maps * N, C]`. Empty if the model returns the tensor itself.
        logits: whether the tensor has one value per class.
        call: the path of the method or the module that takes images.
        arguments: constant keyword arguments of the call.
            A callable gets the model and the images, and returns the value.
        unused: paths of the parts of the model that do not run for images, such as a text tower. They can be absent.
        pooling: what reads the tokens behind the blocks, where it is not that of the spec.
        needs_all: whether something behind the blocks reads all tokens, so that a plan must restore them.
        repeated: parts behind the blocks that run more than once per image, by path: the path in the part of the side
            of a square, for each of which it runs, or an empty path, for each suffix token.
        wrapped: why the model itself cannot be used, only a `TensorModel` that gives the arguments.
        requires: paths of values in the tower, the value without which the model cannot be reduced, and why.
    """

    tensor: str = ""
    logits: bool = False
    call: str = "forward"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    pooling: Pooling | None = None
    needs_all: bool = False
    repeated: Mapping[str, str] = field(default_factory=dict)
    wrapped: str = ""
    requires: tuple[tuple[str, Any, str], ...] = ()


LOGITS = Output("logits", logits=True)
TOWER = Output("last_hidden_state", pooling="tokens", needs_all=True)
"""The tower of a larger model, by itself."""


@dataclass(frozen=True)
class Pool:
    """Attention with one query per image over the tokens behind the blocks.

    Attributes:
        path: of the module in the tower, or of a list of modules that run one after the other; None there for none.
        keys: paths in the module of the layers that run on each token.
        extra: tokens that it reads besides those of the blocks.
        prefix: whether it reads prefix tokens, or the path of this setting in the tower.
    """

    path: str
    keys: tuple[str, ...]
    extra: int = 0
    prefix: bool | str = True


@dataclass(frozen=True)
class BlockSpec:
    """The parts of a block, as paths in it. Empty where the block has no such module.

    Attributes:
        attention: the attention.
        attention_update, mlp_update: modules whose outputs are added to the stream.
        mlp_stream: the module whose input is the stream between attention and MLP.
        query, key: the projections to queries and keys, both the same for a fused one; or what returns them by head.
        maps: linear layers that run on each entry of the attention maps.
        positions: the MLP of relative positions, see `Spec.positions`.
        mask: argument of the attention that is added to its logits, `[B, 1, 1, T]`.
        attention_scale, mlp_scale: parameters or numbers by which the block multiplies the updates.
    """

    attention: str = ""
    attention_update: str = ""
    mlp_update: str = ""
    mlp_stream: str = ""
    query: str = ""
    key: str = ""
    mask: str = ""
    maps: tuple[str, ...] = ()
    positions: str = ""
    attention_scale: str = ""
    mlp_scale: str = ""

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths."""
        updates = (self.attention_update, self.mlp_update, self.attention_scale, self.mlp_scale)
        return (self.attention, *updates, self.mlp_stream, self.query, self.key, *self.maps)


@dataclass(frozen=True)
class Spec:
    """One architecture of a library.

    Attributes:
        library, tower: package and name of the class that holds the blocks. Subclasses are not covered.
        blocks: path of the list of blocks in the tower.
        block: the parts of a block, or those of each class of blocks by its name; other classes are refused.
        patches: path of the module that turns an image into patch tokens; its convolution gives the patch grid.
        patch: path of the height and width of a patch, for patches that a linear layer embeds.
        heads: path of the number of attention heads.
        size: paths of the size of an input along the axes of the convolution: a number or several numbers each. The
            last number stands for all axes that are left.
        axes: of an input behind the batch: an image, a clip, or a spectrogram, whose columns the convolution reads as
            rows.
        any_size: positions are computed for the size of each image.
        prefix: tokens in front of the patch tokens: numbers, and paths of numbers.
        suffix: tokens behind the patch tokens, as `prefix`. They are kept too.
        batch_first: path of the flag that says that blocks pass `[B, T, C]` on instead of `[T, B, C]`; empty if they
            always do.
        has_class: path of the class token, or of whether there is one; empty if any prefix token stands for it.
        rotary: path of rotary positions. If they are not None, queries are turned inside the attention, and those in
            front of it are not given to metrics.
        follows: tensors with entries per token.
        pooling: what reads the tokens behind the blocks; "global_pool" if timm's setting of this name says it.
        pools: the attentions that pool, for their cost, except `probe`.
        positions: path of an MLP of relative positions, which runs once on each of its `rel_coords_log`.
        probe: path in the tower of the `nn.MultiheadAttention` that pools, if the model has one.
        queries: path of its queries `[Q, C]`; empty for one.
        projections: paths in the tower of matrices that are not modules, applied once per image.
        outputs: the classes of the library that the tool runs, by name, with their output.
        requires: as in `Output`, for all of them.
    """

    library: str
    tower: str
    blocks: str
    block: BlockSpec | Mapping[str, BlockSpec]
    patches: str
    heads: str
    size: str | tuple[str, ...]
    outputs: Mapping[str, Output]
    patch: str = ""
    axes: Literal["CHW", "TCHW", "WH"] = "CHW"
    any_size: bool = False
    prefix: tuple[int | str, ...] = (1,)
    suffix: tuple[int | str, ...] = ()
    batch_first: str = ""
    has_class: str = ""
    rotary: str = ""
    follows: tuple[PerToken, ...] = ()
    pooling: Pooling | Literal["global_pool"] = "class"
    pools: tuple[Pool, ...] = ()
    positions: str = ""
    probe: str = ""
    queries: str = ""
    projections: tuple[str, ...] = ()
    requires: tuple[tuple[str, Any, str], ...] = ()


def at(module: Any, path: str) -> Any:
    """The attribute at a dotted path; raises AttributeError if there is none."""
    for name in path.split(".") if path else ():
        module = module[int(name)] if name.isdigit() and isinstance(module, nn.ModuleList) else getattr(module, name)
    return module


def found_at(module: Any, path: str) -> Any:
    """The attribute at a dotted path, None if there is none."""
    try:
        return at(module, path) if path else None
    except (AttributeError, IndexError):
        return None
