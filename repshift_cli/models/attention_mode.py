"""Select the attention backend of a model.

- `flash`: the package flash-attn; attention that it does not support (attention pooling, blocks that project attention
  and MLP in one product) stays on torch's kernels.
- `sdpa`: torch's scaled dot-product attention on a fused kernel, never its math fallback; `sdpa:flash` etc. select one.
- `explicit`: a product, a softmax and a product, with the whole attention map.
- `auto`: flash-attn if it is installed and can run, else the setting of the model.

`measure.attention_kernel.observed_attention` returns what ran.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from repshift_cli.errors import UsageError
from repshift_cli.models import timm_attention
from repshift_cli.models.tensor_model import library_model
from repshift_cli.ops.attention import WIDEST

AttentionMode = Literal["auto", "flash", "sdpa", "sdpa:flash", "sdpa:efficient", "sdpa:cudnn", "sdpa:math", "explicit"]

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_CAPABILITY = (8, 0)
_KERNELS = {
    "sdpa": [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
    "sdpa:flash": [SDPBackend.FLASH_ATTENTION],
    "sdpa:efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "sdpa:cudnn": [SDPBackend.CUDNN_ATTENTION],
    "sdpa:math": [SDPBackend.MATH],
}
_NO_KERNEL = ("No available kernel", "No viable backend for scaled_dot_product_attention")
"""Torch's error messages if no allowed kernel can run, on CUDA and on CPU."""

_CHECKED_TOKENS = 16
_INSTALL = "pip install 'repshift-cli[flash]'"


@contextmanager
def attention_mode(module: nn.Module, mode: AttentionMode) -> Iterator[None]:
    """Compute all attention of a model in this mode inside the context.

    Parameters, keys and hooks stay. Contexts nest. The device and dtype on entering decide whether flash-attn can run.
    The choice of torch's kernel is global: inside the context it also applies to other models. timm's own attention and
    that of UMT can run on flash-attn, modules with timm's option `fused_attn` and those of transformers on the other
    backends, `nn.MultiheadAttention` on `sdpa`.

    Raises:
        UsageError: the model has no attention that can be switched, flash-attn is requested and cannot run, or, inside
            the context, no requested kernel supports an attention of the model.
    """
    flashing = {id(part) for part in _on_flash(module, mode)}
    switches = _switches(module)
    configs = _configs(module, mode)
    multihead = any(isinstance(part, nn.MultiheadAttention) for part in module.modules())
    before = [(part, bool(part.fused_attn), bool(getattr(part, "flash_attn", False))) for part in switches]
    if mode != "auto" and not (switches or configs or (multihead and mode == "sdpa")):
        allowed = "auto or sdpa" if multihead else "auto"
        kind = type(library_model(module)).__name__
        raise UsageError(f"no attention in {kind} can be switched to {mode!r}", f"Use --attention {allowed} for it.")
    implementations = [(config, config._attn_implementation) for config in configs]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        for config in configs:
            _implement(config, "eager" if mode == "explicit" else "sdpa")
        if multihead and mode == "sdpa":
            torch.backends.mha.set_fastpath_enabled(False)  # it has kernels of its own
        for part in switches:
            _switch(part, part.fused_attn if mode == "auto" else mode != "explicit", id(part) in flashing)
        with _explained(mode), sdpa_kernel(_KERNELS[mode]) if mode in _KERNELS else nullcontext():
            yield
    finally:
        for part, fused, flash in before:
            _switch(part, fused, flash)
        for config, implementation in implementations:
            config._attn_implementation_internal = implementation
        torch.backends.mha.set_fastpath_enabled(fast_path)


def check_attention(module: nn.Module, mode: AttentionMode) -> None:
    """Raise `UsageError` if entering `attention_mode` would, or if torch's kernel cannot run at all."""
    with attention_mode(module, mode), torch.no_grad():
        for device, dtype, width in {_kind(part) for part in _flash_takers(module)} if mode in _KERNELS else ():
            query = torch.zeros(1, 1, _CHECKED_TOKENS, width, device=device, dtype=dtype)
            functional.scaled_dot_product_attention(query, query, query)


