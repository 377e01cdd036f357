"""Settings of evaluations of video-text models."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from repshift_cli.models.attention_mode import AttentionMode
from repshift_cli.utils.ranges import check_ranges


@dataclass(frozen=True)
class VideoSettings:
    """How an evaluation runs.

    Attributes:
        batch_size: videos, captions or questions per batch.
        workers: processes for decoding; 0 decodes in this process.
        strict: stop at the first video that is missing or unreadable, instead of leaving it out.
        rerank_k: candidates of each query that are matched; None without re-ranking and for questions.
        attention: kernel of the video encoder.
    """

    batch_size: int
    device: torch.device
    dtype: torch.dtype
    workers: int = 0
    strict: bool = False
    rerank_k: int | None = None
    attention: AttentionMode = "auto"

    def __post_init__(self) -> None:
        check_ranges(batch_size=self.batch_size, workers=self.workers, rerank_k=self.rerank_k)
