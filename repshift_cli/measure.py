"""Numbers with units and spread: multiply-accumulates, latency, memory, and what they were measured on."""

from __future__ import annotations

import copy
import gc
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from repshift_cli import attention
from repshift_cli.errors import CheckFailed, ModelError, UsageError
from repshift_cli.garbage import without_collection
from repshift_cli.progress import Progress, Task

__all__ = [
    "DTYPES",
    "Speedup",
    "Spread",
    "Subject",
    "Timing",
    "attention_backend",
    "count_macs",
    "device_name",
    "measure_latency",
    "observed_attention",
    "out_of_memory",
    "parameter_bytes",
    "peak_memory",
    "resolve_device",
    "resolve_dtype",
    "speedup",
    "threads",
    "tiles_note",
    "wait_for",
    "waking_note",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ---------------------------------------------------------------------------------------------------------------------
# Spread of repeated measurements


@dataclass(frozen=True)
class Spread:
    """Median and 10th and 90th percentile of `count` samples; milliseconds where it is a latency."""

    median: float
    p10: float
    p90: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """The spread of samples in their own unit; percentiles are interpolated linearly.

        Raises:
            ValueError: there is no sample.
        """
        if not samples:
            raise ValueError("a spread needs at least one sample")
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(statistics.median(samples), deciles[0], deciles[-1], len(samples))

    @classmethod
    def of_seconds(cls, samples_s: Sequence[float]) -> Spread:
        """The spread in milliseconds of samples in seconds; errors as `of`."""
        return cls.of([sample * 1e3 for sample in samples_s])

    def overlaps(self, other: Spread) -> bool:
        """Whether the intervals from p10 to p90 share a point."""
        return self.p10 <= other.p90 and other.p10 <= self.p90

    def to_dict(self) -> dict[str, float]:
        """Median, p10 and p90, each with four significant digits."""
        return {name: float(f"{getattr(self, name):.4g}") for name in ("median", "p10", "p90")}


@dataclass(frozen=True)
class Timing:
    """How long each run of one subject took, in seconds; sample `i` belongs to round `i` for every subject."""

    samples_s: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        """The spread in milliseconds."""
        return Spread.of_seconds(self.samples_s)

    @property
    def p99_ms(self) -> float:
        """The 99th percentile in milliseconds; of fewer than a hundred samples hardly less than the largest."""
        if len(self.samples_s) == 1:
            return self.samples_s[0] * 1e3
        return statistics.quantiles(self.samples_s, n=100, method="inclusive")[-1] * 1e3


@dataclass(frozen=True)
class Speedup:
    """How many times faster one subject is than another.

    Attributes:
        ratio: quotient of the median latencies; above 1 is faster.
        p10, p90: percentiles of the quotients of the same round. Drift of the machine hits both sides of a round alike,
            so these are tighter than what the two latency intervals tell.
        overlap: whether the two latency intervals (p10 to p90) overlap.
    """

    ratio: float
    p10: float
    p90: float
    overlap: bool

    @property
    def clear(self) -> bool:
        """Faster beyond doubt: the latency intervals do not overlap, or nine of ten rounds agree."""
        return self.ratio > 1 and (not self.overlap or self.p10 > 1)

    @property
    def clearly_slower(self) -> bool:
        """Slower beyond doubt, by the same measure."""
        return self.ratio < 1 and (not self.overlap or self.p90 < 1)

    def __str__(self) -> str:
        # Where only the pairs tell, they are shown: the two latency intervals alone would not bear it out.
        if self.clear:
            note = f", {self.p10:.2f}-{self.p90:.2f} in paired rounds" if self.overlap else ""
            return f"{self.ratio:.2f}x faster{note}"
        if self.clearly_slower:
            return f"no speed-up: {1 / self.ratio:.2f}x slower"
        return "no speed-up: the intervals overlap"


def speedup(dense: Timing, compressed: Timing) -> Speedup:
    """How many times faster `compressed` is than `dense`; both from one call of `measure_latency`.

    Raises:
        ValueError: the timings do not have the same number of rounds.
    """
    paired = Spread.of([a / b for a, b in zip(dense.samples_s, compressed.samples_s, strict=True)])
    before, after = dense.spread, compressed.spread
    return Speedup(before.median / after.median, paired.p10, paired.p90, before.overlaps(after))


# ---------------------------------------------------------------------------------------------------------------------
# Latency


@dataclass(frozen=True)
class Subject:
    """Something to be timed.

    Attributes:
        name: unique among the subjects that are timed together.
        run: one run on the inputs.
        context: entered before the clock starts and left after it stops, such as a switch to the dense model.
    """

    name: str
    run: Callable[[Tensor], Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def full_batch(images: Tensor, batch_size: int) -> Tensor:
    """A batch of `batch_size`, the images repeated where there are fewer."""
    repeats = -(-batch_size // len(images))
    return torch.cat([images] * repeats)[:batch_size].contiguous()


def measure_latency(
    subjects: Sequence[Subject],
    inputs: Tensor,
    *,
    max_seconds: float,
    warmup: int,
    progress: Progress,
    min_runs: int = 10,
) -> dict[str, Timing]:
    """Time the subjects in turn, so that drift of the machine hits all of them alike.

    One round runs every subject once; the order turns round each time (A B, B A, ...). Runs go without gradients
    and with the garbage collector off; on CUDA the clock stops only when the device has finished.

    Args:
        inputs: handed to every subject; its device is the one that is waited for.
        max_seconds: after this time no new round starts, once there are `min_runs`; warm-up does not count.
        warmup: rounds that are run and thrown away.

    Returns:
        By name, in the order of `subjects`.

    Raises:
        ValueError: two subjects have one name, or `min_runs` is below 1.
    """
    names = [subject.name for subject in subjects]
    if len(set(names)) != len(names) or min_runs < 1:
        raise ValueError(f"subjects need different names and at least one run, not {names} with {min_runs} runs")
    samples: dict[str, list[float]] = {name: [] for name in names}
    label = f"timing {', '.join(names)}"
    gc.collect()
    with torch.inference_mode(), without_collection(), progress.task(label, max(1, round(max_seconds))) as task:
        for turn in range(warmup):
            _round(subjects, inputs, turn)
        clock = _Clock(max_seconds, task)
        turn = 0
        while turn < min_runs or not clock.expired():
            for name, seconds in _round(subjects, inputs, turn):
                samples[name].append(seconds)
            clock.show()
            turn += 1
    return {name: Timing(tuple(found)) for name, found in samples.items()}


class _Clock:
    """The time budget of one measurement; shows whole seconds as steps of a task."""

    def __init__(self, max_seconds: float, task: Task) -> None:
        self._start = time.perf_counter()
        self._max_seconds = max_seconds
        self._task = task
        self._shown = 0

    def expired(self) -> bool:
        return self._elapsed() >= self._max_seconds

    def show(self) -> None:
        steps = int(min(self._elapsed(), self._max_seconds)) - self._shown
        if steps > 0:
            self._task.advance(steps)
            self._shown += steps

    def _elapsed(self) -> float:
        return time.perf_counter() - self._start


def _round(subjects: Sequence[Subject], inputs: Tensor, turn: int) -> list[tuple[str, float]]:
    order = subjects if turn % 2 == 0 else list(reversed(subjects))
    return [(subject.name, _time_once(subject, inputs)) for subject in order]


def _time_once(subject: Subject, inputs: Tensor) -> float:
    with subject.context():
        wait_for(inputs.device)
        start = time.perf_counter()
        output = subject.run(inputs)
        wait_for(inputs.device)
        seconds = time.perf_counter() - start
        del output  # freed after the clock has stopped
    return seconds


def out_of_memory(error: RuntimeError) -> bool:
    """Whether the memory of the device did not suffice; the allocator of the CPU has no exception of its own."""
    words = ("not enough memory", "alloc_cpu")
    return isinstance(error, torch.OutOfMemoryError) or any(each in str(error) for each in words)


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it was asked to; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------------------------------------
# Multiply-accumulates


def count_macs(model: nn.Module, input_size: tuple[int, ...], batch: int = 1) -> int:
    """Multiply-accumulates per image, counted while a weightless copy of the model runs on the `meta` device.

    Matrix products, convolutions and attention count, fused or not; element-wise work, norms and sorting do not.
    On `meta` every attention call takes a path that the counter knows, which is not so on each real device.

    Args:
        model: on any device; it is not changed. The copy is in eval mode and keeps the hooks of the model.
        input_size: of one input: `(C, H, W)`, or `(T, C, H, W)` for a clip.
        batch: images in the counted run.

    Raises:
        ModelError: the model cannot run on `meta`, because its shapes depend on values.
        CheckFailed: the count is not a whole number of multiply-accumulates per image.
    """
    weightless = _meta_copy(model)
    dtypes = (parameter.dtype for parameter in weightless.parameters() if parameter.is_floating_point())
    inputs = torch.empty(batch, *input_size, device="meta", dtype=next(dtypes, torch.float32))
    kernel = nullcontext() if _fused_attention_is_counted() else sdpa_kernel(SDPBackend.MATH)
    try:
        with torch.no_grad(), kernel:
            flops = _count_flops(lambda: weightless(inputs))
    except (NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"the operations of {type(model).__name__} cannot be counted: {error}",
            "Counting runs the model on torch's `meta` device, where tensors have shapes but no values.",
        ) from error
    macs, rest = divmod(flops, 2 * batch)
    if rest:
        raise CheckFailed(
            f"{flops} FLOPs for {batch} images of {type(model).__name__} are no whole number of multiply-accumulates",
            "An operation of the model has a wrong formula in torch.utils.flop_counter.",
        )
    return macs


def _meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode, without copying a single weight: parameters and buffers become empty `meta` ones."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    weightless = copy.deepcopy(model, memo).eval()
    on_flash: list[Any] = [part for part in weightless.modules() if getattr(part, "flash_attn", False)]
    for part in on_flash:
        part.flash_attn = False  # no counter knows it
    return weightless


def _count_flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@cache
def _fused_attention_is_counted() -> bool:
    """Whether this torch counts scaled dot-product attention on `meta`; some versions read it as zero."""
    heads, queries, keys, width = 2, 3, 5, 8
    query = torch.empty(1, heads, queries, width, device="meta")
    key = torch.empty(1, heads, keys, width, device="meta")
    with torch.no_grad():
        flops = _count_flops(lambda: functional.scaled_dot_product_attention(query, key, key))
    return flops == 2 * 2 * heads * queries * keys * width


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; what is shared counts once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def peak_memory(run: Callable[[Tensor], Any], inputs: Tensor) -> int:
    """Most bytes that were alive at once during one run, beyond what lay there before it (weights and inputs).

    On CUDA this is what the allocator tells. On the CPU it is the sum over live tensor storages that operations
    returned, each counted once however many views it has; scratch space inside a kernel is not seen.
    """
    if inputs.device.type == "cuda":
        return _peak_on_cuda(run, inputs)
    # Not inference_mode: with it, composite operations would arrive whole and hide the tensors inside them.
    tracker = _StorageTracker()
    with torch.inference_mode(False), torch.no_grad(), tracker:
        run(inputs)
    return tracker.peak


def _peak_on_cuda(run: Callable[[Tensor], Any], inputs: Tensor) -> int:
    device = inputs.device
    with torch.inference_mode():
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(inputs)
        torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class _StorageTracker(TorchDispatchMode):
    """Adds up the storages that operations return, and takes each off when its last tensor is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        # By identity, since storages compare by value, and by weak reference, so as not to keep them alive.
        self._known = WeakIdKeyDictionary(ref_type=weakref.ref)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):  # not known yet: it is older than the run
            self._known[storage] = True
        output = func(*args, **kwargs)
        for storage in _storages(output):
            if storage not in self._known:
                self._known[storage] = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return output

    def _add(self, size: int) -> None:
        self._live += size
        self.peak = max(self.peak, self._live)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


# ---------------------------------------------------------------------------------------------------------------------
# What it was measured on


def device_name(device: torch.device) -> str:
    """The name that the maker gave to the processor or the graphics card."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "cpu"


def resolve_device(name: str) -> torch.device:
    """The device of this name, known to be there.

    Raises:
        UsageError: the name is not one of cpu, cuda, cuda:0, ..., or there is no such device.
    """
    allowed = "Allowed are cpu, cuda and cuda:N."
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}", allowed) from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UsageError(f"device {name!r} is not supported", allowed)
    if not torch.cuda.is_available():
        raise UsageError(f"device {name!r} was asked for, but torch sees no CUDA device", "Use --device cpu.")
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise UsageError(f"there is no device {name!r}", f"torch sees {count}: cuda:0 to cuda:{count - 1}.")
    return torch.device("cuda", index)


def resolve_dtype(name: str) -> torch.dtype:
    """The floating-point type of this name.

    Raises:
        UsageError: the name is not one of `DTYPES`.
    """
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}", f"Allowed are {', '.join(DTYPES)}.")
    return DTYPES[name]


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Run with this many CPU threads, None for as many as torch takes by itself; yields the number in use."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def waking_note(device: torch.device, count: int) -> str | None:
    """A remark where OpenMP is told that idle threads sleep at once: each operation has to wake them anew."""
    policy = os.environ.get("OMP_WAIT_POLICY", "").strip().upper()
    if device.type != "cpu" or count == 1 or policy != "PASSIVE":
        return None
    return "OMP_WAIT_POLICY=PASSIVE is set: every operation wakes its threads anew, which at batch 1 costs much"


_MATRIX_TILE = 16
"""Rows of a tile of AMX."""


def tiles_note(device: torch.device, dtype: torch.dtype, tokens: Sequence[int]) -> str | None:
    """A remark where numbers of tokens do not suit the matrix unit of a CPU.

    Attention to 158 tokens in bfloat16 takes twice as long there as to 160 (benchmarks/kernels_cpu.py).

    Args:
        tokens: that are left behind the sites of a sequence.
    """
    odd = [count for count in dict.fromkeys(tokens) if count % _MATRIX_TILE]
    if not odd or device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16) or not _has_matrix_unit():
        return None
    return (
        f"tokens that are left ({', '.join(map(str, odd))}) are no multiples of {_MATRIX_TILE}, as the matrix unit of "
        f"this CPU wants them in {str(dtype).removeprefix('torch.')}: `round_tokens: {_MATRIX_TILE}` in the recipe may "
        "be faster"
    )


