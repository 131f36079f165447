"""Weights of Keras models in torch's: convolutions, embeddings, recurrent and dense layers, in their order.

Keras keeps a kernel's channels last, flattens a picture row by row with the channels innermost, and has its
gates in another order. What a file tells of the computation is compared with what the modules compute.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interfuse.models.classifier import Predicting
from interfuse.models.keras_chains import BATCH_NORMS, one_for_each, ours_after, same_chain, theirs_after
from interfuse.models.keras_files import KerasLayer, read
from interfuse.models.keras_maps import Pictures

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Iterator, Sequence

KINDS = {
    "Conv1D": "conv", "Conv2D": "conv", "Conv3D": "conv",
    "DepthwiseConv1D": "conv", "DepthwiseConv2D": "conv",
    "BatchNormalization": "batch norm", "LayerNormalization": "layer norm", "Embedding": "embedding",
    "SimpleRNN": "rnn", "LSTM": "lstm", "GRU": "gru", "Dense": "dense",
}  # fmt: skip
WRAPPERS = ("Bidirectional", "TimeDistributed")
# The place of each of torch's gates among Keras's.
GATES = {"rnn": (0,), "lstm": (0, 1, 2, 3), "gru": (1, 0, 2)}
# What torch's layers compute; a layer that does otherwise has weights that mean something else.
MUST: dict[str, dict[str, Any]] = {
    "conv": {"data_format": "channels_last"},
    "rnn": {"go_backwards": False},
    "lstm": {"activation": "tanh", "recurrent_activation": "sigmoid", "go_backwards": False},
    "gru": {
        "activation": "tanh", "recurrent_activation": "sigmoid", "go_backwards": False, "reset_after": True
    },
}  # fmt: skip


def load_keras(path: str | pathlib.Path, model: nn.Module) -> nn.Module:
    """Puts the weights of a .keras or .h5 file into the model, and returns it: its output is then Keras's;
    of a model of interfuse.models, whose forward gives logits, that of `predict`.

    The model must have the same layers, of the same sizes, in the same order. Its pictures have the channels
    first.
    """
    convert(read(path), model)
    return model


# What models of interfuse.models compute besides, or leave out without a difference.
KNOWN = (
    "InputLayer", "Flatten", "Concatenate", "Activation", "ReLU", "LeakyReLU", "Softmax", "NotEqual",
    *(f"{kind}Pooling{n}D" for kind in ("Max", "Average") for n in (1, 2, 3)),
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a layer's weights go: a module, and which of its layers, if it has several."""

    kind: str
    name: str
    module: Any
    layer: int = 0


def places(model: nn.Module) -> list[Place]:
    """Every layer of the model, in order."""
    found: list[Place] = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.RNNBase):
            kind = module.mode.lower().split("_")[0]
            found += [Place(kind, name, module, layer) for layer in range(module.num_layers)]
        elif isinstance(module, nn.Embedding):
            found.append(Place("embedding", name, module))
        elif isinstance(module, BATCH_NORMS):
            found.append(Place("batch norm", name, module))
        elif isinstance(module, nn.LayerNorm):
            found.append(Place("layer norm", name, module))
        elif isinstance(weight, Tensor) and hasattr(module, "dilation"):
            found.append(
                Place("transposed conv" if getattr(module, "transposed", False) else "conv", name, module)
            )
        elif isinstance(weight, Tensor) and hasattr(module, "in_features"):
            found.append(Place("dense", name, module))
    return found


