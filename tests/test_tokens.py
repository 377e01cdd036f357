from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from repshift_cli.tokens import TokenState, complement, gather_tokens, keep_top

ROWS = st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4)
"""Few different values, so that most rows hold ties."""


@given(ROWS, st.integers(1, 6))
def test_keep_top_takes_the_largest_and_lower_indices_among_ties(rows: list[list[int]], count: int) -> None:
    kept = keep_top(torch.tensor(rows, dtype=torch.float32), count)
    expected = [sorted(sorted(range(6), key=lambda place, row=row: (-row[place], place))[:count]) for row in rows]
    assert kept.tolist() == expected
    assert kept.dtype == torch.int64


@given(ROWS, st.integers(1, 6))
def test_keep_top_treats_each_row_by_itself(rows: list[list[int]], count: int) -> None:
    scores = torch.tensor(rows, dtype=torch.float32)
    alone = torch.cat([keep_top(row.unsqueeze(0), count) for row in scores])
    assert torch.equal(keep_top(scores, count), alone)


def test_keep_top_of_negated_scores_keeps_the_smallest() -> None:
    scores = torch.tensor([[3.0, 1.0, 1.0, 2.0]])
    assert keep_top(-scores, 2).tolist() == [[1, 2]]
    assert keep_top(-scores, 1).tolist() == [[1]]


@given(st.integers(0, 4), st.sets(st.integers(0, 8), min_size=1), st.integers(1, 3))
def test_gather_keeps_the_prefix_and_takes_the_patches_in_order(prefix: int, kept: set[int], batch: int) -> None:
    tokens = torch.randn(batch, prefix + 9, 5)
    index = torch.tensor(sorted(kept)).expand(batch, -1)
    found = gather_tokens(tokens, index, prefix)
    assert torch.equal(found[:, :prefix], tokens[:, :prefix])
    assert torch.equal(found[:, prefix:], tokens[:, [prefix + place for place in sorted(kept)]])
    assert found.is_contiguous()


def test_gather_takes_other_tokens_of_each_image() -> None:
    tokens = torch.arange(8.0).view(2, 4, 1)
    found = gather_tokens(tokens, torch.tensor([[0, 2], [1, 2]]), prefix=1)
    assert found.flatten(1).tolist() == [[0.0, 1.0, 3.0], [4.0, 6.0, 7.0]]


@given(st.sets(st.integers(0, 8)), st.integers(1, 3))
def test_complement_is_ascending_and_whole(kept: set[int], batch: int) -> None:
    index = torch.tensor(sorted(kept), dtype=torch.int64).expand(batch, -1)
    rest = sorted(set(range(9)) - kept)
    assert complement(index, 9).tolist() == [rest] * batch


def test_token_state_follows_the_original_places() -> None:
    state = TokenState.start(2, 5, torch.device("cpu"))
    assert state.index.tolist() == [[0, 1, 2, 3, 4]] * 2
    first = state.keep(torch.tensor([[0, 2, 4], [1, 2, 3]]))
    second = first.keep(torch.tensor([[1, 2], [0, 2]]))
    assert first.index.tolist() == [[0, 2, 4], [1, 2, 3]]
    assert second.index.tolist() == [[2, 4], [1, 3]]
