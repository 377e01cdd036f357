"""The JSON documents that travel with our files, as schemas: of compressed checkpoints and of exported files.

`docs/artifact.schema.json` and `docs/export.schema.json` are made from these classes, and the tests hold what is
written to them. Reading a checkpoint goes by the parts that it needs, so that a file is not refused for a note in it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from repshift_cli.planning.plan import Plan

__all__ = ["EXPORT_VERSION", "ArtifactDocument", "ExportDocument", "Port", "Verdict"]

EXPORT_VERSION = 1
"""Version of the document of exported files. Readers refuse newer ones."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelPart(_Part):
    """What builds the model again, and how a picture becomes its input."""

    name: str
    architecture: str | None
    args: dict[str, Any]
    preprocessing: dict[str, Any]


class RecipePart(_Part):
    """The recipe as its author wrote it."""

    name: str
    text: str


class SourcePart(_Part):
    """Where the dense weights came from; the hash is null where there was no file."""

    origin: Literal["file", "folder", "cache", "random", "builtin", "object"]
    name: str | None
    sha256: str | None


class ArtifactDocument(_Part):
    """The metadata of a compressed checkpoint, see docs/artifact.md."""

    format_version: PositiveInt
    repshift_version: str
    created: str
    model: ModelPart
    plan: Plan
    recipe: RecipePart
    source: SourcePart
    calibration: dict[str, Any] | None
    measured: dict[str, Any]
    versions: dict[str, str]
    search: dict[str, Any] | None = None


class Port(_Part):
    """An input or an output; a size that is null is free."""

    name: str
    shape: list[PositiveInt | None] = Field(min_length=1)
    dtype: str


class Verdict(_Part):
    """What the comparison of an exported file with the model in torch gave.

    Attributes:
        batches: the sizes of the batches that ran.
        inputs: how many inputs they held.
        max_difference: largest difference of an output, divided by the largest output (at least 1), over the inputs
            of which the same tokens were kept; over all where there is none such.
        tolerance: how large that may be.
        kept_equal: share of the kept places that are the same, over all sites and inputs; null where no token goes.
        kept_required: how large that has to be.
        swapped: inputs of which another token was kept at some site, so that their outputs are of no use here.
        most_swapped: how many these may be; null for any number.
        top1: share of the inputs with the same largest output; null for outputs that are no scores of classes.
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


class ExportDocument(_Part):
    """What an exported file says of itself, see docs/exporting.md.

    Attributes:
        plan: how tokens go; null for a dense model.
        macs, dense_macs: multiply-accumulates of one input, of this model and of its dense self.
        num_classes: outputs of the head; null where there is none.
        opset: of ONNX; null for other files.
        tuned: whether kernels were timed and chosen for it.
        verified: null where nothing was compared.
    """

    export_version: PositiveInt
    kind: str
    repshift_version: str
    created: str
    versions: dict[str, str]
    model: dict[str, Any]
    plan: Plan | None
    recipe: RecipePart | None
    source: dict[str, Any]
    measured: dict[str, Any] | None
    macs: NonNegativeInt
    dense_macs: NonNegativeInt
    num_classes: int | None
    input: Port
    output: Port
    opset: int | None
    tuned: bool = False
    device: str
    verified: Verdict | None
