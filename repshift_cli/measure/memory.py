"""Measure peak memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; shared ones count once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def peak_memory(run: Callable[[Tensor], Any], inputs: Tensor) -> int:
    """Peak bytes alive at once during one run, without those allocated before (weights and inputs).

    On CUDA it is reported by the allocator. On the CPU it is the sum over live tensor storages that operations
    returned, each counted once; scratch memory inside a kernel is not included.
    """
    if inputs.device.type == "cuda":
        return _peak_on_cuda(run, inputs)
    # Not inference_mode, which hides the tensors inside composite operations.
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
    """Adds the storages that operations return, and subtracts each when its last tensor is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        # By identity, since storages compare by value; weak references do not keep them alive.
        self._known = WeakIdKeyDictionary(ref_type=weakref.ref)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):  # allocated before the run
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
