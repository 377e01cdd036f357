"""The scan against the recurrence token by token in float64; gradients, dtypes, graphs and memory."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from repshift_cli.measure.memory import peak_memory
from repshift_cli.ops import selective_scan as scan
from repshift_cli.ops.selective_scan import selective_scan, sequential_scan

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def two_level_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The form for graphs and other devices."""
    return scan._two_level_scan(scan._Operands(u, delta, a, b, c))


BOTH = pytest.mark.parametrize("function", [selective_scan, two_level_scan])

# Rounding moves an output by about sqrt(L) eps of the sum of the absolute terms in it: 64 * 6e-8 = 4e-6 at L = 4096.
# The scale is the largest output, which cancellation makes smaller than that sum.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Shape:
    scans: int
    batch: int
    length: int
    width: int
    size: int


def inputs_of(shape: Shape, exponents: tuple[float, float] = (-2, 1), dtype: torch.dtype = torch.float32) -> Inputs:
    """Random inputs with delta |A| log-uniform between these powers of ten."""
    low, high = exponents
    k, b, l, e, n = shape.scans, shape.batch, shape.length, shape.width, shape.size  # noqa: E741
    delta = 10 ** torch.empty(k, b, l, e).uniform_(low / 2, high / 2)
    a = -(10 ** torch.empty(k, e, n).uniform_(low / 2, high / 2))
    u, b_, c = torch.randn(k, b, l, e), torch.randn(k, b, l, n), torch.randn(k, b, l, n)
    return tuple(tensor.to(dtype) for tensor in (u, delta, a, b_, c))  # type: ignore[return-value]


def doubled(inputs: Inputs) -> Inputs:
    return tuple(tensor.double() for tensor in inputs)  # type: ignore[return-value]


def error(output: Tensor, inputs: Inputs) -> float:
    """The largest error, relative to the scale of the reference."""
    expected = sequential_scan(*doubled(inputs))
    assert output.isfinite().all()
    return ((output - expected).abs().max() / expected.abs().max()).item()


