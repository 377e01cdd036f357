"""Describe a model in memory, so that a reader can build it."""

from __future__ import annotations

from typing import Any

from torch import nn

from repshift_cli.checkpoints.create import build_on_meta
from repshift_cli.checkpoints.identify.computation import computation
from repshift_cli.checkpoints.identify.identity import shapes
from repshift_cli.checkpoints.identify.match import identify
from repshift_cli.checkpoints.identify.names import is_model_name
from repshift_cli.checkpoints.libraries.base import libraries
from repshift_cli.checkpoints.loaded import ModelDescription
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.errors import ModelError, RepshiftError


def describe_module(known: ModelDescription, model: nn.Module, computed: str) -> ModelDescription:
    """A description from which `build` makes the same model.

    Args:
        known: name and preprocessing.
        computed: `computation` of the dense model of the library.

    Raises:
        CheckpointError, ModelError: no known model computes the same, or as `Library.describe`.
    """
    for library in libraries():
        if found := library.describe(model, known.preprocessing, computed):
            return found
    return _registered(known, model, computed)


def _registered(known: ModelDescription, model: nn.Module, computed: str) -> ModelDescription:
    kind, name = type(model).__name__, known.name
    advice = "Save its `state_dict()`, and give `repshift compress` the file with --model and --model-args."
    if not is_model_name(name):
        raise ModelError(f"the {kind} does not name a registered model, so a reader could not build it", advice)
    tensors: dict[str, Any] = model.state_dict()
    try:
        identity = identify(tensors, name, LoadOptions(model_name=name), name)
        rebuilt = build_on_meta(name, identity.args, name, tensors)
    except RepshiftError as error:
        raise ModelError(f"the {kind} is not a {name}: {error.message}", advice) from error
    if shapes(rebuilt.state_dict()) != shapes(tensors) or computation(rebuilt) != computed:
        raise ModelError(
            f"the {kind} was built with other arguments than {name}, or changed: it does not compute the same", advice
        )
    return ModelDescription(name, name, identity.args, known.preprocessing)
