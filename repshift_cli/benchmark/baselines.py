"""Baselines timed with the compressed model; `reduction/baselines.py` makes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

from torch import nn

from repshift_cli.benchmark.run import Contender, contenders_of
from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.exported import OpenedExport
from repshift_cli.errors import UsageError
from repshift_cli.models.attention_mode import AttentionMode, attention_mode
from repshift_cli.reduction.baselines import BASELINES, attach_baseline
from repshift_cli.reduction.compressed_model import CompressedModel
from repshift_cli.utils.suggest import nearest

WAYS = ("int8", "bfloat16", "compile", "smaller-input", "smaller-model=NAME")
"""Other ways to run the model, for `way_contenders.with_ways`. They are not plans on the same weights."""


def contenders_against(opened: Mapping[str, Opened], names: Sequence[str]) -> list[Contender]:
    """The contenders of `contenders_of`, and the named baselines of every compressed model.

    Raises:
        UsageError: unknown baseline, no compressed model, or a baseline that the model does not support.
    """
    check_names(names)
    wanted = [name for name in dict.fromkeys(names) if name != "dense"]
    found = contenders_of(opened)
    if not wanted:
        return found
    models = [model.compressed for model in compressed_of(opened) if model.compressed is not None]
    compressed: list[Contender] = []
    baselines: list[Contender] = []
    own = [contender for contender in found if contender.role == "compressed"]
    for contender, model in zip(own, models, strict=True):
        new = [_build(name, contender, model, single=len(models) == 1) for name in wanted]
        compressed.append(replace(contender, baselines=tuple(each.name for each in new)))
        baselines += new
    return [*(contender for contender in found if contender.role == "dense"), *compressed, *baselines]


def check_names(names: Sequence[str]) -> None:
    """Raise a UsageError for an unknown baseline."""
    for name in names:
        if name not in BASELINES:
            allowed = (*BASELINES, *WAYS)
            raise UsageError(
                f"--against: unknown baseline {name!r}", f"{nearest(name, allowed)}Allowed are {', '.join(allowed)}."
            )


def compressed_of(opened: Mapping[str, Opened]) -> list[Opened]:
    """The compressed ones of opened models; raises a UsageError for an exported file, or if there is none."""
    if any(isinstance(model, OpenedExport) for model in opened.values()):
        raise UsageError("--against: unsupported for an exported file", "Name its checkpoint instead.")
    if found := [model for model in opened.values() if model.compressed is not None]:
        return found
    raise UsageError("--against: no model is compressed", "Add --recipe to compress it for the run.")


def _build(name: str, contender: Contender, compressed: CompressedModel, single: bool) -> Contender:
    baseline = BASELINES[name]
    attached = attach_baseline(name, compressed, contender.name)
    module = contender.module if attached is None else attached
    return Contender(
        name=name if single else f"{contender.name}, {name}",
        module=module,
        macs=compressed.dense_macs() if attached is None else attached.macs(),
        input_size=contender.input_size,
        against=contender.against,
        context=partial(_switched, module, baseline.attention, compressed if attached is None else None),
        is_baseline=True,
        preprocessing=contender.preprocessing,
    )


@contextmanager
def _switched(module: nn.Module, attention: AttentionMode | None, dense: CompressedModel | None) -> Iterator[None]:
    """Set the attention of a baseline if not None; run `dense` without its hooks if not None."""
    switched = nullcontext() if attention is None else attention_mode(module, attention)
    with switched, nullcontext() if dense is None else dense.dense():
        yield
