"""Compare an export with the model in torch: outputs and kept positions, at several batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from repshift_cli.checkpoints.schema import Verdict
from repshift_cli.data.inputs import load_inputs
from repshift_cli.errors import CheckFailed, CheckpointError, first_line
from repshift_cli.export.request import Request, Subject
from repshift_cli.measure.device import out_of_memory
from repshift_cli.reduction.compressed_model import Trace
from repshift_cli.utils.progress import Progress

_TOLERANCES = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Largest difference, divided by the largest output (at least 1). Sums in another order add up over the layers."""

_MERGE_FACTOR = 4
"""Factor of the tolerance if tokens merge in half precision, where rounding changes which ones are most similar."""

_KEPT = {torch.float32: 0.99, torch.float16: 0.95, torch.bfloat16: 0.9}
"""Least share of equal kept positions. Scores that are equal up to rounding may swap."""

_MOST_SWAPPED = {torch.float32: 1, torch.float16: None, torch.bfloat16: None}
"""Largest number of inputs with other kept tokens; None for no limit."""

_QUANTIZED_KEPT, _QUANTIZED_TOLERANCE = 0.98, 1.0
"""Limits of a quantised model. What it computes is judged by the share of unchanged predictions."""

_BATCHES, _HEAVY_BATCHES = (1, 2, 5), (1, 2)
_HEAVY_MACS = 40_000_000_000  # of large video models, which take seconds per clip
_SCENES, _SEED = 4, 0


def inputs_for(subject: Subject, request: Request) -> list[Tensor]:
    """Random inputs at several batch sizes, followed by one batch of built-in images."""
    preprocessing = subject.opened.loaded.description.preprocessing
    batches = _HEAVY_BATCHES if subject.opened.dense_macs > _HEAVY_MACS else _BATCHES
    generator = torch.Generator().manual_seed(_SEED)
    found = [
        torch.randn(count, *preprocessing.shape, generator=generator)
        for count in ([request.batch] if request.batch is not None else batches)
    ]
    scenes = load_inputs(None, request.batch or _SCENES, preprocessing, _SEED).tensor
    dtype = request.dtype or torch.float32
    return [inputs.to(device=request.device, dtype=dtype) for inputs in (*found, scenes)]


@dataclass
class Counts:
    """Comparison so far; `difference` over the inputs with the same kept tokens, `any_difference` over all."""

    difference: float = 0.0
    any_difference: float = 0.0
    inputs: int = 0
    same_top: int = 0
    places: int = 0
    same_places: int = 0
    swapped: int = 0
    cosine: float = 0.0
    batches: set[int] = field(default_factory=set)

    def add(self, wanted: Trace, found: Sequence[Tensor]) -> None:
        """Count one batch: the trace in torch, and the outputs of the export."""
        count = len(wanted.output)
        same = torch.ones(count, dtype=torch.bool, device=wanted.output.device)
        for places, others in zip(wanted.kept.values(), found[2:], strict=True):
            kept_too = torch.stack([torch.isin(*pair) for pair in zip(places, others, strict=True)])
            self.places += kept_too.numel()
            self.same_places += int(kept_too.sum())
            same &= kept_too.all(dim=1)
        for output in found[:2]:
            self.difference = max(self.difference, _difference(wanted.output[same], output[same]))
            self.any_difference = max(self.any_difference, _difference(wanted.output, output))
        self.inputs += count
        if wanted.output.shape == found[0].shape:
            one, other = (output.double().flatten(1) for output in (wanted.output, found[0]))
            self.cosine += float(torch.cosine_similarity(one, other).sum())
        self.swapped += count - int(same.sum())
        self.batches.add(count)
        self.same_top += int((wanted.output.argmax(dim=-1) == found[0].argmax(dim=-1)).sum())