def flash_problem(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why flash-attn cannot compute attention with heads of `width` channels here, or None if it can."""
    misfits = _misfits(device, dtype, width)
    return "; ".join(misfits) if misfits else flash_missing()


def flash_missing() -> str | None:
    """Why the package flash-attn cannot be imported, or None if it can."""
    try:
        import flash_attn  # noqa: F401
    except ImportError as error:  # also one that was built for another torch
        missing = isinstance(error, ModuleNotFoundError) and error.name == "flash_attn"
        return "it is not installed" if missing else f"it does not load ({error})"
    return None


def available_kernels(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The modes of torch's own kernels that can run here, such as `sdpa:flash`, without a mask."""
    query, found = torch.zeros(1, 1, _CHECKED_TOKENS, 64, device=device, dtype=dtype), []
    for mode, kernels in _KERNELS.items():
        with suppress(RuntimeError), warnings.catch_warnings(), sdpa_kernel(kernels):
            warnings.simplefilter("ignore")  # torch says why a kernel cannot run
            functional.scaled_dot_product_attention(query, query, query)
            found.append(mode)
    return [mode for mode in found if ":" in mode]


def auto_note(module: nn.Module, mode: AttentionMode) -> str | None:
    """A note if `auto` does not use flash-attn only because it is not installed."""
    kinds = {_kind(part) for part in _flash_takers(module) if part.fused_attn}
    fits = any(not _misfits(*kind) for kind in kinds)
    if mode != "auto" or not fits or (missing := flash_missing()) is None:
        return None
    return f"attention could run on flash-attn here, but {missing} ({_INSTALL}): torch's own kernels are used"


def _misfits(device: torch.device, dtype: torch.dtype, width: int) -> list[str]:
    found = []
    if device.type != "cuda":
        found.append(f"it runs on CUDA, and the model is on {device.type}")
    elif torch.cuda.get_device_capability(device) < _FLASH_CAPABILITY:
        found.append(f"it needs a GPU of compute capability 8.0 or more, and {device} has less")
    if dtype not in _FLASH_DTYPES:
        found.append(f"it takes float16 and bfloat16, and the model is {str(dtype).removeprefix('torch.')}")
    if width > WIDEST:
        found.append(f"it takes heads of {WIDEST} channels at most, and the model has {width}")
    return found


def _on_flash(module: nn.Module, mode: AttentionMode) -> list[Any]:
    """The modules that run on flash-attn in this mode; raises `UsageError` if it is requested and none can."""
    if mode not in ("auto", "flash"):
        return []
    takers = [part for part in _flash_takers(module) if mode == "flash" or part.fused_attn]
    problems = {kind: flash_problem(*kind) for kind in map(_kind, takers)}
    fitting = [part for part in takers if problems[_kind(part)] is None]
    if mode == "auto" or fitting:
        return fitting
    name = type(module).__name__
    if not takers:
        raise UsageError(
            f"no attention in {name} can run on flash-attn",
            "timm's Attention and that of UMT can. Use --attention sdpa or auto.",
        )
    raise UsageError(
        f"attention of {name} cannot run on flash-attn: {problems[_kind(takers[0])]}",
        f"It takes {_INSTALL}, --device cuda and --dtype float16 or bfloat16. --attention sdpa stays on torch's fused "
        "kernels, auto takes flash-attn if it can run.",
    )


def _configs(module: nn.Module, mode: AttentionMode) -> list[Any]:
    """The configurations of transformers that select the attention of a model; none for `auto`.

    Raises:
        UsageError: a class in the model does not read its configuration, or does not support the mode.
    """
    if mode in ("auto", "flash"):
        return []
    models = [part for part in module.modules() if hasattr(part, "_can_set_attn_implementation")]
    for part in models:
        kind: Any = type(part)
        if not kind._can_set_attn_implementation() or (mode != "explicit" and not kind._supports_sdpa):
            raise UsageError(
                f"the attention of {kind.__name__} cannot be switched to {mode!r}", "Use --attention auto for it."
            )
    found = [getattr(part, "config", None) for part in module.modules()] if models else []
    return list({id(part): part for part in found if hasattr(part, "_attn_implementation")}.values())


def _implement(config: Any, implementation: str) -> None:
    config._attn_implementation_internal = implementation  # the public name also sets configurations inside this one
    if config._attn_implementation != implementation:
        raise UsageError(
            f"{type(config).__name__} does not change its attention implementation", "Use --attention auto for it."
        )


def _switches(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if hasattr(part, "fused_attn")]


def _flash_takers(module: nn.Module) -> list[Any]:
    return [part for part in _switches(module) if hasattr(part, "flash_attn") or timm_attention.is_attention(part)]


def _switch(part: Any, fused: bool, flash: bool) -> None:
    part.fused_attn = fused
    if timm_attention.is_attention(part):
        timm_attention.run_on_flash(part, flash)
    elif hasattr(part, "flash_attn"):
        part.flash_attn = flash


def _kind(part: Any) -> tuple[torch.device, torch.dtype, int]:
    weight = next(part.qkv.parameters())
    device: torch.device = weight.device
    cast = device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type)
    return device, torch.get_autocast_dtype(device.type) if cast else weight.dtype, int(part.head_dim)


@contextmanager
def _explained(mode: AttentionMode) -> Iterator[None]:
    """Turn torch's error that no kernel can run into a `UsageError` with a hint."""
    try:
        yield
    except RuntimeError as error:
        if mode in _KERNELS and any(text in str(error) for text in _NO_KERNEL):
            raise UsageError(
                f"{mode}: torch has no kernel of this kind for an attention of the model on this device, in this "
                "dtype, with or without a mask",
                "--attention sdpa takes any of the fused kernels, auto what torch chooses.",
            ) from error
        raise
