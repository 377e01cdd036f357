"""Vision Mamba: two scans over a sequence with class tokens among the patches.

A scan depends on which tokens there are and on their order, so dropped tokens are removed from the hidden state and
from the residual stream, and the order is kept. The class token stays, at a position that then differs for each image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from repshift_cli.models.vim import CONV_WIDTH, VimStream, VisionMamba
from repshift_cli.ops.tokens import complement, keep_top
from repshift_cli.planning.layout import Layout, SiteInfo
from repshift_cli.planning.plan import Plan, PlanSite
from repshift_cli.reduction.families.base import Family, Probe, Site, weight_count
from repshift_cli.reduction.stream import Reduce, Stream


class _ClassTokensInside(Stream):
    """A `VimStream`: metrics see all tokens, and class tokens are always kept."""

    def __init__(self, class_tokens: int) -> None:
        super().__init__(prefix=0)
        self.class_tokens = class_tokens

    def shape(self, value: VimStream) -> tuple[int, ...]:
        return (value.hidden.shape[1],)

    def block_input(self, args: tuple[Any, ...], output: VimStream) -> Tensor:
        return output.residual

    def block_output(self, output: VimStream) -> Tensor:
        return output.residual + output.hidden

    def carrier(self, output: VimStream) -> Tensor:
        return output.hidden  # the next layer reads hidden + residual, so both have the same gradient

    def choose(self, scores: Tensor, output: VimStream, planned: PlanSite) -> Tensor:
        patches = complement(output.place, scores.shape[1])
        return keep_top(scores.gather(1, patches), planned.tokens_out - self.class_tokens)

    def reduce(self, output: VimStream, keep: Tensor, planned: PlanSite, reduce: Reduce) -> VimStream:
        patches = complement(output.place, planned.tokens_in).gather(1, keep)
        tokens = torch.cat((output.place, patches), dim=1).sort(dim=1).values
        # the new position of a class token is the number of kept tokens before it
        place = (tokens.unsqueeze(1) < output.place.unsqueeze(2)).sum(dim=2)
        return VimStream(reduce(output.hidden, tokens), reduce(output.residual, tokens), place)

    def join(self, outputs: Sequence[VimStream]) -> VimStream:
        return VimStream(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))


class Vim(Family):
    """Vim with a class token in the middle or two around the patches."""

    name: ClassVar[str] = "vim"
    covers: ClassVar[str] = "Vision Mamba (Vim)"
    shows: ClassVar[frozenset[str]] = frozenset({"mixer_update", "mixer_stream"})
    format_version: ClassVar[int] = 2

    def accepts(self, model: nn.Module) -> bool:
        return isinstance(model, VisionMamba)

    def layout(self, model: Any) -> Layout:
        return Layout(
            family=self.name,
            prefix_tokens=model.num_prefix_tokens,
            patch_tokens=model.patch_embed.num_patches,
            class_token=False,
            sites=tuple(SiteInfo(f"layers.{index}", index) for index in range(len(model.layers))),
        )

    def sites(self, model: Any) -> list[Site]:
        missing = {"*": "a state space model has a mixer, and neither attention nor an MLP"}
        return [
            Site(
                name=f"layers.{index}",
                layer=index,
                block=layer,
                probes={"mixer_update": Probe(layer.mixer), "mixer_stream": Probe(layer.norm, "input")},
                missing=missing,
                width=layer.mixer.out_proj.out_features,
            )
            for index, layer in enumerate(model.layers)
        ]

    def stream(self, model: Any) -> Stream:
        return _ClassTokensInside(model.num_prefix_tokens)

    def macs(self, model: Any, plan: Plan | None) -> int:
        patches = model.patch_embed.num_patches * weight_count(model.patch_embed)
        per_token = (weight_count(layer.mixer, nn.Linear) + _scan_macs(layer.mixer) for layer in model.layers)
        return patches + self._over_layers(model, plan, per_token) + weight_count(model.head)

    def scan_macs(self, model: Any, plan: Plan | None) -> int:
        return self._over_layers(model, plan, (_scan_macs(layer.mixer) for layer in model.layers))

    def _over_layers(self, model: Any, plan: Plan | None, per_token: Iterable[int]) -> int:
        return sum(tokens * macs for tokens, macs in zip(self.tokens_entering(model, plan), per_token, strict=False))


def _scan_macs(mixer: Any) -> int:
    """Element-wise products of one token in both directions.

    The causal convolution; `delta A`, `B (delta u)`, `a s` and `C s` for each of the N states of a channel; `delta u`,
    `D u` and the gate for each channel.
    """
    inner = mixer.out_proj.in_features
    return int(2 * inner * (CONV_WIDTH + 4 * mixer.d_state + 3))
