"""Whether an exported file does what the model does in torch, on fixed and random inputs at several batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from repshift_cli.checkpoints.schema import Verdict
from repshift_cli.data.inputs import load_inputs
from repshift_cli.errors import CheckFailed, first_line
from repshift_cli.export.request import Request, Subject
from repshift_cli.measure.device import out_of_memory
from repshift_cli.reduction.compressed_model import Trace
from repshift_cli.utils.progress import Progress

__all__ = ["compare", "inputs_for"]

_TOLERANCES = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Largest difference of outputs of size 1: sums in another order, over all layers of a deep model."""

_MERGING = 4
"""By how much more outputs may differ in half precision where tokens merge: which are most alike is rounded, too."""

_KEPT = {torch.float32: 0.99, torch.float16: 0.95, torch.bfloat16: 0.9}
"""Least share of equal kept places. Two scores that are equal but for rounding may change places."""

_MOST_SWAPPED = {torch.float32: 1, torch.float16: None, torch.bfloat16: None}
"""Most inputs of which another token may be kept. In half precision it can be any."""

_BATCHES, _HEAVY_BATCHES = (1, 2, 5), (1, 2)
_SCENES, _SEED = 4, 0
_HEAVY_MACS = 40_000_000_000


def _batches_for(subject: Subject, request: Request) -> tuple[int, ...]:
    """The sizes of the batches to compare on: of a large video model few, since a clip takes seconds."""
    if request.batch is not None:
        return (request.batch,)
    return _HEAVY_BATCHES if subject.opened.dense_macs > _HEAVY_MACS else _BATCHES


def inputs_for(subject: Subject, request: Request) -> list[Tensor]:
    """Random inputs, and behind them fixed ones, which are built-in scenes."""
    preprocessing = subject.opened.loaded.description.preprocessing
    batches = _batches_for(subject, request)
    generator = torch.Generator().manual_seed(_SEED)
    found = [torch.randn(count, *preprocessing.shape, generator=generator) for count in batches]
    scenes = load_inputs(None, request.batch or _SCENES, preprocessing, _SEED).tensor
    dtype = request.dtype or torch.float32
    return [inputs.to(device=request.device, dtype=dtype) for inputs in (*found, scenes)]


@dataclass
class _Tally:
    """What was found so far; `difference` over inputs of which the same tokens were kept, `any_difference` over all."""

    difference: float = 0.0
    any_difference: float = 0.0
    inputs: int = 0
    same_top: int = 0
    places: int = 0
    same_places: int = 0
    swapped: int = 0
    batches: set[int] = field(default_factory=set)


def compare(
    subject: Subject,
    request: Request,
    run: Callable[[Tensor], Tensor],
    watch: Callable[[Tensor], Sequence[Tensor]],
    progress: Progress,
) -> Verdict:
    """Hold what was written to the model in torch.

    Args:
        run: the exported file.
        watch: the same graph with the places that each site kept behind the output.

    Raises:
        CheckFailed: it does something else; with the numbers. Or it does not run.
    """
    inputs, tally = inputs_for(subject, request), _Tally()
    with progress.task("comparing with torch", len(inputs)) as task, torch.no_grad():
        for images in inputs:
            _count(tally, subject.run(images), _ran(run, images, request), watch(images), subject.has_classes)
            task.advance()
    verdict = _verdict(tally, subject, request.dtype or torch.float32)
    _check(verdict, request.output)
    return verdict


def _ran(run: Callable[[Tensor], Tensor], images: Tensor, request: Request) -> Tensor:
    """What the file gives; errors as `compare`."""
    try:
        return run(images)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise CheckFailed(
            f"{request.output} does not run with {len(images)} inputs: {first_line(error)}",
            f"Nothing was left under its name. {'Leave --tune out' if request.tune else 'Try it with --batch 1'}.",
        ) from error


def _verdict(tally: _Tally, subject: Subject, dtype: torch.dtype) -> Verdict:
    kept = tally.same_places / tally.places if tally.places else None
    most, tolerance = _MOST_SWAPPED[dtype], _tolerance(subject, dtype)
    same_tokens = kept is None or (kept >= _KEPT[dtype] and (most is None or tally.swapped <= most))
    # where other tokens were kept of every input, nothing else is left to tell whether the file is right
    difference = tally.difference if tally.swapped < tally.inputs else tally.any_difference
    return Verdict(
        passed=same_tokens and difference <= tolerance,
        batches=sorted(tally.batches),
        inputs=tally.inputs,
        max_difference=float(f"{difference:.3g}"),
        tolerance=tolerance,
        kept_equal=None if kept is None else round(kept, 6),
        kept_required=_KEPT[dtype],
        swapped=tally.swapped,
        most_swapped=most,
        top1=tally.same_top / tally.inputs if subject.has_classes else None,
    )


def _tolerance(subject: Subject, dtype: torch.dtype) -> float:
    plan = subject.plan
    merges = plan is not None and plan.reducer.kind != "prune"
    return _TOLERANCES[dtype] * (_MERGING if merges and dtype != torch.float32 else 1)


def _count(tally: _Tally, wanted: Trace, found: Tensor, watched: Sequence[Tensor], classes: bool) -> None:
    count = len(wanted.output)
    same = torch.ones(count, dtype=torch.bool, device=wanted.output.device)
    for places, others in zip(wanted.kept.values(), watched[1:], strict=True):
        found_again = torch.stack([torch.isin(*pair) for pair in zip(places, others, strict=True)])
        tally.places += found_again.numel()
        tally.same_places += int(found_again.sum())
        same &= found_again.all(dim=1)
    for output in (found, watched[0]):
        tally.difference = max(tally.difference, _difference(wanted.output[same], output[same]))
        tally.any_difference = max(tally.any_difference, _difference(wanted.output, output))
    tally.inputs, tally.swapped = tally.inputs + count, tally.swapped + count - int(same.sum())
    tally.batches.add(count)
    if classes:
        tally.same_top += int((wanted.output.argmax(dim=-1) == found.argmax(dim=-1)).sum())


def _difference(wanted: Tensor, found: Tensor) -> float:
    """Largest difference, as a part of the largest value where that is above 1; infinite where one is no number."""
    if wanted.shape != found.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    apart = (wanted.double() - found.double()).abs().max() / wanted.double().abs().max().clamp(min=1.0)
    return float(apart) if bool(apart.isfinite()) else float("inf")


def _check(verdict: Verdict, output: Path) -> None:
    """Refuse a file that does not do what the model does; errors as `compare`."""
    if verdict.passed:
        return
    kept, required = verdict.kept_equal, verdict.kept_required
    if kept is not None and kept < required:
        problem = f"only {kept:.2%} of the kept places are those of torch (at least {required:.0%})"
    elif verdict.most_swapped is not None and verdict.swapped > verdict.most_swapped:
        problem = f"of {verdict.swapped} inputs it keeps other tokens than torch (at most {verdict.most_swapped})"
    else:
        apart, allowed = verdict.max_difference, verdict.tolerance
        problem = f"its outputs differ from those of torch by {apart:.2g} (at most {allowed:g})"
    raise CheckFailed(
        f"{output} does not do what the model does: {problem}, on {verdict.inputs} inputs",
        "Nothing was left under its name. Export to float32, or see what it does with --no-verify.",
    )