def compare(
    subject: Subject,
    request: Request,
    run: Callable[[Tensor], Sequence[Tensor]],
    progress: Progress,
    known: Sequence[tuple[Tensor, Trace]] = (),
) -> Verdict:
    """Compare an export with the model in torch; `run` is what `Draft.reopen` returns, `known` its `known`.

    Raises:
        CheckFailed: it does not run, or it computes something else; with the numbers.
    """
    counts = Counts()
    pairs: Sequence[tuple[Tensor, Trace | None]] = known or [(each, None) for each in inputs_for(subject, request)]
    with progress.task("comparing with torch", len(pairs)) as task, torch.no_grad():
        for images, trace in pairs:
            wanted = trace or subject.run(images)
            try:
                found = run(images)
            except (CheckpointError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and out_of_memory(error):
                    raise
                raise CheckFailed(
                    f"{request.output} does not run with {len(images)} inputs: {first_line(error.__cause__ or error)}",
                    f"No output was written. {'Leave --tune out' if request.tune else 'Try it with --batch 1'}.",
                ) from error
            counts.add(wanted, found)
            task.advance()
    verdict = _verdict(counts, subject, request)
    if not verdict.passed:
        raise failed(request, verdict)
    return verdict


def judge(subject: Subject, request: Request, wanted: Sequence[Trace], found: Sequence[Sequence[Tensor]]) -> Verdict:
    """The verdict on outputs of an export: the output, the output again, and the kept positions of each site."""
    counts = Counts()
    for pair in zip(wanted, found, strict=True):
        counts.add(*pair)
    return _verdict(counts, subject, request)


def failed(request: Request, verdict: Verdict, *, wrong_in_float: bool = False) -> CheckFailed:
    """The error for a verdict that is not passed; `wrong_in_float` if a quantised graph without int8 does not pass."""
    advice = "Export to float32, or write it unverified with --no-verify."
    if wrong_in_float:
        advice = "With all layers in float32 it does not either, so int8 is not the cause. Use another format."
    elif request.quantize:
        advice = "Give images of the model's own kind, a lower --agreement, or leave --quantize out."
    return CheckFailed(
        f"{request.output} does not compute what the model does: {_problem(verdict)}, on {verdict.inputs} inputs",
        f"No output was written. {advice}",
        {"output": None, "verified": verdict.model_dump(mode="json")},
    )


def _verdict(counts: Counts, subject: Subject, request: Request) -> Verdict:
    dtype = request.dtype or torch.float32
    kept = counts.same_places / counts.places if counts.places else None
    most, tolerance, kept_required = _MOST_SWAPPED[dtype], _TOLERANCES[dtype], _KEPT[dtype]
    if subject.plan is not None and subject.plan.reducer.kind != "prune" and dtype != torch.float32:
        tolerance *= _MERGE_FACTOR
    top1 = counts.same_top / counts.inputs if getattr(subject.opened.loaded.model, "num_classes", 0) else None
    agreement = required = None
    if request.quantize:
        most, tolerance, kept_required = None, _QUANTIZED_TOLERANCE, min(_QUANTIZED_KEPT, request.agreement)
        agreement, required = counts.cosine / counts.inputs if top1 is None else top1, request.agreement
    same_tokens = kept is None or (kept >= kept_required and (most is None or counts.swapped <= most))
    agrees = agreement is None or agreement >= request.agreement
    difference = counts.difference if counts.swapped < counts.inputs else counts.any_difference
    return Verdict(
        passed=same_tokens and agrees and difference <= tolerance,
        batches=sorted(counts.batches),
        inputs=counts.inputs,
        max_difference=float(f"{difference:.3g}"),
        tolerance=tolerance,
        kept_equal=None if kept is None else round(kept, 6),
        kept_required=kept_required,
        swapped=counts.swapped,
        most_swapped=most,
        top1=top1,
        agreement=agreement,
        agreement_required=required,
    )


def _problem(verdict: Verdict) -> str:
    kept, required = verdict.kept_equal, verdict.kept_required
    if kept is not None and kept < required:
        return f"only {kept:.2%} of the kept positions are those of torch (at least {required:.0%})"
    if verdict.most_swapped is not None and verdict.swapped > verdict.most_swapped:
        return f"it keeps other tokens than torch for {verdict.swapped} inputs (at most {verdict.most_swapped})"
    if verdict.agreement is not None and verdict.agreement < (verdict.agreement_required or 0):
        unit = "mean cosine of the outputs" if verdict.top1 is None else "share of unchanged predictions"
        return f"{unit} {verdict.agreement:.2%} (at least {verdict.agreement_required:.2%})"
    return f"its outputs differ from those of torch by {verdict.max_difference:.2g} (at most {verdict.tolerance:g})"


def _difference(wanted: Tensor, found: Tensor) -> float:
    """Largest difference, divided by the largest value (at least 1); infinite for other shapes, NaN and infinity."""
    if wanted.shape != found.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    largest = (wanted.double() - found.double()).abs().max() / wanted.double().abs().max().clamp(min=1.0)
    return float(largest) if bool(largest.isfinite()) else float("inf")
