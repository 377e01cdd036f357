"""Shared by retrieval and question answering: the timed video encoder and unreadable videos."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from repshift_cli.errors import DataError, ModelError
from repshift_cli.evaluation.common import Skipped, timed
from repshift_cli.evaluation.video_text.settings import VideoSettings

TOKEN_DIMS = 3
"""Dimensions of tokens and hidden states, `[B, N, D]`."""


class VideoModel(Protocol):
    """A module with a video encoder; `to` and `eval` are those of `nn.Module`."""

    def encode_video(self, video: Tensor) -> Tensor:
        """`[B, T, 3, H, W]` to tokens `[B, N, D]`, with the same N for every video."""

    def to(self, *, device: torch.device, dtype: torch.dtype) -> object: ...

    def eval(self) -> object: ...


def prepare(models: Mapping[str, VideoModel], settings: VideoSettings) -> None:
    """Set models to eval mode and move them to the device and dtype, in place."""
    for model in models.values():
        model.to(device=settings.device, dtype=settings.dtype)
        model.eval()


def encode_timed(name: str, model: VideoModel, video: Tensor, device: torch.device) -> tuple[Tensor, float]:
    """Encode videos `[B, T, 3, H, W]`; returns tokens `[B, N, D]` and seconds."""
    tokens, seconds = timed(model.encode_video, video, device)
    if tokens.dim() != TOKEN_DIMS or len(tokens) != len(video):
        raise ModelError(f"{name}: the tokens of videos {tuple(video.shape)} have shape {tuple(tokens.shape)}")
    return tokens, seconds


def skipped_of(broken: Iterable[tuple[int, str]], sample_id: Callable[[int], str], strict: bool) -> list[Skipped]:
    """Unreadable videos or their questions, by name; raises DataError if there is one and `strict` is set."""
    skipped = [Skipped(sample_id(index), reason) for index, reason in broken]
    if strict and skipped:
        raise DataError(f"{skipped[0].sample} cannot be read: {skipped[0].reason}")
    return skipped


def nothing_readable(problem: str, skipped: Sequence[Skipped]) -> DataError:
    """The error of a dataset without a readable video, with the first reason as hint."""
    return DataError(problem, f"The first: {skipped[0].sample}: {skipped[0].reason}" if skipped else None)
