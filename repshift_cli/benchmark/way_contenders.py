"""Other ways to run a model as contenders of `bench`: int8, bfloat16, torch.compile, a smaller input or model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from repshift_cli.benchmark import ways
from repshift_cli.benchmark.baselines import WAYS, compressed_of
from repshift_cli.benchmark.run import BenchSettings, Contender, unused
from repshift_cli.benchmark.ways import Missing, Way
from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.errors import UsageError

_COMPILED = "torch.compile"


def split_ways(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Baselines and ways among the names of `--against`."""
    found = [name for name in names if name in WAYS[:-1] or re.match("smaller-model=.", name)]
    return [name for name in names if name not in found], found


def check_ways(names: Sequence[str], sweep: Sequence[BenchSettings], data: str | None) -> None:
    """Raise a UsageError if ways are to be measured with settings that they do not support."""
    cpu = torch.device("cpu")
    allowed = [BenchSettings(cpu, torch.float32, each.seconds, each.min_runs, each.threads) for each in sweep]
    if names and (list(sweep) != allowed or data is not None):
        raise UsageError(
            f"--against {names[0]}: is measured on the CPU, in float32 with the default attention, uncompiled",
            "Leave out --device, --dtype, --attention, --compile, --memory-format and --data.",
        )


def with_ways(
    found: Sequence[Contender],
    opened: Sequence[Mapping[str, Opened]],
    names: Sequence[str],
    exported: Callable[[Sequence[Way]], Iterable[Way | Missing]],
) -> tuple[list[Contender], dict[str, str]]:
    """The contenders of one compressed model with those of the named ways; reasons by the names of missing ways.

    `exported` writes files of models, and gives the ways to run them.

    Raises:
        UsageError: no model or several are compressed, or nothing of `--against` is left.
        CheckpointError: the smaller model cannot be opened.
    """
    models = [model for each in opened for model in compressed_of(each)]
    if len(models) > 1:
        raise UsageError(f"--against {names[0]}: is for one compressed model", "Give one MODEL and one --img-size.")
    ours = next(each for each in found if each.role == "compressed")
    dense = next(each for each in found if each.name == ours.against)
    titles, new = {"dense": dense.name, "tokens": ours.name}, list[Contender]()
    missing: dict[str, str] = {}
    for name in names:
        for way in exported(ways.both(models[0])) if name == "int8" else _in_torch(models[0], name):
            side, comma, rest = way.name.partition(", ")
            title = f"{titles.get(side, side)}{comma}{rest}"
            if isinstance(way, Missing):
                missing[title] = way.reason
                continue
            taken, twin = {each.name for each in (*found, *new)}, f"{dense.name}{comma}{rest}"
            same = (twin,) if side == "tokens" and twin in taken else ()  # the dense model that runs in the same way
            new.append(replace(_contender(unused(title, taken), way, dense), baselines=same))
    if not new and not any(each.is_baseline for each in found):
        raise UsageError(
            f"--against {', '.join(names)}: unsupported here: "
            + "; ".join(f"{name}: {reason}" for name, reason in missing.items()),
            f"Other ways are {', '.join(way for way in WAYS if way not in names)}.",
        )
    sizes = {way.name: way.bytes for way in ways.both(models[0])}
    own = {
        dense.name: replace(dense, bytes=sizes["dense"]),
        ours.name: replace(ours, bytes=sizes["tokens"], baselines=(*ours.baselines, *(each.name for each in new))),
    }
    return [*(own.get(each.name, each) for each in found), *new], missing


def _in_torch(opened: Opened, name: str) -> Iterator[Way | Missing]:
    if name == "bfloat16":
        yield from ways.in_bfloat16(opened)
    elif name == "smaller-input":
        yield ways.smaller_input(opened)
    elif name == "compile":
        if missing := ways.no_compiler():
            yield missing
        else:
            yield from (replace(way, name=f"{way.name}, {_COMPILED}") for way in ways.both(opened))
    else:
        yield ways.smaller_model(name.partition("=")[2], classes=0)


def _contender(name: str, way: Way, dense: Contender) -> Contender:
    module = way.run if isinstance(way.run, nn.Module) else nn.Module()
    if module is not way.run:
        module.forward = way.run
    mode = "default" if name.endswith(_COMPILED) else None
    own: dict[str, Any] = {"takes": way.preprocessing.shape, "compile": mode, "bytes": way.bytes}
    return Contender(name, module, way.macs, dense.input_size, dense.name, way.context, is_baseline=True, **own)
