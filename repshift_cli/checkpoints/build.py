"""Build a model from its description and tensors, and set its image size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from repshift_cli.checkpoints.create import build_on_meta, check_runs, create, is_architecture
from repshift_cli.checkpoints.libraries.base import library_of
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.options import ImageSize
from repshift_cli.data.preprocessing import Preprocessing, fixed_size
from repshift_cli.errors import CheckpointError, UsageError
from repshift_cli.reduction.families.base import find
from repshift_cli.utils.suggest import first_names


def build(description: ModelDescription, tensors: Mapping[str, Tensor], where: str) -> nn.Module:
    """Build the model of a description with these weights (float32, eval mode, CPU).

    Raises:
        CheckpointError: the weights do not fit; the message lists keys and shapes.
    """
    architecture = description.architecture
    if library := library_of(architecture):
        built = library.build(description, tensors, where)
        configure(built, description.preprocessing)
        return built
    if not is_architecture(architecture):
        raise CheckpointError(f"{where}: unknown model {architecture!r}")
    model = build_on_meta(architecture, description.args, where, tensors, description.name)
    check_fit(model, tensors, description.name, where)
    if description.args:
        given, frames = description.preprocessing.input_size, getattr(model, "frames", None)
        image = (given[0], *(fixed_size(model) or given[1:]))
        check_runs(model, (frames, *image) if frames else image, description.name, where)
    model.load_state_dict(dict(tensors), strict=True, assign=True)
    if family := find(model):
        family.after_load(model)
    if any(buffer.is_meta for buffer in model.buffers()):
        # A buffer that is not stored is computed, which needs a real device.
        model = create(architecture, description.args, where)
        model.load_state_dict(dict(tensors), strict=True, assign=True)
    configure(model, description.preprocessing)
    return model.float().eval().requires_grad_(False)


def configure(model: nn.Module, preprocessing: Preprocessing) -> None:
    """Write the preprocessing to the model's own configuration, where timm keeps it."""
    config = dict(getattr(model, "pretrained_cfg", None) or {})
    model.pretrained_cfg = {**config, **preprocessing.to_dict()}  # type: ignore[assignment]
    if getattr(model, "dynamic_img_size", False):
        model.patch_embed.img_size = preprocessing.input_size[1:]  # type: ignore[union-attr]


def set_image_size(loaded: LoadedModel, img_size: int | tuple[int, int] | None) -> None:
    """Set the image size of a model whose weights fit any size; None leaves it as it is.

    Raises:
        UsageError: the weights or the plan of the model are for one size.
    """
    preprocessing = loaded.description.preprocessing
    channels, *size = preprocessing.input_size
    if img_size is None or (wanted := ImageSize.of(img_size)) == tuple(size):
        return
    if fixed_size(loaded.model) and loaded.plan is None:
        raise UsageError(
            f"--img-size {wanted}: {loaded.source.path or loaded.description.name} takes images of "
            f"{size[0]}x{size[1]}: its position table has that size",
            "Leave --img-size out, or resize the position table first.",
        )
    _change(loaded, replace(preprocessing, input_size=(channels, *wanted)), f"--img-size {wanted}")


def set_preprocessing(loaded: LoadedModel, given: Mapping[str, Any]) -> None:
    """Set parts of the preprocessing that the user gives, see `LoadOptions`; a single mean or std is of all channels.

    Raises:
        UsageError: a value is invalid, or the model was compressed with another one.
    """
    now = loaded.description.preprocessing
    values = {
        key: value * now.input_size[0] if isinstance(value, tuple) and len(value) == 1 else value
        for key, value in given.items()
    }
    names = ", ".join(map(_option, given))
    if given and now.spectrogram:
        raise UsageError(f"{names}: the model takes spectrograms, whose values are used as they are", "Leave it out.")
    try:
        changed = Preprocessing.from_dict(now.to_dict() | {"unstated": now.unstated} | values, names)
    except CheckpointError as error:
        raise UsageError(error.message) from error
    if changed != now:
        _change(loaded, changed, names)


def _change(loaded: LoadedModel, changed: Preprocessing, options: str) -> None:
    what, now = loaded.source.path or loaded.description.name, loaded.description.preprocessing
    if loaded.plan is not None:
        raise UsageError(
            f"{options}: {what} was compressed for another preprocessing ({now})",
            "Leave the option out, or compress the dense checkpoint again with it.",
        )
    loaded.description = replace(loaded.description, preprocessing=changed)
    loaded.notes.append(f"preprocessing set to {changed} ({options}) instead of {now}")
    configure(loaded.model, changed)


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def check_fit(model: nn.Module, tensors: Mapping[str, Tensor], name: str, where: str) -> None:
    """Raise CheckpointError with the keys that differ unless names, shapes and kinds of the tensors are the model's."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in tensors.items()}
    problems = []
    for label, keys in (("missing", expected.keys() - given.keys()), ("unknown", given.keys() - expected.keys())):
        if keys:
            problems.append(f"{label}: {first_names(sorted(keys))}")
    wrong = [
        f"{key} is {list(given[key])}, not {list(shape)}"
        for key, shape in expected.items()
        if key in given and given[key] != shape
    ]
    if wrong:
        problems.append(f"shapes: {first_names(wrong)}")
    integers = [
        f"{key} is {tensors[key].dtype}"
        for key, value in model.state_dict().items()
        if key in tensors and value.is_floating_point() and not tensors[key].is_floating_point()
    ]
    if integers:
        problems.append(f"not floating point: {first_names(integers)}")
    if problems:
        raise CheckpointError(f"{where}: the weights do not fit {name}: {'; '.join(problems)}")
