"""The selective scan of Mamba (arXiv 2312.00752, section 3) in plain torch operations.

    s_t = exp(delta_t A) s_{t-1} + (delta_t u_t) B_t,    y_t = <C_t, s_t>,    s_{-1} = 0

No code divides by a product of decays: all factors lie in [0, 1], so states underflow to 0 exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


class _Operands(NamedTuple):
    """The arguments of `selective_scan`, in one dtype."""

    u: Tensor
    delta: Tensor
    a: Tensor
    b: Tensor
    c: Tensor


def selective_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """K independent scans over L >= 1 tokens, such as the two directions of Vision Mamba (arXiv 2401.09417).

    Memory is linear in L. The backward pass stores the arguments only and recomputes the states.

    Args:
        u, delta: `[K, B, L, E]`, any floating dtype; `delta` is positive.
        a: `[K, E, N]`, negative.
        b, c: `[K, B, L, N]`.

    Returns y, `[K, B, L, E]` in the dtype of `u`, computed in float32 (float64 if `u` is float64).
    """
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    inputs = _Operands(*(tensor.to(dtype) for tensor in (u, delta, a, b, c)))
    # blocks use the CPU cache; graphs and other devices need few, large operations
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or u.device.type != "cpu" or not u.numel():
        y = _two_level_scan(inputs)
    elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        y = checkpoint(_two_level_scan, inputs, use_reentrant=False, preserve_rng_state=False)
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


def _two_level_scan(inputs: _Operands) -> Tensor:
    """For graphs and GPUs: about 2 sqrt(L) steps, within all chunks at once, then from chunk to chunk.

    The state at position p of a chunk is `local_p + decay_p * start`: the state of the chunk alone, plus the decayed
    state before the chunk.
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
    """`[K, B, L, X]` as one `[K, B, chunks, X]` for each position in a chunk, padded with zeros (no effect)."""
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


# The blocked scan is for the CPU: the states of some rows and a few tokens stay in the cache, and within a block the
# scan is associative. Rows come first, so that a thread works on the same rows, in its own cache.

_SLICE = 3 << 13  # elements of the states of one token, enough to hide the overhead of an operation
_BLOCK = 9 << 14  # elements of the states of one block; two such float32 arrays fit the L2 cache of a core
_MOST_THREADS = 8  # limits the size of the buffers


def _equal_spans(total: int, most: int) -> list[slice]:
    """Spans of one size, at most `most`, that cover `total`; the last may overlap."""
    count = -(-total // most)
    size = -(-total // count)
    firsts = (min(index * size, total - size) for index in range(count))
    return [slice(first, first + size) for first in firsts]


def _recurrence(decay: Tensor, values: Tensor) -> list[Callable[[], Tensor]]:
    """The operations that turn `values` into the states of v_t += decay_t v_{t-1}, in place; both `[rows, T, N, E]`.

    An associative scan (Blelloch 1990, section 1.4): neighbours are joined in pairs, the pairs are solved recursively,
    and the others follow from the pair before them. About 3 log2 T operations, on less than 3 T tokens in total.
    The decays are overwritten; that of the first token is not used.
    """
    if values.shape[1] == 1:
        return []
    pairs = decay[:, 1::2]
    return [
        _add(decay, values, 1),
        partial(torch.mul, decay[:, 3::2], decay[:, 2:-1:2], out=pairs[:, 1:]),
        *_recurrence(pairs, values[:, 1::2]),
        _add(decay, values, 2),
    ]


def _add(decay: Tensor, values: Tensor, first: int) -> Callable[[], Tensor]:
    """The operation that adds the decayed state before it to every second token from `first` on."""
    return partial(values[:, first::2].addcmul_, decay[:, first::2], values[:, first - 1 : -1 : 2])


def _blocked_scan(inputs: _Operands) -> Tensor:
    u, delta, a, b, c = inputs
    batch, length, width = u.shape[1:]
    states_per_token = width * a.shape[-1]
    threads = min(torch.get_num_threads(), _MOST_THREADS)
    row_spans = _equal_spans(u.shape[0] * batch, max(1, threads * _SLICE // states_per_token))
    rows = row_spans[0].stop
    step = min(length, max(1, threads * _BLOCK // (rows * states_per_token)))

    # row by row: u, delta [rows, L, 1, E], rates [rows, 1, N, E], b [rows, L, N, 1], c its transpose
    rates = a.mT.contiguous().unsqueeze(1).expand(-1, batch, -1, -1)  # strided, it would not be vectorised
    shaped = (u.unsqueeze(-2), delta.unsqueeze(-2), rates.unsqueeze(2), b.unsqueeze(-1), c.unsqueeze(-2))
    operands = [tensor.flatten(0, 1) for tensor in shaped]
    decay, states = (u.new_empty(rows, step, a.shape[-1], width) for _ in range(2))
    start = torch.empty_like(states[:, 0])  # the state before the block
    recurrences = {size: _recurrence(decay[:, :size], states[:, :size]) for size in (step, length % step) if size}

    y = u.new_empty(u.shape)
    for span in row_spans:
        u_rows, delta_rows, rates, b_rows, c_rows = (tensor[span] for tensor in operands)
        start.zero_()
        for first in range(0, length, step):
            size = min(step, length - first)
            tokens, decay_here, states_here = slice(first, first + size), decay[:, :size], states[:, :size]
            torch.mul(delta_rows[:, tokens], rates, out=decay_here)
            torch.exp(decay_here, out=decay_here)
            torch.mul(delta_rows[:, tokens] * u_rows[:, tokens], b_rows[:, tokens], out=states_here)
            states_here[:, 0].addcmul_(decay_here[:, 0], start)
            for operation in recurrences[size]:
                operation()
            y.flatten(0, 1)[span, tokens] = (c_rows[:, tokens] @ states_here).squeeze(-2)
            start.copy_(states_here[:, -1])
    return y
