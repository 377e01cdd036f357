"""Specs of a user."""

from __future__ import annotations

from repshift_cli.reduction.specs.spec import Spec

SPECS: list[Spec] = []


def register(spec: Spec) -> None:
    """Add a spec of an architecture, or replace the one of the same library and tower.

    A model that it describes is accepted if it passes the permute test (`reduction/permute.py`), which runs once on
    each model. Other processes that load such a model must register the spec too.
    """
    SPECS[:] = [other for other in SPECS if (other.library, other.tower) != (spec.library, spec.tower)]
    SPECS.append(spec)
