"""The models of an evaluation: a checkpoint or an exported file, and its dense model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.exported import OpenedExport
from repshift_cli.errors import ModelError, UsageError
from repshift_cli.reduction.compressed_model import CompressedModel

DENSE = "dense"
COMPRESSED = "compressed"


class DenseView(nn.Module):
    """The dense model of a compressed image model, on the same weights."""

    def __init__(self, compressed: CompressedModel) -> None:
        super().__init__()
        self.compressed = compressed

    def forward(self, images: Tensor) -> Any:
        with self.compressed.dense() as dense:
            return dense(images)


class DenseVideoView:
    """The dense model of a compressed video-text model, on the same weights.

    Only the video encoder differs: everything after its tokens is the same module.
    """

    def __init__(self, compressed: CompressedModel) -> None:
        self.compressed = compressed

    def encode_video(self, video: Tensor) -> Tensor:
        """`[B, T, 3, H, W]` to all tokens, `[B, N, C]`."""
        with self.compressed.dense() as dense:
            tokens: Tensor = dense.encode_video(video)  # type: ignore[operator]
            return tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self.compressed.model, name)


def models_of(opened: Opened, compare_dense: bool, name: str) -> dict[str, nn.Module]:
    """The models to evaluate, the given one first. Errors as `check_comparison`."""
    check_comparison(opened, compare_dense, name)
    compressed = opened.compressed
    if isinstance(opened, OpenedExport):
        return {COMPRESSED if opened.reduced else DENSE: opened.flexible}
    if compressed is None:
        return {DENSE: opened.module}
    return {COMPRESSED: compressed} | ({DENSE: DenseView(compressed)} if compare_dense else {})


def check_comparison(opened: Opened, compare_dense: bool, name: str) -> None:
    """Check that there is a dense model to compare with.

    Raises:
        UsageError: `compare_dense` is set, but the model is dense or an exported file.
    """
    if opened.compressed is not None or not compare_dense:
        return
    if opened.reduced:
        raise UsageError(
            f"--compare-dense: {name} is an exported file without its dense model",
            "Export the dense model with --dense and evaluate both, or evaluate the checkpoint.",
        )
    raise UsageError(
        f"--compare-dense: {name} is a dense model", "Leave it out, or give a checkpoint from `repshift compress`."
    )


def head_size(model: nn.Module) -> int:
    """The number of classes of a model.

    Raises:
        ModelError: it has no `num_classes`.
    """
    size = getattr(model, "num_classes", None)
    if not isinstance(size, int):
        raise ModelError("cannot evaluate on labels: the model does not define its number of classes (num_classes)")
    return size
