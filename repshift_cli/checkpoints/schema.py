"""Schemas of the JSON documents in compressed checkpoints and exported files.

`docs/artifact.schema.json` and `docs/export.schema.json` are generated from these classes. A document is checked whole
when it is read.
"""

from __future__ import annotations

import platform
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from repshift_cli.checkpoints.loaded import ModelDescription
from repshift_cli.planning.plan import Plan
from repshift_cli.utils.documents import Count, Name, readable, validated
from repshift_cli.utils.reproducible import now

EXPORT_VERSION = 1
"""Version of the document of exported files. Readers refuse newer ones."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _escape(cls, data: Any) -> Any:
        return readable(data)


class RecipePart(_Part):
    """The text of the recipe."""

    name: str
    text: str


class SourcePart(_Part):
    """Where the dense weights came from; the hash is null without a file."""

    origin: Literal["file", "folder", "cache", "random", "builtin", "object"]
    name: str | None
    sha256: str | None


def creation() -> dict[str, Any]:
    """The fields of a document that say when and by which versions it was made; errors as `reproducible.now`."""
    import timm
    import torch

    from repshift_cli.version import __version__

    return {
        "repshift_version": __version__,
        "created": now().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
    }


class RecoveredPart(_Part):
    """Parameters of the compressed model whose values differ from the tensors of the file, which are the dense model's.

    Attributes:
        images: number of images for training and checking together; `data` says which.
        passes: over the images for training, the first half.
        tensors: names of the parameters, in the order of `values`.
        before, after: images, distance and agreement on the held-out half.
        sigmas: by how many standard errors `after` is better.
        values: float32, little-endian, base64.
    """

    images: PositiveInt
    data: dict[str, Any]
    passes: PositiveInt
    tensors: list[Name] = Field(min_length=1)
    before: dict[str, Any]
    after: dict[str, Any]
    sigmas: float
    values: str


class ArtifactDocument(_Part):
    """The metadata of a compressed checkpoint, see docs/artifact.md."""

    format_version: PositiveInt
    repshift_version: str
    created: str
    model: ModelDescription
    plan: Plan
    recipe: RecipePart
    source: SourcePart
    calibration: dict[str, Any] | None
    measured: dict[str, Any]
    versions: dict[str, str]
    search: dict[str, Any] | None = None
    recovered: RecoveredPart | None = None


class DenseDocument(_Part):
    """The metadata of a dense checkpoint that describes its model."""

    model: ModelDescription


def describe(document: dict[str, Any], where: str) -> ModelDescription:
    """The model of a document in a checkpoint, which is checked whole; raises CheckpointError if it is invalid.

    Unknown keys of the document are ignored: a newer version may add notes.
    """
    is_artifact = bool({"plan", "format_version"} & document.keys())
    kind: type[ArtifactDocument | DenseDocument] = ArtifactDocument if is_artifact else DenseDocument
    known = {key: value for key, value in document.items() if key in kind.model_fields}
    return validated(kind, known, f"{where}: its repshift metadata is damaged").model


class Port(_Part):
    """An input or an output; null is a dynamic size."""

    name: Name
    shape: list[Count | None] = Field(min_length=1)
    dtype: Literal["float32", "float16", "bfloat16"]


class Verdict(_Part):
    """Result of the comparison of an exported file with the model in torch.

    Attributes:
        batches: batch sizes that ran.
        inputs: number of inputs.
        max_difference: largest difference of an output, divided by the largest output (at least 1), over the inputs
            with the same kept tokens; over all inputs if there are none.
        tolerance: upper limit of `max_difference`.
        kept_equal: share of equal kept places, over all sites and inputs; null for a dense model.
        kept_required: lower limit of `kept_equal`.
        swapped: inputs with another kept token at some site, whose outputs are not compared.
        most_swapped: upper limit of `swapped`; null for none.
        top1: share of the inputs with the same largest output; null for outputs that are not class scores.
        agreement: of a quantised model, `top1`, or the mean cosine of the outputs if they are not class scores.
        agreement_required: lower limit of `agreement`.
    """

    passed: bool
    batches: list[PositiveInt]
    inputs: PositiveInt
    max_difference: float
    tolerance: float
    kept_equal: float | None
    kept_required: float
    swapped: NonNegativeInt
    most_swapped: NonNegativeInt | None
    top1: float | None
    agreement: float | None = None
    agreement_required: float | None = None


class Quantization(_Part):
    """How a graph was quantised.

    Attributes:
        layers: number of quantised matrix products and convolutions.
        float_layers: those that stay in float32 because they cost the most agreement, worst first.
        weight_bits: 7, so that sums of 16 bits do not saturate on CPUs without VNNI.
        calibration: the inputs that the ranges of activations are from; null if the graph computes them.
        percentile: share of the values inside of these ranges, in percent; null likewise, and for OpenVINO.
    """

    kind: Literal["int8", "int8-dynamic"]
    layers: PositiveInt
    float_layers: list[str]
    weight_bits: Literal[7]
    calibration: dict[str, Any] | None
    percentile: float | None


class ExportDocument(_Part):
    """The metadata of an exported file, see docs/exporting.md.

    Attributes:
        plan: null for a dense model.
        macs, dense_macs: multiply-accumulates per input, of this model and of the dense model.
        num_classes: outputs of the head; null without a head.
        opset: of ONNX; null for other files.
        tuned: whether the fastest kernels were chosen by timing.
        quantized: null for a model in floating point.
        verified: null if nothing was compared.
        recovered: names of the parameters that differ from the dense model's.
    """

    export_version: PositiveInt
    kind: Literal["onnx", "openvino", "pt2", "aoti", "hub"]
    repshift_version: str
    created: str
    versions: dict[str, str]
    model: ModelDescription
    plan: Plan | None
    recipe: RecipePart | None
    source: SourcePart
    measured: dict[str, Any] | None
    macs: PositiveInt
    dense_macs: PositiveInt
    num_classes: Count | None
    input: Port
    output: Port
    opset: int | None
    tuned: bool = False
    quantized: Quantization | None = None
    device: str = Field(pattern=r"^(cpu|cuda(:\d{1,3})?)$")
    verified: Verdict | None
    recovered: list[Name] = []

    @model_validator(mode="after")
    def _check_shapes(self) -> ExportDocument:
        if tuple(self.input.shape[1:]) != self.model.preprocessing.shape:
            raise ValueError(f"input: the shape should end with {self.model.preprocessing.shape}, as the model's")
        if self.num_classes not in (None, self.output.shape[-1]):
            raise ValueError(f"output: the shape should end with the number of classes, {self.num_classes}")
        return self
