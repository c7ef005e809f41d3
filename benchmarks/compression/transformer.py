"""A small decoder-only transformer over bytes, pre-normalized, its output tied to no embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Causal self-attention, then a two-layer perceptron, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, states: Tensor) -> Tensor:
        """(N, T, width) to the same."""
        count, length, width = states.shape
        joined = self.query_key_value(self.before_attention(states))
        query, key, value = joined.view(count, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + self.attention_out(attended.transpose(1, 2).reshape(count, length, width))
        return states + self.perceptron(states)


class ByteTransformer(nn.Module):
    """Predicts the next byte at each place.

    Args:
        vocabulary: how many tokens there are; 256 for bytes.
        length: the most tokens of a sequence.
    """

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(length, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.normalization = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 (N, T) to logits (N, T, vocabulary)."""
        states = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.normalization(self.blocks(states)))
