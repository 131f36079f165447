"""Weights of Keras models in ours: convolutions, embeddings, recurrent and dense layers, in their order.

Keras keeps a kernel's channels last, flattens a picture row by row with the channels innermost, and has its
gates in another order. keras itself is needed to read a file, and for nothing else.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interfuse.models.cnn import ConvEncoder

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np

KINDS = {
    "Conv1D": "conv", "Conv2D": "conv", "Conv3D": "conv", "Embedding": "embedding", "SimpleRNN": "rnn",
    "LSTM": "lstm", "GRU": "gru", "Dense": "dense",
}  # fmt: skip
# The place of each of torch's gates among Keras's.
GATES = {"rnn": (0,), "lstm": (0, 1, 2, 3), "gru": (1, 0, 2)}
# What ours compute; a layer that does otherwise has weights that mean something else.
MUST = {
    "conv": {"padding": "valid", "data_format": "channels_last", "activation": "relu", "groups": 1},
    "rnn": {"activation": "tanh", "go_backwards": False},
    "lstm": {"activation": "tanh", "recurrent_activation": "sigmoid", "go_backwards": False},
    "gru": {
        "activation": "tanh", "recurrent_activation": "sigmoid", "go_backwards": False, "reset_after": True
    },
}  # fmt: skip


@dataclass(frozen=True)
class KerasLayer:
    """A layer of Keras: its class, its name, its weights in Keras's order, and what of its config matters."""

    kind: str
    name: str
    weights: Sequence[np.ndarray]
    config: Mapping[str, Any] = field(default_factory=dict)


def load_keras(path: str | pathlib.Path, model: nn.Module) -> nn.Module:
    """Puts the weights of a .keras or .h5 file into the model, and returns it: its `predict` is then Keras's.

    The model must have the same layers, of the same sizes, in the same order.
    """
    try:
        keras = _keras()
    except ImportError as error:
        raise ImportError(
            f"load_keras reads files with keras, which cannot be imported: {error}. "
            "`pip install 'interfuse[keras]'` brings it."
        ) from error
    convert(list(_layers(keras.saving.load_model(path, compile=False))), model)
    return model


def _keras() -> Any:
    """keras, on torch where nobody has chosen: its usual back end may not be installed."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    return keras


def _layers(model: Any) -> Iterator[KerasLayer]:
    for layer in model.layers:
        if getattr(layer, "layers", None):
            yield from _layers(layer)
        elif layer.weights:
            kind = type(layer).__name__
            yield KerasLayer(kind, layer.name, layer.get_weights(), layer.get_config())


@dataclass(frozen=True)
class Place:
    """Where a layer's weights go: a module, and which of its layers, if it has several."""

    kind: str
    name: str
    module: Any
    layer: int = 0
    flattened: tuple[int, ...] | None = None  # (channels, *sizes) of the map that a dense layer's input was


def places(model: nn.Module) -> list[Place]:
    """Every layer of the model, in order."""
    flattened = {
        f"{name}.dense.layers.0".lstrip("."): module.map_shape
        for name, module in model.named_modules()
        if isinstance(module, ConvEncoder)
    }
    found: list[Place] = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.RNNBase):
            kind = module.mode.lower().split("_")[0]
            found += [Place(kind, name, module, layer) for layer in range(module.num_layers)]
        elif isinstance(module, nn.Embedding):
            found.append(Place("embedding", name, module))
        elif isinstance(weight, Tensor) and weight.dim() > 2:
            found.append(Place("conv", name, module))
        elif isinstance(weight, Tensor) and weight.dim() == 2:
            found.append(Place("dense", name, module, flattened=flattened.get(name)))
    return found


def convert(layers: Sequence[KerasLayer], model: nn.Module) -> None:
    """Copies the weights: the first convolution to the first, and so on, kind by kind."""
    unknown = [layer for layer in layers if layer.kind not in KINDS]
    if unknown:
        raise ValueError(
            f"Keras layer {unknown[0].name} is a {unknown[0].kind}, whose weights have no place here; there "
            f"are places for {', '.join(KINDS)}."
        )
    ours = places(model)
    pairs = []
    for kind in dict.fromkeys(KINDS.values()):
        given = [layer for layer in layers if KINDS[layer.kind] == kind]
        mine = [place for place in ours if place.kind == kind]
        if len(given) != len(mine):
            theirs, here = (", ".join(x.name for x in some) or "none" for some in (given, mine))
            raise ValueError(
                f"the Keras model has {len(given)} {kind} layers ({theirs}), and this one has {len(mine)} "
                f"({here})."
            )
        pairs += list(zip(given, mine, strict=True))
    changed = []
    for layer, place in pairs:
        for key, value in MUST.get(place.kind, {}).items():
            if layer.config.get(key, value) != value:
                raise ValueError(
                    f"Keras layer {layer.name} has {key}={layer.config[key]!r}; the layers here compute "
                    f"{value!r}."
                )
        for target, value in _converted(layer, place):
            if target.shape != value.shape:
                raise ValueError(
                    f"Keras layer {layer.name} gives {place.name} weights of shape {tuple(value.shape)}, "
                    f"where {tuple(target.shape)} is wanted. Make the model with the same sizes."
                )
            changed.append((target, value))
    with torch.no_grad():  # only now, when all fit
        for target, value in changed:
            target.copy_(value)


def _converted(layer: KerasLayer, place: Place) -> Iterator[tuple[Tensor, Tensor]]:
    weights = [torch.tensor(array) for array in layer.weights]
    module = place.module
    if place.kind == "embedding":
        yield module.weight, weights[0]
    elif place.kind in GATES:
        yield from _recurrent(weights, place)
    else:
        kernel = weights[0]
        if place.flattened is not None and kernel.shape[0] == torch.Size(place.flattened).numel():
            channels, *sizes = place.flattened
            kernel = kernel.view(*sizes, channels, -1).movedim(-2, 0).reshape(kernel.shape)
        spatial = range(kernel.dim() - 2)
        yield module.weight, kernel.permute(-1, -2, *spatial)  # (..., in, out) to (out, in, ...)
        yield module.bias, weights[1] if len(weights) > 1 else torch.zeros(kernel.shape[-1])


def _recurrent(weights: Sequence[Tensor], place: Place) -> Iterator[tuple[Tensor, Tensor]]:
    order = GATES[place.kind]

    def gates(t: Tensor) -> Tensor:
        """Torch's order of gates along the first dimension."""
        return torch.cat([t.chunk(len(order))[i] for i in order])

    kernel, recurrent = weights[:2]
    biases = torch.zeros(2, kernel.shape[1])
    if len(weights) > 2:  # one bias, or with reset_after one for each product
        biases[: weights[2].dim()] = weights[2]
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    for name, value in zip(names, (kernel.T, recurrent.T, *biases), strict=True):
        yield getattr(place.module, f"{name}_l{place.layer}"), gates(value)
