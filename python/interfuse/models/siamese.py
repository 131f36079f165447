"""Do two inputs of different modalities belong together? One shared encoder says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from interfuse.models.classifier import Encoder, Lengths, Predicting, check_count, lengths_of
from interfuse.models.layers import Layers, chosen

if TYPE_CHECKING:
    from collections.abc import Sequence


class SiameseNetwork(Predicting):
    """Two inputs through one shared encoder, and whether they are the same: logits (batch, 2) of no and yes.

    Modalities differ in shape, so that each input first passes its own module of `encoders` and a dense layer
    to `width` features; what follows, the encoder proper, is shared. For two inputs of one modality give the
    same module twice: its weights are then shared too.
    """

    def __init__(self, encoders: Sequence[Encoder], width: int = 128, layers: str | Layers = "fused") -> None:
        super().__init__()
        if len(encoders) != 2:
            raise ValueError(f"a siamese network compares two inputs; got {len(encoders)} encoders.")
        made = chosen(layers)
        self.encoders = nn.ModuleList(encoders)
        different = encoders[:1] if encoders[0] is encoders[1] else encoders
        adapters = [made.dense([encoder.width], [width], "relu") for encoder in different]
        self.adapters = nn.ModuleList([adapters[0], adapters[-1]])
        self.shared = made.dense([width], [width, width])
        self.same = made.dense([width, width], [width, 2])

    def embed(self, which: int, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(batch, width) of the first (0) or second (1) input: near each other where they belong together."""
        return self.shared(self.adapters[which](self.encoders[which](x, lengths)))

    def forward(self, first: Tensor, second: Tensor, lengths: Lengths = None) -> Tensor:
        check_count(self.encoders, (first, second))
        a, b = (
            self.embed(i, x, n)
            for i, (x, n) in enumerate(zip((first, second), lengths_of(self.encoders, lengths), strict=True))
        )
        return self.same(torch.abs(a - b), a * b)
