"""Transformers of transformers, open_clip, torchvision and timm, each described by a `Spec`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache, cached_property, partial
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from repshift_cli.errors import ModelError
from repshift_cli.models.tensor_model import TensorModel, library_model, library_of_class
from repshift_cli.ops.tokens import suffix_first
from repshift_cli.planning.layout import Layout, PatchGrid, SiteInfo
from repshift_cli.planning.plan import Plan
from repshift_cli.reduction import specs
from repshift_cli.reduction.families.base import (
    ATTENTION_TENSORS,
    Family,
    Probe,
    Site,
    TensorEdit,
    do_nothing,
    query_and_key,
    split_heads,
    weight_count,
)
from repshift_cli.reduction.permute import permutation_problem
from repshift_cli.reduction.size_masks import UNWEIGHTED, WEIGHTED, implementation_of, probe_mask, size_mask
from repshift_cli.reduction.specs import registered
from repshift_cli.reduction.specs.maps import MAPS, map_blocks
from repshift_cli.reduction.specs.spec import LOGITS, TOWER, BlockSpec, Output, PerToken, Spec, at, found_at
from repshift_cli.reduction.stream import Stream
from repshift_cli.reduction.token_stream import TokenStream

_permutations: WeakKeyDictionary[nn.Module, tuple[Spec, str | None]] = WeakKeyDictionary()
"""Specs and results of the permute test, of models whose class no spec lists or whose spec is the user's."""


@cache
def _libraries() -> tuple[Any, ...]:
    return tuple(import_module(f"{specs.__name__}.{info.name}") for info in iter_modules(specs.__path__))


def all_specs() -> Iterator[Spec]:
    """The specs of all libraries, then those of the user."""
    for library in _libraries():
        if library is not registered:
            yield from getattr(library, "SPECS", ())
    yield from registered.SPECS


