"""Record which operations a network of feature maps runs, and compute the sizes of its maps for other inputs.

One pass on the meta device records the functions that are called, in order. What each does to the size of a map is
known from its name and arguments. A function that is not known, or that depends on the place of a line in the map (a
table of positions, windows), is recorded with the reason, or refuses the network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repshift_cli.errors import first_line
from repshift_cli.measure.macs import NORMS, meta_copy
from repshift_cli.models.tensor_model import library_model
from repshift_cli.planning.layout import Grid, Window

_BATCH = 3
_SIZE = (608, 736)
"""Of the images: multiples of 32 that give no usual numbers of channels, nor equal numbers of rows and columns."""

_BY_POSITION = frozenset(
    """add sub rsub mul div truediv rtruediv pow rpow neg abs sqrt rsqrt exp square clamp clamp_min maximum minimum
    where addcmul addcdiv lerp relu relu6 gelu silu mish hardswish hardsigmoid hardtanh leaky_relu elu selu celu
    prelu softplus sigmoid logsigmoid tanh sin cos log identity batch_norm layer_norm rms_norm group_norm
    instance_norm dropout dropout2d feature_dropout alpha_dropout normalize softmax log_softmax to type type_as
    float contiguous clone detach expand expand_as broadcast_to requires_grad_ zeros_like ones_like empty_like
    full_like cat stack chunk split tensor_split unbind getitem narrow select view reshape flatten unflatten
    permute transpose t mt squeeze unsqueeze swapaxes movedim channel_shuffle""".split()  # noqa: SIM905
)
"""Functions that compute each position from itself and from values of the whole map."""

_REDUCTIONS = frozenset(
    """mean sum amax amin max min var var_mean std norm vector_norm linalg_vector_norm logsumexp
    prod""".split()  # noqa: SIM905
)
_PRODUCTS = frozenset("matmul bmm rmatmul".split())  # noqa: SIM905
_IGNORED = frozenset(
    """get set size dim numel stride is_contiguous element_size data_ptr is_floating_point is_complex len iter repr
    storage_offset get_device is_cuda is_meta shape ndim dtype device register_hook is_nonzero""".split()  # noqa: SIM905
)


class UnsupportedError(Exception):
    """The network does something whose effect on a map of another size is not known."""


@dataclass(frozen=True)
class Node:
    """One recorded tensor.

    Attributes:
        place: name of the module that made it.
        inputs: the recorded tensors that it was made from.
        like: those of them whose maps have the same size as its own, before `window`; empty if it is no map.
        window: what its operation does to the size of the map.
        cost: multiply-accumulates per image, times the positions of the maps of `areas`.
        passes: whether its operation leaves each value where it is, as a shortcut does.
    """

    place: str
    inputs: tuple[int, ...] = ()
    like: tuple[int, ...] = ()
    window: Window | None = None
    cost: int = 0
    areas: tuple[int, ...] = ()
    passes: bool = False


@dataclass(frozen=True)
class Block:
    """A part of the network with the nodes at its input and its output, and the shape of the output `[C, H, W]`.

    `barred` is the reason why nothing can be dropped behind it, None for a site.
    """

    name: str
    layer: int
    entry: int
    exit: int
    channels: int
    barred: str | None = None


@dataclass
class MapTrace:
    """The operations of a network.

    Attributes:
        nodes: in the order in which they ran; the first is the images.
        blocks: in the order in which they ran.
        fixed: nodes whose operations depend on the place of a line in the map, with the reason.
    """

    nodes: list[Node] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    fixed: dict[int, str] = field(default_factory=dict)

    def grids(self, size: Grid, kept: Mapping[int, Grid]) -> list[Grid]:
        """The size of each map for images of `size` if the block of each layer in `kept` keeps these lines.

        (1, 1) for what is no map. Raises UnsupportedError where maps of different sizes would meet.
        """
        cut = {block.exit: kept[block.layer] for block in self.blocks if block.layer in kept}
        grids = [size]
        for index, node in enumerate(self.nodes[1:], 1):
            found = {grids[other] for other in node.like}
            if len(found) > 1:
                raise UnsupportedError(
                    f"path and shortcut of {node.place} have outputs of different sizes for maps with an odd number of "
                    "lines"
                )
            grid = found.pop() if found else (1, 1)
            grid = node.window.output(grid) if node.window else grid
            grids.append(cut.get(index, grid))
        return grids

    def macs(self, size: Grid, kept: Mapping[int, Grid]) -> int:
        """Multiply-accumulates of one image; arguments as for `grids`."""
        grids = self.grids(size, kept)
        return sum(
            node.cost * math.prod(math.prod(grids[other]) for other in node.areas) for node in self.nodes if node.cost
        )

    def windows(self, start: int, end: int) -> list[Window]:
        """The windows from one node to another, along the path with the most of them."""
        chains: dict[int, list[Window]] = {start: []}
        for index in range(start + 1, end + 1):
            node = self.nodes[index]
            found = [chains[other] for other in node.like if other in chains]
            if found:
                chain = max(found, key=len)
                chains[index] = [*chain, node.window] if node.window else chain
        return chains.get(end, [])

    def passes(self, start: int, end: int) -> bool:
        """Whether a path of shortcuts leads from one node to the other."""
        reached = {start}
        for index in range(start + 1, end + 1):
            node = self.nodes[index]
            if node.passes and not reached.isdisjoint(node.like):
                reached.add(index)
        return end in reached

    def last_map(self) -> int:
        """The node of the last map."""
        return max(index for index, node in enumerate(self.nodes) if node.like or not index)

    def barred(self, block: Block) -> str | None:
        """Why nothing can be dropped after a block; None for a site."""
        if block.barred:
            return block.barred
        if not self.passes(block.entry, block.exit):
            return "it has no shortcut, so its output is not a changed version of its input"
        for node in self.nodes[block.exit + 1 :]:
            if any(other < block.exit for other in (*node.like, *node.areas)):
                return f"{node.place} combines its output with a map from before it"
        return next((f"behind it, {why}" for at, why in self.fixed.items() if at > block.exit), None)


def trace(model: nn.Module, is_block: Callable[[str], bool]) -> MapTrace:
    """Record a pass of a copy of the model.

    Args:
        is_block: whether the module of this name is a block.

    Raises:
        UnsupportedError: with the reason, if it cannot be followed.
    """
    copied = meta_copy(model)
    recorder = _Recorder(copied, is_block)
    for name, module in library_model(copied).named_modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module.register_forward_pre_hook(partial(recorder.enter, name))
        module.register_forward_hook(partial(recorder.leave, name))
    parameter = next(copied.parameters(), torch.empty(0))
    channels = next((part.in_channels for part in copied.modules() if isinstance(part, nn.Conv2d)), 3)
    images = torch.empty(_BATCH, channels, *_SIZE, device="meta", dtype=parameter.dtype)
    recorder.put(images, Node("", like=()), _SIZE)
    try:
        with torch.no_grad(), recorder:
            output = copied(images)
    except UnsupportedError:
        raise
    except Exception as error:
        where = recorder.stack[-1][0] if recorder.stack else ""
        raise UnsupportedError(
            f"{where or 'it'} does not run on images of {_SIZE[0]}x{_SIZE[1]}: {first_line(error)}"
        ) from error
    recorder.finish(output)
    return recorder.trace


class _Recorder(TorchFunctionMode):
    """Records the functions that are called on tensors which depend on the images."""

    def __init__(self, model: nn.Module, is_block: Callable[[str], bool]) -> None:
        super().__init__()
        self.trace = MapTrace()
        self.is_block = is_block
        self.at: dict[int, int] = {}  # node of each tensor, by id
        self.sizes: list[Grid | None] = []  # of the map of each node
        self.constants = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.alive: list[Any] = []  # ids stay unique while the tensors live
        self.stack: list[tuple[str, nn.Module, int]] = []
        self.layer = 0

    def enter(self, name: str, module: nn.Module, args: Any) -> None:
        entry = -1
        if self.is_block(name) and args and isinstance(args[0], Tensor) and id(args[0]) in self.at:
            entry = self._mark(args[0], name)
        self.stack.append((name, module, entry))

    def leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        _, _, entry = self.stack.pop()
        if not self.is_block(name):
            return
        layer, self.layer = self.layer, self.layer + 1
        if not isinstance(output, Tensor) or id(output) not in self.at:
            self.trace.blocks.append(Block(name, layer, entry, -1, 0, "it returns more than one map"))
            return
        size = self.sizes[self.at[id(output)]]
        exit_node = self._mark(output, name)
        barred = None
        if entry < 0 or size is None or output.ndim != 4 or tuple(output.shape[2:]) != size:  # noqa: PLR2004
            barred = "its output is not a map [B, C, H, W]"
        elif tuple(args[0].shape) != tuple(output.shape):
            barred = "its output differs in size or width from its input, so a position has no shift"
        self.trace.blocks.append(Block(name, layer, entry, exit_node, output.shape[1], barred))

    def _mark(self, tensor: Tensor, name: str) -> int:
        """A new node for a tensor, so that what follows reads it and what came before does not."""
        before = self.at[id(tensor)]
        size = self.sizes[before]
        return self.put(tensor, Node(name, (before,), (before,) if size else (), passes=True), size)

    def put(self, tensor: Tensor, node: Node, size: Grid | None) -> int:
        self.trace.nodes.append(node)
        self.sizes.append(size)
        self.at[id(tensor)] = len(self.sizes) - 1
        self.alive.append(tensor)
        return len(self.sizes) - 1

    def finish(self, output: Any) -> None:
        if not isinstance(output, Tensor) or id(output) not in self.at:
            raise UnsupportedError("it does not return one tensor")
        if self.sizes[self.at[id(output)]]:
            raise UnsupportedError(
                "it was built without global pooling, and the size of the map that it returns would change"
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func)).strip("_").removesuffix("_")
        tensors = list(_tensors([*args, *kwargs.values()]))
        nodes = [self.at.get(id(tensor)) for tensor in tensors]  # before an operation in place
        # a norm keeps the shape, which torch computes slowly
        result = torch.empty_like(args[0]) if args and name in NORMS else func(*args, **kwargs)
        if name in _IGNORED:
            return result
        outputs = list(_tensors(result))
        if all(node is None for node in nodes):
            if unseen := [tensor for tensor in tensors if id(tensor) not in self.constants]:
                raise UnsupportedError(f"{self.place} computes a tensor {list(unseen[0].shape)} by unknown means")
            self.constants.update(map(id, outputs))
            self.alive += outputs
            self._constant_cost(name, tensors, outputs)
            return result
        for output in outputs:
            self._record(name, tensors, [-1 if node is None else node for node in nodes], output, args, kwargs)
        return result

    @property
    def place(self) -> str:
        return self.stack[-1][0] if self.stack else "the model"

    @property
    def described(self) -> str:
        return f"{self.place} ({type(self.stack[-1][1]).__name__})" if self.stack else "the model"

    def _record(  # noqa: PLR0917
        self, name: str, tensors: Sequence[Tensor], nodes: Sequence[int], output: Tensor, args: Any, kwargs: Any
    ) -> None:
        name = name[1:] if name in ("iadd", "isub", "imul", "idiv", "itruediv", "radd", "rmul", "ipow") else name
        known = tuple(node for node in nodes if node >= 0)
        maps = tuple(node for node in known if self.sizes[node])
        if not maps:
            self.put(output, Node(self.place, known, cost=self._fixed_cost(name, tensors, nodes, output)), None)
        elif name in ("conv2d", "max_pool2d", "avg_pool2d", "max_pool2d_with_indices"):
            self._window(name, tensors, maps[0], output, args, kwargs)
        elif name == "pad":
            self._pad(maps[0], output, args, kwargs)
        elif name in ("adaptive_avg_pool2d", "adaptive_max_pool2d", "adaptive_max_pool2d_with_indices"):
            if math.prod(output.shape[2:]) != 1:
                raise UnsupportedError(f"{self.described} pools to a map of fixed size")
            self.put(output, Node(self.place, known), None)
        elif name == "linear":
            self._linear(tensors, nodes, output)
        elif name in _PRODUCTS or name == "scaled_dot_product_attention":
            self._product(name, tensors, nodes, output)
        elif name in _BY_POSITION or name in _REDUCTIONS:
            self._by_position(name, tensors, nodes, output, kwargs.get("dim", args[1] if len(args) > 1 else None))
        else:
            raise UnsupportedError(f"{self.described} calls {name}, whose effect on a map of another size is not known")

    def _by_position(
        self, name: str, tensors: Sequence[Tensor], nodes: Sequence[int], output: Tensor, dim: Any
    ) -> None:
        known = tuple(node for node in nodes if node >= 0)
        maps = tuple(node for node in known if self.sizes[node])
        like = next((node for node in maps if _place(output.shape, self.sizes[node])), None)
        if like is None:
            if name not in _REDUCTIONS or not self._over_all(tensors[0], maps[0], dim):
                raise UnsupportedError(f"{self.described} takes maps apart: {name} to {list(output.shape[1:])}")
            self.put(output, Node(self.place, known), None)
            return
        size, place = self.sizes[like], _place(output.shape, self.sizes[like])
        assert place is not None
        same = tuple(node for node in maps if self.sizes[node] == size)
        index = self.put(output, Node(self.place, known, same, passes=name in _BY_POSITION), size)
        behind = output.ndim - place[0]
        for tensor, node in zip(tensors, nodes, strict=True):
            lines = tensor.shape[-behind : tensor.ndim + place[1] - behind]
            if node < 0 and name not in ("cat", "stack") and tensor.ndim >= behind and math.prod(lines) != 1:
                self.trace.fixed[index] = f"{self.described} adds or multiplies a value for each position"
        if len(same) != len(maps):
            raise UnsupportedError(f"{self.described} combines maps of different sizes")

    def _over_all(self, tensor: Tensor, node: int, dim: Any) -> bool:
        """Whether a reduction over `dim` is over all positions of a map."""
        place = _place(tensor.shape, self.sizes[node])
        dims = range(tensor.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
        return place is not None and set(range(place[0], sum(place))) <= {each % tensor.ndim for each in dims}

    def _window(  # noqa: PLR0917
        self, name: str, tensors: Sequence[Tensor], node: int, output: Tensor, args: Any, kwargs: Any
    ) -> None:
        names = {
            "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
            "avg_pool2d": ("input", "kernel_size", "stride", "padding", "ceil_mode"),
        }.get(name, ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode"))
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        same = bool(self.stack) and type(self.stack[-1][1]).__name__.endswith("Same")
        convolution = name == "conv2d"
        kernel = tuple(given["weight"].shape[2:]) if convolution else _pair(given["kernel_size"])
        stride = _pair(given.get("stride") or (1 if convolution else kernel))
        padding: Any = given.get("padding", 0)
        if padding == "same" and stride == (1, 1):
            same = True
        elif isinstance(padding, str):
            padding = 0
        size = self.sizes[node]
        window = Window(
            self._block_name,
            kernel,
            stride,
            (0, 0) if same else _pair(padding),
            _pair(given.get("dilation", 1)),
            bool(given.get("ceil_mode", False)),
            same,
        )
        assert size is not None
        found = window.output(size)
        if found != tuple(output.shape[2:]):
            raise UnsupportedError(f"{self.described} makes a map of {tuple(output.shape[2:])}, not of {found}")
        if any(self.at.get(id(tensor)) is not None and tensor is not given["input"] for tensor in tensors):
            raise UnsupportedError(f"{self.described} has a kernel that depends on the image")
        index = len(self.sizes)
        cost = given["weight"].numel() if convolution else 0
        plain = window.kernel == window.stride == (1, 1) and window.padding == (0, 0)
        self.put(output, Node(self.place, (node,), (node,), None if plain else window, cost, (index,)), found)

    def _pad(self, node: int, output: Tensor, args: Any, kwargs: Any) -> None:
        size = self.sizes[node]
        assert size is not None
        if self.stack and type(self.stack[-1][1]).__name__.endswith("Same"):
            self.put(output, Node(self.place, (node,), (node,)), size)
            return
        given = {**dict(zip(("input", "pad", "mode"), args, strict=False)), **kwargs}
        amounts, mode = list(given["pad"]), given.get("mode", "constant")
        if mode == "circular":
            raise UnsupportedError(f"{self.described} pads with lines of the other side of the map")
        where = _place(output.shape, size)
        if where and where == _place(given["input"].shape, size):  # channels are added
            self.put(output, Node(self.place, (node,), (node,)), size)
        elif len(amounts) == 4 and min(amounts) >= 0:  # noqa: PLR2004
            rows, columns = sum(amounts[2:]), sum(amounts[:2])
            # an odd number of lines as a kernel of 2 with one more line
            window = Window(
                self._block_name, (1 + rows % 2, 1 + columns % 2), padding=((rows + 1) // 2, (columns + 1) // 2)
            )
            self.put(output, Node(self.place, (node,), (node,), window), window.output(size))
        else:
            raise UnsupportedError(f"{self.described} pads by {amounts}")

    def _linear(self, tensors: Sequence[Tensor], nodes: Sequence[int], output: Tensor) -> None:
        node, size = nodes[0], self.sizes[nodes[0]] if nodes[0] >= 0 else None
        if size is None or not _place(output.shape, size):
            raise UnsupportedError(f"{self.described} mixes positions by a matrix of fixed size")
        rows, rest = divmod(output.numel() // output.shape[-1] // _BATCH, math.prod(size))
        assert not rest
        self.put(output, Node(self.place, (node,), (node,), None, rows * tensors[1].numel(), (node,)), size)

    def _product(self, name: str, tensors: Sequence[Tensor], nodes: Sequence[int], output: Tensor) -> None:
        """Matrix products and attention; the positions of maps can be rows, columns and what is summed over."""
        if name == "scaled_dot_product_attention":
            if len(tensors) > 3:  # noqa: PLR2004 (a mask)
                raise UnsupportedError(f"{self.described} has attention with a mask")
            (query, key, value), (first, second, _) = tensors, nodes
            scores = (*query.shape[:-1], key.shape[-2])
            node = self._product_node((*query.shape,), first, key.shape[-2], second, scores)
            other = self._product_node(scores, first, value.shape[-1], second, tuple(output.shape))
            if other.areas != node.areas:
                raise UnsupportedError(f"{self.described} has an unknown kind of attention")
            known = tuple(each for each in nodes if each >= 0)
            found = Node(self.place, known, other.like, None, node.cost + other.cost, node.areas)
        else:
            (left, right), (first, second) = tensors[:2], nodes[:2]
            found = self._product_node((*left.shape,), first, right.shape[-1], second, tuple(output.shape))
        size = self.sizes[found.like[0]] if found.like else None
        self.put(output, found, size)

    def _product_node(
        self, left: tuple[int, ...], first: int, columns: int, second: int, shape: tuple[int, ...]
    ) -> Node:
        cost = math.prod(left[:-2]) // _BATCH
        areas: list[int] = []
        sides = [first, second]
        areas_of = {side: math.prod(self.sizes[side] or (0,)) if side >= 0 else 0 for side in sides}
        seen = set()
        for length, candidates in ((left[-2], [first]), (left[-1], [second, first]), (columns, [second])):
            owners = [side for side in candidates if areas_of[side] and length == areas_of[side]]
            seen.update(owners)
            if owners:
                areas.append(owners[0])
            else:
                cost *= length
        for side in dict.fromkeys(sides):
            if areas_of[side] and side not in seen:
                if cost % areas_of[side]:
                    raise UnsupportedError(f"{self.described} has a matrix product that takes maps apart")
                cost //= areas_of[side]
                areas.append(side)
        like = next((s for s in sides if s >= 0 and self.sizes[s] and _place(shape, self.sizes[s])), None)
        known = tuple(side for side in sides if side >= 0)
        return Node(self.place, known, () if like is None else (like,), None, cost, tuple(areas))

    def _constant_cost(self, name: str, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Record the cost of an operation that does not depend on the image, such as positions by a convolution."""
        if name not in ("conv2d", "linear", *_PRODUCTS):
            return
        shape = cast(Grid, tuple(outputs[0].shape[2:]))
        node = next((index for index in range(len(self.sizes) - 1, -1, -1) if self.sizes[index] == shape), None)
        if name != "conv2d" or node is None:
            raise UnsupportedError(f"{self.described} calls {name} on values that do not depend on the image")
        self.trace.nodes.append(Node(self.place, (node,), (node,), None, tensors[1].numel(), (node,)))
        self.sizes.append(shape)

    def _fixed_cost(self, name: str, tensors: Sequence[Tensor], nodes: Sequence[int], output: Tensor) -> int:
        """Multiply-accumulates of one image of an operation without maps."""
        if name == "linear":
            return output.numel() // output.shape[-1] // _BATCH * tensors[1].numel()
        if name in ("conv1d", "conv2d"):
            return tensors[1].numel() * math.prod(output.shape[2:])
        if name in _PRODUCTS:
            return output.numel() // _BATCH * tensors[0].shape[-1]
        if name in _BY_POSITION or name in _REDUCTIONS or name.startswith("adaptive"):
            return 0
        raise UnsupportedError(f"{self.described} calls {name}, whose cost is not known")

    @property
    def _block_name(self) -> str:
        """The block or the part of the network that runs."""
        names = [name for name, _, _ in self.stack if name]
        return next((name for name in names if self.is_block(name)), names[0] if names else "the model")


def _place(shape: Sequence[int], size: Grid | None) -> tuple[int, int] | None:
    """Where in a shape the positions of a map are: the first dimension and the number of dimensions."""
    if size is None:
        return None
    for index in range(1, len(shape)):
        if tuple(shape[index : index + 2]) == size:
            return index, 2
        if shape[index] == math.prod(size):
            return index, 1
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _pair(value: Any) -> Grid:
    if isinstance(value, int):
        return value, value
    return (int(value[0]), int(value[-1]))


def block_names(pattern: str) -> Callable[[str], bool]:
    """Whether a name fits a pattern such as `stages.*.blocks.*`, where `*` stands for one part of the name."""
    expression = re.compile("|".join(re.escape(each).replace(r"\*", r"[^.]+") for each in pattern.split()))
    return lambda name: expression.fullmatch(name) is not None
