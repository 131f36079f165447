"""Every tolerance of the tests, each with its reason. Errors are relative Frobenius norms against float64:
||ours - truth|| / ||truth||, which a single wrong element of a small tensor already exceeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

# "default" may use Winograd, whose transforms cost about one and a half digits of float32's seven.
FLOAT32_DEFAULT = 1e-5

# "highest" only adds up products in float32: 6e-8 a rounding, growing with the square root of the terms (at
# most a few thousand in these cases). An index that is off by one gives about 1.
FLOAT32_HIGHEST = 1e-6

# Gradients add over the whole batch and plane, and through one more product; Winograd's transposed form,
# which gives them at "default", rounds no more than the forward.
FLOAT32_GRADIENT = 1e-5

# One rounding at the store: half a unit in the last place of 8 bits is at most 2^-8 of each element, and so
# of the norm. What comes before is float32.
BFLOAT16 = 2.0**-8 + FLOAT32_DEFAULT

# Two roundings: of the saved value from which the activation's derivative is computed (which may be
# amplified about twice by gelu's and silu's curvature), and at the store.
BFLOAT16_GRADIENT = 3 * 2.0**-8

# float16 and float64 go through torch's own kernels in the same dtype; float16's convolutions accumulate in
# float32 or float16 as torch likes: a few units of 11 bits.
FLOAT16 = 4 * 2.0**-11
FLOAT64 = 1e-13

# Our error at "highest" is at most this many times torch's own.
TIMES_TORCH = 2.0

# Whole models of a dozen layers in float32: each layer's bound, added up. Gradients pass them twice, and
# those of first layers sum over every position of a picture, where most of the terms cancel.
MODEL = 5e-6
MODEL_GRADIENT = 1e-4


def error(ours: Tensor, truth: Tensor) -> float:
    """The relative Frobenius error; infinite where shapes differ, or NaNs and infinities do."""
    ours, truth = ours.detach().double(), truth.detach().double()
    if ours.shape != truth.shape:
        return float("inf")
    special = ~torch.isfinite(truth)
    if not torch.equal(special, ~torch.isfinite(ours)):
        return float("inf")
    same = (ours == truth) | (ours.isnan() & truth.isnan())
    if not bool(same[special].all()):
        return float("inf")
    ours, truth = ours[~special], truth[~special]
    difference, size = (ours - truth).norm(), truth.norm()
    return float(difference / size) if size > 0 else float("inf") if difference > 0 else 0.0


def close(ours: Any, theirs: Any, bound: float = FLOAT32_GRADIENT) -> bool:
    """Two tensors, or as many on either side."""
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, (tuple, list)) else [(ours, theirs)]
    return all(error(a, b) <= bound for a, b in pairs)


def beside_torch(torchs: float, least: float = 2.0**-24) -> float:
    """The bound on our error where torch's own is this; below a unit in the last place its error is luck."""
    return TIMES_TORCH * max(torchs, least)


def output(dtype: torch.dtype, precision: str = "default") -> float:
    """The bound on an output's error."""
    if dtype == torch.float32:
        return FLOAT32_HIGHEST if precision == "highest" else FLOAT32_DEFAULT
    return {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float64: FLOAT64}[dtype]


def gradient(dtype: torch.dtype) -> float:
    """The bound on a gradient's error."""
    return {torch.float32: FLOAT32_GRADIENT, torch.bfloat16: BFLOAT16_GRADIENT, torch.float64: FLOAT64}[dtype]


def recurrent(steps: int, layers: int, terms: int, dtype: torch.dtype = torch.float32) -> float:
    """The bound on `recurrent_error` of what recurrent layers put out.

    Each step rounds sums of `terms` products, whose errors add up like a random walk; later steps and layers
    carry them on, each contracting on average, so that they too add up like a walk over the steps. The
    factor 4 is for the cells' own arithmetic: half a dozen roundings and two approximated functions.
    """
    unit = {torch.float64: 2.0**-52}.get(dtype, 2.0**-23)  # half precision computes in float32
    computed = 4 * unit * terms**0.5 * (layers + steps**0.5)
    stored = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0.0)  # one rounding of each result
    return computed + stored


def recurrent_gradient(steps: int, layers: int, terms: int, dtype: torch.dtype = torch.float32) -> float:
    """A gradient goes through the forward's error and its own, and sums over all steps and rows."""
    stored = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0.0)
    return 4 * (recurrent(steps, layers, terms, dtype) - stored) + stored


# Terms of a recurrent sum are of order one. Where they cancel, the error still follows their size, not that
# of what is left: the truth counts as at least this much for each element, in the mean square.
RECURRENT_SCALE = 0.25


def recurrent_error(ours: Tensor, truth: Tensor) -> float:
    """`error`, with the truth's norm taken as at least RECURRENT_SCALE an element."""
    plain = error(ours, truth)
    if plain in (0.0, float("inf")):
        return plain
    size = float(truth.detach().double().norm())
    return plain * size / max(size, RECURRENT_SCALE * truth.numel() ** 0.5)


# attention: two products and a softmax in float32. An error of a score is an error of its exponential, and
# scores of these cases reach about 10, known to 7 digits.
FLOAT32_ATTENTION = 2e-6

# The gradient passes through four more products, and through differences of values of one size.
FLOAT32_ATTENTION_GRADIENT = 1e-5


def attention(dtype: torch.dtype) -> float:
    """The bound on the error of attention's output and weights; the inputs are the truth's own."""
    return {
        torch.float32: FLOAT32_ATTENTION,
        torch.bfloat16: 2.0**-8,
        torch.float16: 2.0**-11,
        torch.float64: FLOAT64,
    }[dtype]


def attention_gradient(dtype: torch.dtype) -> float:
    """For bfloat16 the saved output is rounded too, and enters each score's gradient."""
    return {
        torch.float32: FLOAT32_ATTENTION_GRADIENT,
        torch.bfloat16: BFLOAT16_GRADIENT,
        torch.float64: FLOAT64,
    }[dtype]
