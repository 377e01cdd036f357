"""The preprocessing that an image processor of the transformers library describes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from repshift_cli.checkpoints.folders import read_config
from repshift_cli.errors import CheckpointError, first_line
from repshift_cli.reduction.families.transformer import Tower

_FILES = (
    ("processor_config.json", "image_processor"),
    ("processor_config.json", "video_processor"),
    ("preprocessor_config.json", ""),
    ("video_preprocessor_config.json", ""),
)
"""Files with their key of the processor, in the order in which transformers reads them."""

_KINDS = ("image_processor_type", "feature_extractor_type", "video_processor_type")

_STEPS = ("Beit", "Bit", "Blip", "CLIP", "ConvNext", "DINOv3ViT", "DeiT", "Siglip", "VideoMAE", "ViT", "Vivit")
"""Processors that resize, crop, rescale and normalise each image, and do nothing else."""

_INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""By the number of a filter in PIL."""

_WARPED = 384
"""From this size on the processor of ConvNeXt does not crop."""

_USUAL = 224

_STATISTICS = (("image_mean", 0.0), ("image_std", 1.0))
"""Keys with their values for pixels that are not normalised."""

_ASK = "Correct the file, or give --mean, --std, --crop-pct and --interpolation."


def read_processor(folder: Path, model_type: str) -> dict[str, Any] | None:
    """Fields of `Preprocessing` from the processor files of a folder, `input_size` as height and width.

    What a file leaves out is the default of its processor, as in transformers. None if there is no file.

    Raises:
        CheckpointError: a file is damaged, or its processor does what `Preprocessing` cannot express.
    """
    for name, key in _FILES:
        if (folder / name).is_file():
            values = read_config(folder / name)
            if (found := values.get(key) if key else values) is not None:
                return _fields(found, model_type, str(folder / name))
    return None


def check_spectrograms(folder: Path, shape: tuple[int, ...]) -> None:
    """Raise CheckpointError if the feature extractor in a folder makes spectrograms of another `(time, frequency)`."""
    path = folder / "preprocessor_config.json"
    values = read_config(path) if path.is_file() else {}
    for key, wanted in zip(("max_length", "num_mel_bins"), shape, strict=True):
        if values.get(key, wanted) != wanted:
            raise CheckpointError(
                f"{path}: {key} is {values[key]!r}, but the model takes {wanted}", "Correct the size in the file."
            )


def default_processor(model_type: str) -> dict[str, Any]:
    """As `read_processor`, of the processor that transformers uses for a kind of model; empty if it is not known."""
    try:
        return _fields({}, model_type, model_type)
    except CheckpointError:
        return {}


def usual_of_maps(model_type: str) -> dict[str, Any]:
    """As `usual_preprocessing`, of a network of feature maps, which takes any size."""
    found = _fields({"size": {"shortest_edge": _USUAL}}, model_type, model_type)
    return found | {"input_size": (3, *found["input_size"]), "frames": None}


def usual_preprocessing(tower: Tower) -> dict[str, Any]:
    """Fields of `Preprocessing` of a model without processor files: the size that it takes, and usual statistics.

    The columns and rows of a spectrogram stand for height and width. Its values are not normalised again.
    """
    spectrogram = tower.spec.axes == "WH"
    *frames, channels, height, width = (1, *tower.input_size) if spectrogram else tower.input_size
    rgb = channels == len(IMAGENET_DEFAULT_MEAN)
    usual: dict[str, Any] = {"interpolation": "bicubic", "crop_pct": 1.0, "mean": (0.5,) * channels}
    if spectrogram:
        return usual | {"mean": (0.0,), "std": (1.0,), "input_size": (1, height, width), "spectrogram": True}
    usual |= {"std": usual["mean"]} | ({"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD} if rgb else {})
    model_type = getattr(getattr(tower.module, "config", None), "model_type", None)
    if rgb and model_type:
        usual |= default_processor(model_type)
    return usual | {"input_size": (channels, height, width), "frames": frames[0] if frames else None}


def _fields(values: Any, model_type: str, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} is not the configuration of a processor")
    steps = _with_defaults(values, model_type, where)
    refused = [key for key in ("do_pad", "do_image_splitting", "do_thumbnail") if steps.get(key)]
    if refused := refused + ["fps"] * bool(steps.get("do_sample_frames") and steps.get("fps")):
        raise CheckpointError(f"{where}: {', '.join(refused)} is not supported", _ASK)
    try:
        return {**_sizes(steps), **_pixels(steps), "interpolation": _INTERPOLATIONS[_index(steps["resample"])]}
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError) as error:
        reason = f"unknown {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{where}: the preprocessing is not supported: {reason}", _ASK) from error


