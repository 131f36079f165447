"""Images and videos: stacks of convolution blocks, in two and three dimensions from one body."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from interfuse.models.classifier import Classifier, Encoder, check_sizes, is_shape, with_head
from interfuse.models.layers import Layers, chosen
from interfuse.torch_state import is_tracing

if TYPE_CHECKING:
    from collections.abc import Sequence

CHANNELS = (32, 64, 128)


def cnn_blocks(
    in_channels: int = 3,
    channels: Sequence[int] = CHANNELS,
    spatial: int = 2,
    layers: str | Layers = "torch",
) -> nn.Sequential:
    """One block per entry of `channels`: a convolution of kernel 3 to so many channels, ReLU, max pooling of
    size 2."""
    widths = zip([in_channels, *channels], channels, strict=False)
    return nn.Sequential(*(chosen(layers).conv(spatial, before, after) for before, after in widths))


def smallest_size(blocks: int) -> int:
    """The least height, width or number of frames of which so many blocks leave something."""
    return 3 * 2**blocks - 2


class ConvEncoder(Encoder):
    """Convolution blocks on images (channels, height, width) or videos (channels, frames, height, width).

    forward gives one vector of `width` features: of a dense layer with ReLU over all that the blocks leave.
    `tokens` gives the blocks' own output, position by position.
    """

    is_sequence = False

    def __init__(
        self,
        input_shape: Sequence[int],
        channels: Sequence[int] = CHANNELS,
        width: int = 512,
        layers: str | Layers = "fused",
    ) -> None:
        super().__init__()
        if not any(is_shape(input_shape, dimensions) for dimensions in (2, 3, 4)):
            raise ValueError(
                "input_shape must be (channels, length), (channels, height, width) or (channels, frames, "
                f"height, width), without the batch; got {input_shape!r}."
            )
        if not channels:
            raise ValueError("channels must name at least one block; got none.")
        for size in (input_shape[0], *channels):
            check_sizes(channels=size)
        check_sizes(width=width)
        spatial, least = len(input_shape) - 1, smallest_size(len(channels))
        if min(input_shape[1:]) < least:
            raise ValueError(
                f"{len(channels)} blocks of a convolution of kernel 3 and pooling by 2 need at least {least} "
                f"elements along every dimension but the first; got input_shape {tuple(input_shape)}. "
                f"The smallest is {(input_shape[0], *(max(n, least) for n in input_shape[1:]))}."
            )
        self.blocks = cnn_blocks(input_shape[0], channels, spatial, layers)
        sizes = list(input_shape[1:])
        for _ in channels:
            sizes = [(n - 2) // 2 for n in sizes]
        self.input_shape = tuple(input_shape)
        self.width, self.token_width = width, channels[-1]
        self.map_shape = (channels[-1], *sizes)  # of what the blocks leave
        self.dense = chosen(layers).dense([math.prod(self.map_shape)], [width], "relu")

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is not None:
            raise ValueError("lengths are for sequences; an image or a video has none.")
        if x.shape[1:] != self.input_shape and not is_tracing():  # in a jit trace sizes are tensors
            wanted = ", ".join(map(str, self.input_shape))
            raise ValueError(
                f"this encoder was made for inputs of shape (batch, {wanted}); got {tuple(x.shape)}."
            )
        return self.dense(self.blocks(x).flatten(1))

    def tokens(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(batch, positions, token_width)."""
        return self.blocks(x).flatten(2).transpose(1, 2)


def cnn(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    channels: Sequence[int] = CHANNELS,
    width: int = 512,
    layers: str | Layers = "fused",
) -> Classifier:
    """Images (channels, height, width): convolution blocks, a dense layer of `width`, the classes."""
    return _conv_classifier("cnn", 3, input_shape, num_classes, channels, width, layers)


def cnn3d(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    channels: Sequence[int] = CHANNELS,
    width: int = 512,
    layers: str | Layers = "fused",
) -> Classifier:
    """Videos (channels, frames, height, width): the blocks of `cnn` in three dimensions."""
    return _conv_classifier("cnn3d", 4, input_shape, num_classes, channels, width, layers)


def _conv_classifier(
    name: str,
    dimensions: int,
    input_shape: Sequence[int],
    num_classes: int,
    channels: Sequence[int],
    width: int,
    layers: str | Layers,
) -> Classifier:
    if not is_shape(input_shape, dimensions):
        raise ValueError(
            f"{name} takes an input_shape of {dimensions} numbers, channels first, without the batch; "
            f"got {input_shape!r}."
        )
    encoder = ConvEncoder(input_shape, channels, width, layers)
    return with_head(encoder, num_classes, layers)
