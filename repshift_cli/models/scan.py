"""The selective scan of Mamba (arXiv 2312.00752, section 3) in plain torch operations.

    s_t = exp(delta_t A) s_{t-1} + (delta_t u_t) B_t,    y_t = <C_t, s_t>,    s_{-1} = 0

Nothing here divides by a product of decays: every factor lies in [0, 1], so a state that has died out is exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["selective_scan", "sequential_scan"]


class _Operands(NamedTuple):
    """The arguments of `selective_scan`, in one dtype."""

    u: Tensor
    delta: Tensor
    a: Tensor
    b: Tensor
    c: Tensor


def selective_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """K independent scans over L >= 1 tokens, such as the two directions of Vision Mamba (arXiv 2401.09417).

    Memory is linear in L. The gradient is defined once; a gradient of the gradient is not, outside graphs.

    Args:
        u: `[K, B, L, E]`, any floating dtype.
        delta: `[K, B, L, E]`, positive.
        a: `[K, E, N]`, negative.
        b, c: `[K, B, L, N]`.

    Returns:
        y, `[K, B, L, E]` in the dtype of `u`, computed in float32 (float64 where `u` is float64).
    """
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    inputs = _Operands(*(tensor.to(dtype) for tensor in (u, delta, a, b, c)))
    # Blocks pay where there is a cache to stay in; a graph or another device wants few and large operations.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or u.device.type != "cpu" or not u.numel():
        y = _two_level_scan(inputs)
    elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        y = _BlockedScan.apply(*inputs)
    else:
        y = _blocked_scan(inputs)
    return y.to(u.dtype)


def sequential_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The recurrence token by token, in the dtype of its arguments: the reference. Shapes as `selective_scan`."""
    scans, batch, _, width = u.shape
    state = u.new_zeros(scans, batch, width, a.shape[-1])
    outputs = []
    for u_t, delta_t, b_t, c_t in zip(u.unbind(2), delta.unbind(2), b.unbind(2), c.unbind(2), strict=True):
        decay = torch.exp(delta_t.unsqueeze(-1) * a.unsqueeze(1))
        state = decay * state + (delta_t * u_t).unsqueeze(-1) * b_t.unsqueeze(-2)
        outputs.append((state * c_t.unsqueeze(-2)).sum(-1))
    return torch.stack(outputs, dim=2)


# ---------------------------------------------------------------------------------------------------------------------
# Two levels: for graphs and for devices where starting an operation is dear


def _two_level_scan(inputs: _Operands) -> Tensor:
    """About 2 sqrt(L) steps: inside the chunks, all chunks at once, and then from chunk to chunk.

    The state after position p of a chunk is `local_p + decay_p * start`: what the chunk alone would give, plus what is
    left of the state before the chunk.
    """
    u, delta, a, b, c = inputs
    length = u.shape[2]
    chunk = math.isqrt(length - 1) + 1
    rates = a.mT.contiguous()[:, None, None]  # [K, 1, 1, N, E]
    local: list[Tensor] = []
    decays: list[Tensor] = []
    for drive_p, delta_p, b_p in zip(*(_positions(tensor, chunk) for tensor in (delta * u, delta, b)), strict=True):
        decay = torch.exp(delta_p.unsqueeze(-2) * rates)  # [K, B, chunks, N, E]
        drive = drive_p.unsqueeze(-2) * b_p.unsqueeze(-1)
        local.append(torch.addcmul(drive, decay, local[-1]) if local else drive)
        decays.append(decay * decays[-1] if decays else decay)
    start = _chunk_starts(local[-1], decays[-1])
    states = (torch.addcmul(state, decay, start) for state, decay in zip(local, decays, strict=True))
    outputs = [(state * c_p.unsqueeze(-1)).sum(-2) for state, c_p in zip(states, _positions(c, chunk), strict=True)]
    return torch.stack(outputs, dim=3).flatten(2, 3)[:, :, :length]


def _positions(tensor: Tensor, chunk: int) -> tuple[Tensor, ...]:
    """`[K, B, L, X]` as one `[K, B, chunks, X]` for each position in a chunk; zeros behind the last token.

    A token with delta = 0 leaves the state as it is.
    """
    missing = -tensor.shape[2] % chunk
    return functional.pad(tensor, (0, 0, 0, missing)).unflatten(2, (-1, chunk)).unbind(3)


def _chunk_starts(ends: Tensor, decays: Tensor) -> Tensor:
    """The state before each chunk; all `[K, B, chunks, N, E]`."""
    state = torch.zeros_like(ends[:, :, 0])
    starts = [state]
    for end, decay in zip(ends.unbind(2)[:-1], decays.unbind(2)[:-1], strict=True):
        state = torch.addcmul(end, decay, state)
        starts.append(state)
    return torch.stack(starts, dim=2)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks: for the CPU. The states of some rows and a few tokens stay in the cache, and within a block the scan is an
# associative one. Rows come first, so that a thread works on the same rows, hence in its own cache, throughout.

