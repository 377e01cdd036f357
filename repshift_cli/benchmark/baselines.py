"""Other ways to make the same model faster, to be timed beside a compressed one: the same weights, the same cost.

Each peer is a plan of its own, attached to a copy of the model that shares all its weights. Peers that work at the
sites of the compressed model let the same numbers of tokens go there, so that all cost the same up to their own scores.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from repshift_cli.benchmark.run import Contender, contenders_of
from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.exported import OpenedExport, Runtime
from repshift_cli.errors import ModelError, RecipeError, UsageError
from repshift_cli.models.attention_mode import AttentionMode, attention_mode
from repshift_cli.planning.plan import Plan, PlanSite
from repshift_cli.planning.recipe import ComponentSpec
from repshift_cli.reduction.checks import check_reducer
from repshift_cli.reduction.compressed_model import CompressedModel, attach
from repshift_cli.reduction.reducers.base import Merger, Reducer, build_reducer
from repshift_cli.utils.suggest import nearest

__all__ = ["PEERS", "Peer", "check_names", "contenders_against", "dense_copy", "shared_copy", "uniform_plan"]

_FREE = ComponentSpec(kind="random")
"""The score of reducers that ask for none: it looks at no token, and costs the least."""

_MATCHING = ComponentSpec(kind="bipartite")


@dataclass(frozen=True)
class Peer:
    """A way to make a dense model faster.

    Attributes:
        told: what it is, in words.
        plan: from a compressed model to what the peer does in its place; None for the dense model itself.
        attention: how it has to attend, whatever the setting says; None as the setting says.
    """

    told: str
    plan: Callable[[CompressedModel], Plan] | None = None
    attention: AttentionMode | None = None


def contenders_against(opened: Mapping[str, Opened], names: Sequence[str]) -> list[Contender]:
    """The contenders of `contenders_of`, and for every compressed model its peers.

    Args:
        opened: by label.
        names: of `PEERS`; dense models take part in any case.

    Raises:
        UsageError: there is no such peer, nothing is compressed, or a model cannot be made into the peer, with those
            that it can be made into.
    """
    check_names(names)
    wanted = [name for name in dict.fromkeys(names) if PEERS[name].plan or PEERS[name].attention]
    found = contenders_of(opened)
    exported = [contender for contender in found if isinstance(contender.module, Runtime)]
    found = [contender for contender in found if contender not in exported]
    compressed = [contender for contender in found if contender.role == "compressed"]
    if wanted and any(isinstance(model, OpenedExport) for model in opened.values()):
        raise UsageError("--against: an exported file cannot be made into a peer", "Name its checkpoint instead.")
    if wanted and not compressed:
        raise UsageError("--against: no model is compressed", "Add --recipe to compress it for the run.")
    models = [model.compressed for model in opened.values() if model.compressed is not None]
    ours: list[Contender] = []
    peers: list[Contender] = []
    for contender, model in zip(compressed, models, strict=True):
        own = [_build(name, contender, model, single=len(compressed) == 1) for name in wanted]
        ours.append(replace(contender, peers=tuple(peer.name for peer in own)))
        peers += own
    return [*(contender for contender in found if contender.role == "dense"), *ours, *peers, *exported]


def check_names(names: Sequence[str]) -> None:
    """Refuse a peer that there is not.

    Raises:
        UsageError: with those that there are.
    """
    for name in names:
        if name not in PEERS:
            raise UsageError(
                f"--against: there is no peer {name!r}", f"{nearest(name, PEERS)}Known are {', '.join(PEERS)}."
            )


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of a model with modules of its own, whose parameters and buffers are those of the model itself."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def uniform_plan(compressed: CompressedModel) -> Plan:
    """Merging in every block, the same number of tokens in each, as ToMe has it (arXiv 2210.09461, section 3).

    The number is the one whose cost is nearest to that of the compressed model. Where half of the tokens are fewer, as
    many as that merge.

    Raises:
        RecipeError: tokens of the model cannot be merged.
    """
    _reducer(_MATCHING, compressed)
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
    """Bipartite matching after each block, of `count` tokens where there are twice as many."""
    layout = compressed.layout
    sites, patches = [], layout.patch_tokens
    for info in layout.sites:
        left = patches - min(count, patches // 2)
        if left < patches:
            sites.append(_site(info.name, info.layer, layout.prefix_tokens, patches, left))
        patches = left
    return Plan(
        family=layout.family,
        prefix_tokens=layout.prefix_tokens,
        patch_tokens=layout.patch_tokens,
        sites=tuple(sites),
        reducer=_MATCHING,
    )


def _site(name: str, layer: int, prefix: int, patches: int, left: int) -> PlanSite:
    return PlanSite(site=name, layer=layer, tokens_in=prefix + patches, tokens_out=prefix + left, metric=_FREE)


def _macs(dense: nn.Module, plan: Plan) -> int:
    """What a plan costs; the model is dense before and after."""
    attached = attach(dense, plan)
    try:
        return attached.macs()
    finally:
        attached.detach()


def _same_counts(compressed: CompressedModel, part: ComponentSpec, metric: ComponentSpec | None) -> Plan:
    """The plan of a compressed model with another reducer, and another score where one is given.

    Raises:
        RecipeError: the model cannot be reduced in this way.
    """
    reducer = _reducer(part, compressed)
    changed = {"after": reducer.after} | ({"metric": metric} if metric else {})
    sites = tuple(site.model_copy(update=changed) for site in compressed.plan.sites)
    return compressed.plan.model_copy(update={"sites": sites, "reducer": part})


def _bipartite(compressed: CompressedModel) -> Plan:
    """Matching at the sites of the compressed model.

    Raises:
        RecipeError: tokens cannot be merged, or more go at a site than can be matched.
    """
    plan, reducer = _same_counts(compressed, _MATCHING, _FREE), _reducer(_MATCHING, compressed)
    assert isinstance(reducer, Merger)
    for site in plan.sites:
        patches, dropped = site.tokens_in - plan.prefix_tokens, site.tokens_in - site.tokens_out
        if dropped > (most := reducer.most(patches)):
            raise RecipeError(f"{dropped} of {patches} tokens go at {site.site}, and matching can let {most} go")
    return plan


def _reducer(part: ComponentSpec, compressed: CompressedModel) -> Reducer:
    """The reducer, known to work on this model; errors as `attach.check_reducer`."""
    reducer = build_reducer(part)
    check_reducer(reducer, compressed.family, compressed.model)
    return reducer


_CLASS_ATTENTION = partial(_same_counts, part=ComponentSpec(kind="prune"), metric=ComponentSpec(kind="class_attention"))

PEERS: dict[str, Peer] = {
    "dense": Peer("the dense model"),
    "explicit": Peer("the dense model with explicit attention", attention="explicit"),
    "class-attention": Peer(
        "pruning by class attention, with explicit attention in every block", _CLASS_ATTENTION, "explicit"
    ),
    "class-attention-row": Peer("pruning by class attention, of which only one row is formed", _CLASS_ATTENTION),
    "bipartite": Peer("ToMe's matching at the same sites", _bipartite),
    "tome": Peer("ToMe's matching in every block, the same number in each", uniform_plan),
    "fuse": Peer(
        "the tokens that go fused into one", partial(_same_counts, part=ComponentSpec(kind="fuse"), metric=None)
    ),
}
"""By the name that `--against` takes."""


def _build(name: str, contender: Contender, compressed: CompressedModel, single: bool) -> Contender:
    """The contender of a peer.

    Raises:
        UsageError: the model cannot be made into it, with those that it can be made into.
    """
    try:
        return _contender(name, contender, compressed, single)
    except (ModelError, RecipeError, UsageError) as error:
        able = [other for other in PEERS if other != name and _is_possible(other, contender, compressed)]
        raise UsageError(
            f"--against {name}: {contender.name} ({compressed.family.name}) cannot be made into it: {error.message}",
            f"Possible for this model and its plan: {', '.join(able)}.",
        ) from error


def _is_possible(name: str, contender: Contender, compressed: CompressedModel) -> bool:
    try:
        _contender(name, contender, compressed, single=True)
    except (ModelError, RecipeError, UsageError):
        return False
    return True


def _contender(name: str, contender: Contender, compressed: CompressedModel, single: bool) -> Contender:
    peer = PEERS[name]
    attached: CompressedModel | None = None
    if peer.plan is not None:
        attached = attach(dense_copy(compressed), peer.plan(compressed))
    module = contender.module if attached is None else attached
    if peer.attention is not None:
        with attention_mode(module, peer.attention):
            pass  # refused here where there is nothing to switch
    return Contender(
        name=name if single else f"{contender.name}, {name}",
        module=module,
        macs=compressed.dense_macs() if attached is None else attached.macs(),
        input_size=contender.input_size,
        against=contender.against,
        context=partial(_as_peer, module, peer.attention, compressed if attached is None else None),
        is_peer=True,
        preprocessing=contender.preprocessing,
    )


@contextmanager
def _as_peer(module: nn.Module, attention: AttentionMode | None, dense: CompressedModel | None) -> Iterator[None]:
    """What makes a module the peer: its attention, and the switch to the dense model where it is that."""
    with ExitStack() as entered:
        if attention is not None:  # else that of the setting stays
            entered.enter_context(attention_mode(module, attention))
        if dense is not None:
            entered.enter_context(dense.dense())
        yield


def dense_copy(compressed: CompressedModel) -> nn.Module:
    """The dense model, as `shared_copy`: modules of its own on the same weights."""
    twin = shared_copy(compressed)
    assert isinstance(twin, CompressedModel)
    return twin.detach()