def convert(layers: Sequence[KerasLayer], model: nn.Module) -> None:
    """Copies the weights: the first convolution to the first, and so on, kind by kind."""
    given = [_unwrapped(layer) for layer in layers if layer.weights or layer.kind in KINDS]
    ours = places(model)
    pairs: list[tuple[KerasLayer, Place]] = []
    for kind in dict.fromkeys([*KINDS.values(), *(place.kind for place in ours)]):
        theirs = [layer for layer in given if KINDS[layer.kind] == kind]
        mine = [place for place in ours if place.kind == kind]
        if len(theirs) != len(mine):
            names, here = (
                ", ".join(x.name or "the model itself" for x in some) or "none" for some in (theirs, mine)
            )
            raise ValueError(
                f"the Keras model has {len(theirs)} {kind} layers ({names}), and this one has "
                f"{len(mine)} ({here})."
            )
        pairs += list(zip(theirs, mine, strict=True))
    foreign = [x for x in layers if not x.weights and x.kind not in KNOWN and "Dropout" not in x.kind]
    if foreign and isinstance(model, Predicting):
        raise ValueError(
            f"Keras layer {foreign[0].name} is a {foreign[0].kind}, which this model does not compute. If it "
            "stands at the input, leave it out of the Keras model and apply it before."
        )
    pictures = Pictures(layers)
    changed: list[tuple[Tensor, Tensor]] = []
    for layer, place in pairs:
        _check(layer, place, layers, model)
        for target, value in _converted(layer, place, pictures):
            if target.shape != value.shape:
                raise ValueError(
                    f"Keras layer {layer.name} gives {place.name} weights of shape {tuple(value.shape)}, "
                    f"where {tuple(target.shape)} is wanted. Make the model with the same sizes."
                )
            changed.append((target, value))
    known = {id(target) for target, _ in changed}
    left = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
    if left:
        raise ValueError(
            f"the Keras model has nothing for {left[0]}"
            + (f" and {len(left) - 1} more" if len(left) > 1 else "")
            + ": its outputs would not be Keras's."
        )
    with torch.no_grad():  # only now, when all fit
        for target, value in changed:
            target.copy_(value)


def _unwrapped(layer: KerasLayer) -> KerasLayer:
    """The layer itself; of a Bidirectional the one inside, with the weights of both directions."""
    kind, config = layer.kind, layer.config
    if kind == "Bidirectional":
        inside = config["layer"]
        if config.get("merge_mode", "concat") != "concat":
            raise ValueError(
                f"Keras layer {layer.name} has merge_mode={config['merge_mode']!r}; the layers here put both "
                "directions side by side, 'concat'."
            )
        kind, config = inside["class_name"], {**inside["config"], "directions": 2}
    if kind not in KINDS:
        raise ValueError(
            f"Keras layer {layer.name} is a {kind}, whose weights have no place here; there are places for "
            f"{', '.join(KINDS)}, also in {' and '.join(WRAPPERS)}."
        )
    return replace(layer, kind=kind, config=config)


def _refuse(layer: KerasLayer, what: str, theirs: Any, place: Place, ours: Any) -> ValueError:
    return ValueError(
        f"Keras layer {layer.name} has {what}={theirs!r}; {place.name or 'the model'} computes {ours!r}."
    )


def _check(layer: KerasLayer, place: Place, layers: Sequence[KerasLayer], model: nn.Module) -> None:
    """That the module computes what the layer did, as far as its settings tell."""
    config, module = layer.config, place.module
    for key, value in MUST.get(place.kind, {}).items():
        if config.get(key, value) != value:
            raise _refuse(layer, key, config[key], place, value)
    if place.kind in GATES:
        directions = 2 if module.bidirectional else 1
        if config.get("directions", 1) != directions:
            raise _refuse(layer, "directions", config.get("directions", 1), place, directions)
        if place.kind == "rnn" and config.get("activation", "tanh") != module.nonlinearity:
            raise _refuse(layer, "activation", config["activation"], place, module.nonlinearity)
    elif place.kind == "conv":
        _check_convolution(layer, place)
    elif place.kind.endswith("norm"):
        if config.get("epsilon", 1e-3) != module.eps:
            raise _refuse(layer, "epsilon", config.get("epsilon", 1e-3), place, module.eps)
        axis = config.get("axis", -1)
        if (
            axis not in (-1, [-1])
            and layer.shape is not None
            and axis not in (n := len(layer.shape) - 1, [n])
        ):
            raise _refuse(layer, "axis", axis, place, -1)
    if place.kind in ("conv", "dense"):
        theirs, mine = theirs_after(layer, layers), ours_after(place.module, model)
        if isinstance(model, Predicting):
            mine = replace(mine, complete=True)
            if theirs.steps == ("softmax",):  # which `predict` adds
                theirs = replace(theirs, steps=())
        if not same_chain(theirs, mine):
            raise ValueError(
                f"behind Keras layer {layer.name} there is {theirs}; behind {place.name or 'the model'} "
                f"there is {mine}."
            )


