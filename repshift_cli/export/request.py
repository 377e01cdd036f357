"""The options of an export, the exported model, and its metadata."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.schema import EXPORT_VERSION, ExportDocument, creation
from repshift_cli.planning.plan import Plan
from repshift_cli.reduction.compressed_model import Trace
from repshift_cli.reduction.families.base import match
from repshift_cli.utils.ranges import check_ranges

_EXAMPLES = 2
"""Number of inputs to trace a dynamic batch size with: with one input torch fixes the size to one."""


@dataclass(frozen=True)
class Request:
    """Options of an export.

    Attributes:
        target: name of the format.
        output: file or folder.
        dense: whether to export the dense model of a compressed one.
        batch: batch size; None for any.
        dtype: of weights and inputs; None for float32, for a hub folder for the dtype of the checkpoint.
        tune: whether AOTInductor times several kernels for each product.
        quantize: `int8` or `int8-dynamic`; None for floating point.
        calibration: folder or dataset of unlabelled images to quantise with; None for the built-in scenes.
        calibration_images: how many to calibrate on; None for the usual number.
        agreement: least share of unchanged predictions of a quantised model.
    """

    target: str
    output: Path
    dense: bool = False
    batch: int | None = None
    dtype: torch.dtype | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    opset: int | None = None
    tune: bool = False
    quantize: str | None = None
    calibration: str | None = None
    calibration_images: int | None = None
    agreement: float = 0.99
    verify: bool = True
    force: bool = False

    def __post_init__(self) -> None:
        check_ranges(agreement=self.agreement, calibration_images=self.calibration_images)


@dataclass(frozen=True)
class Subject:
    """The exported model, on its device and in its dtype; with `dense`, without its reduction."""

    opened: Opened
    dense: bool

    @classmethod
    def of(cls, opened: Opened, request: Request) -> Subject:
        """The model of a request. It is moved to the device and dtype of the request."""
        opened.module.to(device=request.device, dtype=request.dtype or torch.float32)
        return cls(opened, request.dense or opened.compressed is None)

    @property
    def plan(self) -> Plan | None:
        return None if self.dense or self.opened.compressed is None else self.opened.compressed.plan

    def context(self) -> AbstractContextManager[Any]:
        """In this context `opened.module` computes what is exported."""
        compressed = self.opened.compressed
        return compressed.dense() if self.dense and compressed is not None else nullcontext()

    def run(self, images: Tensor) -> Trace:
        """Run the model in torch: its output, and the kept positions by layer."""
        compressed = self.opened.compressed
        if self.dense or compressed is None:
            with torch.no_grad(), self.context():
                return Trace(self.opened.module(images), {})
        return compressed.trace(images)

    @property
    def input_name(self) -> str:
        names = {"image": "images", "clip": "video", "spectrogram": "spectrograms"}
        return names[self.opened.loaded.description.preprocessing.unit]

    @property
    def output_name(self) -> str:
        return match(self.opened.loaded.model).output_name(self.opened.loaded.model)

    def examples(self, request: Request) -> Tensor:
        """Inputs to trace the model with."""
        shape = self.opened.loaded.description.preprocessing.shape
        count = request.batch or _EXAMPLES
        return torch.zeros(count, *shape, device=request.device, dtype=request.dtype or torch.float32)

    def document(self, request: Request, output: Tensor, opset: int | None = None) -> ExportDocument:
        """The metadata of the file, without a verdict."""
        loaded, inputs = self.opened.loaded, self.examples(request)
        dtype = str(inputs.dtype).removeprefix("torch.")
        stored = loaded.document or {}
        fields = dict(
            export_version=EXPORT_VERSION,
            kind=request.target,
            **creation(),
            model=loaded.description,
            plan=self.plan,
            recipe=None if self.dense else stored.get("recipe"),
            source=stored.get("source") or loaded.source.to_dict(),
            measured=None if self.dense else stored.get("measured"),
            macs=self.opened.dense_macs if self.dense else self.opened.macs,
            dense_macs=self.opened.dense_macs,
            num_classes=getattr(loaded.model, "num_classes", None) or None,
            input={"name": self.input_name, "shape": [request.batch, *inputs.shape[1:]], "dtype": dtype},
            output={"name": self.output_name, "shape": [request.batch, *output.shape[1:]], "dtype": dtype},
            opset=opset,
            tuned=request.tune,
            device=str(request.device),
            verified=None,
            recovered=[] if self.dense else (stored.get("recovered") or {}).get("tensors", []),
        )
        return ExportDocument.model_validate(fields)
