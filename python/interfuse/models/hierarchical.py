"""Attention within each modality, then across them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from interfuse.models.classifier import Encoder, Lengths, Predicting, tokens_of
from interfuse.models.layers import Layers, chosen

if TYPE_CHECKING:
    from collections.abc import Sequence


class HierarchicalAttentionNetwork(Predicting):
    """Each encoder's tokens (an image's positions, a text's steps) are pooled by an attention of their own;
    the pooled vectors, brought to `width`, by another one across the modalities."""

    def __init__(
        self,
        encoders: Sequence[Encoder],
        num_classes: int,
        width: int = 128,
        layers: str | Layers = "fused",
    ) -> None:
        super().__init__()
        made = chosen(layers)
        self.encoders = nn.ModuleList(encoders)
        widths = [encoder.token_width for encoder in encoders]
        self.within = nn.ModuleList(made.attention_pool(given) for given in widths)
        self.bring = nn.ModuleList(made.dense([given], [width], "tanh") for given in widths)
        self.across = made.attention_pool(width)
        self.dense = made.dense([width], [width, num_classes])

    def forward(self, *inputs: Tensor, lengths: Lengths = None) -> Tensor:
        return self.dense(self._attend(inputs, lengths)[0])

    def weights(self, *inputs: Tensor, lengths: Lengths = None) -> tuple[list[Tensor], Tensor]:
        """What was attended to: (batch, tokens) of each modality, and (batch, modalities)."""
        with torch.no_grad():
            _, within, across = self._attend(inputs, lengths)
        return within, across

    def _attend(self, inputs: Sequence[Tensor], lengths: Lengths) -> tuple[Tensor, list[Tensor], Tensor]:
        tokens, each = tokens_of(self.encoders, inputs, lengths)
        vectors, within = [], []
        for pool, bring, x, n in zip(self.within, self.bring, tokens, each, strict=True):
            pooled, weights = pool(x, n, return_weights=True)
            vectors.append(bring(pooled))
            within.append(weights)
        pooled, across = self.across(torch.stack(vectors, 1), return_weights=True)
        return pooled, within, across
