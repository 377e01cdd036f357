from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import functional

from repshift_cli.ops.tokens import complement, gather_tokens, keep_lines, keep_top, keep_top_behind
from repshift_cli.planning.layout import Grid, Window
from repshift_cli.reduction.metrics.base import norms
from repshift_cli.reduction.token_trace import MapState

ROWS = st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4)
"""Few different values, so that most rows have ties."""


@given(ROWS, st.integers(1, 6))
def test_keep_top_takes_the_largest_and_lower_indices_among_ties(rows: list[list[int]], count: int) -> None:
    kept = keep_top(torch.tensor(rows, dtype=torch.float32), count)
    expected = [sorted(sorted(range(6), key=lambda place, row=row: (-row[place], place))[:count]) for row in rows]
    assert kept.tolist() == expected
    assert kept.dtype == torch.int64


@given(ROWS, st.integers(1, 6))
def test_keep_top_treats_rows_independently(rows: list[list[int]], count: int) -> None:
    scores = torch.tensor(rows, dtype=torch.float32)
    alone = torch.cat([keep_top(row.unsqueeze(0), count) for row in scores])
    assert torch.equal(keep_top(scores, count), alone)


def test_keep_top_of_negated_scores_keeps_the_smallest() -> None:
    scores = torch.tensor([[3.0, 1.0, 1.0, 2.0]])
    assert keep_top(-scores, 2).tolist() == [[1, 2]]
    assert keep_top(-scores, 1).tolist() == [[1]]


@given(st.integers(0, 4), st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), min_size=1), st.integers(1, 6))
def test_the_prefix_is_always_kept(prefix: int, rows: list[list[int]], count: int) -> None:
    scores = torch.tensor(rows, dtype=torch.float32)
    found = keep_top_behind(scores, count, prefix)
    assert found[:, :prefix].tolist() == [list(range(prefix))] * len(rows)
    assert torch.equal(found[:, prefix:] - prefix, keep_top(scores, count))


def test_the_prefix_is_kept_with_infinite_scores() -> None:
    scores = torch.tensor([[0.0, float("inf"), 1.0, float("inf")]])
    assert keep_top_behind(scores, 1, 2).tolist() == [[0, 1, 3]]
    assert keep_top_behind(-scores, 1, 2).tolist() == [[0, 1, 2]]


@given(st.sets(st.integers(0, 8), min_size=1), st.integers(1, 3))
def test_gather_takes_the_tokens_in_order(kept: set[int], batch: int) -> None:
    tokens = torch.randn(batch, 9, 5)
    found = gather_tokens(tokens, torch.tensor(sorted(kept)).expand(batch, -1))
    assert torch.equal(found, tokens[:, sorted(kept)])
    assert found.is_contiguous()


def test_gather_takes_other_tokens_of_each_image() -> None:
    tokens = torch.arange(8.0).view(2, 4, 1)
    found = gather_tokens(tokens, torch.tensor([[0, 1, 3], [0, 2, 3]]))
    assert found.flatten(1).tolist() == [[0.0, 1.0, 3.0], [4.0, 6.0, 7.0]]


@given(st.sets(st.integers(0, 8)), st.integers(1, 3))
def test_complement_is_ascending_and_complete(kept: set[int], batch: int) -> None:
    index = torch.tensor(sorted(kept), dtype=torch.int64).expand(batch, -1)
    rest = sorted(set(range(9)) - kept)
    assert complement(index, 9).tolist() == [rest] * batch


def test_token_state_follows_the_original_places() -> None:
    state = MapState.start(2, (1, 5), torch.device("cpu"))
    assert state.index.tolist() == [[0, 1, 2, 3, 4]] * 2
    first = state.keep(torch.tensor([[0, 2, 4], [1, 2, 3]]))
    second = first.keep(torch.tensor([[1, 2], [0, 2]]))
    assert first.index.tolist() == [[0, 2, 4], [1, 2, 3]]
    assert second.index.tolist() == [[2, 4], [1, 3]]


