"""Video-text models of an evaluation: task, pooling, tokenizer and attention kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.exported import OpenedExport
from repshift_cli.data.builtin import moving_shapes
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.data.video.annotations import Task, VideoTextSet
from repshift_cli.data.video.tokenizer import Tokenizer
from repshift_cli.errors import ModelError, UsageError
from repshift_cli.evaluation.models import COMPRESSED, DENSE, DenseVideoView, check_comparison
from repshift_cli.evaluation.video_text.data import BUILTIN_DATASETS
from repshift_cli.evaluation.video_text.settings import VideoSettings
from repshift_cli.measure.attention_kernel import observed_attention
from repshift_cli.models.attention_mode import attention_mode, auto_note
from repshift_cli.models.umt import Pooling, UmtAnswering, UmtModel, UmtRetrieval
from repshift_cli.utils.progress import Progress

_MODELS_OF_SHAPES = "umt-shapes"


def video_models_of(opened: Opened, compare_dense: bool, name: str) -> dict[str, Any]:
    """The models to evaluate, the given one first.

    Raises:
        ModelError: it is an exported file.
        UsageError: as `check_comparison`.
    """
    if isinstance(opened, OpenedExport):
        raise ModelError(
            f"{name} holds the vision encoder only; retrieval and question answering need the text encoder too",
            "Evaluate the checkpoint that it was exported from.",
        )
    check_comparison(opened, compare_dense, name)
    compressed, model = opened.compressed, opened.loaded.model  # the hooks of a compressed model are on `model`
    if compressed is None:
        return {DENSE: model}
    return {COMPRESSED: model} | ({DENSE: DenseVideoView(compressed)} if compare_dense else {})


def task_of(model: nn.Module) -> Task:
    """The task of a video-text model; raises ModelError for other models."""
    if isinstance(model, UmtRetrieval):
        return "retrieval"
    if isinstance(model, UmtAnswering):
        return "qa"
    raise ModelError("the model takes clips, but not for classification, retrieval or question answering")


def choose_pooling(opened: Opened, pooling: Pooling | None) -> Pooling:
    """Set the pooling of a dense retrieval model, if one is given. Returns the pooling in use."""
    model = opened.loaded.model
    assert isinstance(model, UmtModel)
    if pooling is None:
        return model.pooling
    if task_of(model) == "qa":
        raise UsageError(f"--pooling {pooling}: question answering does not pool", "Leave the option out.")
    if opened.compressed is not None:
        raise UsageError(
            f"--pooling {pooling}: a compressed model has no whole frames, so it and its dense model pool all tokens",
            "Leave the option out, or give the dense checkpoint.",
        )
    model.pooling = pooling
    return pooling


def open_tokenizer(vocabulary: Path | None, opened: Opened, data: VideoTextSet) -> Tokenizer:
    """The tokenizer of a model, from the given vocabulary file or from that of the built-in models.

    Raises:
        UsageError: no file is given, and the model is not built in.
        DataError: the vocabulary has another size than the model's.
    """
    model, name = opened.loaded.model, opened.loaded.description.name
    assert isinstance(model, UmtModel)
    if vocabulary is not None:
        tokenizer = Tokenizer(vocabulary.expanduser())
    elif data.name in BUILTIN_DATASETS or name.startswith(_MODELS_OF_SHAPES):
        with moving_shapes.vocabulary_file() as path:
            tokenizer = Tokenizer(path)
    else:
        raise UsageError(
            f"{name} needs its vocabulary to read texts",
            "Add --vocab vocab.txt; the authors' UMT uses that of bert-base-uncased.",
        )
    tokenizer.check_fits(model.text.vocabulary, name)
    return tokenizer


@torch.inference_mode()
def observe_attention(
    models: Mapping[str, Any], preprocessing: Preprocessing, settings: VideoSettings, progress: Progress
) -> dict[str, str]:
    """The attention kernel that each video encoder runs on an empty clip; see `attention_kernel.observed_attention`."""
    clip = torch.zeros(1, *preprocessing.shape, device=settings.device, dtype=settings.dtype)
    with ready(models, settings):
        for note in {note for module in _modules(models) if (note := auto_note(module, settings.attention))}:
            progress.note(note)
        return {name: observed_attention(model.encode_video, clip) for name, model in models.items()}


@contextmanager
def ready(models: Mapping[str, Any], settings: VideoSettings) -> Iterator[None]:
    """Move the models to the device and dtype; they use the requested attention kernel inside the context."""
    with ExitStack() as switched:
        for module in _modules(models):
            module.to(device=settings.device, dtype=settings.dtype)
            switched.enter_context(attention_mode(module, settings.attention))
        yield


def _modules(models: Mapping[str, Any]) -> list[nn.Module]:
    """Each module once; a `DenseVideoView` has the module of its compressed model."""
    parts = (model.compressed.model if isinstance(model, DenseVideoView) else model for model in models.values())
    return list({id(part): part for part in parts if isinstance(part, nn.Module)}.values())
