"""The image encoder's stack of convolution blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence


def cnn_blocks(in_channels: int = 3, channels: Sequence[int] = (32, 64, 128)) -> nn.Sequential:
    """One block per entry of `channels`: a 3x3 convolution to so many channels, ReLU, 2x2 max pooling."""
    blocks = []
    for before, after in zip([in_channels, *channels], channels, strict=False):
        blocks.append(nn.Sequential(nn.Conv2d(before, after, 3), nn.ReLU(), nn.MaxPool2d(2)))
    return nn.Sequential(*blocks)
