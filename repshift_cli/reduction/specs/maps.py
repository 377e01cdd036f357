"""Networks of feature maps of transformers: where the blocks are in each class. They return `logits`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from repshift_cli.models.tensor_model import library_model, library_of_class

MAPS: Mapping[str, str] = {
    "ResNetForImageClassification": "resnet.encoder.stages.*.layers.*",
    "ConvNextForImageClassification": "convnext.encoder.stages.*.layers.*",
    "ConvNextV2ForImageClassification": "convnextv2.encoder.stages.*.layers.*",
}
"""By class; `*` is one part of a name. Each class passes the shift test."""


def map_blocks(model: nn.Module) -> str | None:
    """The pattern of the names of blocks in the model of the library; None for a class that is not listed."""
    inner = library_model(model)
    return MAPS.get(type(inner).__name__) if library_of_class(inner) == "transformers" else None
