"""Baselines: other methods to make the same model faster.

A baseline is a plan on a copy of the model that shares all its weights. Baselines that work at the sites of the
compressed model drop or merge the same numbers of tokens there, so the cost is equal up to their own scores.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from repshift_cli.errors import ModelError, RecipeError, UsageError
from repshift_cli.models.attention_mode import AttentionMode, attention_mode
from repshift_cli.planning.plan import Plan, PlanSite
from repshift_cli.planning.recipe import ComponentSpec
from repshift_cli.reduction.checks import check_reducer
from repshift_cli.reduction.compressed_model import CompressedModel, attach
from repshift_cli.reduction.reducers.base import Reducer, build_reducer

_NO_SCORE = ComponentSpec(kind="random")
"""For reducers that need no score: it reads no token and costs the least."""

_MATCHING = ComponentSpec(kind="bipartite")
_UNSUPPORTED = (ModelError, RecipeError, UsageError)


@dataclass(frozen=True)
class Baseline:
    """A plan made from a compressed model (None: dense), and the attention that it needs (None: of the setting)."""

    plan: Callable[[CompressedModel], Plan] | None = None
    attention: AttentionMode | None = None


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of a model with its own modules and hooks, but the same parameters and buffers."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def dense_copy(compressed: CompressedModel) -> nn.Module:
    """`shared_copy` of the dense model."""
    twin = shared_copy(compressed)
    assert isinstance(twin, CompressedModel)
    return twin.detach()


def uniform_plan(compressed: CompressedModel) -> Plan:
    """ToMe (arXiv 2210.09461, section 3): bipartite matching in every block, the same number of tokens in each.

    The number is the one whose MACs are nearest to those of the compressed model. A block with fewer than twice that
    many patches merges half of them.

    Raises:
        RecipeError: tokens of the model cannot be merged.
    """
    _checked_reducer(_MATCHING, compressed)
    dense = dense_copy(compressed)
    wanted = compressed.macs()
    most, low, high = (compressed.plan.patch_tokens - 1) // 2, 1, 1
    while high < most and _macs(dense, _every_block(compressed, high)) > wanted:
        low, high = high, min(2 * high, most)
    while low < high:  # the smallest number that costs no more
        middle = (low + high) // 2
        low, high = (low, middle) if _macs(dense, _every_block(compressed, middle)) <= wanted else (middle + 1, high)
    plans = [_every_block(compressed, count) for count in {max(1, low - 1), low}]
    return min(plans, key=lambda plan: abs(_macs(dense, plan) - wanted))


def _every_block(compressed: CompressedModel, count: int) -> Plan:
    """Bipartite matching after each block, of `count` tokens or half of the patches; not after an `exact` last one."""
    layout, last_block = compressed.layout, compressed.plan.last_block
    prefix, patches = layout.prefix_tokens, layout.patch_tokens
    sites = []
    for info in layout.sites[:-1] if last_block == "exact" else layout.sites:
        left = patches - min(count, patches // 2)
        if left < patches:
            before, after = prefix + patches, prefix + left
            sites.append(
                PlanSite(site=info.name, layer=info.layer, tokens_in=before, tokens_out=after, metric=_NO_SCORE)
            )
        patches = left
    return Plan(
        family=layout.family,
        prefix_tokens=prefix,
        patch_tokens=layout.patch_tokens,
        sites=tuple(sites),
        reducer=_MATCHING,
        restore=compressed.plan.restore,
        last_block=last_block,
    )


def _macs(dense: nn.Module, plan: Plan) -> int:
    attached = attach(dense, plan)
    try:
        return attached.macs()
    finally:
        attached.detach()


def _same_counts(compressed: CompressedModel, part: ComponentSpec, metric: ComponentSpec | None = None) -> Plan:
    """The plan of a compressed model with another reducer, and another metric if not None."""
    reducer = _checked_reducer(part, compressed)
    changed = {"after": reducer.after} | ({"metric": metric} if metric else {})
    sites = tuple(site.model_copy(update=changed) for site in compressed.plan.sites)
    return compressed.plan.model_copy(update={"sites": sites, "reducer": part})


def _checked_reducer(part: ComponentSpec, compressed: CompressedModel) -> Reducer:
    reducer = build_reducer(part)
    check_reducer(reducer, compressed.family, compressed.model, restore=compressed.plan.restore)
    return reducer


_PRUNE = ComponentSpec(kind="prune")
_CLASS_ATTENTION = partial(_same_counts, part=_PRUNE, metric=ComponentSpec(kind="class_attention"))

BASELINES: dict[str, Baseline] = {
    "dense": Baseline(),
    "explicit": Baseline(attention="explicit"),  # the dense model with explicit attention
    "class-attention": Baseline(_CLASS_ATTENTION, "explicit"),  # pruning by the attention map of the class token
    "class-attention-row": Baseline(_CLASS_ATTENTION),  # the same with fused attention, computing one row of the map
    "bipartite": Baseline(
        partial(_same_counts, part=_MATCHING, metric=_NO_SCORE)
    ),  # ToMe's matching at the sites of the compressed model
    "tome": Baseline(uniform_plan),  # ToMe's matching in every block
    "fuse": Baseline(partial(_same_counts, part=ComponentSpec(kind="fuse"))),  # dropped tokens fused into one
    "random": Baseline(partial(_same_counts, part=_PRUNE, metric=_NO_SCORE)),  # pruning of random tokens
}
"""By the name that `--against` takes."""

SAME_OUTPUTS = {"explicit": "dense", "class-attention-row": "class-attention"}
"""Baselines that differ from another one in speed only."""


def attach_baseline(
    name: str, compressed: CompressedModel, label: str, among: Collection[str] = BASELINES
) -> CompressedModel | None:
    """The model of a baseline, on the weights of `compressed`; None for the dense model.

    Raises:
        UsageError: the model, called `label`, does not support it. The hint has those `among` that it supports.
    """
    try:
        return _attach(name, compressed)
    except _UNSUPPORTED as error:
        supported = [other for other in among if other != name and _is_supported(other, compressed)]
        raise UsageError(
            f"--against {name}: unsupported for {label} ({compressed.family.name}): {error.message}",
            f"Supported for this model and its plan: {', '.join(supported)}.",
        ) from error


def _is_supported(name: str, compressed: CompressedModel) -> bool:
    try:
        _attach(name, compressed)
    except _UNSUPPORTED:
        return False
    return True


def _attach(name: str, compressed: CompressedModel) -> CompressedModel | None:
    baseline = BASELINES[name]
    attached = None if baseline.plan is None else attach(dense_copy(compressed), baseline.plan(compressed))
    if baseline.attention is not None:
        with attention_mode(compressed if attached is None else attached, baseline.attention):
            pass  # raises if unsupported
    return attached
