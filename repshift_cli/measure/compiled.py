"""torch.compile for timing: the whole model as one graph, and the compile time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from repshift_cli.errors import UsageError, first_line
from repshift_cli.measure.device import out_of_memory

CompileMode = Literal["off", "default", "frozen", "reduce-overhead", "max-autotune"]
"""A mode of torch.compile, or `off`; `frozen` is `default` with the weights as constants of the graph.

Constants are laid out for the kernels once. Otherwise each call does it, which takes as long for few as for
many tokens. Constants need memory for a second copy of the weights. `max-autotune` on the CPU uses them too: torch has
alternative kernels only for constants.
"""

_MAX_REASON = 200


class Compiled:
    """A model compiled for one shape of inputs, in any mode but `off`; `name` is for messages.

    Call `first` once, with the context and inference mode of the later calls: graphs depend on both.

    Attributes:
        seconds: of the first call, including compilation.
        recompiles: graphs compiled in later calls.
    """

    def __init__(self, name: str, module: nn.Module, mode: CompileMode) -> None:
        self.name = name
        self.mode = mode
        self.seconds = 0.0
        self.recompiles = 0
        chosen: Any = {} if mode == "frozen" else {"mode": mode}
        self._run = torch.compile(_own_function(module, name), fullgraph=True, dynamic=False, **chosen)

    def first(self, inputs: Tensor) -> None:
        """Compile and run once; raises a UsageError if it cannot be compiled here."""
        start = time.perf_counter()
        try:
            with quiet_tuning(), _constant_weights() if self._freezes(inputs.device) else nullcontext():
                self._run(inputs)
        except RuntimeError as error:  # the base class of torch's errors
            if out_of_memory(error):
                raise
            raise UsageError(
                f"--compile {self.mode}: torch.compile cannot compile {self.name} here: "
                f"{first_line(error)[:_MAX_REASON]}",
                "It needs a C++ compiler such as g++ for the CPU, and Triton for CUDA. Use --compile off without them.",
            ) from error
        if inputs.device.type == "cuda":
            torch.cuda.synchronize(inputs.device)
        self.seconds = time.perf_counter() - start

    def _freezes(self, device: torch.device) -> bool:
        return self.mode == "frozen" or (self.mode == "max-autotune" and device.type == "cpu")

    def __call__(self, inputs: Tensor) -> Any:
        before = _graphs()
        # marks the start of a run, which overwrites the outputs of the last CUDA graph
        torch.compiler.cudagraph_mark_step_begin()
        output = self._run(inputs)
        self.recompiles += _graphs() - before
        return output


@contextmanager
def fresh_graphs() -> Iterator[None]:
    """Reset torch.compile before and after, so that a second shape does not become a dynamic one."""
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()


@contextmanager
def quiet_tuning() -> Iterator[None]:
    """Stop torch from printing the times of all kernels that it tries."""
    from torch._inductor import config  # slow import

    quiet = {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}
    # some versions of torch lack one
    with config.patch({name: value for name, value in quiet.items() if hasattr(config, name)}):
        yield


@contextmanager
def _constant_weights() -> Iterator[None]:
    """Compile with weights as constants.

    This must be the setting of the process. An option of `torch.compile` reaches only the compiler of the graph, not
    the tracer, which then passes the weights as inputs, so nothing is frozen.
    """
    from torch._inductor import config

    with config.patch(freezing=True):
        yield


def _own_function(module: nn.Module, name: str) -> Callable[[Tensor], Any]:
    """A function that runs the module, with its own code object, by which torch looks up graphs."""

    def run(inputs: Tensor) -> Any:
        return module(inputs)

    code = run.__code__.replace(co_name=f"run {name}")
    return FunctionType(code, run.__globals__, run.__name__, run.__defaults__, run.__closure__)


def _graphs() -> int:
    from torch._dynamo.utils import counters  # slow import

    return int(counters["stats"]["unique_graphs"])