def _has_matrix_unit() -> bool:
    """Whether the CPU has AMX, as far as torch tells."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # of newer versions
    return bool(capabilities.get("amx_tile"))


# ---------------------------------------------------------------------------------------------------------------------
# Which attention runs

# The operation that each fused backend dispatches to; `sdpa:math` dispatches to none, so the call itself is seen too.
_FUSED_OPERATIONS = {
    "_scaled_dot_product_flash_attention_for_cpu": "sdpa:flash",
    "_scaled_dot_product_flash_attention": "sdpa:flash",
    "_scaled_dot_product_efficient_attention": "sdpa:efficient",
    "_scaled_dot_product_cudnn_attention": "sdpa:cudnn",
    "_scaled_dot_product_fused_attention_overrideable": "sdpa:fused",
}
_FLASH_FUNCTIONS = (attention.flash_attend, attention.flash_attend_packed)
_SOFTMAX_OPERATIONS = {"_softmax", "_safe_softmax"}
_ATTENTION_MAP_DIMS = 3  # batch, queries and keys at least; a softmax over classes has two


def observed_attention(run: Callable[[Tensor], Any], inputs: Tensor) -> str:
    """The attention that one run really took, read off the operations that it called.

    Returns:
        `sdpa:flash`, `sdpa:efficient`, `sdpa:cudnn`, `sdpa:fused` or `sdpa:math` for torch's scaled dot-product
        attention; `flash-attn` for the package of that name; `explicit` for a softmax over a product that the
        model itself forms; `none`. Several are joined with `+`.
    """
    operations = _AttentionOperations()
    calls = _AttentionCalls(operations)
    # In inference mode composite operations reach a dispatch mode whole, so the kernels inside would go unseen.
    with torch.inference_mode(False), torch.no_grad(), operations, calls:
        run(inputs)
    found = operations.backends
    math_calls = calls.count - operations.fused_calls
    if math_calls > 0:
        found.add("sdpa:math")
    if operations.softmax_calls > max(math_calls, 0):  # the math backend takes one softmax a call; graphs make no calls
        found.add("explicit")
    return "+".join(sorted(found)) or "none"


def attention_backend(device: torch.device, dtype: torch.dtype, head_width: int = 64) -> str:
    """The backend that `scaled_dot_product_attention` takes here without a mask; values as `observed_attention`."""
    query = torch.zeros(1, 2, 64, head_width, device=device, dtype=dtype)
    return observed_attention(lambda x: functional.scaled_dot_product_attention(x, x, x), query)


class _AttentionCalls(TorchFunctionMode):
    """Counts calls of scaled dot-product attention, whatever they turn into, and sees those of flash-attn.

    Not every version of flash-attn calls an operation that a dispatch mode could see.
    """

    def __init__(self, operations: _AttentionOperations) -> None:
        super().__init__()
        self.operations = operations
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _FLASH_FUNCTIONS:
            with self.operations.inside_flash():
                return func(*args, **(kwargs or {}))
        self.count += func is functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


class _AttentionOperations(TorchDispatchMode):
    """Notes the fused attention operations and the softmax operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.backends: set[str] = set()
        self.fused_calls = 0
        self.softmax_calls = 0
        self._paused = False

    @contextmanager
    def inside_flash(self) -> Iterator[None]:
        """Notes flash-attn, and not what it does inside."""
        self.backends.add("flash-attn")
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if self._paused:
            return func(*args, **(kwargs or {}))
        if name in _FUSED_OPERATIONS:
            self.backends.add(_FUSED_OPERATIONS[name])
            self.fused_calls += 1
        elif func.namespace.replace("_", "").startswith("flashattn"):  # the name changed between its versions
            self.backends.add("flash-attn")
        elif name in _SOFTMAX_OPERATIONS and args[0].ndim >= _ATTENTION_MAP_DIMS:
            self.softmax_calls += 1
        return func(*args, **(kwargs or {}))
