"""repshift: speed up trained vision models by dropping or merging unimportant tokens between layers.

    from repshift_cli import Recipe, compress, load

    model = compress("vit_base.safetensors", Recipe.load("recipe.yaml"))
    with model.dense():
        ...                       # the dense model, on the same weights
    model.trace(images).kept      # indices of the kept patches, per layer

Importing the package does not import torch. A name of the API imports it on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repshift_cli.version import __version__

if TYPE_CHECKING:
    from repshift_cli.checkpoints.artifact import load
    from repshift_cli.compression.api import compress, search_recipe
    from repshift_cli.errors import RepshiftError
    from repshift_cli.planning.recipe import Recipe
    from repshift_cli.reduction.compressed_model import CompressedModel, Trace, detach

__all__ = [
    "CompressedModel",
    "Recipe",
    "RepshiftError",
    "Trace",
    "__version__",
    "compress",
    "detach",
    "load",
    "search_recipe",
]

_MODULES = {
    "CompressedModel": "reduction.compressed_model",
    "Recipe": "planning.recipe",
    "RepshiftError": "errors",
    "Trace": "reduction.compressed_model",
    "compress": "compression.api",
    "detach": "reduction.compressed_model",
    "load": "checkpoints.artifact",
    "search_recipe": "compression.api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
