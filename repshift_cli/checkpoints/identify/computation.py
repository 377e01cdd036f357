"""What a model computes, as far as its tensors do not show it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

_TRAINING_ONLY = ("AlphaDropout", "DropBlock2d", "DropPath", "Dropout", "Dropout1d", "Dropout2d", "PatchDropout")
"""Modules that change nothing in eval mode, as `Identity`."""

_NO_EFFECT = frozenset(
    {
        "default_cfg",
        "drop_rate",
        "feature_size",
        "fused_attn",
        "grad_checkpointing",
        "gradient_checkpointing",
        "grid_size",
        "image_mean",
        "image_std",
        "img_size",
        "init_values",
        "inplace",
        "momentum",
        "name_or_path",
        "num_patches",
        "output_dict",
        "preprocess_cfg",
        "pretrained_cfg",
        "pretrained_model_args",
        "training",
    }
)
"""Settings that change no output in eval mode, or that the shapes of the tensors show."""


def computation(model: nn.Module) -> str:
    """Types and settings of all modules: heads, activation, pooling, epsilons, rotary positions, ...

    Two models with the same names and shapes of tensors and the same text compute the same. A setting without an effect
    that is not in `_NO_EFFECT` can make the texts differ.
    """
    return json.dumps([(name, *_settings(part)) for name, part in model.named_modules()])


def _settings(module: nn.Module) -> tuple[str, dict[str, Any]]:
    name = type(module).__name__
    if name in (*_TRAINING_ONLY, "Identity"):
        return "Identity", {}
    own = vars(module).items()
    return name, {key: _plain(own_value) for key, own_value in sorted(own) if key[0] != "_" and key not in _NO_EFFECT}


def _plain(value: Any) -> Any:
    """A setting as JSON; other objects and functions by name."""
    if isinstance(value, partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)
