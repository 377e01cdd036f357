"""Zero-shot classification: images against the embeddings of the class names."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from repshift_cli.checkpoints.libraries.base import encode_texts
from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.models.tensor_model import library_model


class ZeroShotClassifier(nn.Module):
    """An image encoder as a classifier, by the cosine to the embedding of each class.

    Args:
        encoder: images to embeddings `[B, C]`.
        classes: of `class_embeddings`, `[K, C]`.
        texts: what they are made of. The state of a resumed run depends on the texts, not on rounding.
    """

    classes: Tensor

    def __init__(self, encoder: nn.Module, classes: Tensor, texts: Sequence[str]) -> None:
        super().__init__()
        self.encoder, self.num_classes = encoder, len(classes)
        self.register_buffer("classes", classes, persistent=False)
        digest = sha256("\0".join(texts).encode("utf-8", "backslashreplace")).digest()
        self.register_buffer("texts", torch.tensor(list(digest), dtype=torch.uint8))

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, K]`, float32."""
        return normalize(self.encoder(images).float(), dim=-1) @ self.classes.float().mT


def class_embeddings(loaded: LoadedModel, names: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """The unit embeddings of classes times the factor of the model's logits, `[K, C]`.

    Of several prompts, the mean of the unit embeddings is used. Errors as `encode_texts`.
    """
    texts = [prompt.replace("{}", name) for prompt in prompts for name in names]
    units = normalize(encode_texts(loaded, texts).float(), dim=-1).unflatten(0, (len(prompts), len(names)))
    return normalize(units.mean(dim=0), dim=-1) * library_model(loaded.model).logit_scale.exp()
