"""compact(): the weights of a whole model rounded, for inference that is bound by reading them."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from interfuse.nn.linear import CompactLinear, FusionLinear
from interfuse.nn.rnn import GRU, LSTM, RNN
from interfuse.torch_state import children

Model = TypeVar("Model", bound=nn.Module)


def compact(model: Model, weight_dtype: torch.dtype = torch.bfloat16) -> Model:
    """Rounds the weights of interfuse's dense and recurrent layers in a model, in place; returns the model.

    Every FusionLinear within becomes a CompactLinear of `weight_dtype`. With torch.bfloat16, float32 RNN,
    LSTM and GRU read theirs rounded wherever no gradients are recorded; their parameters stay as they are.
    Convolutions, whose weights are few, and torch's own modules are left alone.
    """
    if isinstance(model, FusionLinear):
        raise ValueError(
            "compact: it replaces layers within a model; got a FusionLinear itself, of which "
            "CompactLinear(layer, weight_dtype) makes one."
        )
    made: dict[int, CompactLinear] = {}  # a layer that stands in two places is one layer afterwards too
    for parent in list(model.modules()):
        for name, child in children(parent):
            if type(child) is FusionLinear:
                if id(child) not in made:
                    made[id(child)] = CompactLinear(child, weight_dtype)
                setattr(parent, name, made[id(child)])
        if isinstance(parent, (RNN, LSTM, GRU)) and weight_dtype is torch.bfloat16:
            parent.weight_dtype = weight_dtype if parent.weight_hh_l0.dtype is torch.float32 else None
    return model
