"""Ways to run a model faster: fewer tokens, another runtime or dtype, a smaller input or model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from repshift_cli.checkpoints.artifact import Opened, open_model
from repshift_cli.checkpoints.exported import quiet_logs
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import ModelError, RepshiftError, UsageError
from repshift_cli.measure.compiled import Compiled
from repshift_cli.measure.cpu import INSTRUCTIONS, cpu_features
from repshift_cli.measure.environment import cxx_compiler
from repshift_cli.measure.macs import count_macs
from repshift_cli.measure.memory import parameter_bytes
from repshift_cli.reduction.baselines import dense_copy, shared_copy
from repshift_cli.reduction.compressed_model import CompressedModel

_STEP = 32
"""Sizes of images of a network of maps are multiples of this."""


@dataclass(frozen=True)
class Way:
    """One way to run the model.

    Attributes:
        name: unique in the table.
        reduced: whether it runs the plan of the compressed model.
        run: images `[B, C, H, W]` of `preprocessing`, float32, to outputs `[B, outputs]`.
        macs: multiply-accumulates per image; those of a float model for int8.
        bytes: of the file, or of the weights.
        comparable: whether its outputs mean the same as those of the dense model.
        context: to be entered for each run.
        opened: the model, if it can be exported; its reduction is exported if `reduced`.
    """

    name: str
    reduced: bool
    run: Callable[[Tensor], Any]
    macs: int
    bytes: int
    preprocessing: Preprocessing
    comparable: bool = True
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    opened: Opened | None = None


@dataclass(frozen=True)
class Missing:
    """A way that does not exist here."""

    name: str
    reason: str


def both(opened: Opened) -> list[Way]:
    """The dense and the compressed model, as they are."""
    compressed = _compressed(opened)
    size = parameter_bytes(compressed.model)
    shape = opened.loaded.description.preprocessing
    return [
        Way("dense", False, compressed, opened.dense_macs, size, shape, context=compressed.dense, opened=opened),
        Way("tokens", True, compressed, opened.macs, size, shape, opened=opened),
    ]


def in_bfloat16(opened: Opened) -> Iterator[Way | Missing]:
    """Both models in bfloat16, where the CPU has instructions for it."""
    if cpu_features().isdisjoint(INSTRUCTIONS["bfloat16"]):
        yield Missing("bfloat16", "this CPU has no bfloat16 instructions, so it is slower than float32")
        return
    half = copy.deepcopy(_compressed(opened)).to(torch.bfloat16)
    for way in both(opened):
        yield replace(
            way,
            name=f"{way.name}, bfloat16",
            run=lambda images: half(images.to(torch.bfloat16)).float(),
            bytes=parameter_bytes(half.model),
            context=nullcontext if way.reduced else half.dense,
            opened=None,
        )


def compiled(opened: Opened, batch: int) -> Iterator[Way | Missing]:
    """Both models compiled by torch for one batch size."""
    if missing := no_compiler():
        yield missing
        return
    compressed = _compressed(opened)
    shape = opened.loaded.description.preprocessing.shape
    modules = dense_copy(compressed), shared_copy(compressed)
    for way, module in zip(both(opened), modules, strict=True):
        function = Compiled(way.name, module, "default")
        try:
            with torch.inference_mode(), quiet_logs(logging.WARNING):
                function.first(torch.zeros(batch, *shape))
        except UsageError as error:
            yield Missing("torch.compile", error.message)
            return
        yield replace(way, name=f"{way.name}, torch.compile", run=function, context=nullcontext, opened=None)


def no_compiler() -> Missing | None:
    """Why torch.compile cannot work here."""
    return Missing("torch.compile", "there is no C++ compiler: install g++") if cxx_compiler() is None else None


def smaller_input(opened: Opened) -> Way | Missing:
    """The dense model on the largest images whose multiply-accumulates are at most those of the compressed model."""
    if (unit := opened.loaded.description.preprocessing.unit) != "image":
        return Missing("smaller input", f"the model takes {unit}s")
    dense, preprocessing = dense_copy(_compressed(opened)), opened.loaded.description.preprocessing
    channels, height, width = preprocessing.input_size
    patch = getattr(getattr(dense, "patch_embed", None), "patch_size", None)
    step = patch[0] if patch else _STEP
    for rows in range(height // step - 1, 0, -1):
        size = (rows * step, max(1, round(width / height * rows)) * step)
        try:
            module = _at_size(dense, size)
            macs = count_macs(module, (channels, *size))
        except RepshiftError as error:
            return Missing("smaller input", error.message)
        if macs <= opened.macs:
            own = replace(preprocessing, input_size=(channels, *size))
            described = replace(opened.loaded.description, preprocessing=own)
            small = Opened(replace(opened.loaded, model=module, description=described, document=None), None)
            name = f"images {size[0]}x{size[1]}"
            return Way(name, False, module, macs, parameter_bytes(module), own, opened=small)
    return Missing("smaller input", "no size has as few multiply-accumulates")


def smaller_model(name: str, classes: int) -> Way:
    """Another model; comparable if its head has as many outputs and its weights are not random."""
    opened = open_model(name)
    loaded = opened.loaded
    comparable = loaded.source.origin != "random" and getattr(loaded.model, "num_classes", 0) == classes > 0
    size = parameter_bytes(loaded.model)
    shape = loaded.description.preprocessing
    return Way(
        loaded.description.name, opened.reduced, opened.module, opened.macs, size, shape, comparable, opened=opened
    )


def _at_size(model: nn.Module, size: tuple[int, int]) -> nn.Module:
    """The model for images of another size; timm resizes the position embedding of a ViT."""
    resize = getattr(model, "set_input_size", None)
    if resize is None:
        if hasattr(model, "pos_embed"):
            raise ModelError(f"{type(model).__name__} has positions for one image size")
        return model
    own = copy.deepcopy(model)
    own.set_input_size(img_size=size)  # type: ignore[operator]
    return own.eval()


def _compressed(opened: Opened) -> CompressedModel:
    if opened.compressed is None:
        raise UsageError("the model is not compressed", "Give a compressed checkpoint, or --recipe.")
    return opened.compressed
