"""torchvision's vision transformers: files with their tensors. Its ResNets have the tensors of timm's."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from repshift_cli.checkpoints.build import check_fit
from repshift_cli.checkpoints.create import check_depth, check_runs, on_meta
from repshift_cli.checkpoints.identify.computation import computation
from repshift_cli.checkpoints.identify.identity import Identity
from repshift_cli.checkpoints.identify.sizes import check_divides, check_heads
from repshift_cli.checkpoints.libraries.base import Library
from repshift_cli.checkpoints.loaded import ModelDescription
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckpointError, first_line
from repshift_cli.models.tensor_model import TensorModel, library_model, library_of_class

_KIND = "VisionTransformer"
"""Stands for the class itself, whose arguments are all sizes."""

_LAYER = "encoder.layers.encoder_layer_"
_FIRST = f"{_LAYER}0.self_attention.in_proj_weight"
_NAMES = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")
_OLD = {".mlp.linear_1.": ".mlp.0.", ".mlp.linear_2.": ".mlp.3."}
"""Names of older versions."""


class Torchvision(Library):
    """torchvision: `vit_b_16` and others with `image_size` and `num_classes`, or the class with all sizes."""

    name: ClassVar[str] = "torchvision"

    def names(self) -> Collection[str]:
        return _NAMES

    def build(self, description: ModelDescription, tensors: Mapping[str, Tensor], where: str) -> nn.Module:
        name, args = str(description.architecture).partition(":")[2], description.args
        own = {_new_name(key): value for key, value in tensors.items()}
        check_depth(args, tensors, name, where)
        model = _wrapped(_on_meta(name, args, where))
        check_fit(model.inner, own, name, where)
        assert model.img_size is not None
        check_runs(model, (3, *model.img_size), name, where)
        model.load_state_dict(own, strict=True, assign=True)
        return model.float().eval().requires_grad_(False)

    def recognises(self, tensors: Mapping[str, Tensor]) -> bool:
        return "conv_proj.weight" in tensors and _FIRST in tensors

    def identify(self, tensors: Mapping[str, Tensor], where: str, options: LoadOptions) -> Identity:
        sizes, args = _sizes(tensors, where)
        known = {name: _sizes(_on_meta(name, {}, where).state_dict(), where)[0] for name in _NAMES}
        name = options.model_name or next((name for name in _NAMES if known[name] == sizes), None)
        if name is None:
            if options.heads is None:
                listed = "; ".join(f"{name}: {_text(known[name])}" for name in _NAMES)
                raise CheckpointError(
                    f"{where}: no model of torchvision has these sizes ({_text(sizes)}), and tensors do not show the "
                    "number of heads",
                    f"Give --heads. Known are {listed}.",
                )
            heads = check_divides(options.heads, sizes["hidden_dim"], where)
            args, name = {**args, **sizes, "num_heads": heads}, _KIND
        elif known[name] != sizes:
            raise CheckpointError(f"{where}: {name} has {_text(known[name])}, these weights have {_text(sizes)}")
        else:
            check_heads(_on_meta(name, args, where), name, options.heads, where)
        preprocessing, weights = _preprocessing(name, args["image_size"], where)
        notes = [f"detected {name} of torchvision from tensor names and shapes"]
        notes += [f"assumed the preprocessing of {weights}"] if weights else []
        return Identity(name, f"{self.name}:{name}", args, preprocessing, dict(tensors), notes)

    def describe(self, model: nn.Module, preprocessing: Preprocessing, computed: str) -> ModelDescription | None:
        inner = library_model(model)
        if library_of_class(inner) != self.name or type(inner).__name__ != _KIND:
            return None
        where = f"the {_KIND}"
        sizes, args = _sizes(inner.state_dict(), where)
        args |= {**sizes, "num_heads": inner.encoder.layers[0].num_heads}
        rebuilt = _on_meta(_KIND, args, where)
        check_fit(rebuilt, inner.state_dict(), _KIND, where)
        if computation(rebuilt) != computation(inner):
            raise CheckpointError(f"{where} was built with arguments that are not sizes, or changed")
        return ModelDescription(_KIND, f"{self.name}:{_KIND}", args, preprocessing)


def _sizes(tensors: Mapping[str, Tensor], where: str) -> tuple[dict[str, int], dict[str, int]]:
    """The sizes that a name stands for, and those that are arguments of it."""
    own = {_new_name(key): value.shape for key, value in tensors.items()}
    try:
        width, _, _, patch = own["conv_proj.weight"]
        sizes = {
            "patch_size": patch,
            "num_layers": len({key.split(".")[2] for key in own if key.startswith(_LAYER)}),
            "hidden_dim": width,
            "mlp_dim": own[f"{_LAYER}0.mlp.0.weight"][0],
        }
        side = math.isqrt(own["encoder.pos_embedding"][1] - 1)
        args = {"image_size": side * patch, "num_classes": own["heads.head.weight"][0]}
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{where}: the tensors of a ViT of torchvision are not complete: {error}") from error
    if "heads.pre_logits.weight" in own:
        args["representation_size"] = own["heads.pre_logits.weight"][0]
    return sizes, args


def _text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sizes.items())


def _on_meta(name: str, args: Mapping[str, Any], where: str) -> Any:
    from torchvision import models

    if name not in (_KIND, *_NAMES):
        raise CheckpointError(f"{where}: unknown model {name!r} of torchvision", f"Allowed: {', '.join(_NAMES)}.")
    if wrong := [key for key, value in args.items() if not isinstance(value, int) or key == "weights"]:
        raise CheckpointError(f"{where}: unsupported model arguments {', '.join(wrong)}", "Sizes are whole numbers.")
    try:
        with on_meta():
            model: nn.Module = models.VisionTransformer(**args) if name == _KIND else models.get_model(name, **args)
    except Exception as error:  # it raises errors of every kind for invalid values
        raise CheckpointError(f"{where}: {name} cannot be built: {first_line(error)}") from error
    return model.eval()


def _wrapped(inner: Any) -> TensorModel:
    model = TensorModel(inner, "", "forward", {}, prefix=1, num_classes=int(inner.num_classes))
    model.img_size = (int(inner.image_size), int(inner.image_size))
    return model


def _new_name(key: str) -> str:
    for old, new in _OLD.items():
        key = key.replace(old, new)
    return key


def _preprocessing(name: str, size: int, where: str) -> tuple[Preprocessing, str]:
    """The preprocessing of the first published weights for images of this size, and their name."""
    from torchvision import models

    values: dict[str, Any] = {
        "input_size": (3, size, size),
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": "bilinear",
        "crop_pct": 0.875,
    }
    for weights in models.get_model_weights(name) if name in _NAMES else ():
        made = weights.transforms()
        if made.crop_size == [size]:
            values |= {"mean": made.mean, "std": made.std, "interpolation": made.interpolation.value}
            values["crop_pct"] = size / made.resize_size[0]
            return Preprocessing.from_dict(values, where), str(weights)
    return Preprocessing.from_dict(values, where), ""
