"""Build a small decoder-only transformer from plain modules of torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Block(nn.Module):
    """Apply causal self-attention and a perceptron, each after a layer norm and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, input: Tensor) -> Tensor:
        split = self.qkv(self.norm1(input)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each [N, heads, length, width / heads]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = input + self.projection(mixed.transpose(1, 2).flatten(2))
        return hidden + self.down(F.gelu(self.up(self.norm2(hidden))))


class GPT(nn.Module):
    """Build a GPT: ids [N, length] in, logits [N, length, classes] of the next ids out.

    `shape` is (context,), the most ids at once. The embeddings are no products and stay dense when
    the model is sparsified; the last layer has weights of its own, so it gets a mask.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        layers: int = 4,
        width: int = 128,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(classes, width)
        self.positions = nn.Embedding(shape[0], width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(positions))))
