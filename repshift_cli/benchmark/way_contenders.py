"""Other ways to run a model as contenders of `bench`: int8, bfloat16, torch.compile, a smaller input or model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from repshift_cli.benchmark import ways
from repshift_cli.benchmark.baselines import WAYS, compressed_of
from repshift_cli.benchmark.report import Missing
from repshift_cli.benchmark.run import BenchSettings, Contender, unused
from repshift_cli.benchmark.ways import Way
from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.errors import UsageError

_SMALLER_MODEL, _COMPILED = "smaller-model=", "torch.compile"


def split_ways(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Baselines and ways among the names of `--against`; raises UsageError for a smaller model without a name."""
    for name in names:
        if name in ("smaller-model", _SMALLER_MODEL):
            hint = "Write smaller-model=NAME, such as smaller-model=deit_tiny_patch16_224."
            raise UsageError("--against smaller-model: needs the name of a model", hint)
    found = [name for name in names if name in WAYS or name.startswith(_SMALLER_MODEL)]
    return [name for name in names if name not in found], found


def check_ways(names: Sequence[str], sweep: Sequence[BenchSettings], data: str | None) -> None:
    """Raise a UsageError if ways are to be measured with settings that they do not support."""
    plain = BenchSettings(torch.device("cpu"), torch.float32)
    for settings in sweep if names else ():
        same = replace(plain, seconds=settings.seconds, min_runs=settings.min_runs, threads=settings.threads)
        if settings != same or data is not None:
            raise UsageError(
                f"--against {names[0]}: is measured on the CPU, in float32 with the default attention, uncompiled",
                "Leave out --device, --dtype, --attention, --compile, --memory-format and --data.",
            )


def with_ways(
    found: Sequence[Contender],
    opened: Sequence[Mapping[str, Opened]],
    names: Sequence[str],
    exported: Callable[[Sequence[Way]], Iterable[Way | Missing]],
) -> tuple[list[Contender], list[Missing]]:
    """The contenders of one compressed model with those of the named ways, and the ways that are missing.

    Args:
        exported: writes files of models, and gives the ways to run them.

    Raises:
        UsageError: no model or several are compressed, or nothing of `--against` is left.
        CheckpointError: the smaller model cannot be opened.
    """
    models = [model for each in opened for model in compressed_of(each)]
    if len(models) > 1:
        raise UsageError(f"--against {names[0]}: is for one compressed model", "Give one MODEL and one --img-size.")
    dense, ours = (next(each for each in found if each.role == role) for role in ("dense", "compressed"))
    listed: list[Way | Missing] = []
    for name in names:
        if name == "int8":
            listed += exported(ways.both(models[0]))
        else:
            listed += _in_torch(models[0], name)
    titles = {"dense": dense.name, "tokens": ours.name}
    missing = [_renamed(each, titles) for each in listed if isinstance(each, Missing)]
    new = [_contender(_renamed(each, titles), dense) for each in listed if isinstance(each, Way)]
    known = {each.name for each in new}
    for index, each in enumerate(new):  # a compressed one is also compared with the dense one that runs in the same way
        twin = f"{dense.name}{each.name.removeprefix(ours.name)}"
        name = unused(each.name, {other.name for other in (*found, *new[:index])})
        new[index] = replace(each, name=name, baselines=(twin,) if twin in known and twin != each.name else ())
    if not new and not any(each.is_baseline for each in found):
        raise UsageError(
            f"--against {', '.join(names)}: unsupported here: "
            + "; ".join(f"{each.name}: {each.reason}" for each in missing),
            f"Other ways are {', '.join(way for way in WAYS if way not in names)}.",
        )
    sizes = {way.name: way.bytes for way in ways.both(models[0])}
    own = [
        replace(dense, bytes=sizes["dense"]),
        replace(ours, bytes=sizes["tokens"], baselines=(*ours.baselines, *(each.name for each in new))),
    ]
    return [*own, *(each for each in found if each.is_baseline), *new], missing


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
        yield ways.smaller_model(name.removeprefix(_SMALLER_MODEL), classes=0)


def _renamed(found: Any, titles: Mapping[str, str]) -> Any:
    """A way or what is missing, by the names of the contenders."""
    side, comma, rest = found.name.partition(", ")
    return replace(found, name=f"{titles.get(side, side)}{comma}{rest}")


def _contender(way: Way, dense: Contender) -> Contender:
    return Contender(
        name=way.name,
        module=way.run if isinstance(way.run, nn.Module) else _Function(way.run),
        macs=way.macs,
        input_size=dense.input_size,
        against=dense.name,
        context=way.context,
        is_baseline=True,
        takes=way.preprocessing.shape,
        compile="default" if way.name.endswith(_COMPILED) else None,
        bytes=way.bytes,
    )


class _Function(nn.Module):
    """A function as a module without weights."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.run = run

    def forward(self, images: Tensor) -> Any:
        return self.run(images)
