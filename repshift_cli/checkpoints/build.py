"""Build a model from its description and its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from repshift_cli.checkpoints.identify.building import UMT, VIM, build_on_meta, create
from repshift_cli.checkpoints.identify.names import is_model_name
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.weights import first_names
from repshift_cli.data.preprocessing import LARGEST_SIDE, Preprocessing, fixed_size
from repshift_cli.errors import CheckpointError, UsageError
from repshift_cli.models.umt import UmtModel

__all__ = [
    "build",
    "checked_size",
    "configure",
    "set_image_size",
]


def build(description: ModelDescription, tensors: Mapping[str, Tensor], where: str) -> nn.Module:
    """Build the model of a description around these weights (float32, eval mode, CPU).

    Raises:
        CheckpointError: the weights do not fit; the message says which keys and shapes.
    """
    architecture = description.architecture
    if architecture not in (None, VIM, UMT) and not is_model_name(architecture):
        raise CheckpointError(f"{where}: there is no model named {architecture!r}")
    model = build_on_meta(architecture, description.args, where, tensors, description.name)
    _check_fit(model, tensors, description.name, where)
    model.load_state_dict(dict(tensors), strict=True, assign=True)
    if isinstance(model, UmtModel):
        model.restore_buffers()
    if any(buffer.is_meta for buffer in model.buffers()):
        # A buffer that is not stored has to be computed, which needs a real device.
        model = create(architecture, description.args, where)
        model.load_state_dict(dict(tensors), strict=True, assign=True)
    configure(model, description.preprocessing)
    return model.float().eval().requires_grad_(False)


def configure(model: nn.Module, preprocessing: Preprocessing) -> None:
    """Let the model's own configuration say what is known of its images: a convolutional network takes any size."""
    config = dict(getattr(model, "pretrained_cfg", None) or {})
    model.pretrained_cfg = {**config, **preprocessing.to_dict()}  # type: ignore[assignment]


def set_image_size(loaded: LoadedModel, img_size: int | None) -> None:
    """Let a model take images of another size, where its weights fit any; None leaves it as it is.

    Raises:
        UsageError: the weights fit one size only, or what was decided for it does.
    """
    preprocessing = loaded.description.preprocessing
    channels, *size = preprocessing.input_size
    if img_size is None or size == [img_size, img_size]:
        return
    what, now = loaded.source.path or loaded.description.name, f"{size[0]}x{size[1]}"
    checked_size(img_size)
    if loaded.document is not None and "plan" in loaded.document:
        raise UsageError(
            f"--img-size {img_size}: {what} was compressed for images of {now}, and its plan holds for no other size",
            f"Leave --img-size out, or compress the dense checkpoint again with --img-size {img_size}.",
        )
    if fixed_size(loaded.model):
        raise UsageError(
            f"--img-size {img_size}: {what} takes images of {now}: its positions are made for that size",
            "Leave --img-size out, or resize the position table first.",
        )
    changed = replace(preprocessing, input_size=(channels, img_size, img_size))
    loaded.description = replace(loaded.description, preprocessing=changed)
    loaded.notes.append(f"images of {img_size}x{img_size} are used instead of {now}, as --img-size says")
    configure(loaded.model, changed)


def checked_size(img_size: int) -> int:
    """Return the image size, or raise if it is out of range."""
    if not 1 <= img_size <= LARGEST_SIDE:
        raise UsageError(f"--img-size: {img_size} is not a number from 1 to {LARGEST_SIDE}")
    return img_size


def _check_fit(model: nn.Module, tensors: Mapping[str, Tensor], name: str, where: str) -> None:
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in tensors.items()}
    problems = []
    for label, keys in (("missing", expected.keys() - given.keys()), ("not known", given.keys() - expected.keys())):
        if keys:
            problems.append(f"{label}: {first_names(sorted(keys))}")
    wrong = [
        f"{key} is {list(given[key])}, not {list(shape)}"
        for key, shape in expected.items()
        if key in given and given[key] != shape
    ]
    if wrong:
        problems.append(f"shapes: {first_names(wrong)}")
    parameters = [key for key, _ in model.named_parameters() if key in tensors]
    whole = [f"{key} is {tensors[key].dtype}" for key in parameters if not tensors[key].is_floating_point()]
    if whole:
        problems.append(f"not floating point: {first_names(whole)}")
    if problems:
        raise CheckpointError(f"{where}: the weights do not fit {name}: {'; '.join(problems)}")
