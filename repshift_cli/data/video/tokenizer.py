"""BERT's WordPiece tokenizer, from a local vocabulary file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from repshift_cli.errors import DataError, UsageError
from repshift_cli.utils.files import read_text

if TYPE_CHECKING:
    from torch import Tensor

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_LARGEST_FILE = 1 << 24  # bytes; BERT's own vocabularies have 0.2 to 1 MB


class TextBatch(NamedTuple):
    """Token ids of texts, padded to one length: int64 `[n, L]`, and a mask int64 `[n, L]`, 1 at tokens."""

    ids: Tensor
    mask: Tensor


class Tokenizer:
    """BERT's lower-case WordPiece tokenizer.

    Args:
        vocabulary: a file with one token per line (`vocab.txt` of bert-base-uncased), or a folder that holds one.

    Raises:
        DataError: the file is missing, unreadable or not a BERT vocabulary.
        UsageError: the package `tokenizers` is not installed.
    """

    def __init__(self, vocabulary: Path) -> None:
        path, token_ids = _read(vocabulary)
        self.path = path
        self.size = len(token_ids)
        self.padding, _, self.start, self.end = (token_ids[token] for token in _SPECIAL)
        self._pieces = _word_pieces(token_ids)

    def texts(self, texts: Sequence[str], longest: int) -> TextBatch:
        """`[CLS]` and the tokens of each text, truncated to `longest`, as UMT encodes captions and questions."""
        return self._batch([self._pieces.encode(text).ids for text in texts], longest)

    def answers(self, answers: Sequence[str], longest: int) -> TextBatch:
        """`[CLS]`, the tokens of each answer and `[SEP]`, truncated to `longest`, as UMT encodes answers."""
        return self._batch([[*self._pieces.encode(answer).ids, self.end] for answer in answers], longest)

    def check_fits(self, vocabulary: int, what: str) -> None:
        """Raise a DataError if the model `what` has a vocabulary of another size."""
        if self.size != vocabulary:
            raise DataError(
                f"{self.path} has {self.size} tokens, but {what} was trained with {vocabulary}",
                "Give the vocabulary of the checkpoint with --vocab; the authors' UMT uses that of bert-base-uncased.",
            )

    def _batch(self, rows: list[list[int]], longest: int) -> TextBatch:
        import torch

        rows = [[self.start, *row][:longest] for row in rows]
        length = max((len(row) for row in rows), default=1)
        ids = torch.tensor([[*row, *[self.padding] * (length - len(row))] for row in rows], dtype=torch.int64)
        lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
        return TextBatch(ids.view(len(rows), length), (torch.arange(length) < lengths).long())


def _read(path: Path) -> tuple[Path, dict[str, int]]:
    """The path of the vocabulary file, and the id of each token."""
    hint = "Give the file vocab.txt of a BERT model, with one token per line, such as that of bert-base-uncased."
    try:
        path = path / "vocab.txt" if path.is_dir() else path
        # not splitlines(): a token may be a Unicode line separator
        text = read_text(path, _LARGEST_FILE).replace("\r\n", "\n").replace("\r", "\n")
        lines = text.removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not text", hint) from None
    except OSError as error:
        raise DataError(f"cannot read the vocabulary {path}: {error.strerror or error}", hint) from error
    token_ids = {token: number for number, token in enumerate(line.rstrip() for line in lines)}
    if missing := [token for token in _SPECIAL if token not in token_ids]:
        raise DataError(f"{path} is not a vocabulary of BERT: it has no {', '.join(missing)}", hint)
    if len(token_ids) != len(lines):
        raise DataError(f"{path} is not a vocabulary of BERT: {len(lines) - len(token_ids)} tokens are repeated", hint)
    return path, token_ids


def _word_pieces(token_ids: dict[str, int]) -> Any:
    try:
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import WordPiece
        from tokenizers.normalizers import BertNormalizer
        from tokenizers.pre_tokenizers import BertPreTokenizer
    except ImportError as error:
        raise UsageError(
            "video-text models need the package tokenizers", "Install it with: pip install 'repshift-cli[video]'"
        ) from error
    backend = Backend(WordPiece(token_ids, unk_token="[UNK]", max_input_chars_per_word=100))  # noqa: S106
    backend.normalizer = BertNormalizer(lowercase=True)
    backend.pre_tokenizer = BertPreTokenizer()
    return backend
