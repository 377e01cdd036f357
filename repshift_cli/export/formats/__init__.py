"""The formats of `repshift export`: one file each, which declares a `FORMAT`. Importing them does not import torch."""

from importlib import import_module
from pkgutil import iter_modules

from repshift_cli.export.format import Format

_FOUND: list[Format] = [import_module(f"{__name__}.{module.name}").FORMAT for module in iter_modules(__path__)]

FORMATS: dict[str, Format] = {found.name: found for found in sorted(_FOUND, key=lambda found: found.name)}
"""By the name that `--to` takes."""
