"""The built-in models and the built-in datasets that they were trained for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Builtin:
    """Files in the folder `assets`, and the dataset for its evaluation.

    Attributes:
        files: together they hold the tensors, matrices in float16. The first has the description of the model.
    """

    files: tuple[str, ...]
    dataset: str = "builtin:digits"


_ENCODERS = "umt_encoders.safetensors"

BUILTIN = {
    "builtin:vit-digits": Builtin(("vit_digits.safetensors",)),
    "builtin:vit-digits-small": Builtin(("vit_digits_small.safetensors",)),
    "builtin:cnn-digits": Builtin(("cnn_digits.safetensors",)),
    "builtin:vim-digits": Builtin(("vim_digits.safetensors",)),
    "builtin:umt-shapes": Builtin(("umt_shapes.safetensors", _ENCODERS), "builtin:shapes"),
    "builtin:umt-shapes-qa": Builtin(("umt_shapes_qa.safetensors", _ENCODERS), "builtin:shapes-qa"),
}