def rows_of(inputs: Inputs, rows: slice) -> Inputs:
    u, delta, a, b, c = inputs
    return u[:, rows], delta[:, rows], a, b[:, rows], c[:, rows]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few tokens and rows, so that small inputs have several."""
    monkeypatch.setattr(scan, "_SLICE", 24)
    monkeypatch.setattr(scan, "_BLOCK", 100)


def random_shape(draw: random.Random) -> Shape:
    longest = draw.choices([30, 300, 4096], [90, 9, 1])[0]
    length, small = draw.randint(1, longest), longest > 300
    width, size = draw.randint(1, 3 if small else 9), draw.randint(1, 3 if small else 6)
    return Shape(draw.randint(1, 3), draw.randint(1, 4), length, width, size)


class TestAgainstTheReference:
    @pytest.mark.parametrize("group", range(10))
    def test_a_thousand_random_cases(self, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
        draw = random.Random(group)
        torch.manual_seed(group)
        for _ in range(100):
            shape = random_shape(draw)
            low = draw.uniform(-6, 3)
            inputs = inputs_of(shape, (low, draw.uniform(low, 4)))
            monkeypatch.setattr(scan, "_SLICE", draw.choice([1, 24, 1 << 15]))
            monkeypatch.setattr(scan, "_BLOCK", draw.choice([1, 100, 1 << 17]))
            assert error(selective_scan(*inputs), inputs) < TOLERANCE, shape
            assert error(two_level_scan(*inputs), inputs) < TOLERANCE, shape

    @BOTH
    @pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 101, 145, 197, 730, 1009, 4096])
    def test_lengths(self, function: Scan, length: int, small_blocks: None) -> None:
        inputs = inputs_of(Shape(2, 3, length, 4, 3))
        assert error(function(*inputs), inputs) < TOLERANCE

    @BOTH
    def test_the_size_of_vision_mamba(self, function: Scan) -> None:
        inputs = inputs_of(Shape(2, 2, 197, 384, 16))
        assert error(function(*inputs), inputs) < TOLERANCE

    @BOTH
    @pytest.mark.parametrize("power", [-6, -3, 0, 2, 4])
    @pytest.mark.parametrize("length", [7, 2048])
    def test_extreme_decays(self, function: Scan, power: int, length: int, small_blocks: None) -> None:
        """If all decays are equal, their rounding error (2^-25 below 1) adds up instead of averaging out."""
        inputs = inputs_of(Shape(1, 2, length, 4, 3), (power, power))
        assert error(function(*inputs), inputs) < TOLERANCE + length * 2**-25

    @BOTH
    def test_a_decayed_state_is_zero(self, function: Scan, small_blocks: None) -> None:
        u, delta, a, b, c = inputs_of(Shape(1, 1, 40, 3, 2), (4, 4))
        u[:, :, 0] = 1e30
        u[:, :, 1:] = 0
        assert not function(u, delta, a, b, c)[:, :, 1:].any()

    @BOTH
    def test_without_decay_it_is_a_running_sum(self, function: Scan, small_blocks: None) -> None:
        ones = torch.ones(1, 1, 50, 1)
        tiny = torch.full((1, 1, 1), -1e-30)
        assert torch.equal(function(ones, ones, tiny, ones, ones), torch.arange(1.0, 51.0).reshape(1, 1, 50, 1))

    @BOTH
    def test_inputs_need_not_be_contiguous(self, function: Scan, small_blocks: None) -> None:
        u, delta, a, b, c = inputs_of(Shape(2, 3, 20, 4, 3))
        strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (u, delta, b, c)]
        output = function(strided[0], strided[1], a.mT.contiguous().mT, *strided[2:])
        assert torch.equal(output, function(u, delta, a, b, c))

    def test_the_reference_is_the_formula(self) -> None:
        """Written out for two tokens, one channel and a state of one."""
        u, delta, a, b, c = inputs_of(Shape(1, 1, 2, 1, 1), dtype=torch.float64)
        (u0, u1), (d0, d1), (b0, b1), (c0, c1) = (tensor.flatten().tolist() for tensor in (u, delta, b, c))
        first = d0 * u0 * b0
        second = math.exp(d1 * a.item()) * first + d1 * u1 * b1
        expected = torch.tensor([c0 * first, c1 * second], dtype=torch.float64)
        torch.testing.assert_close(sequential_scan(u, delta, a, b, c).flatten(), expected)


class TestBatch:
    @BOTH
    @pytest.mark.parametrize("width", [5, 37, 384])
    def test_rows_of_a_batch_are_independent(self, function: Scan, width: int) -> None:
        inputs = inputs_of(Shape(2, 8, 60, width, 16))
        together = function(*inputs)
        for row in range(8):
            u, delta, a, b, c = (tensor.clone() for tensor in inputs)
            for tensor in (u, delta, b, c):
                tensor[:, :row] *= 3
                tensor[:, row + 1 :] *= 0.5
            assert torch.equal(function(u, delta, a, b, c)[:, row], together[:, row])

    @BOTH
    @pytest.mark.parametrize("width", [5, 37, 384])
    def test_the_batch_size_changes_only_rounding(self, function: Scan, width: int) -> None:
        inputs = inputs_of(Shape(2, 8, 60, width, 16))
        together = function(*inputs)
        for row in range(8):
            alone = function(*rows_of(inputs, slice(row, row + 1)))
            assert (alone - together[:, row : row + 1]).abs().max() < TOLERANCE / 10 * together.abs().max()

    @BOTH
    def test_it_is_deterministic(self, function: Scan) -> None:
        inputs = inputs_of(Shape(2, 3, 50, 64, 8))
        assert torch.equal(function(*inputs), function(*inputs))

    def test_inputs_are_not_changed(self) -> None:
        inputs = inputs_of(Shape(2, 3, 20, 4, 3))
        copies = [tensor.clone() for tensor in inputs]
        selective_scan(*inputs)
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))

    def test_no_images(self) -> None:
        inputs = inputs_of(Shape(2, 0, 20, 4, 3))
        assert selective_scan(*inputs).shape == (2, 0, 20, 4)


class TestGradient:
    @pytest.mark.slow
    @BOTH
    @pytest.mark.parametrize("length", [1, 2, 11])
    def test_gradcheck(self, function: Scan, length: int, small_blocks: None) -> None:
        inputs = inputs_of(Shape(2, 3, length, 3, 2), dtype=torch.float64)
        assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in inputs])

    @pytest.mark.parametrize("exponents", [(-6, -6), (-2, 1), (4, 4)])
    def test_the_gradient_in_float32(self, exponents: tuple[float, float], small_blocks: None) -> None:
        inputs = inputs_of(Shape(2, 3, 150, 5, 4), exponents)
        grad = torch.randn_like(inputs[0])
        found = gradients(selective_scan, inputs, grad)
        expected = gradients(sequential_scan, doubled(inputs), grad.double())
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == torch.float32
            assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()

    @pytest.mark.parametrize("only", range(5))
    def test_the_gradient_of_one_input(self, only: int, small_blocks: None) -> None:
        inputs = inputs_of(Shape(2, 2, 9, 3, 2))
        every = gradients(selective_scan, inputs, torch.ones_like(inputs[0]))
        leaf = inputs[only].clone().requires_grad_()
        selective_scan(*inputs[:only], leaf, *inputs[only + 1 :]).sum().backward()
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, every[only])

    def test_gradients_change_only_rounding(self) -> None:
        inputs = inputs_of(Shape(2, 3, 50, 64, 8))
        expected = selective_scan(*inputs)
        inputs[0].requires_grad_()
        output = selective_scan(*inputs)
        assert output.requires_grad
        assert (output.detach() - expected).abs().max() < TOLERANCE / 10 * expected.abs().max()
        with torch.no_grad():
            assert torch.equal(selective_scan(*inputs), expected)


def gradients(function: Scan, inputs: Inputs, grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(function(*leaves), leaves, grad)


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_computed_in_float32(self, dtype: torch.dtype) -> None:
        inputs = inputs_of(Shape(2, 2, 60, 8, 4), dtype=dtype)
        output = selective_scan(*inputs)
        assert output.dtype == dtype
        in_float32 = selective_scan(*(tensor.float() for tensor in inputs))  # type: ignore[arg-type]
        assert torch.equal(output, in_float32.to(dtype))

    def test_half_precision_has_a_gradient(self) -> None:
        inputs = inputs_of(Shape(1, 2, 20, 4, 3), dtype=torch.bfloat16)
        found = gradients(selective_scan, inputs, torch.ones_like(inputs[0]))
        assert all(grad.dtype == torch.bfloat16 and grad.isfinite().all() for grad in found)

    def test_float64_is_exact(self) -> None:
        inputs = inputs_of(Shape(2, 2, 60, 8, 4), dtype=torch.float64)
        assert selective_scan(*inputs).dtype == torch.float64
        assert error(selective_scan(*inputs), inputs) < 1e-13

    def test_a_rate_in_float32_with_half_precision_inputs(self) -> None:
        """Models keep A in float32 if the rest is in half precision."""
        u, delta, a, b, c = inputs_of(Shape(1, 1, 10, 4, 3))
        assert selective_scan(u.half(), delta.half(), a, b.half(), c.half()).dtype == torch.float16


class Module(nn.Module):
    def forward(self, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return selective_scan(u, delta, a, b, c)


def exported(length: int) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=64)
    with_batch = {1: batch}
    inputs = inputs_of(Shape(2, 3, length, 4, 3))
    return torch.export.export(Module(), inputs, dynamic_shapes=(with_batch, with_batch, None, with_batch, with_batch))


class TestGraphs:
    @pytest.mark.parametrize("length", [1, 2, 37])
    def test_export_with_a_free_batch(self, length: int) -> None:
        module = exported(length).module()
        for batch in (1, 3, 7):
            inputs = inputs_of(Shape(2, batch, length, 4, 3))
            assert error(module(*inputs), inputs) < TOLERANCE

    @pytest.mark.slow
    def test_the_graph_grows_with_the_root_of_the_length(self) -> None:
        short, long = (len(exported(length).graph.nodes) for length in (64, 256))
        assert long < 2.2 * short

    def test_the_graph_has_only_common_operations(self) -> None:
        names = {str(node.target) for node in exported(37).graph.nodes if node.op == "call_function"}
        assert all(name.startswith("aten.") or "getitem" in name or "sym" in name for name in names), names
        assert not any("scatter" in name or "copy_" in name or "index" in name for name in names)

    @pytest.mark.parametrize("grad", [False, True])
    def test_compile_without_a_break(self, grad: bool) -> None:
        inputs = inputs_of(Shape(2, 3, 11, 4, 3))
        inputs[0].requires_grad_(grad)
        compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
        output = compiled(*inputs)
        assert error(output.detach(), inputs) < TOLERANCE
        assert output.requires_grad == grad

    @pytest.mark.parametrize("length", [1, 2, 197])
    def test_meta(self, length: int) -> None:
        inputs = [tensor.to("meta") for tensor in inputs_of(Shape(2, 3, length, 4, 3), dtype=torch.bfloat16)]
        output = selective_scan(*inputs)
        assert (output.shape, output.dtype, output.device.type) == ((2, 3, length, 4), torch.bfloat16, "meta")


class TestMemory:
    @pytest.mark.slow
    @BOTH
    def test_it_is_linear_in_the_length(self, function: Scan) -> None:
        short, long = (self.peak(function, length) for length in (4096, 8192))
        assert 1.7 < long / short < 2.1

    def test_states_of_all_tokens_are_never_alive_at_once(self) -> None:
        shape = Shape(2, 4, 512, 256, 8)
        states = 4 * math.prod((shape.scans, shape.batch, shape.length, shape.width, shape.size))
        assert self.peak(selective_scan, 512) < states / 2

    @staticmethod
    def peak(function: Scan, length: int) -> int:
        u, *rest = inputs_of(Shape(2, 4, length, 256, 8))
        return peak_memory(lambda u: function(u, *rest), u)
