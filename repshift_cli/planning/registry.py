"""Registries of metrics, reducers and families: each file of a folder defines one member."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import GenericAlias
from typing import Any, TypeVar

from repshift_cli.errors import RecipeError
from repshift_cli.planning.recipe import ComponentSpec, Place, dotted, validate
from repshift_cli.utils.suggest import nearest

_Base = TypeVar("_Base")


def members(package: str, base: type[_Base]) -> Iterator[type[_Base]]:
    """The concrete subclasses of `base` that are defined in the modules of `package`, by module name."""
    folder = importlib.import_module(package)
    for module_info in sorted(pkgutil.iter_modules(folder.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{package}.{module_info.name}")
        for value in vars(module).values():
            # before Python 3.11 an alias such as tuple[int, int] is an instance of type
            if isinstance(value, GenericAlias) or not isinstance(value, type) or not issubclass(value, base):
                continue
            if value.__module__ != module.__name__ or value is base:
                continue
            if not getattr(value, "__abstractmethods__", None):
                yield value


def build_component(spec: ComponentSpec, known: dict[str, Any], place: Place, path: tuple[str | int, ...]) -> Any:
    """The metric or reducer at `path` of a recipe; `known` are the pydantic models by kind.

    Raises a RecipeError for an unknown kind or an invalid option.
    """
    if spec.kind not in known:
        hint = f"{nearest(spec.kind, known)}Allowed: {', '.join(known)}."
        where = (*path, "kind")
        raise RecipeError(f"{place.at(where)}: {dotted(where)}: unknown {path[-1]} {spec.kind!r}", hint)
    return validate(known[spec.kind], spec.options, place, path)
