"""Each modality attends to the others."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from interfuse.models.classifier import Encoder, Lengths, Predicting, tokens_of
from interfuse.models.layers import Layers, chosen

if TYPE_CHECKING:
    from collections.abc import Sequence


def positions(steps: int, width: int, like: Tensor) -> Tensor:
    """(steps, width) of sines and cosines, which tell any number of places apart."""
    place = torch.arange(steps, device=like.device, dtype=torch.float32).unsqueeze(1)
    rate = torch.exp(torch.arange(0, width, 2, device=like.device) * (-math.log(10_000.0) / width))
    both = torch.stack([torch.sin(place * rate), torch.cos(place * rate)], 2)
    return both.flatten(1)[:, :width].to(like.dtype)


class CrossModalBlock(nn.Module):
    """Every modality attends to each of the others; then a feed-forward layer of its own. Both add to what
    comes in."""

    def __init__(self, modalities: int, width: int, heads: int, layers: Layers) -> None:
        super().__init__()
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(modalities))
        self.attention = nn.ModuleDict(
            {
                f"{i}_to_{j}": layers.attention(width, width, heads)
                for i in range(modalities)
                for j in range(modalities)
                if i != j
            }
        )
        self.forward_norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(modalities))
        self.feed_forward = nn.ModuleList(
            layers.dense([width], [4 * width, width]) for _ in range(modalities)
        )

    def forward(self, tokens: Sequence[Tensor], lengths: Sequence[Tensor | None]) -> list[Tensor]:
        normed = [norm(x) for norm, x in zip(self.norm, tokens, strict=True)]
        result = []
        for i, x in enumerate(tokens):
            for j, context in enumerate(normed):
                if i != j:
                    x = x + self.attention[f"{i}_to_{j}"](normed[i], context, context_lengths=lengths[j])  # noqa: PLW2901
            result.append(x + self.feed_forward[i](self.forward_norm[i](x)))
        return result


class CrossModalTransformer(Predicting):
    """Tokens of each encoder, embedded in `width` with their positions, through `depth` blocks in which each
    modality attends to the others; then each modality's tokens are pooled by attention, and one dense layer
    sees all."""

    def __init__(
        self,
        encoders: Sequence[Encoder],
        num_classes: int,
        width: int = 128,
        heads: int = 4,
        depth: int = 2,
        layers: str | Layers = "fused",
    ) -> None:
        super().__init__()
        if len(encoders) < 2:
            raise ValueError(f"attention across modalities needs at least two encoders; got {len(encoders)}.")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads; got {width} and {heads}.")
        made = chosen(layers)
        self.width = width
        self.encoders = nn.ModuleList(encoders)
        self.embed = nn.ModuleList(made.dense([encoder.token_width], [width]) for encoder in encoders)
        self.blocks = nn.ModuleList(CrossModalBlock(len(encoders), width, heads, made) for _ in range(depth))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in encoders)
        self.pool = nn.ModuleList(made.attention_pool(width) for _ in encoders)
        self.dense = made.dense([width] * len(encoders), [width, num_classes])

    def forward(self, *inputs: Tensor, lengths: Lengths = None) -> Tensor:
        given, each = tokens_of(self.encoders, inputs, lengths)
        tokens = []
        for embed, x in zip(self.embed, given, strict=True):
            embedded = embed(x)
            tokens.append(embedded + positions(embedded.shape[1], self.width, embedded))
        for block in self.blocks:
            tokens = block(tokens, each)
        pooled = [
            pool(norm(x), n) for pool, norm, x, n in zip(self.pool, self.norm, tokens, each, strict=True)
        ]
        return self.dense(*pooled)