@dataclass(frozen=True)
class Tower:
    """The part of a model that a spec describes.

    Attributes:
        name: its path in the model of the library; empty for the model itself.
    """

    model: nn.Module
    name: str
    module: Any
    spec: Spec

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """The blocks, in the order of the forward pass."""
        return list(at(self.module, self.spec.blocks))

    @cached_property
    def prefix(self) -> int:
        """Tokens in front of the patch tokens."""
        return self._count(self.spec.prefix)

    @cached_property
    def suffix(self) -> int:
        """Tokens behind the patch tokens."""
        return self._count(self.spec.suffix)

    def _count(self, parts: tuple[int | str, ...]) -> int:
        return sum(part if isinstance(part, int) else int(at(self.module, part)) for part in parts)

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """Patches along each axis of the input that the embedding reads: `(frames,) rows, columns`."""
        steps, padding = self.stride, (0,) * len(self.size)
        kernel = steps if self.spec.patch else self.projection.kernel_size
        if not self.spec.patch and self.projection.padding != "valid":
            padding = self.projection.padding
        sides = zip(self.size, kernel, steps, padding, strict=True)
        return tuple((side + 2 * pad - width) // step + 1 for side, width, step, pad in sides)

    @cached_property
    def projection(self) -> Any:
        """The convolution of the patch embedding, or its linear layer."""
        parts = at(self.module, self.spec.patches).modules()
        kinds = nn.Conv2d | nn.Conv3d | nn.Linear if self.spec.patch else nn.Conv2d | nn.Conv3d
        return next(part for part in parts if isinstance(part, kinds))

    @property
    def stride(self) -> tuple[int, ...]:
        """Pixels from one patch to the next along each axis."""
        return tuple(at(self.module, self.spec.patch)) if self.spec.patch else self.projection.stride

    @cached_property
    def size(self) -> tuple[int, ...]:
        """The size of an input along each axis of the convolution."""
        axes = len(self.stride)
        stated = (getattr(self.model, "pretrained_cfg", None) or {}).get("input_size")
        if self.spec.any_size and stated:
            return tuple(stated[-axes:])
        paths = (self.spec.size,) if isinstance(self.spec.size, str) else self.spec.size
        sizes = [at(self.module, path) for path in paths]
        if None in sizes:
            raise ModelError(
                f"the image size of this {self.spec.tower} is unknown", "Set it: model.pretrained_cfg['input_size']."
            )
        numbers = [number for size in sizes for number in ((size,) if isinstance(size, int) else size)][-axes:]
        return (*numbers, *numbers[-1:] * (axes - len(numbers)))

    @property
    def input_size(self) -> tuple[int, ...]:
        """Of one input, in the order that the model takes: `(C, H, W)`, `(T, C, H, W)` or `(W, H)`."""
        *frames, rows, columns = self.size
        if self.spec.axes == "WH":
            return columns, rows
        weight = self.projection.weight
        channels = weight.shape[1] // math.prod(self.stride) if self.spec.patch else weight.shape[1]
        return (*frames, int(channels), rows, columns)

    @property
    def inner(self) -> nn.Module:
        """The model of the library."""
        inner: nn.Module = library_model(self.model)
        return inner

    @property
    def output(self) -> Output | None:
        """How the model is run; None if no spec of its library lists its class."""
        alone = isinstance(self.model, TensorModel) and (self.model.tensor, self.model.call) == (
            TOWER.tensor,
            TOWER.call,
        )
        return TOWER if alone else output_of(self.inner)

    @property
    def pooling(self) -> str:
        """What reads the tokens behind the blocks."""
        pooling = (self.output and self.output.pooling) or self.spec.pooling
        if pooling != "global_pool":
            return pooling
        # without pooling the model returns the tokens, and a maximum needs no sizes
        return {"avg": "mean", "avgmax": "mean", "map": "map"}.get(self.module.global_pool, "class")

    @cached_property
    def attention_width(self) -> int:
        """Channels of the queries of all heads."""
        parts = self.block_spec(self.blocks[0]) or BlockSpec()
        fused = not parts.query or parts.query == parts.key
        return self.width if fused else int(getattr(at(self.blocks[0], parts.query), "out_features", self.width))

    @property
    def batch_first(self) -> bool:
        """Blocks pass `[B, T, C]` on, not `[T, B, C]`."""
        return not self.spec.batch_first or bool(at(self.module, self.spec.batch_first))

    @property
    def heads(self) -> int:
        """Attention heads of a block."""
        return int(at(self.module, self.spec.heads))

    @property
    def width(self) -> int:
        """Channels of a token."""
        return int(self.projection.weight.shape[0])

    @property
    def class_token(self) -> bool:
        """Whether the first prefix token is a class token."""
        token = at(self.module, self.spec.has_class) if self.spec.has_class else self.prefix > 0
        return token is not None and token is not False

    def block_spec(self, block: nn.Module) -> BlockSpec | None:
        """The parts of a block; None for a class of blocks that the spec does not name."""
        parts = self.spec.block
        return parts if isinstance(parts, BlockSpec) else parts.get(type(block).__name__)


def tower_of(model: nn.Module) -> Tower | None:
    """The part of a model that a spec describes, None if there is none; raises ModelError if a path is wrong."""
    inner = library_model(model)
    known = {(spec.library, spec.tower): spec for spec in all_specs()}
    for name, module in inner.named_modules():
        if spec := known.get((library_of_class(module), type(module).__name__)):
            tower = Tower(model, name, module, spec)
            _check_paths(tower)
            return tower
    return None


def as_function(model: nn.Module, output: Output | None = None) -> nn.Module:
    """The model as a function from inputs to one tensor: itself, or a `TensorModel` for a class that needs one.

    `output` is by default that of the class.
    """
    output, tower = output or output_of(model), tower_of(model)
    if output is None or not (tower or map_blocks(model)) or (output.call == "forward" and not output.tensor):
        return model
    classes = int(model.config.num_labels) if output.logits else 0  # type: ignore[union-attr, arg-type]
    made = TensorModel(model, output.tensor, output.call, output.arguments, tower.prefix if tower else 0, classes)
    made.training, made.pretrained_cfg = model.training, dict(getattr(model, "pretrained_cfg", None) or {})
    return made


def _check_paths(tower: Tower) -> None:
    spec, block = tower.spec, None
    try:
        path = spec.blocks
        block = tower.blocks[0]
        sizes = (spec.size,) if isinstance(spec.size, str) else spec.size
        prefix = (part for part in spec.prefix + spec.suffix if isinstance(part, str))
        for path in (spec.patches, spec.heads, *sizes, spec.batch_first, *prefix):
            at(tower.module, path)
        for path in parts.paths if (parts := tower.block_spec(block)) else ():
            at(block, path)
    except (AttributeError, IndexError) as error:
        raise ModelError(
            f"the spec of {spec.library} {spec.tower} names {path!r}, which this model does not have",
            "Correct the spec, or use the version of the library that the spec is for.",
        ) from error


class Transformer(Family):
    """Transformers that are described by a spec."""

    name: ClassVar[str] = "transformer"
    covers: ClassVar[str] = "transformers, open_clip, torchvision and timm's EVA: image encoders"
    shows: ClassVar[frozenset[str]] = ATTENTION_TENSORS
    format_version: ClassVar[int] = 5

    def accepts(self, model: nn.Module) -> bool:
        inner = library_model(model)
        named = library_of_class(inner) == "transformers" or type(inner).__name__ in _refused()
        return (named or tower_of(model) is not None) and not map_blocks(model)

    def refusal(self, model: nn.Module) -> str | None:
        tower = tower_of(model)
        if tower is None:
            return _not_described(model)
        output = tower.output
        for index, block in enumerate(tower.blocks):
            if tower.block_spec(block) is None:
                return f"{tower.spec.blocks}.{index} is a {type(block).__name__}, which is not supported"
        for path, value, reason in (*tower.spec.requires, *(output.requires if output else ())):
            found = found_at(tower.module, path)
            if found not in value if isinstance(value, frozenset) else found != value:
                return reason
        if output is not None and tower.spec not in registered.SPECS:
            return (not isinstance(model, TensorModel) and output.wrapped) or None
        spec, found = _permutations.get(tower.inner, (None, None))
        if spec is not tower.spec:
            found = _permutation_refusal(self, tower)
            _permutations[tower.inner] = tower.spec, found
        return found

    def layout(self, model: nn.Module) -> Layout:
        tower = _tower(model)
        path = f"{tower.name}.{tower.spec.blocks}".removeprefix(".")
        names = [name for name, _ in at(tower.module, tower.spec.blocks).named_children()]
        return Layout(
            family=self.name,
            prefix_tokens=tower.prefix + tower.suffix,
            patch_tokens=math.prod(tower.grid),
            class_token=tower.class_token,
            sites=tuple(SiteInfo(f"{path}.{name}", index) for index, name in enumerate(names)),
        )

    def sites(self, model: nn.Module) -> list[Site]:
        tower = _tower(model)
        infos = zip(self.layout(model).sites, tower.blocks, strict=True)
        return [_site(tower, info, block) for info, block in infos]

    def stream(self, model: nn.Module) -> Stream:
        tower = _tower(model)
        return TokenStream(tower.prefix, not tower.batch_first, bool(tower.spec.follows), tower.suffix)

    def edits(self, model: nn.Module, stream: Stream) -> tuple[list[TensorEdit], Callable[[], None]]:
        assert isinstance(stream, TokenStream)
        tower, edits = _tower(model), []
        for block in tower.blocks if tower.spec.follows else ():
            edits.append(TensorEdit(block, "arguments", partial(_follow_arguments, stream=stream, spec=tower.spec)))
            for part in tower.spec.follows:
                if part.source == "output" and found_at(block, part.name) is not None:
                    gather = partial(stream.gather, pairs=part.pairs, prefix=part.prefix)
                    edits.append(TensorEdit(at(block, part.name), "output", gather))
        return edits, _follow_methods(tower, stream)

    def restore_refusal(self, model: nn.Module) -> str | None:
        return None

    def needs_restore(self, model: nn.Module) -> str | None:
        output = _tower(model).output
        needed = output is not None and output.needs_all
        return f"what reads the tokens of {type(library_model(model)).__name__} needs all of them" if needed else None

    def reads_class_token(self, model: nn.Module) -> bool:
        tower = _tower(model)
        plain = tower.spec.pooling == "global_pool" and tower.module.global_pool != "token"
        return tower.pooling == "class" and not plain

    def merge_refusal(self, model: nn.Module, restore: bool = False) -> str | None:
        tower = _tower(model)
        spec, kind = tower.spec, type(tower.inner).__name__
        parts = tower.block_spec(tower.blocks[0]) or BlockSpec()
        attention = at(tower.blocks[0], parts.attention)
        if isinstance(attention, nn.MultiheadAttention):
            return f"the nn.MultiheadAttention of {spec.tower} cannot weight tokens by size"
        # with rotary positions of timm a token merges into the position of another
        follows = any(part.name != parts.mask for part in spec.follows) and not spec.rotary
        pooling = None if restore else tower.pooling
        found = {
            f"the attention of {spec.tower} reads positions, and a merged token has several": follows,
            f"the attention of {spec.tower} cannot weight tokens by size": not parts.mask,
            f"{kind} pools by a mean over tokens, which is not weighted by size": pooling == "mean",
            f"{kind} pools by attention, whose keys are not weighted by size": pooling == "map",
            f"a part of {kind} reads all tokens, which it does not weight by size": pooling == "tokens",
            f"it is not known what reads the tokens in {kind}": not restore and tower.output is None,
            UNWEIGHTED.format(implementation_of(attention)): implementation_of(attention) not in WEIGHTED,
        }
        return next((reason for reason, holds in found.items() if holds), None)

    def use_proportional_attention(
        self, model: nn.Module, stream: Stream
    ) -> tuple[list[TensorEdit], Callable[[], None]]:
        assert isinstance(stream, TokenStream)
        tower = _tower(model)
        spec = tower.spec
        edits = []
        for block in tower.blocks:
            parts = tower.block_spec(block) or BlockSpec()
            attention = at(block, parts.attention)
            mask = partial(size_mask, stream=stream, name=parts.mask, attention=attention)
            edits.append(TensorEdit(attention, "arguments", mask))
        if not stream.restores and (probe := found_at(tower.module, spec.probe)) is not None:
            heads = int(probe.num_heads)
            edits.append(TensorEdit(probe, "arguments", partial(probe_mask, stream=stream, heads=heads)))
        return edits, do_nothing

    def macs(self, model: nn.Module, plan: Plan | None) -> int:
        tower, tokens = _tower(model), self.tokens_entering(model, plan)
        embedding = at(tower.module, tower.spec.patches)
        total = math.prod(tower.grid) * _weights(embedding) + _head_macs(tower, embedding, tokens[-1])
        return total + sum(_block_macs(tower, *each) for each in zip(tower.blocks, tokens, strict=False))

    def patch_grid(self, model: nn.Module) -> PatchGrid:
        tower = _tower(model)
        if tower.spec.axes == "WH":
            raise ModelError(f"{tower.spec.tower} reads spectrograms, whose patches cannot be shown")
        *frames, rows, columns = tower.grid
        height, width = tower.stride[-2:]
        return PatchGrid(rows, columns, height, width, *frames)


def _tower(model: nn.Module) -> Tower:
    tower = tower_of(model)
    if tower is None:
        raise ModelError(f"models of the kind {type(model).__name__} are not described by a spec")
    return tower


def _refused() -> dict[str, str]:
    """Why classes of modules are not supported, by name."""
    return {key: reason for library in _libraries() for key, reason in getattr(library, "REFUSED", {}).items()}


def _not_described(model: nn.Module) -> str:
    """Why a model without a tower is not supported, with the classes of similar names."""
    inner = library_model(model)
    refused = _refused()
    for module in inner.modules():
        if reason := refused.get(type(module).__name__):
            return f"{type(module).__name__} {reason}"
    known = [name for spec in all_specs() if spec.library == library_of_class(inner) for name in spec.outputs]
    nearest = get_close_matches(type(inner).__name__, known, 3, 0)
    return f"no spec describes it. Supported classes with similar names: {', '.join(nearest)}"


@torch.no_grad()
def _permutation_refusal(family: Family, tower: Tower) -> str | None:
    """Why a model fails the permute test on random inputs, or None."""
    start = f"no spec of this package lists its class ({tower.spec.tower} has a spec), and"
    weight = next(tower.model.parameters())
    if weight.is_meta or weight.dtype not in (torch.float32, torch.float64):
        return f"{start} the permute test needs its weights in float32"
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, *tower.input_size, generator=generator).to(weight)
    training = [module for module in tower.model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        problem = permutation_problem(tower.model, family, images)
    finally:
        for module in training:
            module.training = True
    return f"{start} it {problem}" if problem else None


def _site(tower: Tower, info: SiteInfo, block: nn.Module) -> Site:
    spec, head = tower.block_spec(block) or BlockSpec(), tower.attention_width // tower.heads
    updates = {
        "attention_update": (spec.attention_update, spec.attention_scale),
        "mlp_update": (spec.mlp_update, spec.mlp_scale),
    }
    first = _first if tower.batch_first else _first_swapped
    probes = {
        name: Probe(at(block, path), "output", partial(_scaled, block=block, scale=scale) if scale else first)
        for name, (path, scale) in updates.items()
        if path
    }
    missing: dict[str, str] = {}
    if spec.mlp_stream:
        probes["mlp_stream"] = Probe(at(block, spec.mlp_stream), "input", None if tower.batch_first else _swapped)
    if spec.query and spec.query == spec.key:
        probes |= query_and_key(at(block, spec.query), tower.heads, head)
    elif spec.query:
        split = partial(split_heads, size=head)
        probes["attention_key"] = Probe(at(block, spec.key), "output", split)
        if tower.spec.rotary and at(tower.module, tower.spec.rotary) is not None:
            missing["attention_query"] = "positions turn its queries and keys inside the attention"
        else:
            probes["attention_query"] = Probe(at(block, spec.query), "output", split)
    if tower.suffix:
        moved = partial(_suffix_first, front=tower.prefix, suffix=tower.suffix)
        probes = {name: replace(probe, view=partial(moved, view=probe.view)) for name, probe in probes.items()}
    missing["*"] = f"the blocks of {tower.spec.tower} have no module that returns it"
    if isinstance(at(block, spec.attention), nn.MultiheadAttention):
        missing["*"] = f"the nn.MultiheadAttention of {tower.spec.tower} computes queries and keys without a module"
    return Site(
        name=info.name,
        layer=info.layer,
        block=block,
        probes=probes,
        missing=missing,
        attention_channels=tower.attention_width,
        width=tower.width,
        head=head,
        grid=tower.grid,
    )


def _suffix_first(found: Any, *, front: int, suffix: int, view: Callable[[Any], Tensor] | None) -> Tensor:
    return suffix_first(view(found) if view else found, front, suffix)


def _first(output: Any) -> Tensor:
    """The tensor that an attention returns, alone or before its map."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def _first_swapped(output: Any) -> Tensor:
    return _swapped(_first(output))


def _scaled(output: Any, block: nn.Module, scale: str) -> Tensor:
    return _first(output) * at(block, scale)


def _swapped(tokens: Tensor) -> Tensor:
    """`[T, B, C]` as `[B, T, C]`."""
    return tokens.transpose(0, 1)


def _follow_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], *, stream: TokenStream, spec: Spec
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block with the entries of the tokens that it gets."""
    stream.arrive(args[0])
    for part in spec.follows:
        if part.source != "argument":
            continue
        gather = partial(stream.gather, pairs=part.pairs, prefix=part.prefix)
        if kwargs.get(part.name) is not None:
            kwargs = {**kwargs, part.name: gather(kwargs[part.name])}
        elif part.position is not None and len(args) > part.position and args[part.position] is not None:
            args = (*args[: part.position], gather(args[part.position]), *args[part.position + 1 :])
    return args, kwargs


def _follow_methods(tower: Tower, stream: TokenStream) -> Callable[[], None]:
    """Replace the methods of a spec on the instances that have them; returns a function that undoes it."""
    replaced: list[tuple[Any, str]] = []
    for part in (part for part in tower.spec.follows if part.source == "method"):
        path, _, name = part.name.rpartition(".")
        for block in tower.blocks:
            if (owner := at(block, path)) is None:
                continue
            method = getattr(type(owner), name)
            owner.__dict__[name] = partial(_gathered, part=part, method=method, owner=owner, stream=stream)
            replaced.append((owner, name))
    return partial(_restore_methods, replaced) if replaced else do_nothing


def _gathered(*args: Any, part: PerToken, method: Callable[..., Any], owner: nn.Module, stream: TokenStream) -> Any:
    return stream.gather(method(owner, *args), part.pairs, part.prefix)


def _restore_methods(replaced: list[tuple[Any, str]]) -> None:
    for owner, name in replaced:
        owner.__dict__.pop(name, None)


def _block_macs(tower: Tower, block: nn.Module, tokens: int) -> int:
    parts = tower.block_spec(block) or BlockSpec()
    maps = sum(_weights(at(block, path)) for path in parts.maps)
    positions = at(block, parts.positions) if parts.positions else None
    per_token = _weights(block) - maps - (_weights(positions) if positions is not None else 0)
    return tokens * per_token + tokens * tokens * (2 * tower.attention_width + maps) + _position_macs(positions)


def _position_macs(positions: Any) -> int:
    """The MLP of relative positions, if it is one."""
    weights = _weights(positions) if positions is not None else 0
    return weights * positions.rel_coords_log[..., 0].numel() if weights else 0


def _head_macs(tower: Tower, embedding: nn.Module, tokens: int) -> int:
    """Layers behind the blocks: once per image, but for an attention that pools `tokens` tokens by a few queries."""
    probe = found_at(tower.module, tower.spec.probe)
    unused = [found_at(tower.inner, path) for path in (tower.output.unused if tower.output else ())]
    parts = [embedding, *tower.blocks, probe, *unused]
    total = _weights(tower.inner) - sum(_weights(part) for part in parts if isinstance(part, nn.Module))
    matrices = [at(tower.module, path) for path in tower.spec.projections]
    total += sum(matrix.numel() for matrix in matrices if matrix is not None)
    for path, side in (tower.output.repeated if tower.output else {}).items():
        if (part := found_at(tower.inner, path)) is not None:
            cells = math.prod(math.ceil(patches / at(part, side)) for patches in tower.grid) if side else tower.suffix
            total += (cells - 1) * _weights(part)
    if probe is not None:
        queries = len(at(tower.module, tower.spec.queries)) if tower.spec.queries else 1
        total += _probe_macs(probe, queries, tokens)
    for pool in tower.spec.pools:
        with_prefix = pool.prefix if isinstance(pool.prefix, bool) else at(tower.module, pool.prefix)
        seen = tokens + pool.extra - (0 if with_prefix else tower.prefix)
        found = at(tower.module, pool.path)
        for part in found if isinstance(found, nn.ModuleList) else [] if found is None else [found]:
            total += (seen - 1) * sum(_weights(at(part, path)) for path in pool.keys) + 2 * seen * tower.width
    if tower.spec.positions and (positions := at(tower.module, tower.spec.positions)) is not None:
        total += _position_macs(positions) - _weights(positions)
    return total


def output_of(model: nn.Module) -> Output | None:
    """How a model of a library is run on images, None if its class is in no spec."""
    library, name = library_of_class(model), type(model).__name__
    if library == "transformers" and name in MAPS:
        return LOGITS
    return next((spec.outputs[name] for spec in all_specs() if spec.library == library and name in spec.outputs), None)


def _probe_macs(probe: nn.MultiheadAttention, queries: int, tokens: int) -> int:
    """Projections of `queries` queries, of `tokens` keys and values, and of the result; the products of attention."""
    width, of_tokens = int(probe.embed_dim), int(probe.embed_dim) * (int(probe.kdim) + int(probe.vdim))
    return queries * 2 * width * width + tokens * of_tokens + 2 * queries * tokens * width


def _weights(module: nn.Module) -> int:
    """Weights of linear layers, convolutions and the fused projections of attention, without biases."""
    fused = [getattr(part, "in_proj_weight", None) for part in module.modules()]
    linear = weight_count(module, nn.Linear, nn.Conv2d, nn.Conv3d)
    return linear + sum(weight.numel() for weight in fused if isinstance(weight, nn.Parameter))
