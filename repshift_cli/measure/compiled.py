"""torch.compile for timing: the whole model in one graph, with what compiling takes."""

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

__all__ = ["CompileMode", "Compiled", "fresh_graphs", "quiet_tuning"]

CompileMode = Literal["off", "default", "frozen", "reduce-overhead", "max-autotune"]
"""A mode of torch.compile, or none at all; `frozen` is the default one with weights as constants of the graph.

Constants are laid out in advance as the kernels want them, where otherwise each call does that anew. It takes as long
for few tokens as for many, and it takes memory for a second copy of the weights. On the CPU `max-autotune` has them as
well: for other weights torch knows no kernels to choose from.
"""

_LONGEST_REASON = 200


class Compiled:
    """A model through torch.compile, for one shape of inputs.

    Call `first` once, in the context and the inference mode of the later calls, since graphs depend on both.

    Args:
        name: what messages call the model.
        mode: any but `off`.

    Attributes:
        seconds: how long the first call took, compiling included.
        recompiles: graphs that were compiled in later calls.
    """

    def __init__(self, name: str, module: nn.Module, mode: CompileMode) -> None:
        self.name = name
        self.mode = mode
        self.seconds = 0.0
        self.recompiles = 0
        chosen: Any = {} if mode == "frozen" else {"mode": mode}
        self._run = torch.compile(_own_function(module, name), fullgraph=True, dynamic=False, **chosen)

    def first(self, inputs: Tensor) -> None:
        """Compile and run once.

        Raises:
            UsageError: it cannot be compiled here.
        """
        start = time.perf_counter()
        try:
            with quiet_tuning(), _constant_weights() if self._freezes(inputs.device) else nullcontext():
                self._run(inputs)
        except RuntimeError as error:  # of torch's own kinds of errors all are
            if out_of_memory(error):
                raise
            raise UsageError(
                f"--compile {self.mode}: torch.compile cannot compile {self.name} here: {_reason(error)}",
                "It needs a C++ compiler such as g++ for the CPU, and Triton for CUDA. Use --compile off without them.",
            ) from error
        if inputs.device.type == "cuda":
            torch.cuda.synchronize(inputs.device)
        self.seconds = time.perf_counter() - start

    def _freezes(self, device: torch.device) -> bool:
        return self.mode == "frozen" or (self.mode == "max-autotune" and device.type == "cpu")

    def __call__(self, inputs: Tensor) -> Any:
        before = _graphs()
        # outputs of a graph of CUDA calls are overwritten by the next one, which must be told to begin
        torch.compiler.cudagraph_mark_step_begin()
        output = self._run(inputs)
        self.recompiles += _graphs() - before
        return output


@contextmanager
def fresh_graphs() -> Iterator[None]:
    """Forget, before and after, all that was compiled, so that no shape becomes a dynamic one because of another."""
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()


@contextmanager
def quiet_tuning() -> Iterator[None]:
    """Do not let torch print the times of all the kernels that it chooses from inside."""
    from torch._inductor import config  # imports much, so only where something is compiled

    quiet = {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}
    # not every version of torch has both
    with config.patch({name: value for name, value in quiet.items() if hasattr(config, name)}):
        yield


@contextmanager
def _constant_weights() -> Iterator[None]:
    """Let what is compiled inside take weights as constants.

    The setting of the process it has to be: an option of `torch.compile` reaches the compiler of the graph, but not
    the tracer before it, which then hands the weights over as inputs, and nothing is frozen.
    """
    from torch._inductor import config

    with config.patch(freezing=True):
        yield


def _own_function(module: nn.Module, name: str) -> Callable[[Tensor], Any]:
    """A function that runs the module, with code of its own: graphs are kept and looked up by code."""

    def run(inputs: Tensor) -> Any:
        return module(inputs)

    code = run.__code__.replace(co_name=f"run {name}")
    return FunctionType(code, run.__globals__, run.__name__, run.__defaults__, run.__closure__)


def _graphs() -> int:
    """How many graphs were compiled so far in this process."""
    from torch._dynamo.utils import counters  # imports much, so only where something is compiled

    return int(counters["stats"]["unique_graphs"])


def _reason(error: RuntimeError) -> str:
    """The first line of what torch says, which goes on for pages."""
    line = first_line(error)
    return line if len(line) <= _LONGEST_REASON else f"{line[: _LONGEST_REASON - 3]}..."
