"""Small networks of feature maps of the transformers library, by name of the class."""

from __future__ import annotations

from typing import Any

import transformers as hf
from tiny_cnn import drawn
from torch import nn

SMALL: dict[str, Any] = {"hidden_sizes": [8, 8, 16, 16], "depths": [2, 1, 2, 1], "num_labels": 7}

CONFIGS: dict[str, Any] = {
    "ResNetForImageClassification": hf.ResNetConfig(**{**SMALL, "depths": [2, 2, 2, 1]}, embedding_size=8),
    "ConvNextForImageClassification": hf.ConvNextConfig(**SMALL, drop_path_rate=0.1),
    "ConvNextV2ForImageClassification": hf.ConvNextV2Config(**SMALL),
}


def tiny_network(name: str, **options: Any) -> nn.Module:
    """A model in eval mode, with weights large enough that its outputs differ."""
    config = CONFIGS[name]
    model = drawn(getattr(hf, name)(type(config)(**{**config.to_dict(), **options})))
    del model.pretrained_cfg
    return model
