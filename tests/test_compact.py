"""compact(): a whole model's dense and recurrent weights rounded for inference."""

from __future__ import annotations

import copy

import pytest
import tolerance
import torch
from torch import nn

from interfuse import models
from interfuse.nn import LSTM, CompactLinear, DenseChain, FusionLinear, compact
from interfuse.ops import rnn

IMAGE, IDS = torch.randn(2, 3, 22, 22), torch.randint(50, (2, 7))


def fusion() -> nn.Module:
    torch.manual_seed(0)
    return models.image_text_fusion((3, 22, 22), 10, vocabulary=50).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_a_fusion_model(dtype: torch.dtype) -> None:
    model = fusion()
    made = compact(copy.deepcopy(model), dtype)
    dense = [m for m in made.modules() if isinstance(m, (FusionLinear, CompactLinear))]
    assert [m.weight.dtype for m in dense] == [dtype] * 3
    rounding = torch.bfloat16 if dtype is torch.bfloat16 else None
    assert made.encoders[1].recurrent.rnn.weight_dtype is rounding
    with torch.no_grad():
        # A rounding to 8 bits of each weight's size, averaged over the terms of three layers in a row.
        assert tolerance.error(made(IMAGE, IDS), model(IMAGE, IDS)) <= 3 * 2.0**-6
    again = copy.deepcopy(made)
    with torch.no_grad():
        assert torch.equal(again(IMAGE, IDS), made(IMAGE, IDS))


def test_recurrent_layers_read_rounded_weights_in_inference_alone() -> None:
    lstm, x = LSTM(40, 64, 2), torch.randn(9, 1, 40)
    plain = lstm(x)[0]
    assert compact(lstm) is lstm
    assert torch.equal(lstm(x)[0], plain)
    with torch.no_grad():
        rounded, _ = rnn(x, list(lstm.parameters()), cell="lstm", weight_dtype=torch.bfloat16)
        assert torch.equal(lstm(x)[0], rounded)
    assert not torch.equal(rounded, plain)
    lstm(x)[0].sum().backward()
    assert lstm.weight_hh_l0.grad is not None


def test_other_dtypes_of_recurrent_layers_stay_as_they_are() -> None:
    assert compact(LSTM(4, 4, dtype=torch.float64)).weight_dtype is None


def test_a_layer_in_two_places_stays_one() -> None:
    layer = FusionLinear(8, 8)
    model = compact(nn.ModuleList([DenseChain(layer), nn.Sequential(layer, layer)]))
    first, (second, third) = model[0][0], model[1]
    assert type(first) is CompactLinear
    assert first is second is third


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"compact: it replaces layers within a model; got a FusionLinear"):
        compact(FusionLinear(2, 2))
    with pytest.raises(ValueError, match=r"torch\.bfloat16; got torch\.float16"):
        compact(DenseChain(FusionLinear(2, 2)), torch.float16)
