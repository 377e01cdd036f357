"""The text side of UMT: BERT whose upper layers look at the video, and the decoder of the question answering model.

Embeddings, layers and the prediction head are those of `transformers`; what it has no form for is here: cross-attention
from one layer on, and keys and values of a width of their own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repshift_cli.errors import UsageError

__all__ = ["TextDecoder", "TextEncoder", "TextShape"]

_LAYER_NORM_EPS = 1e-12


@dataclass(frozen=True)
class TextShape:
    """Sizes of a BERT.

    Attributes:
        vocabulary: tokens.
        width: channels.
        depth: layers, those that look at the video included.
        heads: of attention.
        hidden: channels inside the MLP.
        positions: the longest text.
        fusion_layer: the first layer that looks at the video.
        types: token types.
    """

    vocabulary: int = 30522
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 512
    fusion_layer: int = 9
    types: int = 2

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class TextEncoder(nn.Module):
    """BERT without a pooler; from `fusion_layer` on each layer attends to a memory as well.

    Args:
        shape: its sizes.
        memory: channels of what the upper layers attend to.

    Raises:
        UsageError: `transformers` is not installed.
        ValueError: the sizes do not go together.
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

    def forward(self, ids: Tensor, mask: Tensor, memory: Tensor | None = None) -> Tensor:
        """All layers, or without a memory those below the fusion layer.

        Args:
            ids: int64 `[B, L]`.
            mask: `[B, L]`, 1 where there is a token.
            memory: `[B, N, M]`, what the upper layers attend to.

        Returns:
            `[B, L, C]`.
        """
        hidden = self.read(ids, mask)
        return hidden if memory is None else self.fuse(hidden, mask, memory)

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The layers that see the text alone; `[B, L]` twice to `[B, L, C]`."""
        return self._run(self.embeddings(input_ids=ids), mask, slice(0, self.fusion_layer))

    def fuse(self, hidden: Tensor, mask: Tensor, memory: Tensor) -> Tensor:
        """The layers that attend to the memory too.

        Args:
            hidden, mask: `[n, L, C]` and `[n, L]`.
            memory: `[m, N, M]`; the first n / m texts look at the first one, and so on.

        Returns:
            `[n, L, C]`.
        """
        return self._run(hidden, mask, slice(self.fusion_layer, None), memory)

    def _run(self, hidden: Tensor, mask: Tensor, layers: slice, memory: Tensor | None = None) -> Tensor:
        bias = _bias(mask, hidden.dtype)
        for layer in self._layers()[layers]:
            if memory is None:
                hidden = _first(layer(hidden, attention_mask=bias))
            else:
                hidden = _fused(layer, hidden, bias, memory)
        return hidden

    def _layers(self) -> nn.ModuleList:
        layers = self.encoder["layer"]
        assert isinstance(layers, nn.ModuleList)
        return layers


class TextDecoder(nn.Module):
    """A causal BERT over answers that attends to the states of the question, with a language model head.

    Args:
        shape: sizes of the encoder; the decoder has as many layers as that has from the fusion layer on.

    Raises:
        UsageError: `transformers` is not installed.
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
        """Logits of the next token at each place.

        Args:
            ids: int64 `[n, A]`, answers.
            mask: `[n, A]`, 1 where there is a token.
            states: `[n, L, C]` of the questions.
            states_mask: `[n, L]`.

        Returns:
            `[n, A, vocabulary]`.
        """
        hidden: Tensor = self.bert["embeddings"](input_ids=ids)
        bias, length = _bias(mask, hidden.dtype), ids.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        bias = bias.masked_fill(future, torch.finfo(hidden.dtype).min)
        seen = _bias(states_mask, hidden.dtype)
        for layer in self._layers():
            hidden = _first(
                layer(hidden, attention_mask=bias, encoder_hidden_states=states, encoder_attention_mask=seen)
            )
        logits: Tensor = self.cls(hidden)
        return logits

    def _layers(self) -> nn.ModuleList:
        encoder = self.bert["encoder"]
        assert isinstance(encoder, nn.ModuleDict)
        layers = encoder["layer"]
        assert isinstance(layers, nn.ModuleList)
        return layers


def _fused(layer: Any, hidden: Tensor, bias: Tensor, memory: Tensor) -> Tensor:
    """A layer with cross-attention, its parts called one by one.

    Texts that look at the same memory do so as one long query, since keys and values of a video are most of the work.
    """
    attended = _first(layer.attention(hidden, attention_mask=bias))
    together = attended.reshape(memory.shape[0], -1, attended.shape[-1])
    seen = _first(layer.crossattention(together, encoder_hidden_states=memory)).reshape(attended.shape)
    found: Tensor = layer.feed_forward_chunk(seen)
    return found


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds: 0 at tokens, the lowest number elsewhere; `[B, L]` to `[B, 1, 1, L]`."""
    return (1.0 - mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min


def _first(output: Any) -> Tensor:
    """Some versions of transformers return the hidden states alone, others a tuple."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _transformers_bert() -> Any:
    try:
        from transformers.models.bert import modeling_bert
    except ImportError as error:
        raise UsageError(
            "UMT needs the package transformers for its text side",
            "Install it with: pip install 'repshift-cli[video]'",
        ) from error
    return modeling_bert


def _check(shape: TextShape) -> None:
    if not 0 < shape.fusion_layer < shape.depth:
        raise ValueError(f"fusion layer {shape.fusion_layer} is not among the {shape.depth} layers")
    if shape.width % shape.heads:
        raise ValueError(f"{shape.heads} heads do not divide a width of {shape.width}")


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
        is_decoder=crossing,  # without it transformers allows no cross-attention; what is causal is up to our masks
        add_cross_attention=crossing,
    )
    configuration._attn_implementation = "sdpa"
    return configuration


def _embeddings(parts: Any, configuration: Any) -> nn.Module:
    """With `position_ids` among the tensors that are stored, as the official checkpoints have it."""
    embeddings: nn.Module = parts.BertEmbeddings(configuration)
    places = torch.arange(configuration.max_position_embeddings).unsqueeze(0)
    embeddings.register_buffer("position_ids", places, persistent=True)
    return embeddings


def _crossing_layer(parts: Any, configuration: Any, memory: int) -> nn.Module:
    layer: Any = parts.BertLayer(configuration)
    if memory != configuration.hidden_size:
        attention = layer.crossattention.self
        attention.key = nn.Linear(memory, configuration.hidden_size)
        attention.value = nn.Linear(memory, configuration.hidden_size)
    found: nn.Module = layer
    return found
