"""timm's transformers besides `VisionTransformer`: EVA, DINOv3, PE, BEiT, relative positions, CaiT and NaFlexVit.

Only registered models are known. Heads, pooling, activation and rotary positions are theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from repshift_cli.checkpoints.identify import vit
from repshift_cli.checkpoints.identify.identity import Identity
from repshift_cli.checkpoints.identify.sizes import head_count
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.errors import CheckpointError
from repshift_cli.utils.suggest import first_names

MODULES = ("eva", "beit", "cait", "vision_transformer_relpos", "naflexvit")

_FIRST_BLOCK = (
    "gamma_1",
    "attn.q_bias",
    "attn.q_proj.weight",
    "attn.relative_position_bias_table",
    "attn.rel_pos.relative_position_bias_table",
    "attn.rel_pos.mlp.fc1.weight",
)
"""Tensors of the first block that no `VisionTransformer` has."""

_OTHERS = ("shared_rel_pos.mlp.fc1.weight", "shared_rel_pos.relative_position_bias_table", "rope.freqs", "rope.periods")


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these can be the weights of such a model."""
    names = (*(f"blocks.0.{name}" for name in _FIRST_BLOCK), *_OTHERS)
    flexible = "embeds.proj.weight" in tensors and "blocks.0.norm1.weight" in tensors
    return flexible or ("patch_embed.proj.weight" in tensors and any(name in tensors for name in names))


def identify(  # noqa: PLR0917
    tensors: Mapping[str, Tensor],
    where: str,
    options: LoadOptions,
    hint: str,
    size: tuple[int, int] | None,
    given: Mapping[str, Any],
) -> Identity:
    """Find the registered model that the weights belong to; arguments and errors as `vit.identify`."""
    alike = vit.alike(tensors, MODULES)
    fitting = vit.fitting(alike, tensors, where, size, given)
    if options.heads is not None:
        fitting = {name: found for name, found in fitting.items() if head_count(found[0]) == options.heads}
    if not fitting:
        names = first_names([model.name for model in alike])
        raise CheckpointError(
            f"{where}: no model of timm has exactly these tensors"
            + (f"; their names are those of {names}" if alike else ""),
            "Name the model with --model, and what differs with --model-args, such as img_size=256 or depth=8.",
        )
    identity, model = vit.choose(fitting, tensors, where, hint)
    height, width = identity.preprocessing.input_size[1:]
    identity.notes.append(
        f"assumed as in {identity.name}, since tensors do not show it: {head_count(model)} heads, "
        f"{getattr(model, 'global_pool', '') or 'no'} pooling, images of {height}x{width}, activation and rotary "
        "positions. If the model has others, its results are wrong: give --model, --img-size, --model-args"
    )
    return identity
