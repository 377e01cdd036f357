"""repshift: make trained vision models faster by letting unimportant tokens go between layers.

    from repshift_cli import Recipe, compress, load

    model = compress("vit_base.safetensors", Recipe.load("recipe.yaml"))
    with model.dense():
        ...                       # the original, on the same weights
    model.trace(images).kept      # which patches stayed, per layer

Importing the package is cheap: torch comes with the first name that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repshift_cli.artifact import load
    from repshift_cli.attach import CompressedModel, Trace
    from repshift_cli.compression import compress
    from repshift_cli.errors import RepshiftError
    from repshift_cli.recipe import Recipe

__all__ = ["CompressedModel", "Recipe", "RepshiftError", "Trace", "__version__", "compress", "load"]

__version__ = "0.1.0"

_HOME = {
    "CompressedModel": "attach",
    "Recipe": "recipe",
    "RepshiftError": "errors",
    "Trace": "attach",
    "compress": "compression",
    "load": "artifact",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
