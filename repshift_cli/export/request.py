"""What is asked for, what is exported, and the document that travels with it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.schema import EXPORT_VERSION, ExportDocument, Port, creation
from repshift_cli.errors import UsageError
from repshift_cli.planning.plan import Plan
from repshift_cli.reduction.compressed_model import Trace
from repshift_cli.reduction.families.base import match

__all__ = ["TARGETS", "Request", "Subject", "Target", "check_suffix", "default_output"]

Target = Literal["onnx", "pt2", "aoti", "hub"]
TARGETS: tuple[Target, ...] = get_args(Target)

_SUFFIXES: dict[Target, str] = {"onnx": ".onnx", "pt2": ".pt2", "aoti": "_aoti.pt2", "hub": "_hub"}
_EXAMPLES = 2
"""Inputs that a graph is traced with, where it is to take any number: with one, torch would fix the batch to one."""


@dataclass(frozen=True)
class Request:
    """How to export.

    Attributes:
        target: format of the file.
        output: file, or folder where the target is `hub`.
        dense: whether the original model is exported, and not what is compressed.
        batch: inputs at a time; None for any number.
        dtype: of weights and inputs; None for float32, and for `hub` for that of the file.
        opset: of ONNX; None for the default.
        tune: whether a package gets the fastest of several kernels for each product.
        verify: whether what was written is compared with the model in torch.
    """

    target: Target
    output: Path
    dense: bool = False
    batch: int | None = None
    dtype: torch.dtype | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    opset: int | None = None
    tune: bool = False
    verify: bool = True
    force: bool = False


@dataclass(frozen=True)
class Subject:
    """The model that is exported, on its device and in its dtype.

    Attributes:
        opened: compressed or dense.
        dense: whether its dense self is meant.
    """

    opened: Opened
    dense: bool

    @classmethod
    def of(cls, opened: Opened, request: Request) -> Subject:
        """The model of a request; it is moved to the device and dtype, and stays there."""
        opened.module.to(device=request.device, dtype=request.dtype or torch.float32)
        return cls(opened, request.dense or opened.compressed is None)

    @property
    def plan(self) -> Plan | None:
        """How tokens go; None where none does."""
        return None if self.dense or self.opened.compressed is None else self.opened.compressed.plan

    @property
    def context(self) -> Callable[[], AbstractContextManager[Any]]:
        """What must be entered for the module to be what is meant."""
        compressed = self.opened.compressed
        return compressed.dense if self.dense and compressed is not None else nullcontext

    def run(self, images: Tensor) -> Trace:
        """One pass in torch: the output, and which places were kept by layer."""
        compressed = self.opened.compressed
        if self.dense or compressed is None:
            with torch.no_grad(), self.context():
                return Trace(self.opened.module(images), {})
        return compressed.trace(images)

    def traceable(self, *, watched: bool) -> nn.Module:
        """A module of one input for a graph; one that is watched returns beside the output what each site kept."""
        return (_Watched if watched else _Plain)(self).eval()

    @property
    def has_classes(self) -> bool:
        """Whether the output are scores of classes."""
        return bool(getattr(self.opened.loaded.model, "num_classes", 0))

    @property
    def input_name(self) -> str:
        """What an input is called."""
        return "images" if self.opened.loaded.description.preprocessing.frames is None else "video"

    @property
    def output_name(self) -> str:
        """What the output is called."""
        return match(self.opened.loaded.model).output_name(self.opened.loaded.model)

    def examples(self, request: Request) -> Tensor:
        """Inputs for a graph to be traced with."""
        shape = self.opened.loaded.description.preprocessing.shape
        count = request.batch or _EXAMPLES
        return torch.zeros(count, *shape, device=request.device, dtype=request.dtype or torch.float32)

    def document(self, request: Request, output: Tensor, opset: int | None = None) -> ExportDocument:
        """What the file says of itself, before it was checked."""
        loaded, inputs = self.opened.loaded, self.examples(request)
        dtype = str(inputs.dtype).removeprefix("torch.")
        stored = loaded.document or {}
        return ExportDocument(
            export_version=EXPORT_VERSION,
            kind=request.target,
            **creation(),
            model=loaded.description.to_dict(),
            plan=self.plan,
            recipe=None if self.dense else stored.get("recipe"),
            source=stored.get("source") or loaded.source.to_dict(),
            measured=None if self.dense else stored.get("measured"),
            macs=self.opened.dense_macs if self.dense else self.opened.macs,
            dense_macs=self.opened.dense_macs,
            num_classes=getattr(loaded.model, "num_classes", None) or None,
            input=Port(name=self.input_name, shape=[request.batch, *inputs.shape[1:]], dtype=dtype),
            output=Port(name=self.output_name, shape=[request.batch, *output.shape[1:]], dtype=dtype),
            opset=opset,
            tuned=request.tune,
            device=str(request.device),
            verified=None,
        )


class _Plain(nn.Module):
    """The output alone. The name of the argument is that of the input in the graph."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.model = subject.opened.module
        self._context = subject.context

    def forward(self, images: Tensor) -> Tensor:
        with self._context():
            output: Tensor = self.model(images)
        return output


class _Watched(nn.Module):
    """The output, and the places that were kept after each site."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.model = subject.opened.module
        self._run = subject.run

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        trace = self._run(images)
        return (trace.output, *trace.kept.values())


def default_output(name: str, target: Target) -> Path:
    """`<name>.onnx`, `<name>.pt2`, `<name>_aoti.pt2` or the folder `<name>_hub`, in the current folder."""
    from repshift_cli.utils.files import weight_stem

    stem = weight_stem(name.rstrip("/").rsplit("/", 1)[-1].removeprefix("builtin:"))
    return Path(f"{stem}{_SUFFIXES[target]}")


def check_suffix(request: Request) -> None:
    """Refuse a name that the file would not be known by.

    Raises:
        UsageError: naming the ending.
    """
    wanted = Path(f"x{_SUFFIXES[request.target]}").suffix
    if wanted and request.output.suffix != wanted:
        raise UsageError(
            f"-o {request.output}: what is exported to {request.target} has a name that ends with {wanted}",
            f"For example -o {request.output.with_suffix(wanted).name}.",
        )
