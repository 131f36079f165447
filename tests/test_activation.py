"""The native activations against float64, over their whole range: an identity convolution shows them bare."""

from __future__ import annotations

import math

import pytest
import torch

import interfuse

FUNCTIONS = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
# gelu's 1 + erf cancels on the negative side, in torch as here: its error is absolute there.
CANCELS = ("gelu", "gelu_tanh")


def activate(name: str, values: torch.Tensor) -> torch.Tensor:
    x = values.reshape(1, 1, -1)
    return interfuse.ops.conv_pool(x, torch.ones(1, 1, 1), activation=name, backend="native").reshape(-1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_close_to_float64(name: str) -> None:
    values = torch.cat([torch.linspace(-80, 80, 400_001), torch.linspace(-1.5, 1.5, 200_001)])
    truth = FUNCTIONS[name](values.double())
    error = (activate(name, values).double() - truth).abs()
    # Three units in the last place for exp, tanh, erf; the products and quotients around them add up to two.
    unit = 2.0**-23
    scale = values.double().abs().clamp(max=1) if name in CANCELS else truth.abs()
    worst = (error / (scale * unit).clamp(min=1e-37)).max().item()
    assert worst < 5, f"{name} is {worst:.1f} units in the last place from float64"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_special_values_as_in_float64(name: str) -> None:
    # Not as torch's own float32: its gelu of infinity is NaN, and of 3e38 infinite.
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1e-30, -1e-30, 3e38, -3e38])
    truth = FUNCTIONS[name](values.double()).float()
    torch.testing.assert_close(activate(name, values), truth, equal_nan=True, rtol=1e-6, atol=1e-37)
