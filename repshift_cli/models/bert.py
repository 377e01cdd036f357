"""The text encoder of UMT, a BERT whose upper layers attend to the video, and its decoder for question answering.

Embeddings, layers and the prediction head are those of `transformers`. Added here are cross-attention from one layer
on, and keys and values of another width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repshift_cli.errors import UsageError

_LAYER_NORM_EPS = 1e-12


@dataclass(frozen=True)
class TextShape:
    """Sizes of a BERT.

    Attributes:
        hidden: channels inside the MLP.
        positions: tokens of the longest text.
        fusion_layer: the first layer with cross-attention to the video.
    """

    vocabulary: int = 30522
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 512
    fusion_layer: int = 9
    types: int = 2


class TextEncoder(nn.Module):
    """BERT without a pooler; from `fusion_layer` on, layers also attend to a memory (the tokens of a video).

    `memory` is the channels of the memory. Raises UsageError without `transformers`, ValueError for invalid sizes.
    """

    def __init__(self, shape: TextShape, memory: int) -> None:
        super().__init__()
        parts = _transformers_bert()
        _check(shape)
        plain, crossing = (_configuration(shape, crossing) for crossing in (False, True))
        self.fusion_layer = shape.fusion_layer
        self.embeddings = _embeddings(parts, plain)
        layers = [
            parts.BertLayer(plain) if index < shape.fusion_layer else _crossing_layer(parts, crossing, memory)
            for index in range(shape.depth)
        ]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, ids: Tensor, mask: Tensor, memory: Tensor) -> Tensor:
        """All layers: int64 `[B, L]`, its mask (1 at tokens) and `[B, N, M]` to `[B, L, C]`."""
        return self.fuse(self.read(ids, mask), mask, memory)

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The layers below `fusion_layer`: int64 `[B, L]` and its mask to `[B, L, C]`."""
        hidden: Tensor = self.embeddings(input_ids=ids)
        bias = _bias(mask, hidden.dtype)
        for layer in _layers(self.encoder)[: self.fusion_layer]:
            hidden = _hidden(layer(hidden, attention_mask=bias))
        return hidden

    def fuse(self, hidden: Tensor, mask: Tensor, memory: Tensor) -> Tensor:
        """The layers from `fusion_layer` on: `[n, L, C]`, its mask and `memory` `[m, N, M]` to `[n, L, C]`.

        The first n / m texts attend to the first memory, and so on.
        """
        bias = _bias(mask, hidden.dtype)
        for layer in _layers(self.encoder)[self.fusion_layer :]:
            attended = _hidden(layer.attention(hidden, attention_mask=bias))
            # texts with the same memory form one long query: keys and values of a video are most of the work
            query = attended.reshape(memory.shape[0], -1, attended.shape[-1])
            crossed = _hidden(layer.crossattention(query, encoder_hidden_states=memory)).reshape(attended.shape)
            hidden = layer.feed_forward_chunk(crossed)
        return hidden


class TextDecoder(nn.Module):
    """A causal BERT over answers that attends to the hidden states of the question, with a language model head.

    It has as many layers as the encoder of `shape` from `fusion_layer` on. Raises UsageError without `transformers`.
    """

    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        parts = _transformers_bert()
        configuration = _configuration(shape, crossing=True)
        count = shape.depth - shape.fusion_layer
        layers = nn.ModuleList(_crossing_layer(parts, configuration, shape.width) for _ in range(count))
        self.bert = nn.ModuleDict(
            {"embeddings": _embeddings(parts, configuration), "encoder": nn.ModuleDict({"layer": layers})}
        )
        self.cls = parts.BertOnlyMLMHead(configuration)

    def forward(self, ids: Tensor, mask: Tensor, states: Tensor, states_mask: Tensor) -> Tensor:
        """Logits of the next token at each position, `[n, A, vocabulary]`.

        Args:
            ids, mask: answers, int64 `[n, A]`, and `[n, A]`, 1 at tokens.
            states, states_mask: of the questions, `[n, L, C]` and `[n, L]`.
        """
        hidden: Tensor = self.bert["embeddings"](input_ids=ids)
        bias, length = _bias(mask, hidden.dtype), ids.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        bias = bias.masked_fill(future, torch.finfo(hidden.dtype).min)
        states_bias = _bias(states_mask, hidden.dtype)
        for layer in _layers(self.bert["encoder"]):
            output = layer(
                hidden, attention_mask=bias, encoder_hidden_states=states, encoder_attention_mask=states_bias
            )
            hidden = _hidden(output)
        logits: Tensor = self.cls(hidden)
        return logits


def _layers(encoder: Any) -> Any:
    return encoder["layer"]


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The attention bias, 0 at tokens and the lowest number elsewhere: `[B, L]` to `[B, 1, 1, L]`."""
    return (1.0 - mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min


def _hidden(output: Any) -> Tensor:
    """Some versions of transformers return the hidden states, others a tuple that starts with them."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _transformers_bert() -> Any:
    try:
        from transformers.models.bert import modeling_bert
    except ImportError as error:
        raise UsageError(
            "UMT needs the package transformers for its text encoder",
            "Install it with: pip install 'repshift-cli[video]'",
        ) from error
    return modeling_bert


def _check(shape: TextShape) -> None:
    if not 0 < shape.fusion_layer < shape.depth:
        raise ValueError(f"invalid fusion_layer={shape.fusion_layer}: must be between 0 and depth={shape.depth}")
    if shape.width % shape.heads:
        raise ValueError(f"invalid heads={shape.heads}: must divide width={shape.width}")


def _configuration(shape: TextShape, crossing: bool) -> Any:
    from transformers import BertConfig

    configuration = BertConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=shape.hidden,
        max_position_embeddings=shape.positions,
        type_vocab_size=shape.types,
        layer_norm_eps=_LAYER_NORM_EPS,
        is_decoder=crossing,  # transformers needs it for cross-attention; the causal mask is ours
        add_cross_attention=crossing,
    )
    configuration._attn_implementation = "sdpa"
    return configuration


def _embeddings(parts: Any, configuration: Any) -> nn.Module:
    """BERT's embeddings; `position_ids` is stored in the state dict, as in the official checkpoints."""
    embeddings: nn.Module = parts.BertEmbeddings(configuration)
    positions = torch.arange(configuration.max_position_embeddings).unsqueeze(0)
    embeddings.register_buffer("position_ids", positions, persistent=True)
    return embeddings


def _crossing_layer(parts: Any, configuration: Any, memory: int) -> Any:
    """A layer with cross-attention to a memory of `memory` channels."""
    layer = parts.BertLayer(configuration)
    if memory != configuration.hidden_size:
        attention = layer.crossattention.self
        attention.key = nn.Linear(memory, configuration.hidden_size)
        attention.value = nn.Linear(memory, configuration.hidden_size)
    return layer