def _with_defaults(values: Mapping[str, Any], model_type: str, where: str) -> dict[str, Any]:
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    usual = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type.removesuffix("_vision_model")) or {}
    kind = str(next((values[key] for key in _KINDS if values.get(key)), usual.get("torchvision", "")))
    parts = re.fullmatch(r"(\w+?)(Image|Video)?(Processor|FeatureExtractor)(Fast|Pil)?", kind)
    if parts is None or parts[1] not in _STEPS:
        named = f"the processor {kind}" if kind else "a processor without a name"
        raise CheckpointError(f"{where}: {named} is not supported", f"Supported: {', '.join(_STEPS)}. {_ASK}")
    name = f"{parts[1]}{parts[2] or 'Image'}Processor"
    known = {key: value for key, value in values.items() if key not in ("auto_map", *_KINDS)}
    try:
        found: dict[str, Any] = getattr(transformers, name).from_dict(known).to_dict()
    except Exception as error:  # it raises errors of every kind for invalid values
        raise CheckpointError(f"{where}: {name} does not take its values: {first_line(error)}", _ASK) from error
    special = {"offset": name == "VivitVideoProcessor", "warps": name == "ConvNextImageProcessor"}
    return {**special, **found}  # the first always subtracts 1


def _sizes(steps: Mapping[str, Any]) -> dict[str, Any]:
    """Size, crop and how the image is resized."""
    if not steps.get("do_resize"):
        raise ValueError("images are not resized (do_resize false)")
    size = {key: value for key, value in dict(steps["size"] or {}).items() if value is not None}
    crop = dict(steps["crop_size"]) if steps.get("do_center_crop") else None
    if steps["warps"] and size.keys() == {"shortest_edge"} and crop is None:
        side = _side(size["shortest_edge"])
        if side >= _WARPED:
            return {"input_size": (side, side), "crop_pct": 1.0, "crop_mode": "squash"}
        share = _share(side, _side(int(side / steps["crop_pct"])))
        return {"input_size": (side, side), "crop_pct": share, "crop_mode": "center"}
    if size.keys() == {"height", "width"}:
        resized = (_side(size["height"]), _side(size["width"]))
        cropped = (_side(crop["height"]), _side(crop["width"])) if crop else resized
        share = _share(cropped[0], resized[0])
        if math.floor(cropped[1] / share) != resized[1]:
            raise ValueError(f"size {size} and crop_size {crop} have different ratios")
        return {"input_size": cropped, "crop_pct": share, "crop_mode": "squash"}
    if size.keys() != {"shortest_edge"} or crop is None or crop["height"] != crop["width"]:
        raise ValueError(f"size {size} with {'no crop' if crop is None else f'crop_size {crop}'}")
    cropped = (_side(crop["height"]),) * 2
    return {"input_size": cropped, "crop_pct": _share(cropped[0], _side(size["shortest_edge"])), "crop_mode": "center"}


def _pixels(steps: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and deviation of pixels in 0..1 that give what the processor makes of pixels in 0..255."""
    factor = float(steps["rescale_factor"]) if steps.get("do_rescale") else 1.0
    offset = 1.0 if steps.get("offset") and steps.get("do_rescale") else 0.0
    normalise = steps.get("do_normalize")
    mean, std = (_channels(steps[key]) if normalise else (usual,) * 3 for key, usual in _STATISTICS)
    scale = 255 * factor
    if math.isclose(scale, 1.0) and not offset:
        return {"mean": mean, "std": std}
    return {"mean": tuple((value + offset) / scale for value in mean), "std": tuple(value / scale for value in std)}


def _channels(value: Any) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, list | tuple) else (float(value),) * 3


def _side(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"the side {value!r} of an image")
    return value


def _index(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < len(_INTERPOLATIONS):
        raise ValueError(f"resample {value!r}")
    return int(value)


def _share(cropped: int, resized: int) -> float:
    """The `crop_pct` of which timm, which rounds down, makes this size."""
    share = cropped / resized
    while math.floor(cropped / share) < resized:
        share = math.nextafter(share, 0.0)
    return share