def _check_convolution(layer: KerasLayer, place: Place) -> None:
    config, module = layer.config, place.module
    spatial = module.weight.dim() - 2
    each = partial(one_for_each, spatial)
    ours = {"strides": each(module.stride), "dilation_rate": each(module.dilation)}
    for key, value in ours.items():
        given = each(config.get(key, 1))
        if len(given) == spatial and given != value:
            raise _refuse(layer, key, given, place, value)
    groups = config.get("groups", 1)
    if not layer.kind.startswith("Depthwise") and groups != module.groups:
        raise _refuse(layer, "groups", groups, place, module.groups)
    kernel, dilation = each(module.kernel_size), ours["dilation_rate"]
    padding = config.get("padding", "valid")
    if isinstance(module.padding, str):
        found = module.padding
    elif not any(each(module.padding)):
        found = "valid"
    else:
        twice = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        same = [2 * p for p in each(module.padding)] == twice and set(ours["strides"]) == {1}
        found = "same" if same else module.padding
    if found != padding and (padding, set(kernel)) != ("same", {1}):
        raise _refuse(layer, "padding", padding, place, found)


def _converted(layer: KerasLayer, place: Place, pictures: Pictures) -> Iterator[tuple[Tensor, Tensor]]:
    weights = [torch.tensor(array) for array in layer.weights]
    module = place.module
    if place.kind == "embedding":
        yield module.weight, weights[0]
    elif place.kind in GATES:
        yield from _recurrent(layer, weights, place, pictures)
    elif place.kind.endswith("norm"):
        yield from _norm(layer, weights, module, pictures)
    else:
        kernel = weights[0]
        if place.kind == "dense":
            kernel = pictures.channels_first(layer, kernel)
        spatial = range(kernel.dim() - 2)
        if layer.kind.startswith("Depthwise"):  # (..., in, multiplier): one group for each channel
            value = kernel.permute(-2, -1, *spatial).flatten(0, 1).unsqueeze(1)
        else:
            value = kernel.permute(-1, -2, *spatial)  # (..., in, out) to (out, in, ...)
        yield module.weight, value
        yield from _bias(layer, weights[1:], module, value.shape[0])


def _bias(
    layer: KerasLayer, given: Sequence[Tensor], module: Any, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    if module.bias is not None:
        yield module.bias, given[0] if given else torch.zeros(size)
    elif given:
        raise ValueError(f"Keras layer {layer.name} has a bias, and the module for it was made without one.")


def _norm(
    layer: KerasLayer, weights: Sequence[Tensor], module: Any, pictures: Pictures
) -> Iterator[tuple[Tensor, Tensor]]:
    left = [pictures.channels_first(layer, t) for t in weights]
    statistics = [left.pop(-2), left.pop()] if layer.kind == "BatchNormalization" else []
    scale = [left.pop(0)] if layer.config.get("scale", True) else []
    size = (statistics + scale + left)[0].numel() if statistics + scale + left else module.weight.numel()
    if module.weight is not None:
        yield module.weight, scale[0] if scale else torch.ones(size)
    elif scale:
        raise ValueError(f"Keras layer {layer.name} has a scale, and the module for it was made without one.")
    yield from _bias(layer, left, module, size)
    if statistics:
        yield module.running_mean, statistics[0]
        yield module.running_var, statistics[1]


def _recurrent(
    layer: KerasLayer, weights: Sequence[Tensor], place: Place, pictures: Pictures
) -> Iterator[tuple[Tensor, Tensor]]:
    order, module = GATES[place.kind], place.module
    directions = 2 if module.bidirectional else 1
    for direction in range(directions):
        kernel, recurrent, *bias = weights[direction * len(weights) // directions :][
            : len(weights) // directions
        ]
        values = [pictures.channels_first(layer, kernel).T, recurrent.T]
        if module.bias:
            biases = torch.zeros(2, kernel.shape[1])
            if bias:  # one, or with reset_after one for each product
                biases[: bias[0].dim()] = bias[0]
            values += [*biases]
        elif bias:
            raise ValueError(f"Keras layer {layer.name} has a bias, and {place.name} was made without one.")
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        for name, value in zip(names, values, strict=False):
            parts = value.chunk(len(order))
            suffix = "_reverse" if direction else ""
            yield getattr(module, f"{name}_l{place.layer}{suffix}"), torch.cat([parts[i] for i in order])
