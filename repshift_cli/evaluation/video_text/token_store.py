"""Storage for encoded tokens, in memory or on disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from repshift_cli.errors import OutputError

GIB = 1024**3


class TokenStore:
    """Vision tokens of every model, `[V, N, D]` on the CPU, in memory or beyond `max_memory` bytes in mapped files."""

    def __init__(self, videos: int, max_memory: int, spill_to: Path | None) -> None:
        self.videos = videos
        self.max_memory = max_memory
        self.spill_to = spill_to
        self.where: Literal["memory", "disk"] = "memory"
        self.bytes = 0
        self._tokens: dict[str, Tensor] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def open(self, first: Mapping[str, Tensor]) -> None:
        """Allocate space for all videos, given the tokens `[b, N, D]` of the first batch.

        Raises:
            OutputError: there is not enough disk space.
        """
        self.bytes = sum(self.videos * tokens[0].nbytes for tokens in first.values())
        if self.bytes > self.max_memory:
            self.where = "disk"
            self._make_folder()
        for number, (name, tokens) in enumerate(first.items()):
            self._tokens[name] = self._allocate(f"{number}.tokens", (self.videos, *tokens.shape[1:]), tokens.dtype)

    def put(self, name: str, row: int, tokens: Tensor) -> None:
        """Store `[b, N, D]` as the rows from `row` on."""
        self._tokens[name][row : row + len(tokens)] = tokens.cpu()

    def get(self, name: str, count: int) -> Tensor:
        """The first `count` rows."""
        return self._tokens[name][:count]

    def close(self) -> None:
        """Free the tokens and delete the files."""
        self._tokens.clear()  # first: some systems cannot delete a mapped file
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _make_folder(self) -> None:
        self._folder = tempfile.TemporaryDirectory(
            prefix="repshift-tokens-", dir=self.spill_to, ignore_cleanup_errors=True
        )
        # Checked here: writing to a mapped file on a full disk ends the process, without an error to catch.
        free = shutil.disk_usage(self._folder.name).free
        if free < self.bytes:
            raise OutputError(
                f"the vision tokens of {self.videos} videos need {self.bytes / GIB:.1f} GiB, but "
                f"{Path(self._folder.name).parent} has {free / GIB:.1f} GiB left",
                "Set TMPDIR to a folder with more space, or leave re-ranking out.",
            )

    def _allocate(self, file: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._folder is None:
            return torch.empty(shape, dtype=dtype)
        size = torch.Size(shape).numel()
        return torch.from_file(str(Path(self._folder.name) / file), shared=True, size=size, dtype=dtype).view(shape)
