"""Registries that find their members by themselves: one file in a folder is one metric, reducer or family."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import GenericAlias
from typing import Any, TypeVar

from repshift_cli.errors import RecipeError
from repshift_cli.planning.recipe import ComponentSpec, Place, dotted, validate
from repshift_cli.utils.suggest import nearest

__all__ = ["build_component", "members"]

_Base = TypeVar("_Base")


def members(package: str, base: type[_Base]) -> Iterator[type[_Base]]:
    """The concrete subclasses of `base` that are defined in the modules of `package`, by module name."""
    folder = importlib.import_module(package)
    for module_info in sorted(pkgutil.iter_modules(folder.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{package}.{module_info.name}")
        for value in vars(module).values():
            # before Python 3.11 an alias such as tuple[int, int] says that it is a type
            if isinstance(value, GenericAlias) or not isinstance(value, type) or not issubclass(value, base):
                continue
            if value.__module__ != module.__name__ or value is base:
                continue
            if not getattr(value, "__abstractmethods__", None):
                yield value


def build_component(part: ComponentSpec, known: dict[str, Any], place: Place, path: tuple[str | int, ...]) -> Any:
    """The metric or reducer that a recipe names, with its options checked.

    Args:
        part: kind and options.
        known: pydantic models by kind.
        place: where the recipe stands, for messages.
        path: where the part stands in the recipe; its last key is `metric` or `reducer`.

    Raises:
        RecipeError: an unknown kind, or an option that cannot be.
    """
    if part.kind not in known:
        hint = f"{nearest(part.kind, known)}Allowed: {', '.join(known)}."
        where = (*path, "kind")
        raise RecipeError(f"{place.at(where)}: {dotted(where)}: there is no {path[-1]} {part.kind!r}", hint)
    return validate(known[part.kind], part.options, place, path)
