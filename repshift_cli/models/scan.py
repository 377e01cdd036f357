"""The selective scan of Mamba (arXiv 2312.00752, section 3) in plain torch operations.

    s_t = exp(delta_t A) s_{t-1} + (delta_t u_t) B_t,    y_t = <C_t, s_t>,    s_{-1} = 0

Nothing here divides by a product of decays: every factor lies in [0, 1], so a state that has died out is exactly 0.
"""

from __future__ import annotations

import math
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
# Blocks: for the CPU. What is vectorised over a block of tokens stays in the cache. One fused operation for each token
# is left, which is less work than the second level that would take its place. Tokens come first, so that a token is one
# contiguous piece; and memory is used again, since a fresh page costs more than the work on it.

_SLICE = 1 << 15  # elements of the states of one token, enough to hide what starting an operation costs
_BLOCK = 1 << 17  # elements of the states of one block; two such arrays in float32 fit the L2 cache of a core
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


class _Group:
    """Some of the K B rows, and the decays and states of one block of their tokens."""

    def __init__(self, inputs: _Operands, blocking: _Blocking) -> None:
        u, delta, a, b, c = inputs
        rates = a.mT.contiguous().unsqueeze(1).expand(-1, u.shape[1], -1, -1)  # strided, it would not be vectorised
        self._inputs = [tensor.flatten(0, 1) for tensor in (u, delta, rates, b, c)]
        count, length, width, size = _size(blocking.rows[0]), u.shape[2], u.shape[3], a.shape[-1]
        self.drive = u.new_empty(length, count, 1, width)  # delta u
        self.b = u.new_empty(length, count, size, 1)
        self.c = u.new_empty(length, count, 1, size)
        step = _size(blocking.tokens[0])
        self.decay = u.new_empty(step, count, size, width)
        self.states = u.new_empty(step + 1, count, size, width)  # the first is the state before the block
        self.start = self.states[0]
        self._steps = list(zip(self.states[1:], self.decay, self.states[:-1], strict=True))

    def load(self, rows: slice) -> None:
        """Take these rows, with a state of zero."""
        u, delta, self.rates, b, c = (tensor[rows] for tensor in self._inputs)  # rates: [rows, N, E]
        self.delta = delta.transpose(0, 1).unsqueeze(-2)  # [L, rows, 1, E]
        torch.mul(self.delta, u.transpose(0, 1).unsqueeze(-2), out=self.drive)
        self.b.copy_(b.transpose(0, 1).unsqueeze(-1))
        self.c.copy_(c.transpose(0, 1).unsqueeze(-2))
        self.start.zero_()

    def fill(self, span: slice) -> tuple[Tensor, Tensor]:
        """Decays and states of these tokens, `[tokens, rows, N, E]`, from the state in `start`."""
        count = _size(span)
        decay, states = self.decay[:count], self.states[1 : count + 1]
        torch.mul(self.delta[span], self.rates, out=decay)
        torch.exp(decay, out=decay)
        torch.mul(self.drive[span], self.b[span], out=states)
        for state, step, before in self._steps[:count]:
            state.addcmul_(step, before)
        return decay, states


def _blocked_scan(inputs: _Operands, starts: Tensor | None = None) -> Tensor:
    """y; the state before each block goes to `starts`, `[blocks, K B, N, E]`, where that is given."""
    y = inputs.u.new_empty(inputs.u.shape)
    blocking = _Blocking.of(inputs)
    group = _Group(inputs, blocking)
    products = torch.empty_like(group.drive)
    for rows in blocking.rows:
        group.load(rows)
        for index, span in enumerate(blocking.tokens):
            if starts is not None:
                starts[index, rows] = group.start
            _, states = group.fill(span)
            _multiply(group.c[span], states, out=products[span])
            group.start.copy_(states[-1])
        y.flatten(0, 1)[rows] = products.squeeze(-2).transpose(0, 1)
    return y


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """`[T, rows, I, J]` times `[T, rows, J, M]`, all contiguous but for the order of the last two."""
    torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out=out.flatten(0, 1))


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
    gradients = _Operands(u, delta, inputs.a.new_empty(rates_shape), b, c)
    group = _Group(inputs, blocking)
    adjoint = _GroupGradients(group)
    for rows in blocking.rows:
        group.load(rows)
        adjoint.load(grad.flatten(0, 1)[rows])
        for index, span in reversed(list(enumerate(blocking.tokens))):
            group.start.copy_(starts[index, rows])
            adjoint.add(span, *group.fill(span))
        adjoint.store(inputs.u.flatten(0, 1)[rows], [tensor.flatten(0, 1)[rows] for tensor in gradients])
    return gradients._replace(a=gradients.a.sum(1).mT)


class _GroupGradients:
    """The gradients of a group: with g_t that of s_t, g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}."""

    def __init__(self, group: _Group) -> None:
        self._group = group
        self._y, self._drive, self._delta = (torch.empty_like(group.drive) for _ in range(3))
        self._b, self._c = torch.empty_like(group.b), torch.empty_like(group.b)
        self._rates, self._carry = torch.empty_like(group.start), torch.empty_like(group.start)
        self._adjoint = torch.empty_like(group.decay)

    def load(self, y: Tensor) -> None:
        """Start anew with the gradient of y, `[rows, L, E]`."""
        self._y.copy_(y.transpose(0, 1).unsqueeze(-2))
        self._rates.zero_()
        self._carry.zero_()

    def add(self, span: slice, decay: Tensor, states: Tensor) -> None:
        """One block, from its decays and states; the decays are overwritten. Blocks come last to first."""
        group, y = self._group, self._y[span]
        adjoint = self._adjoint[: _size(span)]
        torch.mul(y, group.c[span].mT, out=adjoint)
        self._accumulate(adjoint, decay)
        _multiply(states, y.mT, out=self._c[span])
        _multiply(adjoint, group.drive[span].mT, out=self._b[span])
        _multiply(group.b[span].mT, adjoint, out=self._drive[span])
        # The gradient of the exponent delta A, of which both factors have their share.
        exponent = decay.mul_(adjoint).mul_(group.states[: _size(span)])
        torch.mul(exponent, group.rates, out=adjoint)
        torch.sum(adjoint, -2, keepdim=True, out=self._delta[span])
        for step, delta in zip(exponent, group.delta[span], strict=True):
            self._rates.addcmul_(step, delta)

    def _accumulate(self, adjoint: Tensor, decay: Tensor) -> None:
        """The recurrence backwards in `adjoint`; the carry is what this block adds to the one before it."""
        steps, decays = adjoint.unbind(0), decay.unbind(0)
        steps[-1].add_(self._carry)
        for index in reversed(range(len(steps) - 1)):
            steps[index].addcmul_(decays[index + 1], steps[index + 1])
        torch.mul(decays[0], steps[0], out=self._carry)

    def store(self, u: Tensor, gradients: list[Tensor]) -> None:
        """Write the gradients of u, delta, A (transposed, of each row), B and C; tokens second, as in the arguments."""
        grad_u, grad_delta, grad_rates, grad_b, grad_c = gradients
        drive, delta, b, c = (
            tensor.flatten(-2).transpose(0, 1) for tensor in (self._drive, self._delta, self._b, self._c)
        )
        torch.mul(drive, self._group.delta.squeeze(-2).transpose(0, 1), out=grad_u)
        torch.addcmul(delta, drive, u, out=grad_delta)
        grad_rates.copy_(self._rates)
        grad_b.copy_(b)
        grad_c.copy_(c)
