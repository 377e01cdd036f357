"""torch.compile in the benchmark: real dynamo graphs, run by the eager backend."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import compressed, images
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from repshift_cli.errors import UsageError
from repshift_cli.measure.compiled import Compiled, CompileMode, fresh_graphs


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = torch.compile

    def without(run: Callable[..., Any], *, fullgraph: bool, dynamic: bool, **_: Any) -> Any:
        return real(run, backend="eager", fullgraph=fullgraph, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", without)
    with fresh_graphs():
        yield


@pytest.mark.slow
def test_dense_and_compressed_have_their_own_graphs() -> None:
    model = compressed()
    inputs = images()
    with torch.inference_mode():
        dense, short = (Compiled(name, model, "default") for name in ("dense", "compressed"))
        with model.dense():
            dense.first(inputs)
            wanted = model(inputs)
        short.first(inputs)
        for _ in range(2):
            with model.dense():
                torch.testing.assert_close(dense(inputs), wanted, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(short(inputs), model(inputs), rtol=1e-5, atol=1e-5)
    assert (dense.recompiles, short.recompiles) == (0, 0)
    assert dense.seconds > 0


@pytest.mark.parametrize(("mode", "expected"), [("default", {"mode": "default"}), ("frozen", {})])
def test_options_of_torch_compile(mode: CompileMode, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda run, **options: calls.append(options))
    Compiled("a", nn.Linear(4, 4), mode)
    assert calls == [{"fullgraph": True, "dynamic": False} | expected]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("mode", ["default", "frozen", "max-autotune"])
def test_frozen_weights_are_constants(mode: CompileMode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # use the real compiler
    model, inputs = compressed(), images()
    with torch.inference_mode():
        run = Compiled("compressed", model, mode)
        run.first(inputs)
        wanted = model(inputs)
        torch.testing.assert_close(run(inputs), wanted, rtol=1e-4, atol=1e-5)
        model.get_submodule("model.head").weight.zero_()
        unchanged = torch.allclose(run(inputs), wanted, rtol=1e-4, atol=1e-5)
    assert unchanged == (mode != "default")
    assert run.recompiles == 0
    assert not inductor_config.freezing  # the setting is restored


def test_a_second_graph_is_counted() -> None:
    run = Compiled("a", nn.Linear(4, 4), "default")
    run.first(torch.zeros(1, 4))
    run(torch.zeros(2, 4))
    assert run.recompiles == 1


def test_graph_breaks_are_unsupported() -> None:
    class Breaks(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return inputs

    with pytest.raises(UsageError, match=r"--compile default: torch\.compile cannot compile a here") as found:
        Compiled("a", Breaks(), "default").first(torch.zeros(1))
    assert len(found.value.message) < 300


def test_out_of_memory_is_not_a_compile_error() -> None:
    class Hungry(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs

    run = Compiled("a", Hungry(), "default")

    def fail(inputs: Tensor) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.")

    run._run = fail
    with pytest.raises(RuntimeError, match="not enough memory"):
        run.first(torch.zeros(1))
