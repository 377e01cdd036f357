"""The models of an evaluation: checkpoints and exported files, their dense models and baselines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.exported import OpenedExport
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import ModelError, UsageError
from repshift_cli.reduction.baselines import BASELINES, SAME_OUTPUTS, attach_baseline
from repshift_cli.reduction.compressed_model import CompressedModel
from repshift_cli.utils.suggest import nearest

DENSE = "dense"
COMPRESSED = "compressed"


_AGAINST = tuple(name for name in BASELINES if name not in SAME_OUTPUTS)
"""The baselines that an evaluation takes."""


@dataclass(frozen=True)
class Candidate:
    """A model of an evaluation, one row of its table.

    Attributes:
        module: the model to run.
        macs: multiply-accumulates per image.
        opened: what it is made of.
        given: whether it is the model of the user, not its dense model or a baseline.
    """

    module: nn.Module
    macs: int
    opened: Opened
    given: bool

    @property
    def preprocessing(self) -> Preprocessing:
        return self.opened.loaded.description.preprocessing


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


def check_against(names: Sequence[str]) -> None:
    """Raise a UsageError for an unknown baseline, and for one that differs from another in speed only."""
    allowed = f"Allowed are {', '.join(_AGAINST)}."
    for name in names:
        if name in SAME_OUTPUTS:
            raise UsageError(f"--against {name}: it predicts what {SAME_OUTPUTS[name]} predicts", allowed)
        if name not in BASELINES:
            raise UsageError(f"--against: unknown baseline {name!r}", f"{nearest(name, _AGAINST)}{allowed}")


def candidates_of(
    opened: Mapping[str, Opened], compare_dense: bool, baselines: Sequence[str] = ()
) -> dict[str, Candidate]:
    """The models to evaluate, by name: each opened one, its dense model and its baselines.

    The dense model of the first one is there with `compare_dense`, with several models and with baselines.

    Args:
        opened: by label.
        baselines: as checked by `check_against`.

    Raises:
        UsageError: baselines of an exported file, of dense models only, or that a model does not support; or two models
            of one name.
    """
    if baselines and any(isinstance(model, OpenedExport) for model in opened.values()):
        raise UsageError("--against: unsupported for an exported file", "Name its checkpoint instead.")
    if baselines and not any(model.compressed for model in opened.values()):
        raise UsageError("--against: no model is compressed", "Give a checkpoint from `repshift compress`.")
    found: dict[str, Candidate] = {}
    for label, model in opened.items():
        dense = DENSE in baselines or (not found and (compare_dense or len(opened) > 1 or bool(baselines)))
        for kind, each in _candidates(label, model, dense, baselines):
            name = kind if len(opened) == 1 else label if each.given else f"{label}, {kind}"
            if name in found:
                raise UsageError(f"two models have the name {name}", "Rename a file.")
            found[name] = each
    return found


def _candidates(label: str, opened: Opened, dense: bool, baselines: Sequence[str]) -> Iterator[tuple[str, Candidate]]:
    """The models that are made of an opened one, which is the first, and what they are."""
    compressed = opened.compressed
    own = opened.flexible if isinstance(opened, OpenedExport) else opened.module
    yield COMPRESSED if opened.reduced else DENSE, Candidate(own, opened.macs, opened, given=True)
    if compressed is None:
        return
    if dense:
        yield DENSE, Candidate(DenseView(compressed), opened.dense_macs, opened, given=False)
    for name in baselines:
        attached = attach_baseline(name, compressed, label, _AGAINST)
        if attached is not None:
            yield name, Candidate(attached, attached.macs(), opened, given=False)


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
