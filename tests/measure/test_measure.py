"""Exact counts, percentiles, order of timed runs; no test depends on the speed of the machine."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from repshift_cli.checkpoints.create import on_meta as meta_device
from repshift_cli.errors import CheckFailed, ModelError, UsageError
from repshift_cli.measure.attention_kernel import observed_attention
from repshift_cli.measure.device import device_name, num_threads, out_of_memory, resolve_device, resolve_dtype
from repshift_cli.measure.latency import Speedup, Spread, Subject, Timing, compute_speedup, measure_latency
from repshift_cli.measure.macs import count_macs
from repshift_cli.measure.memory import parameter_bytes, peak_memory
from repshift_cli.utils.progress import Silent

CPU = torch.device("cpu")


def on_meta(name: str, **kwargs: object) -> nn.Module:
    with meta_device():
        return timm.create_model(name, **kwargs)


def block_macs(tokens: int, width: int, hidden: int) -> int:
    projections = tokens * width * (3 * width + width)
    attention = 2 * tokens * tokens * width
    return projections + attention + 2 * tokens * width * hidden


class TestCountMacs:
    @pytest.mark.parametrize("batch", [1, 3])
    def test_vit_base(self, batch: int) -> None:
        assert count_macs(on_meta("vit_base_patch16_224"), (3, 224, 224), batch) == 17_563_828_224

    def test_attention_pooling(self) -> None:
        tokens, width, hidden = 196, 768, 3072
        patches = tokens * width * 16 * 16 * 3
        pool = (2 * tokens + 2) * width * width + 2 * tokens * width + 2 * width * hidden
        expected = patches + 12 * block_macs(tokens, width, hidden) + pool
        assert count_macs(on_meta("vit_base_patch16_siglip_224"), (3, 224, 224)) == expected

    def test_torch_encoder_layer(self) -> None:
        """The fast path of torch's encoder is one operation without a formula, so it must not be used."""
        model = nn.Sequential(nn.Flatten(1, 2), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
        assert count_macs(model, (2, 3, 8)) == block_macs(6, 8, 16)

    @pytest.mark.parametrize("counted", [True, False])
    def test_fused_attention_counts_either_way(self, monkeypatch: pytest.MonkeyPatch, counted: bool) -> None:
        monkeypatch.setattr("repshift_cli.measure.macs._fused_attention_is_counted", lambda: counted)
        model = on_meta("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=0)
        assert count_macs(model, (3, 32, 32)) == 4 * 192 * 768 + block_macs(5, 192, 768)

    def test_hooks_are_counted_and_the_model_is_not_changed(self) -> None:
        class KeepFirst:
            def on_forward(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
                return output[:, : output.shape[1] // 2]

        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Dropout(), nn.Linear(4, 4, bias=False)).double()
        model[0].register_forward_hook(KeepFirst().on_forward)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert count_macs(nn.Sequential(nn.Flatten(1, 2), model), (1, 6, 4)) == 6 * 16 + 3 * 16
        assert model.training
        assert all(value.device == CPU and value.equal(before[name]) for name, value in model.state_dict().items())

    def test_shared_and_buffered_weights(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Linear(4, 4, bias=False)
                self.second = self.first
                self.register_buffer("table", torch.ones(4, 2))

            def forward(self, x: Tensor) -> Tensor:
                return self.second(self.first(x.flatten(1, 2))) @ self.table

        assert count_macs(Tied(), (1, 3, 4)) == 2 * 3 * 16 + 3 * 8

    def test_shapes_that_depend_on_values_are_unsupported(self) -> None:
        class Selects(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x[x > 0]

        with pytest.raises(ModelError, match="Selects cannot be counted"):
            count_macs(Selects(), (3, 4, 4))

    def test_odd_count_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("repshift_cli.measure.macs._count_flops", lambda run: 7)
        monkeypatch.setattr("repshift_cli.measure.macs._fused_attention_is_counted", lambda: True)
        with pytest.raises(CheckFailed, match="7 FLOPs"):
            count_macs(nn.Identity(), (3, 4, 4))


class TestSpread:
    def test_seconds_to_milliseconds(self) -> None:
        spread = Spread.of_seconds([second / 1000 for second in range(11)])
        assert (spread.median, spread.p10, spread.p90, spread.count) == pytest.approx((5, 1, 9, 11))

    def test_one_sample(self) -> None:
        assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 1)

    def test_no_sample(self) -> None:
        with pytest.raises(ValueError, match="at least one"):
            Spread.of([])

    def test_to_dict_rounds(self) -> None:
        assert Spread(1276.34, 0.0123456, 2e5, 3).to_dict() == {"median": 1276.0, "p10": 0.01235, "p90": 2e5}

    @pytest.mark.parametrize(
        ("low", "high", "overlaps"), [(3, 4, False), (2, 4, True), (0, 1.5, True), (0, 0.5, False)]
    )
    def test_overlaps(self, low: float, high: float, overlaps: bool) -> None:
        one, other = Spread(1.5, 1, 2, 9), Spread((low + high) / 2, low, high, 9)
        assert one.overlaps(other) is overlaps
        assert other.overlaps(one) is overlaps


class TestTiming:
    def test_p99(self) -> None:
        assert Timing(tuple(second / 1000 for second in range(101))).p99_ms == pytest.approx(99)
        assert Timing((0.002,)).p99_ms == pytest.approx(2)


class TestSpeedup:
    def test_drift_does_not_hide_a_speedup(self) -> None:
        drift = [1.0, 1.5, 2.0, 3.0]
        found = compute_speedup(Timing(tuple(1.2 * value for value in drift)), Timing(tuple(drift)))
        assert (found.ratio, found.p10, found.p90) == pytest.approx((1.2, 1.2, 1.2))
        assert found.overlap
        assert found.clear
        assert str(found) == "1.20x faster, 1.20-1.20 in paired rounds"

    def test_separate_intervals(self) -> None:
        found = compute_speedup(Timing((2.0, 2.1, 1.9)), Timing((1.0, 1.1, 0.9)))
        assert found.clear
        assert str(found) == "2.00x faster"

    def test_noise(self) -> None:
        found = compute_speedup(Timing((1.0, 1.3, 0.9, 1.2)), Timing((1.1, 0.9, 1.2, 1.0)))
        assert not found.clear
        assert str(found) == "no speed-up: the intervals overlap"

    def test_slower(self) -> None:
        found = compute_speedup(Timing((1.0, 1.0)), Timing((2.0, 2.0)))
        assert (found.clear, found.clearly_slower) == (False, True)
        assert str(found) == "no speed-up: 2.00x slower"

    def test_equal(self) -> None:
        assert str(Speedup(1.0, 1.0, 1.0, overlap=True)) == "no speed-up: the intervals overlap"

    def test_rounds_must_pair(self) -> None:
        with pytest.raises(ValueError, match="shorter"):
            compute_speedup(Timing((1.0, 1.0)), Timing((1.0,)))


class TestMeasureLatency:
    def test_turns(self) -> None:
        log: list[str] = []
        subjects = [Subject(name, lambda _, name=name: log.append(name)) for name in "abc"]
        timings = measure_latency(subjects, torch.zeros(1), max_seconds=0, warmup=1, progress=Silent(), min_runs=3)
        assert "".join(log) == "abc" + "abc" + "cba" + "abc"
        assert list(timings) == ["a", "b", "c"]
        assert all(len(timing.samples_s) == 3 for timing in timings.values())

    def test_context_is_entered_for_its_subject_only(self) -> None:
        log: list[str] = []

        @contextmanager
        def context() -> Iterator[None]:
            log.append("in")
            yield
            log.append("out")

        subjects = [Subject("a", lambda _: log.append("a"), context), Subject("b", lambda _: log.append("b"))]
        measure_latency(subjects, torch.zeros(1), max_seconds=0, warmup=0, progress=Silent(), min_runs=1)
        assert log == ["in", "a", "out", "b"]

    def test_time_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = iter(range(1000))
        monkeypatch.setattr("time.perf_counter", lambda: float(next(now)))
        subject = Subject("a", lambda _: None)
        timings = measure_latency([subject], torch.zeros(1), max_seconds=20, warmup=0, progress=Silent(), min_runs=2)
        # Each round reads the clock three times: the seventh ends after 20.
        assert timings["a"].samples_s == (1.0,) * 7

    def test_inference_mode_and_garbage(self) -> None:
        seen: list[tuple[bool, bool]] = []
        subject = Subject("a", lambda _: seen.append((torch.is_inference_mode_enabled(), gc.isenabled())))
        measure_latency([subject], torch.zeros(1), max_seconds=0, warmup=0, progress=Silent(), min_runs=1)
        assert seen == [(True, False)]
        assert gc.isenabled()

    def test_names_must_differ(self) -> None:
        subjects = [Subject("a", lambda _: None)] * 2
        with pytest.raises(ValueError, match="different names"):
            measure_latency(subjects, torch.zeros(1), max_seconds=0, warmup=0, progress=Silent())

    @pytest.mark.parametrize(("name", "value"), [("min_runs", 10**10), ("max_seconds", float("inf")), ("min_runs", 0)])
    def test_limits_out_of_range(self, name: str, value: float) -> None:
        options: dict[str, Any] = {"max_seconds": 0.0, "min_runs": 1, name: value}
        with pytest.raises(UsageError, match="invalid"):
            measure_latency([Subject("a", lambda _: None)], torch.zeros(1), warmup=0, progress=Silent(), **options)


class TestMemory:
    def test_a_chain_frees_intermediate_tensors(self) -> None:
        assert peak_memory(lambda x: (((x + 1) + 1) + 1) + 1, torch.zeros(1000)) == 2 * 4000

    def test_views_count_once(self) -> None:
        def run(x: Tensor) -> Tensor:
            made = x + 1
            return made.view(10, 100).t()[2:]

        assert peak_memory(run, torch.zeros(1000)) == 4000

    def test_inputs_weights_and_in_place_operations_are_not_counted(self) -> None:
        weight = torch.ones(1000)
        assert peak_memory(lambda x: x.view(10, 100).add_(weight.view(10, 100)), torch.zeros(1000)) == 0

    def test_live_tensors_add_up(self) -> None:
        assert peak_memory(lambda x: [x + step for step in range(3)], torch.zeros(10, dtype=torch.float64)) == 240

    def test_tensors_inside_composite_operations(self) -> None:
        query = torch.zeros(1, 2, 16, 8)
        with sdpa_kernel(SDPBackend.MATH):
            peak = peak_memory(lambda x: functional.scaled_dot_product_attention(x, x, x), query)
        assert peak >= 2 * 16 * 16 * 4

    def test_parameter_bytes(self) -> None:
        layer = nn.Linear(3, 2)
        assert parameter_bytes(nn.Sequential(layer, layer, nn.BatchNorm1d(2))) == 4 * (8 + 8) + 8


class TestDevice:
    def test_device_has_a_name(self) -> None:
        assert device_name(CPU)

    def test_cpu(self) -> None:
        assert resolve_device("cpu") == CPU

    @pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "meta"])
    def test_unknown_device(self, name: str) -> None:
        with pytest.raises(UsageError, match=f"'{name}'"):
            resolve_device(name)

    def test_cuda_absent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(UsageError, match="no CUDA device") as caught:
            resolve_device("cuda")
        assert caught.value.exit_code == 2

    def test_dtypes(self) -> None:
        assert resolve_dtype("bfloat16") is torch.bfloat16
        with pytest.raises(UsageError, match="'fp16'") as caught:
            resolve_dtype("fp16")
        assert "float32, bfloat16, float16" in str(caught.value)

    def test_threads_are_restored(self) -> None:
        before = torch.get_num_threads()
        with num_threads(before + 1) as count:
            assert count == torch.get_num_threads() == before + 1
        with num_threads(None) as count:
            assert count == before
        assert torch.get_num_threads() == before


class TestAttention:
    @staticmethod
    def fused(x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x, x, x)

    @staticmethod
    def explicit(x: Tensor) -> Tensor:
        return (x @ x.transpose(-1, -2)).softmax(dim=-1) @ x

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_flash_on_cpu(self, dtype: torch.dtype) -> None:
        assert observed_attention(self.fused, torch.zeros(1, 2, 64, 64, dtype=dtype)) == "sdpa:flash"

    def test_math(self) -> None:
        with sdpa_kernel(SDPBackend.MATH):
            assert observed_attention(self.fused, torch.zeros(1, 2, 64, 64)) == "sdpa:math"

    def test_explicit(self) -> None:
        images = torch.zeros(1, 2, 8, 8)
        assert observed_attention(self.explicit, images) == "explicit"
        assert observed_attention(lambda x: self.fused(self.explicit(x)), images) == "explicit+sdpa:flash"

    def test_none(self) -> None:
        assert observed_attention(lambda x: x.flatten(1).softmax(-1), torch.zeros(1, 2, 8, 8)) == "none"


def test_out_of_memory() -> None:
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."))
    assert not out_of_memory(RuntimeError("something else"))
