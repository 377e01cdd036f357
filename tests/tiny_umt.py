"""Small UMTs, the reference vectors, and a naive vision encoder of UMT: one clip at a time."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from paths import VECTORS
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from repshift_cli.models import umt
from repshift_cli.models.bert import TextShape
from repshift_cli.models.umt import UmtAnswering, UmtModel, UmtRetrieval, VisionShape
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import Recipe
from repshift_cli.planning.resolve import resolve
from repshift_cli.reduction.compressed_model import CompressedModel, attach
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.reducers.base import Merger, build_reducer

__all__ = [
    "DEPTH",
    "VARIANTS",
    "VECTORS",
    "Naive",
    "Reference",
    "compressed_umt",
    "key_lists",
    "naive_vision",
    "reference",
    "tensors_of",
    "texts_for",
    "tiny_umt",
    "umt_clips",
    "umt_plan",
    "umt_recipe",
]

DEPTH = 4

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd": {"img_size": 24},
    "answering": {"embed_dim": 0},
    "one_frame": {"frames": 1},
    "interpolated": {"frames": 4, "checkpoint_frames": 2},
}
"""By name: what differs from `tiny_umt()`, which takes 3 frames of 4x4 patches. `odd` has 27 tokens."""


def tiny_umt(*, seed: int = 0, embed_dim: int = 24, text: Mapping[str, Any] | None = None, **options: Any) -> UmtModel:
    """A UMT with 4 blocks and 48 tokens in eval mode, with weights large enough that its tokens differ."""
    vision = {"img_size": 32, "frames": 3, "patch_size": 8, "width": 64, "depth": DEPTH, "heads": 4, "hidden": 96}
    words = {"vocabulary": 40, "width": 64, "depth": 3, "heads": 1, "hidden": 80, "positions": 16, "fusion_layer": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = umt.build({**vision, **options}, {**words, **(text or {})}, embed_dim)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.15)
            elif parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def umt_clips(model: nn.Module, count: int = 2, seed: int = 1, frames: int | None = None) -> Tensor:
    """Noise of the size and in the dtype that the model takes."""
    dense: Any = model.model if isinstance(model, CompressedModel) else model
    shape: VisionShape = dense.vision
    generator = torch.Generator().manual_seed(seed)
    clips = torch.randn(count, frames or shape.frames, 3, shape.img_size, shape.img_size, generator=generator)
    return clips.to(dense.vision_encoder.encoder.norm.weight.dtype)


def texts_for(count: int = 2, length: int = 7, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, the second text and every other one shorter than the first."""
    ids = torch.randint(5, 40, (count, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 2
    mask = torch.ones_like(ids)
    mask[1::2, length - 2 :] = 0
    return ids * mask, mask


def umt_recipe(layers: str, metric: str = "{kind: representation_shift}", reducer: str = "prune") -> Recipe:
    """A recipe from the YAML of its parts."""
    return Recipe.parse(f"version: 1\nmetric: {metric}\nreducer: {{kind: {reducer}}}\nlayers: {layers}\n")


def umt_plan(model: UmtModel, recipe: Recipe) -> Plan:
    """The plan of the recipe for the model, as `compress` makes it."""
    reducer = build_reducer(recipe.reducer)
    most = reducer.most if isinstance(reducer, Merger) else None
    return resolve(recipe, match(model).layout(model), reducer.after, most)


def compressed_umt(model: UmtModel, recipe: Recipe) -> CompressedModel:
    """The model with the recipe attached."""
    return attach(model, umt_plan(model, recipe))


@dataclass(frozen=True)
class Reference:
    """Inputs and results of the authors' code, and a model with the weights that it ran.

    Attributes:
        vision, text: sizes of the model.
        embed_dim: 0 for question answering.
        tensors: all but the weights.
        weights: under the official keys.
        metadata: what the file says of itself.
    """

    vision: dict[str, Any]
    text: dict[str, Any]
    embed_dim: int
    tensors: dict[str, Tensor]
    weights: dict[str, Tensor]
    metadata: dict[str, str]

    def model(self, **options: Any) -> Any:
        """The dense model; options are other sizes of the vision encoder."""
        model = umt.build({**self.vision, **options}, self.text, self.embed_dim)
        model.load_state_dict(self.weights, strict=True)
        assert isinstance(model, UmtRetrieval if self.embed_dim else UmtAnswering)
        return model.eval()


def tensors_of(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one of our safetensors files."""
    with safe_open(VECTORS / name, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def reference(name: str) -> Reference:
    """`retrieval` or `qa`."""
    tensors, metadata = tensors_of(f"umt_{name}.safetensors")
    vision, text = VisionShape(**json.loads(metadata["vision"])), TextShape(**json.loads(metadata["text"]))
    weights = {key.removeprefix("w/"): value for key, value in tensors.items() if key.startswith("w/")}
    others = {key: value for key, value in tensors.items() if not key.startswith("w/")}
    return Reference(asdict(vision), asdict(text), int(metadata["embed_dim"]), others, weights, metadata)


def key_lists() -> dict[str, dict[str, tuple[list[int], str]]]:
    """Names, shapes and dtypes of the tensors of UMT-B: `retrieval`, `qa` and `pretraining`."""
    found: dict[str, dict[str, tuple[list[int], str]]] = json.loads(
        gzip.decompress((VECTORS / "umt_keys.json.gz").read_bytes())
    )
    return {name: {key: (shape, dtype) for key, (shape, dtype) in keys.items()} for name, keys in found.items()}


@dataclass
class Naive:
    """The state of one clip in the encoder.

    Attributes:
        entered: of each block, `[N, C]` before it.
        attended: of each block, `[N, C]` after its attention, before its MLP.
        blocks: of each block, `[N, C]`, before tokens are dropped.
        tokens: `[N, C]` after the last norm.
    """

    entered: list[Tensor] = field(default_factory=list)
    attended: list[Tensor] = field(default_factory=list)
    blocks: list[Tensor] = field(default_factory=list)
    tokens: Tensor = field(default_factory=lambda: torch.empty(0))


def naive_vision(
    weights: Mapping[str, Tensor], clip: Tensor, *, heads: int, places: Tensor, kept: Mapping[int, Tensor] | None = None
) -> Naive:
    """The vision encoder on one clip, in the dtype of the weights.

    Args:
        weights: under the authors' keys.
        clip: `[T, 3, H, W]`.
        heads: of attention.
        places: `[N, C]`, the position of each token.
        kept: after these blocks only these positions of the dense clip are kept.
    """
    start = "vision_encoder.encoder."
    weights = {key.removeprefix(start): value for key, value in weights.items() if key.startswith(start)}
    kernel = weights["patch_embed.proj.weight"][:, :, 0]
    frames = functional.conv2d(clip, kernel, weights["patch_embed.proj.bias"], stride=kernel.shape[-1])
    rows, columns = frames.shape[2:]
    tokens = torch.stack(
        [frame[:, row, column] for frame in frames for row in range(rows) for column in range(columns)]
    )
    tokens = tokens + places
    left = torch.arange(len(tokens))
    found = Naive()
    depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    for index in range(depth):
        block = {key.split(".", 2)[2]: value for key, value in weights.items() if key.startswith(f"blocks.{index}.")}
        found.entered.append(tokens)
        tokens = tokens + _attention(block, _norm(block, "norm1", tokens), heads)
        found.attended.append(tokens)
        hidden = _norm(block, "norm2", tokens) @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"]
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        tokens = tokens + hidden @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"]
        found.blocks.append(tokens)
        if kept is not None and index in kept:
            stay = torch.isin(left, kept[index])
            tokens, left = tokens[stay], left[stay]
    found.tokens = _norm(weights, "norm", tokens)
    return found


def _norm(weights: Mapping[str, Tensor], name: str, tokens: Tensor) -> Tensor:
    centred = tokens - tokens.mean(1, keepdim=True)
    scaled = centred / torch.sqrt((centred * centred).mean(1, keepdim=True) + 1e-6)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _attention(block: Mapping[str, Tensor], tokens: Tensor, heads: int) -> Tensor:
    queries, keys, values = (tokens @ part.T for part in block["attn.qkv.weight"].chunk(3))
    queries, values = queries + block["attn.q_bias"], values + block["attn.v_bias"]
    mixed = []
    for query, key, value in zip(*(part.chunk(heads, dim=1) for part in (queries, keys, values)), strict=True):
        scores = (query @ key.T) / query.shape[1] ** 0.5
        powers = (scores - scores.amax(1, keepdim=True)).exp()
        mixed.append(powers / powers.sum(1, keepdim=True) @ value)
    return torch.cat(mixed, dim=1) @ block["attn.proj.weight"].T + block["attn.proj.bias"]