_SLICE = 3 << 13  # elements of the states of one token, enough to hide what starting an operation costs
_BLOCK = 9 << 14  # elements of the states of one block; two such arrays in float32 fit the L2 cache of a core
_MOST_THREADS = 8  # each has its part of a block; beyond this the buffers would be larger than they are worth


class _Blocking(NamedTuple):
    """How the K B rows and the L tokens are cut."""

    rows: list[slice]
    tokens: list[slice]

    @classmethod
    def of(cls, inputs: _Operands) -> _Blocking:
        scans, batch, length, width = inputs.u.shape
        threads = min(torch.get_num_threads(), _MOST_THREADS)
        state = width * inputs.a.shape[-1]
        rows = _equal_spans(scans * batch, max(1, threads * _SLICE // state))
        step = min(length, max(1, threads * _BLOCK // (_size(rows[0]) * state)))
        return cls(rows, [slice(first, min(first + step, length)) for first in range(0, length, step)])


def _equal_spans(total: int, most: int) -> list[slice]:
    """Spans of one size, at most `most`, that cover `total`; the last may overlap, and does that work again."""
    count = -(-total // most)
    size = -(-total // count)
    firsts = (min(index * size, total - size) for index in range(count))
    return [slice(first, first + size) for first in firsts]


def _size(span: slice) -> int:
    return int(span.stop - span.start)


def _recurrence(decay: Tensor, values: Tensor, *, backwards: bool = False) -> list[Callable[[], Tensor]]:
    """The operations that turn `values` into the states of v_t += decay_t v_{t-1}, in place; both `[rows, T, N, E]`.

    An associative scan (Blelloch 1990, section 1.4): neighbours are joined in pairs, the pairs are solved the same way,
    and the others follow from the pair before them. About 3 log2 T operations, on less than 3 T tokens in all.
    Backwards it is v_t += decay_t v_{t+1}. The decays are overwritten; that of the first token is not used.
    """
    count = values.shape[1]
    if count == 1:
        return []
    step = 1 if backwards else -1
    paired, others, joined = (_every_second(first, count, backwards) for first in (1, 2, 3))
    pairs = decay[:, paired]
    join = partial(torch.mul, decay[:, joined], decay[:, _moved(joined, step)])
    return [
        _add(decay, values, paired, step),
        partial(join, out=pairs[:, :-1] if backwards else pairs[:, 1:]),
        *_recurrence(pairs, values[:, paired], backwards=backwards),
        _add(decay, values, others, step),
    ]


def _add(decay: Tensor, values: Tensor, into: slice, step: int) -> Callable[[], Tensor]:
    return partial(values[:, into].addcmul_, decay[:, into], values[:, _moved(into, step)])


def _every_second(first: int, count: int, backwards: bool) -> slice:
    """Of `count` tokens these: first, first + 2, ..., counted from the end where it goes backwards."""
    number = (count - first + 1) // 2
    start = count - first - 2 * number + 1 if backwards else first
    return slice(start, start + 2 * number, 2)


def _moved(span: slice, step: int) -> slice:
    return slice(span.start + step, span.stop + step, span.step)


class _Group:
    """Some of the K B rows, and the decays and states of one block of their tokens."""

    def __init__(self, inputs: _Operands, blocking: _Blocking) -> None:
        u, delta, a, b, c = inputs
        rates = a.mT.contiguous().unsqueeze(1).expand(-1, u.shape[1], -1, -1)  # strided, it would not be vectorised
        self._inputs = [
            tensor.flatten(0, 1)
            for tensor in (u.unsqueeze(-2), delta.unsqueeze(-2), rates.unsqueeze(2), b.unsqueeze(-1), c.unsqueeze(-2))
        ]
        count, step = _size(blocking.rows[0]), _size(blocking.tokens[0])
        self.decay, self.states = (u.new_empty(count, step, a.shape[-1], u.shape[3]) for _ in range(2))
        self.start = torch.empty_like(self.states[:, 0])  # the state before the block
        self._steps = {size: self._scan(size) for size in {*map(_size, blocking.tokens)}}

    def _scan(self, count: int) -> list[Callable[[], Tensor]]:
        decay, states = self.decay[:, :count], self.states[:, :count]
        return [partial(states[:, 0].addcmul_, decay[:, 0], self.start), *_recurrence(decay, states)]

    def load(self, rows: slice) -> None:
        """Take these rows, with a state of zero: u, delta `[rows, L, 1, E]`, b `[rows, L, N, 1]`, c its transpose."""
        self.u, self.delta, self.rates, self.b, self.c = (tensor[rows] for tensor in self._inputs)
        self.start.zero_()

    def fill(self, span: slice) -> Tensor:
        """The states of these tokens, `[rows, tokens, N, E]`, from the state in `start`."""
        states = self.states[:, : _size(span)]
        self.decays(span)  # where the scan works on them; it overwrites them
        torch.mul(self.drive(span), self.b[:, span], out=states)
        for step in self._steps[_size(span)]:
            step()
        return states

    def decays(self, span: slice) -> Tensor:
        """The decay of the state before each of these tokens, `[rows, tokens, N, E]`."""
        decay = self.decay[:, : _size(span)]
        torch.mul(self.delta[:, span], self.rates, out=decay)
        return torch.exp(decay, out=decay)

    def drive(self, span: slice) -> Tensor:
        """delta u of these tokens, `[rows, tokens, 1, E]`."""
        return self.delta[:, span] * self.u[:, span]


def _blocked_scan(inputs: _Operands, starts: Tensor | None = None) -> Tensor:
    """y; the state before each block goes to `starts`, `[blocks, K B, N, E]`, where that is given."""
    y = inputs.u.new_empty(inputs.u.shape)
    blocking = _Blocking.of(inputs)
    group = _Group(inputs, blocking)
    for rows in blocking.rows:
        group.load(rows)
        for index, span in enumerate(blocking.tokens):
            if starts is not None:
                starts[index, rows] = group.start
            states = group.fill(span)
            y.flatten(0, 1)[rows, span] = (group.c[:, span] @ states).squeeze(-2)
            group.start.copy_(states[:, -1])
    return y


class _BlockedScan(torch.autograd.Function):
    """The scan with its gradient, which is the same recurrence backwards.

    Only the state before each block is kept; the states inside are computed again, which is cheaper than fresh memory.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        operands = _Operands(*inputs)
        scans, batch, _, width = operands.u.shape
        ctx.blocking = _Blocking.of(operands)
        starts = operands.u.new_empty(len(ctx.blocking.tokens), scans * batch, operands.a.shape[-1], width)
        ctx.save_for_backward(*inputs, starts)
        return _blocked_scan(operands, starts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        *inputs, starts = ctx.saved_tensors
        return _blocked_gradients(_Operands(*inputs), grad, ctx.blocking, starts)


def _blocked_gradients(inputs: _Operands, grad: Tensor, blocking: _Blocking, starts: Tensor) -> _Operands:
    """The gradients of the inputs, from that of y."""
    rates_shape = (*inputs.u.shape[:2], *inputs.a.mT.shape[1:])  # [K, B, N, E]
    u, delta, _, b, c = (tensor.new_empty(tensor.shape) for tensor in inputs)
    gradients = _Operands(u, delta, inputs.a.new_zeros(rates_shape), b, c)
    group = _Group(inputs, blocking)
    adjoint = _GroupGradients(group, blocking)
    for rows in blocking.rows:
        group.load(rows)
        adjoint.load(grad.flatten(0, 1)[rows], _Operands(*(tensor.flatten(0, 1)[rows] for tensor in gradients)))
        for index, span in reversed(list(enumerate(blocking.tokens))):
            group.start.copy_(starts[index, rows])
            adjoint.add(span)
    return gradients._replace(a=gradients.a.sum(1).mT)


class _GroupGradients:
    """The gradients of a group: with g_t that of s_t, g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}."""

    def __init__(self, group: _Group, blocking: _Blocking) -> None:
        self._group = group
        self._carry = torch.empty_like(group.start)
        self._adjoint, self._decay = torch.empty_like(group.decay), torch.empty_like(group.decay)
        self._steps = {
            size: _recurrence(self._decay[:, 1:size], self._adjoint[:, :size], backwards=True)
            for size in {*map(_size, blocking.tokens)}
        }

    def load(self, y: Tensor, into: _Operands) -> None:
        """Start anew with the gradient of y, `[rows, L, E]`, and with where to put those of the rows' arguments."""
        self._y, self._into = y.unsqueeze(-2), into
        into.a.zero_()  # rows that overlap come twice
        self._carry.zero_()

    def add(self, span: slice) -> None:
        """One block, from the state in the group's `start`. Blocks come last to first."""
        group, into, y = self._group, self._into, self._y[:, span]
        states, decay = group.fill(span), group.decays(span)
        adjoint = self._accumulate(torch.mul(y, group.c[:, span].mT, out=self._adjoint[:, : _size(span)]), decay)
        into.c[:, span] = (states @ y.mT).squeeze(-1)
        into.b[:, span] = (adjoint @ group.drive(span).mT).squeeze(-1)
        drive = (group.b[:, span].mT @ adjoint).squeeze(-2)
        torch.mul(drive, group.delta[:, span].squeeze(-2), out=into.u[:, span])
        # The gradient of the exponent delta A, of which both factors have their share.
        exponent = decay.mul_(adjoint)
        exponent[:, 0].mul_(group.start)
        exponent[:, 1:].mul_(states[:, :-1])
        shares = torch.mul(exponent, group.rates, out=adjoint).sum(-2)
        torch.addcmul(shares, drive, group.u[:, span].squeeze(-2), out=into.delta[:, span])
        into.a.add_(exponent.mul_(group.delta[:, span]).sum(1))

    def _accumulate(self, adjoint: Tensor, decay: Tensor) -> Tensor:
        """The recurrence backwards in `adjoint`; the carry is what this block adds to the one before it."""
        count = adjoint.shape[1]
        self._decay[:, :count].copy_(decay)  # the scan overwrites them
        adjoint[:, -1].add_(self._carry)
        for step in self._steps[count]:
            step()
        torch.mul(decay[:, 0], adjoint[:, 0], out=self._carry)
        return adjoint