@given(st.integers(0, 2**16), st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 7)), st.data())
def test_keep_lines_takes_the_best_rows_and_columns(
    seed: int, shape: tuple[int, int, int], data: st.DataObject
) -> None:
    """Integers with few values: their sums are exact, and many lines tie."""
    scores = np.random.default_rng(seed).integers(-2, 3, shape)
    kept = (data.draw(st.integers(1, shape[1])), data.draw(st.integers(1, shape[2])))
    found = keep_lines(torch.from_numpy(scores).float(), kept)
    for image, places in zip(scores, found.tolist(), strict=True):
        rows = sorted(np.argsort(-image.sum(axis=1), kind="stable")[: kept[0]])
        columns = sorted(np.argsort(-image.sum(axis=0), kind="stable")[: kept[1]])
        assert places == [row * shape[2] + column for row in rows for column in columns]
    assert found.dtype == torch.int64


def test_keep_lines_takes_the_lower_of_two_equal_lines() -> None:
    scores = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]]])
    assert keep_lines(scores, (1, 1)).tolist() == [[0]]
    assert keep_lines(scores, (2, 2)).tolist() == [[0, 2, 6, 8]]
    assert keep_lines(torch.zeros(1, 3, 3), (2, 1)).tolist() == [[0, 3]]


def channel_by_channel(tokens: Tensor) -> Tensor:
    """The same tokens, channel-major in memory."""
    return tokens.mT.contiguous().mT


@given(st.integers(2, 9), st.integers(1, 5), st.integers(1, 3), st.data())
def test_gather_keeps_the_memory_layout(count: int, channels: int, batch: int, data: st.DataObject) -> None:
    tokens = torch.randn(batch, count, channels)
    amount = data.draw(st.integers(1, count))
    places = st.permutations(range(count)).map(lambda order: sorted(order[:amount]))
    index = torch.tensor([data.draw(places) for _ in range(batch)])
    plain, other = gather_tokens(tokens, index), gather_tokens(channel_by_channel(tokens), index)
    assert torch.equal(plain, other)
    assert plain.is_contiguous()
    assert other.mT.is_contiguous()
    assert other.untyped_storage().nbytes() == other.numel() * other.element_size()


def test_gather_of_another_memory_layout() -> None:
    tokens = torch.randn(2, 7, 6)[:, :, ::2]
    index = torch.tensor([[0, 2], [1, 4]])
    assert torch.equal(gather_tokens(tokens[:1], index[:1]), gather_tokens(tokens[:1].contiguous(), index[:1]))
    assert torch.equal(gather_tokens(tokens, index), gather_tokens(tokens.contiguous(), index))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_norms_do_not_depend_on_the_memory_layout(order: int, dtype: torch.dtype) -> None:
    tokens = (100 * torch.randn(2, 9, 300, generator=torch.Generator().manual_seed(0))).to(dtype)
    wanted = vector_norm(tokens.double(), order, dim=-1).float()
    for same in (tokens, channel_by_channel(tokens), tokens.repeat_interleave(2, dim=-1)[:, :, ::2]):
        found = norms(same, order)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0.0)


def test_map_state_follows_the_lines() -> None:
    state = MapState.start(1, (3, 4), torch.device("cpu")).keep(torch.tensor([[1, 3, 9, 11]]), (2, 2))
    assert (state.rows.tolist(), state.columns.tolist()) == ([[0, 2]], [[1, 3]])
    assert state.index.tolist() == [[1, 3, 9, 11]]
    again = state.keep(torch.tensor([[2]]), (1, 1))
    assert (again.index.tolist(), again.dense) == ([[9]], (3, 4))


def test_map_state_after_a_stride() -> None:
    """Of 8 rows the first, third and fourth are dropped; lines 1, 5 and 7 are in the middle of the windows."""
    rows = torch.tensor([[1, 4, 5, 6, 7]])
    state = MapState(rows, rows, (8, 8)).through([Window("w", (3, 3), (2, 2), (1, 1))])
    assert (state.rows.tolist(), state.columns.tolist(), state.dense) == ([[0, 2, 3]], [[0, 2, 3]], (4, 4))


