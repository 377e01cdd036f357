"""Read weights and options from the mappings that training scripts write."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from repshift_cli.checkpoints.options import WeightsKind
from repshift_cli.errors import CheckpointError
from repshift_cli.utils.suggest import first_names

_RAW = ("state_dict", "model", "module", "model_state_dict")
_AVERAGED = "ema"
"""A part of the keys of averaged weights: `state_dict_ema`, `model_ema`."""

_COUNTER = "n_averaged"
"""A tensor of torch's AveragedModel that is not of the model."""

_MOST_WRAPPERS = 8  # a pickle can hold a mapping that contains itself
_LARGEST_SHARE = 4
"""Maximum size of all tensors, in sizes of the file. Tied weights are stored once and counted for each name."""

_LARGEST_VALUE = 1e30
_PLAIN = (str, int, float, list, tuple, Mapping)


def unwrap(content: Any, where: str, which: WeightsKind | None) -> tuple[dict[str, Tensor], list[str]]:
    """The weights in the mappings that training scripts write, and notes for the user.

    Raises:
        CheckpointError: there are none, those of several models, or not the kind that the user chooses.
    """
    outside, notes, is_averaged = content, [], False
    for _ in range(_MOST_WRAPPERS):
        if not isinstance(content, Mapping):
            break
        averaged, raw = _averaged(content), _raw(content)
        if averaged and raw:
            used, other = (raw, averaged) if which == "raw" else (averaged, raw)
            names = ("raw", "averaged") if which == "raw" else ("averaged", "raw")
            notes.append(f"{names[0]} weights ({used}) are used, not the {names[1]} ones ({other}); see --weights")
        elif averaged and which == "raw":
            raise CheckpointError(f"{where} holds averaged weights only ({averaged})", "Leave --weights out.")
        if not (key := averaged if averaged and which != "raw" else raw):
            break
        content, is_averaged = content[key], is_averaged or key == averaged
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{where} holds a {type(content).__name__}, not a mapping of weights")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor) and key != _COUNTER}
    if not any(value.ndim for value in tensors.values()):
        raise _no_weights(outside, where)
    check_kind(which, where, is_averaged)
    return tensors, notes


def check_kind(which: WeightsKind | None, where: str, is_averaged: bool = False) -> None:
    """Raise CheckpointError if the user chooses averaged weights and these are others."""
    if which == "ema" and not is_averaged:
        raise CheckpointError(f"{where} holds no averaged weights", "Leave --weights out.")


def training_options(content: Any) -> dict[str, Any]:
    """Options of a training script that have a value, with the name of the model under `model`."""
    if not isinstance(content, Mapping):
        return {}
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    options = dict(args) if isinstance(args, Mapping) else {}
    if isinstance(content.get("arch"), str):
        options["model"] = content["arch"]
    return {key: value for key, value in options.items() if isinstance(value, _PLAIN) and value}


def plain(tensors: Mapping[str, Tensor], where: str, size: int) -> dict[str, Tensor]:
    """The tensors with negative and conjugate views resolved.

    Args:
        size: of the file.

    Raises:
        CheckpointError: there are none, one is not dense or has no valid name, or they are far larger than the file.
    """
    if not tensors:
        raise CheckpointError(f"{where} holds no tensors")
    for key, value in tensors.items():
        if any("\ud800" <= character <= "\udfff" for character in key):
            raise CheckpointError(f"{where}: the name {key!r} of a tensor has half of a surrogate pair", "Rename it.")
        if kind := _unsupported(value):
            raise CheckpointError(f"{where}: {kind[0]}: {key} is {kind[1]}", "Save dense tensors with values.")
    total = sum(value.numel() * value.element_size() for value in tensors.values())
    if total > _LARGEST_SHARE * size:
        raise CheckpointError(
            f"{where}: its tensors have {total} bytes, but the file only {size}", "Save the tensors without expanding."
        )
    return {key: value.resolve_conj().resolve_neg() for key, value in tensors.items()}


def extreme(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with values that are not finite or are too large to compute with."""
    return [key for key, value in tensors.items() if value.is_floating_point() and not _largest(value) < _LARGEST_VALUE]


def _largest(value: Tensor) -> float:
    low, high = (value.float() if value.element_size() == 1 else value).aminmax()  # float8 has no `aminmax`
    return math.nan if math.isnan(low) else max(-float(low), float(high))


def _unsupported(value: Tensor) -> tuple[str, str] | None:
    if value.is_nested or value.layout != torch.strided:
        return "not dense", f"a nested or sparse tensor ({value.layout})"
    if value.is_meta:
        return "no values", "a meta tensor"
    if value.is_quantized:
        return "not floating point", str(value.dtype)
    return None if value.numel() else ("empty", str(list(value.shape)))


def _averaged(content: Mapping[Any, Any]) -> Any:
    """The first key of averaged weights; unused ones are None or empty."""
    return next((key for key in content if _is_averaged(key) and _is_filled(content[key])), None)


def _raw(content: Mapping[Any, Any]) -> Any:
    """The first key of a known wrapper, else that of the only mapping full of tensors."""
    known = [key for key in _RAW if _is_filled(content.get(key))]
    if known:
        return next((key for key in known if any(map(torch.is_tensor, content[key].values()))), known[0])
    found = [
        key
        for key, value in content.items()
        if _is_filled(value) and not _is_averaged(key) and all(map(torch.is_tensor, value.values()))
    ]
    has_weights = any(isinstance(value, Tensor) and value.ndim for value in content.values())
    return found[0] if len(found) == 1 and not has_weights else None


def _is_averaged(key: Any) -> bool:
    return _AVERAGED in str(key).split("_")


def _is_filled(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(each, Tensor | Mapping) for each in value.values())


def _no_weights(content: Mapping[Any, Any], where: str) -> CheckpointError:
    if places := [str(key) for key, value in content.items() if _is_filled(value)]:
        return CheckpointError(
            f"{where} holds no tensors where weights are expected",
            f"Save the weights alone. Tensors may lie under {first_names(places)}.",
        )
    return CheckpointError(f"{where} holds no tensors", f"Its keys: {first_names([str(key) for key in content])}.")
