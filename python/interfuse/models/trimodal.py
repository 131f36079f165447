"""Image, text and audio together, with metadata: where, what about, and when."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from interfuse.models.classifier import Encoder, Lengths, Predicting, features_of
from interfuse.models.cnn import CHANNELS, ConvEncoder
from interfuse.models.fusion import fusion_head
from interfuse.models.layers import Layers, chosen
from interfuse.models.recurrent import SequenceEncoder

if TYPE_CHECKING:
    from collections.abc import Sequence

WAVES = 4  # of the time, each of half the period of the one before


class MetadataEncoder(nn.Module):
    """One vector of `width` features of a position, a category and a time; those not given are left out.

    position: (batch, positions) floats. semantics: (batch,) int64 category. time: (batch,) floats in periods
    (of a day, say): encoded as sines and cosines, so that a period's end is near the start of the next.
    """

    def __init__(self, positions: int, categories: int, width: int, layers: Layers) -> None:
        super().__init__()
        self.positions, self.width = positions, width
        self.category = nn.Embedding(categories, width)
        self.dense = layers.dense([positions, width, 2 * WAVES], [width], "relu")
        self.register_buffer("waves", 2 * math.pi * 2.0 ** torch.arange(WAVES), persistent=False)

    def forward(self, position: Tensor | None, semantics: Tensor | None, time: Tensor | None) -> Tensor:
        batch = next(t.shape[0] for t in (position, semantics, time) if t is not None)
        like = self.category.weight
        if position is None:
            position = like.new_zeros(batch, self.positions)
        about = like.new_zeros(batch, self.width) if semantics is None else self.category(semantics)
        if time is None:
            when = like.new_zeros(batch, 2 * WAVES)
        else:
            phase = time.unsqueeze(1).to(like.dtype) * self.get_buffer("waves")
            when = torch.cat([phase.sin(), phase.cos()], 1)
        return self.dense(position, about, when)


class TriModalFusion(Predicting):
    """Images, token ids and audio features, with optional metadata as a fourth source of features.

    Args:
        image_shape: (channels, height, width).
        num_classes: of the output.
        vocabulary, embedding: of the text.
        audio_features: elements of each step of audio.
        positions: numbers of a position; categories: of the metadata's semantics. 0 positions: no metadata.
        fusion: "early", "late" or "attention".
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        vocabulary: int = 10_000,
        embedding: int = 64,
        audio_features: int = 40,
        positions: int = 2,
        categories: int = 16,
        hidden: int = 128,
        num_layers: int = 2,
        cell: str = "lstm",
        channels: Sequence[int] = CHANNELS,
        width: int = 512,
        fusion: str = "early",
        layers: str | Layers = "fused",
    ) -> None:
        super().__init__()
        encoders: list[Encoder] = [
            ConvEncoder(image_shape, channels, width, layers),
            SequenceEncoder(embedding, hidden, num_layers, vocabulary, cell, layers),
            SequenceEncoder(audio_features, hidden, num_layers, None, cell, layers),
        ]
        self.encoders = nn.ModuleList(encoders)
        widths = [encoder.width for encoder in encoders]
        self.metadata = None
        if positions:
            self.metadata = MetadataEncoder(positions, categories, hidden, chosen(layers))
            widths.append(hidden)
        self.head = fusion_head(fusion, widths, num_classes, width, layers)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        audio: Tensor,
        position: Tensor | None = None,
        semantics: Tensor | None = None,
        time: Tensor | None = None,
        lengths: Lengths = None,
    ) -> Tensor:
        """Logits; `lengths` are those of text and audio, either of which may be None."""
        features = features_of(self.encoders, (image, text, audio), lengths)
        given = any(t is not None for t in (position, semantics, time))
        if self.metadata is None and given:
            raise ValueError("this model was made without metadata (positions=0), and is given some.")
        if self.metadata is not None:
            if given:
                features.append(self.metadata(position, semantics, time))
            else:
                features.append(image.new_zeros(image.shape[0], self.metadata.width))
        return self.head(features)