@st.composite
def windows(draw: st.DrawFn, centred: bool = False) -> Window:
    """Windows as in networks: strides up to the kernel size, and padding up to half of it.

    Args:
        centred: only those whose middle is read; a dilated kernel of even size has a gap there.
    """
    kernel = (draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    dilation = tuple(draw(st.integers(1, 1 if centred and side % 2 == 0 else 2)) for side in kernel)
    stride = tuple(draw(st.integers(1, min(side, 4))) for side in kernel)
    padding = tuple(draw(st.integers(0, d * (k - 1) // 2)) for k, d in zip(kernel, dilation, strict=True))
    # the middle of the last window may be in the padding, which has no line
    return Window("w", kernel, stride, padding, dilation, ceil=draw(st.booleans()) and not any(padding))


@given(st.lists(windows(), max_size=4), st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_all_lines_keep_their_position(windows: list[Window], grid: Grid) -> None:
    state = MapState.start(2, grid, torch.device("cpu"))
    for window in windows:
        grid = window.output(grid)
    assume(min(grid) > 0)
    state = state.through(windows)
    assert state.dense == grid
    assert state.index.tolist() == [list(range(grid[0] * grid[1]))] * 2


def middle_tap(lines: list[int], window: Window, axis: int) -> list[int]:
    """The output of a convolution whose only weight is in the middle of the window."""
    kernel = torch.zeros(1, 1, window.kernel[axis])
    reach, padding = window.dilation[axis] * (window.kernel[axis] - 1), window.padding[axis]
    kernel[0, 0, (window.kernel[axis] - 1) // 2] = 1
    value = functional.pad(torch.tensor([[lines]], dtype=torch.float32), (padding, padding + reach), mode="replicate")
    count = window.output((len(lines), len(lines)))[axis]
    found = functional.conv1d(value, kernel, stride=window.stride[axis], dilation=window.dilation[axis])
    return [int(line) for line in found[0, 0, :count]]


@given(windows(centred=True), st.integers(1, 30), st.data())
def test_each_line_stands_for_the_middle_of_its_window(window: Window, side: int, data: st.DataObject) -> None:
    kept = [sorted(data.draw(st.sets(st.integers(0, side - 1), min_size=1))) for _ in range(2)]
    count = (window.output((len(kept[0]), 1))[0], window.output((1, len(kept[1])))[1])
    dense = window.output((side, side))
    assume(min(count) > 0)
    state = MapState(torch.tensor([kept[0]]), torch.tensor([kept[1]]), (side, side)).through([window])
    assert state.dense == dense
    for axis, lines in enumerate((state.rows, state.columns)):
        stride = window.stride[axis]
        read = middle_tap(kept[axis], window, axis)
        first = middle_tap(list(range(side)), window, axis)[0]
        # `first` is what the first window of the dense map reads; places count in whole steps from there
        assert lines.tolist() == [[min(line // stride - first // stride, dense[axis] - 1) for line in read]]
        assert lines.shape[1] == count[axis]


@given(st.integers(1, 7), st.integers(1, 4), st.sets(st.integers(0, 39), min_size=1))
def test_lines_stay_distinct_after_a_window_padded_to_half_its_width(kernel: int, stride: int, lines: set[int]) -> None:
    assume(stride <= kernel)
    window = Window("w", (kernel, 1), (stride, 1), ((kernel - 1) // 2, 0))
    state = MapState(torch.tensor([sorted(lines)]), torch.zeros(1, 1, dtype=torch.int64), (40, 1))
    assume(window.output((len(lines), 1))[0] > 0)
    found = state.through([window]).rows[0].tolist()
    assert found == sorted(set(found))
    assert found[0] >= 0 and found[-1] < window.output((40, 1))[0]
