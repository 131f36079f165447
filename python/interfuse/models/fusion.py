"""Several modalities together: early, late and attention fusion of their features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interfuse.models.classifier import Encoder, Lengths, Predicting, check_sizes, features_of, is_shape
from interfuse.models.cnn import CHANNELS, ConvEncoder
from interfuse.models.layers import Layers, chosen
from interfuse.models.recurrent import SequenceEncoder

if TYPE_CHECKING:
    from collections.abc import Sequence

KINDS = ("early", "late", "attention")


class EarlyHead(nn.Module):
    """g(W [x; y; ...] + b) and the classes: one dense layer sees all features together."""

    def __init__(self, widths: Sequence[int], num_classes: int, width: int, layers: Layers) -> None:
        super().__init__()
        self.dense = layers.dense(widths, [width, num_classes])

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.dense(*features)


class LateHead(nn.Module):
    """Each modality decides for itself; the logits are averaged. It cannot learn what only shows in two
    modalities together."""

    def __init__(self, widths: Sequence[int], num_classes: int, width: int, layers: Layers) -> None:
        super().__init__()
        self.each = nn.ModuleList(layers.dense([given], [width, num_classes]) for given in widths)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.stack([head(x) for head, x in zip(self.each, features, strict=True)]).mean(0)


class AttentionHead(nn.Module):
    """Every modality becomes one token of `width`; an attention over the tokens weighs them."""

    def __init__(self, widths: Sequence[int], num_classes: int, width: int, layers: Layers) -> None:
        super().__init__()
        self.each = nn.ModuleList(layers.dense([given], [width], "tanh") for given in widths)
        self.pool = layers.attention_pool(width)
        self.dense = layers.dense([width], [width, num_classes])

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        tokens = torch.stack([layer(x) for layer, x in zip(self.each, features, strict=True)], 1)
        return self.dense(self.pool(tokens))


def fusion_head(
    kind: str, widths: Sequence[int], num_classes: int, width: int, layers: str | Layers
) -> nn.Module:
    """Called with a list of (batch, widths[i]) features; gives logits."""
    check_sizes(num_classes=num_classes, width=width)
    heads: dict[str, Any] = {"early": EarlyHead, "late": LateHead, "attention": AttentionHead}
    if kind not in heads:
        raise ValueError(f"fusion must be one of {', '.join(KINDS)}; got {kind!r}.")
    return heads[kind](widths, num_classes, width, chosen(layers))


class Fusion(Predicting):
    """An encoder for each modality, and a head that fuses their features."""

    def __init__(
        self,
        encoders: Sequence[Encoder],
        num_classes: int,
        fusion: str = "early",
        width: int = 512,
        layers: str | Layers = "fused",
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        widths = [encoder.width for encoder in encoders]
        self.head = fusion_head(fusion, widths, num_classes, width, layers)

    def forward(self, *inputs: Tensor, lengths: Lengths = None) -> Tensor:
        """Logits (batch, num_classes) of one input for each encoder.

        lengths: of the sequences among them: one tensor where there is one, else one for each.
        """
        return self.head(features_of(self.encoders, inputs, lengths))


def image_text_fusion(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    vocabulary: int = 10_000,
    embedding: int = 64,
    hidden: int = 128,
    num_layers: int = 2,
    cell: str = "lstm",
    channels: Sequence[int] = CHANNELS,
    width: int = 512,
    fusion: str = "early",
    layers: str | Layers = "fused",
) -> Fusion:
    """g(W [CNN(image); RNN(text)] + b): called with images of input_shape (channels, height, width) and token
    ids (batch, steps), of any number of steps."""
    if not is_shape(input_shape, 3):
        raise ValueError(
            "image_text_fusion takes the images' shape (channels, height, width) without the batch; got "
            f"{input_shape!r}."
        )
    encoders = [
        ConvEncoder(input_shape, channels, width, layers),
        SequenceEncoder(embedding, hidden, num_layers, vocabulary, cell, layers),
    ]
    return Fusion(encoders, num_classes, fusion, width, layers)


def video_audio_fusion(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    audio_features: int = 40,
    hidden: int = 128,
    num_layers: int = 2,
    cell: str = "lstm",
    channels: Sequence[int] = CHANNELS,
    width: int = 512,
    fusion: str = "early",
    layers: str | Layers = "fused",
) -> Fusion:
    """g(W [3D-CNN(video); LSTM(audio)] + b): called with videos of input_shape (channels, frames, height,
    width) and audio (batch, steps, audio_features), of any number of steps."""
    if not is_shape(input_shape, 4):
        raise ValueError(
            "video_audio_fusion takes the videos' shape (channels, frames, height, width) without the batch; "
            f"got {input_shape!r}."
        )
    encoders = [
        ConvEncoder(input_shape, channels, width, layers),
        SequenceEncoder(audio_features, hidden, num_layers, None, cell, layers),
    ]
    return Fusion(encoders, num_classes, fusion, width, layers)
