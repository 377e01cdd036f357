"""Measure the dense and the compressed model, and the report of a compression."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repshift_cli.calibration.calibrate import Calibration
from repshift_cli.calibration.outputs import agreement, divergence, reference_outputs
from repshift_cli.calibration.recover import Recovery
from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.compression.settings import Settings
from repshift_cli.data.inputs import ImageBatch
from repshift_cli.errors import CheckFailed
from repshift_cli.measure.attention_kernel import observed_attention
from repshift_cli.measure.device import device_name
from repshift_cli.measure.latency import Speedup, Spread, Subject, compute_speedup, full_batch, measure_latency
from repshift_cli.measure.macs import count_macs
from repshift_cli.measure.memory import parameter_bytes, peak_memory
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.compressed_model import CompressedModel
from repshift_cli.search.job import FinishedSearch
from repshift_cli.utils.progress import Progress

_MIN_RUNS = 5
_WARMUP_ROUNDS = 1


@dataclass(frozen=True)
class ModelCost:
    """Cost of the dense or of the compressed model: inputs per second, peak memory with weights."""

    macs: int
    latency: Spread
    throughput: float
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "gmacs": self.macs / 1e9,
            "latency_ms": self.latency.to_dict(),
            "throughput": float(f"{self.throughput:.4g}"),
            "peak_memory_mb": round(self.peak_bytes / 1e6, 3),
        }


@dataclass(frozen=True)
class Measured:
    """Dense and compressed model, measured in one run.

    Attributes:
        agreement: share of images with unchanged predicted class, or of clips that are still most similar to
            themselves among all; None without a head.
        divergence: mean KL in nats (or one minus the cosine of features) from the dense model.
        images: the images of `agreement`.
    """

    dense: ModelCost
    compressed: ModelCost
    speedup: Speedup
    agreement: float | None
    divergence: float
    images: ImageBatch
    batch_size: int
    device: str
    dtype: str
    attention: str
    threads: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "dense": self.dense.to_dict(),
            "compressed": self.compressed.to_dict(),
            "ratio": {
                "macs": float(f"{self.dense.macs / self.compressed.macs:.4g}"),
                "latency": float(f"{self.speedup.ratio:.4g}"),
                "latency_clear": self.speedup.clear,
            },
            "agreement": self.agreement,
            "divergence": round(self.divergence, 6),
            "images": self.images.identity,
            "batch": self.batch_size,
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
            "attention": self.attention,
        }


@dataclass(frozen=True)
class CompressReport:
    """Result of `repshift compress`.

    Attributes:
        calibration: None if nothing was calibrated.
        measured: None for a dry run.
        found: the search for a target; None without one.
        recovery: None without --recover.
    """

    loaded: LoadedModel
    family: str
    recipe: Recipe
    plan: Plan
    dense_macs: int
    macs: int
    calibration: Calibration | None
    measured: Measured | None
    output: Path | None
    notes: tuple[str, ...]
    found: FinishedSearch | None = None
    recovery: Recovery | None = None

    def to_dict(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "output": str(self.output) if self.output else None,
            "model": {
                "name": self.loaded.description.name,
                "family": self.family,
                "params": sum(parameter.numel() for parameter in self.loaded.model.parameters()),
            },
            "recipe": self.recipe.place.name,
            "plan": self.plan.summary(),
            "last_block": self.plan.last_block,
            "dense": {"gmacs": self.dense_macs / 1e9},
            "compressed": {"gmacs": self.macs / 1e9},
            "ratio": {"macs": float(f"{self.dense_macs / self.macs:.4g}")},
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "notes": list(self.notes),
        }
        if self.found:
            document["search"] = self.found.provenance()
        if self.recovery:
            document["recovery"] = {"kept": self.recovery.kept, **self.recovery.to_dict()}
        return document | (self.measured.to_dict() if self.measured else {})


@torch.inference_mode()
def check_counts(compressed: CompressedModel, loaded: LoadedModel) -> None:
    """Raise CheckFailed if the counted operations differ from the analytic ones."""
    size = loaded.description.preprocessing.shape
    with compressed.dense():
        _check_count("dense", count_macs(compressed.model, size), compressed.dense_macs(counted=True))
    _check_count("compressed", count_macs(compressed.model, size), compressed.macs(counted=True))


@torch.inference_mode()
def check_outputs(compressed: CompressedModel, images: Tensor) -> None:
    """Raise CheckFailed if one forward pass gives another shape than the dense model, or values that are not finite."""
    with compressed.dense():
        wanted = compressed(images)
    output = compressed(images)
    if output.shape != wanted.shape:
        raise CheckFailed(f"the compressed model returns {list(output.shape)}, the dense one {list(wanted.shape)}")
    if not bool(output.isfinite().all()):
        raise CheckFailed("the compressed model returns values that are not finite", "Does the dense one? Try float32.")


def _check_count(side: str, counted: int, planned: int) -> None:
    if counted != planned:
        raise CheckFailed(f"the {side} model runs {counted} multiply-accumulates, but its plan has {planned}")


@torch.inference_mode()
def measure_models(  # noqa: PLR0917
    compressed: CompressedModel,
    batch: ImageBatch,
    images: Tensor,
    settings: Settings,
    batch_size: int,
    progress: Progress,
) -> Measured:
    """Measure latency (both models in turn), memory, and agreement of predictions."""
    inputs = full_batch(images, batch_size)
    subjects = [Subject("dense", compressed, compressed.dense), Subject("compressed", compressed)]
    times = measure_latency(
        subjects,
        inputs,
        max_seconds=settings.seconds,
        warmup=_WARMUP_ROUNDS,
        min_runs=_MIN_RUNS,
        progress=progress,
    )
    weights = parameter_bytes(compressed.model)
    costs = {}
    for subject, macs in zip(subjects, (compressed.dense_macs(), compressed.macs()), strict=True):
        latency = times[subject.name].spread
        with subject.context():
            peak = weights + peak_memory(subject.run, inputs)
        costs[subject.name] = ModelCost(macs, latency, batch_size * 1e3 / latency.median, peak)
    unchanged, distance = _compare(compressed, images, batch_size, progress)
    return Measured(
        dense=costs["dense"],
        compressed=costs["compressed"],
        speedup=compute_speedup(times["dense"], times["compressed"]),
        agreement=unchanged,
        divergence=distance,
        images=batch,
        batch_size=batch_size,
        device=device_name(inputs.device),
        dtype=settings.dtype,
        attention=observed_attention(compressed, inputs[:1]),
        threads=torch.get_num_threads(),
    )


def _compare(
    compressed: CompressedModel, images: Tensor, batch_size: int, progress: Progress
) -> tuple[float | None, float]:
    """Share of unchanged predictions (None without a head) and mean divergence from the dense model."""
    dense, outputs = [], []
    with progress.task("comparing predictions", len(images)) as task:
        for part in images.split(batch_size):
            with compressed.dense():
                dense.append(compressed(part))
            outputs.append(compressed(part))
            task.advance(len(part))
    wanted = reference_outputs(compressed.model, torch.cat(dense))
    given = wanted.of(torch.cat(outputs))
    distance = float(divergence(wanted.reference, given, wanted.are_logits).mean())
    return (float(agreement(wanted.reference, given).mean()) if wanted.are_logits else None), distance
