"""Embeddings of texts by the text tower of a model, with the tokenizer of its own folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.errors import CheckpointError, first_line

_TOKENIZERS = (["tokenizer.json"], ["vocab.json", "merges.txt"], ["spiece.model"], ["tokenizer.model"], ["vocab.txt"])
"""The files of a tokenizer: one of these lists is needed."""

_BATCH = 64


@dataclass(frozen=True)
class TextTower:
    """The text tower of a loaded model.

    Attributes:
        tokenize: K texts to token ids, int64 `[K, L]`.
        encode: token ids to embeddings `[K, C]`, on the device of the model.
        vocabulary: number of token ids.
    """

    tokenize: Callable[[list[str]], Tensor]
    encode: Callable[[Tensor], Tensor]
    vocabulary: int


@torch.no_grad()
def embed_texts(tower: TextTower, texts: Sequence[str], device: torch.device, where: str) -> Tensor:
    """The embeddings of different texts, `[K, C]` in the dtype of the model.

    Raises:
        CheckpointError: the tokenizer does not load or fit the model, or weights of the tower are missing.
    """
    try:
        tokens = tower.tokenize(list(texts))
    except Exception as error:  # tokenizers raise errors of every kind for damaged files
        raise CheckpointError(f"{where}: its tokenizer does not load: {first_line(error)}") from error
    if (largest := int(tokens.max())) >= tower.vocabulary:
        raise CheckpointError(f"{where}: its tokenizer makes token {largest}, but the model has {tower.vocabulary}")
    seen: dict[tuple[int, ...], str] = {}
    for text, row in zip(texts, tokens.tolist(), strict=True):
        if (other := seen.setdefault(tuple(row), text)) != text:
            raise CheckpointError(
                f"{where}: its tokenizer makes the same tokens of {other!r} and {text!r}",
                "Change the texts or check the tokenizer files. It can ignore case, and cuts long texts.",
            )
    found = torch.cat([tower.encode(part.to(device)) for part in tokens.split(_BATCH)])
    if not bool(found.isfinite().all()):
        raise CheckpointError(f"{where}: embeddings of texts are not finite", "Are all weights in the file?")
    if len(found) > 1 and torch.allclose(found, found[:1].expand_as(found), rtol=1e-5, atol=1e-7):
        raise CheckpointError(
            f"{where}: the text tower returns the same embedding for all texts",
            "Its tokenizer must end each text with the token that the configuration names (eos_token_id).",
        )
    return found


def tokenizer_folder(loaded: LoadedModel) -> Path:
    """The folder with the tokenizer of a model; raises CheckpointError if it lacks tokenizer files or is a file."""
    where = loaded.source.path or loaded.description.name
    hint = "It needs tokenizer.json, or vocab.json and merges.txt, or spiece.model. Nothing is downloaded."
    if loaded.source.origin != "folder":
        raise CheckpointError(f"{where} is not a folder, so it has no tokenizer", f"Give the folder. {hint}")
    folder = Path(where).absolute()
    missing = [[name for name in names if not (folder / name).is_file()] for names in _TOKENIZERS]
    if all(missing):
        partly = [found for found, names in zip(missing, _TOKENIZERS, strict=True) if found != names]
        what = f"its tokenizer lacks {partly[0][0]}" if partly else "it has no tokenizer files"
        raise CheckpointError(f"{where}: {what}", hint)
    return folder
