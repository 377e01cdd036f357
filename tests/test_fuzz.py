"""Changed inputs are accepted or raise a RepshiftError (the long run: benchmarks/fuzz_inputs.py)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing import TARGETS, Fuzzer
from hypothesis import given, settings
from hypothesis import strategies as st

from repshift_cli.errors import RepshiftError


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    yield Fuzzer(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=150)
@given(seed=st.integers(0, 2**32))
def test_changed_inputs_raise_only_repshift_errors(fuzzer: Fuzzer, target: str, seed: int) -> None:
    try:
        TARGETS[target](fuzzer, random.Random(seed))
    except RepshiftError as error:
        assert error.message
        assert error.exit_code in (1, 2, 3, 4, 5)


def test_the_valid_inputs_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("changed_bytes", "changed_tree"):
        monkeypatch.setattr(f"fuzzing.{name}", lambda rng, good: good)
    fuzzer = Fuzzer(tmp_path)
    taken = 0
    for name, target in TARGETS.items():
        for seed in range(4):
            try:
                target(fuzzer, random.Random(seed))
                taken += 1
            except RepshiftError:
                # a recipe for another model, a header with a length of its own
                assert name in ("recipes", "headers of safetensors")
    assert taken >= 28
