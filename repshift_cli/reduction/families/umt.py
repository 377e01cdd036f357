"""UMT: video models with attention over all positions of all frames."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from repshift_cli.models.umt import Block, UmtModel, UmtRetrieval
from repshift_cli.ops.tokens import Sized, mean_by_size
from repshift_cli.planning.layout import Layout, PatchGrid, SiteInfo
from repshift_cli.planning.plan import Plan
from repshift_cli.reduction.families.base import (
    ATTENTION_TENSORS,
    Family,
    Probe,
    Site,
    TensorEdit,
    do_nothing,
    query_and_key,
)
from repshift_cli.reduction.stream import SizedStream, Stream

_EARLY = frozenset({"block_input", "block_output", "attention_update", "attention_query", "attention_key"})


class UmtStream(SizedStream):
    """The tokens and sizes that the blocks pass on, and the last ones of a pass for the mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Tensor | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.sizes = self.normed = None

    def leave(self, value: Sized) -> Sized:
        self.sizes = value.sizes
        return value

    def block_input(self, args: tuple[Any, ...], output: Sized) -> Tensor:
        entered: Tensor = args[0].tokens
        return entered

    def weight(self, mean: Tensor) -> Tensor:
        """`[B, 1, C]`, the mean weighted by size in place of the plain mean."""
        sizes, normed = self.sizes, self.normed
        self.normed = None  # the next mean may be over tokens of another pass
        if sizes is None or normed is None:
            return mean
        return mean_by_size(normed, sizes).unsqueeze(1)

    def __getstate__(self) -> dict[str, Any]:
        # a copy does not take over the tensors of a running pass
        return {**self.__dict__, "sizes": None, "normed": None}


class Umt(Family):
    """The vision encoder of UMT, with any text model."""

    name: ClassVar[str] = "umt"
    covers: ClassVar[str] = "UMT for text-video retrieval and video question answering"
    shows: ClassVar[frozenset[str]] = ATTENTION_TENSORS
    format_version: ClassVar[int] = 3

    def accepts(self, model: nn.Module) -> bool:
        return isinstance(model, UmtModel)

    def layout(self, model: Any) -> Layout:
        return Layout(
            family=self.name,
            prefix_tokens=0,
            patch_tokens=model.vision.tokens,
            class_token=False,
            sites=tuple(SiteInfo(f"blocks.{index}", index) for index in range(len(model.blocks))),
        )

    def sites(self, model: Any) -> list[Site]:
        width = model.vision.width
        channels = {"attention_channels": width, "width": width, "head": width // model.vision.heads}
        return [
            Site(info.name, info.layer, block, _probes(block), {}, **channels, attended=block.attended, early=_EARLY)
            for info, block in zip(self.layout(model).sites, model.blocks, strict=True)
        ]

    def macs(self, model: Any, plan: Plan | None) -> int:
        shape = model.vision
        entering = self.tokens_entering(model, plan)
        early = {site.layer: site.tokens_out for site in plan.sites if site.after == "attention"} if plan else {}
        total = shape.tokens * model.vision_encoder.encoder.patch_embed.proj.weight.numel()
        for layer, tokens in enumerate(entering[:-1]):
            total += tokens * 4 * shape.width**2 + 2 * tokens**2 * shape.width
            total += early.get(layer, tokens) * 2 * shape.width * shape.hidden
        if isinstance(model, UmtRetrieval):
            total += (shape.frames if model.pooling == "frames" else 1) * model.vision_proj.weight.numel()
        return int(total)

    def merge_refusal(self, model: Any, restore: bool = False) -> str | None:
        return None

    def stream(self, model: Any) -> Stream:
        return UmtStream()

    def use_proportional_attention(self, model: Any, stream: Stream) -> tuple[list[TensorEdit], Callable[[], None]]:
        assert isinstance(stream, UmtStream)
        norm = model.vision_encoder.encoder.norm
        edits = [TensorEdit(norm, "output", stream.remember), TensorEdit(model.averaged, "output", stream.weight)]
        return edits, do_nothing

    def output_name(self, model: Any) -> str:
        return "embedding"

    def patch_grid(self, model: Any) -> PatchGrid:
        shape = model.vision
        return PatchGrid(shape.side, shape.side, shape.patch_size, shape.patch_size, shape.frames)

    def after_load(self, model: Any) -> None:
        model.restore_buffers()

    def adapt(self, model: Any) -> Callable[[], None]:
        before = model.pooling
        model.pooling = "all"
        return partial(setattr, model, "pooling", before)


def _probes(block: Block) -> dict[str, Probe]:
    attention = block.attn
    return {
        "block_input": Probe(block.norm1, "input"),
        "attention_update": Probe(attention),
        "mlp_update": Probe(block.mlp),
        "mlp_stream": Probe(block.norm2, "input"),
        **query_and_key(attention.qkv, attention.num_heads, attention.head_dim),
    }
