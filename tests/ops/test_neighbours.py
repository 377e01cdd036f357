"""Recall of nearest neighbours against a search one by one."""

from __future__ import annotations

import pytest
import torch

from repshift_cli.ops import neighbours
from repshift_cli.ops.neighbours import recall_at


@pytest.mark.parametrize("at_a_time", [1 << 24, 40])
def test_recall_is_that_of_a_search_one_by_one(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_MOST_SCORES", at_a_time)
    index = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    dense, own = 3 * index[:12], torch.tensor([*range(10), -1, -1])
    given = dense + 0.8 * torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    found = recall_at(dense, {"given": given, "dense": dense}, index, (1, 4), own)
    for row in range(12):
        others = [entry for entry in range(20) if entry != own[row]]

        def nearest(query: torch.Tensor, k: int, others: list[int] = others) -> set[int]:
            cosine = torch.nn.functional.cosine_similarity(query, index).tolist()
            return set(sorted(others, key=cosine.__getitem__, reverse=True)[:k])

        for k in (1, 4):
            share = len(nearest(dense[row], k) & nearest(given[row], k)) / k
            assert float(found["given"][k][row]) == pytest.approx(share)
    assert found["dense"][4].eq(1).all()
    assert 0 < found["given"][4].mean() < 1


def test_an_equal_entry_is_as_good() -> None:
    """Two entries are the same: either of them is the nearest."""
    index = torch.eye(3)[[0, 0, 1, 2]]
    queries = torch.tensor([[1.0, 0.1, 0.0]])
    assert recall_at(queries, {"": queries * 2}, index, [1])[""][1].tolist() == [1.0]
