"""Where a Keras model flattens a picture: its channels are innermost there, and outermost in torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from interfuse.models.keras_files import KerasLayer

# Layers that leave the elements where they are.
KEEPS_ORDER = (
    "InputLayer", "Activation", "ReLU", "LeakyReLU", "PReLU", "ELU", "Dropout", "SpatialDropout1D",
    "SpatialDropout2D", "SpatialDropout3D", "GaussianNoise", "GaussianDropout", "AlphaDropout",
    "BatchNormalization", "Rescaling", "Normalization", "Add", "Average", "Maximum", "Multiply",
)  # fmt: skip
KEEPS_CHANNELS = (
    *KEEPS_ORDER, "MaxPooling1D", "MaxPooling2D", "MaxPooling3D", "AveragePooling1D", "AveragePooling2D",
    "AveragePooling3D", "ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D", "Cropping1D", "Cropping2D",
    "Cropping3D", "UpSampling1D", "UpSampling2D", "UpSampling3D",
)  # fmt: skip
MOVES = ("Reshape", "Permute", "Lambda")


class Pictures:
    """Which of a layer's inputs are flattened pictures."""

    def __init__(self, layers: Sequence[KerasLayer]) -> None:
        self._layers = {layer.name: layer for layer in layers}

    def channels_first(self, layer: KerasLayer, weight: Tensor) -> Tensor:
        """The weight with its rows, one for each input, in the order that torch's flattening gives."""
        parts = list(self._parts(layer.sources))
        if not any(channels for channels, _ in parts):
            return weight
        known = [size for _, size in parts if size is not None]
        unknown = len(parts) - len(known)
        if unknown > 1:
            raise ValueError(
                f"Keras layer {layer.name} reads {unknown} inputs whose sizes the file does not tell. Save "
                "the model as .keras, which tells them."
            )
        rest = weight.shape[0] - sum(known)
        result, at = [], 0
        for channels, size in parts:
            rows = weight[at : at + (rest if size is None else size)]
            at += rows.shape[0]
            result.append(
                rows.unflatten(0, (-1, channels)).transpose(0, 1).flatten(0, 1) if channels else rows
            )
        return torch.cat(result)

    def _parts(self, names: Sequence[str]) -> Iterator[tuple[int | None, int | None]]:
        """Of what these layers give, one after the other: the channels, if it is a flattened picture, and the
        size, if it is known."""
        for name in names:
            layer = self._layers[name]
            if layer.kind == "Flatten":
                sizes = None if layer.shape is None else layer.shape[1:]
                known = sizes is not None and None not in sizes
                yield self._channels(layer.sources), math.prod(n or 0 for n in sizes or ()) if known else None
            elif layer.kind == "Concatenate":
                yield from self._parts(layer.sources)
            elif layer.kind in KEEPS_ORDER and layer.sources:
                yield from self._parts(layer.sources[:1])
            elif layer.kind in MOVES and self._channels(layer.sources) is not None:
                raise ValueError(
                    f"behind a picture there is Keras layer {name}, a {layer.kind}: what it makes of "
                    "channels that come first is not known. Flatten can be followed."
                )
            elif layer.kind.startswith("Global"):
                yield None, self._channels(layer.sources)
            elif layer.kind == "Bidirectional":
                yield None, 2 * layer.config["layer"]["config"]["units"]
            else:
                yield None, layer.config.get("units", layer.config.get("output_dim"))

    def _channels(self, names: Sequence[str]) -> int | None:
        """The channels of the picture that these layers give side by side; None where that is no picture."""
        each = [self._channels_of(self._layers[name]) for name in names]
        return None if None in each else sum(n for n in each if n is not None) or None

    def _channels_of(self, layer: KerasLayer) -> int | None:
        if "Conv" in layer.kind:
            filters = layer.config.get("filters")
            return math.prod(layer.weights[0].shape[-2:]) if filters is None else filters
        if layer.kind == "InputLayer" and not layer.sources:
            shape = layer.config.get("batch_shape", layer.config.get("batch_input_shape")) or ()
            sizes: list[int | None] = list(shape)
            return sizes[-1] if len(sizes) > 3 else None
        if layer.kind == "Concatenate":
            return self._channels(layer.sources)
        return self._channels(layer.sources[:1]) if layer.kind in (*KEEPS_CHANNELS, *MOVES) else None
