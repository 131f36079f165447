"""Where torch's own functions were measured to be faster than the native kernels: all thresholds in one
place.

Measured with torch 2.13 on two cores of a Xeon with AVX-512 and AMX (`interfuse bench conv_pool --sweep`
prints the like for any machine). The ratios are the time of torch's convolution, activation and pool over the
native kernel's, at batch 1 and 8. Where they straddle 1, torch gets the problem: that costs nothing, since
its own functions are then called, with its own gradients.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from interfuse.ops import _conv_pool_native as native
from interfuse.torch_state import has_bfloat16_matrix_units

if TYPE_CHECKING:
    from interfuse.ops._conv_pool_problem import ConvPoolProblem

# Below both, the calls around the kernels take longer than the kernels, and fewer calls win.
LEAST_PRODUCTS, LEAST_RESULTS = 32_000_000, 65_536


@lru_cache(maxsize=1024)
def rather_not(problem: ConvPoolProblem) -> str | None:
    """None where the native kernel is preferred to the reference, else the sentence that says why not."""
    seen = _Seen(problem)
    if problem.save and seen.narrow and problem.batch:
        return (
            "torch's own functions are faster for the gradients of kernels wider than what they put out, "
            "measured 0.01 to 1.2."
        )
    if problem.batch == 0 or (seen.products < LEAST_PRODUCTS and seen.results < LEAST_RESULTS):
        return None
    slower = _of_bfloat16(seen) if problem.dtype == torch.bfloat16 else None
    slower = slower or (_in_training(seen) if problem.save else _in_inference(seen))
    return None if slower is None else f"torch's own functions are faster for {slower}."


class _Seen:
    """What the rules ask of a problem."""

    def __init__(self, problem: ConvPoolProblem) -> None:
        p = problem.params
        self.problem, self.params = problem, p
        self.last = problem.channels_last
        self.spatial = problem.spatial
        self.group_in = problem.in_channels // p.groups
        self.group_out = problem.out_channels // p.groups
        self.taps = math.prod(problem.kernel)
        self.plane = math.prod(problem.conv_sizes)
        self.pixels = problem.batch * self.plane
        self.results = problem.out_channels * self.pixels
        self.products = self.results * self.group_in * self.taps
        self.weights = problem.out_channels * self.group_in * self.taps
        self.strided = any(s > 1 for s in p.stride)
        self.depthwise = p.groups > 1 and self.group_in == 1 and self.group_out == 1
        self.grouped = p.groups > 1 and not self.depthwise
        self.patches = self.taps > 1 and p.stride == problem.kernel and not any(p.padding)
        # Torch stores what the pool reads, and its gradient, of which a max pool leaves most zero.
        self.pooled = p.pool != "none" and self.plane >= 2 * math.prod(problem.out_sizes)
        self.thinned = self.pooled and p.pool == "max"

    @property
    def narrow(self) -> bool:
        """Rows of results shorter than the kernel's, as where text is a picture one word wide."""
        return self.problem.kernel[-1] >= 5 and self.problem.conv_sizes[-1] < self.problem.kernel[-1]

    @property
    def winograd(self) -> bool:
        return native.describe(self.problem)[0] == "winograd"


def _in_inference(at: _Seen) -> str | None:
    wide = at.group_in >= 16
    if at.spatial == 1 and (at.group_in > 64 or at.taps >= 8) and not at.depthwise:
        return "1-d convolutions over more than 64 channels or with 8 taps and more, measured 0.69 to 1.6"
    if at.winograd and at.pixels < 384 and at.plane < 100 and at.weights >= 1 << 20 and not at.last:
        return "few images of less than 100 pixels with more than a million weights, measured 0.92 to 0.99"
    if at.pooled:
        if wide and at.last and at.taps >= 25 and at.pixels >= 2048 and not (at.depthwise or at.winograd):
            return "kernels of 5x5 and more over many channels of channels-last tensors, measured 0.94 to 1.0"
        return None
    if at.depthwise:
        if at.taps >= 49:
            return "depthwise kernels of 7x7 and more, measured 0.69 to 1.3"
        if at.last and at.strided:
            return "strided depthwise convolutions of channels-last tensors, measured 0.71 to 1.0"
        return None
    if at.patches and not at.last and at.group_in * at.taps >= 256:
        return "large patches, measured 0.86 to 1.1"
    if at.grouped and at.last and not wide:
        return "groups of less than 16 channels in channels-last tensors, measured 0.39 to 0.96"
    if at.grouped and at.plane < 400 and (not at.last or at.pixels >= 1024):
        return "grouped convolutions of images of less than 400 pixels, measured 0.52 to 0.96"
    if wide and at.strided and at.taps == 1 and at.last:
        return "strided 1x1 convolutions of channels-last tensors, measured 0.90 to 1.06"
    if wide and at.taps > 1 and not at.winograd:
        if at.last:
            kept = at.pixels < 2048
        else:
            kept = (at.strided and at.group_in <= 64) or (at.pixels < 256 and at.weights >= 1 << 20)
        if not kept:
            return "unpooled sums over many channels, which Winograd does not take, measured 0.69 to 1.1"
    return None


def _in_training(at: _Seen) -> str | None:
    if at.depthwise:
        few = at.taps < 25 and at.results < (1 << 18 if at.pooled else 1 << 19)
        if at.last or at.strided or at.plane < 784 or few:
            return (
                "the gradients of depthwise convolutions in channels-last tensors, with strides, of images "
                "of less than 784 pixels or with few results, measured 0.13 to 1.5"
            )
        return None
    if at.patches and (at.last or at.group_in * at.taps >= 256):
        return "the gradients of patch embeddings, measured 0.59 to 1.0"
    if at.grouped and at.last and at.group_in < 16:
        return "the gradients of groups of less than 16 channels, channels last, measured 0.79 to 0.94"
    if at.spatial == 1 and (at.group_in >= 256 or at.group_in < 4):
        return "the gradients of 1-d convolutions over less than 4 or from 256 channels, measured 0.57 to 1.2"
    if at.taps == 1 and at.last and at.strided:
        return "the gradients of strided 1x1 convolutions in channels-last tensors, measured 0.85 to 1.1"
    if at.pixels <= 256 and at.weights >= 1 << 17:
        return "the gradients of many weights from at most 256 pixels, measured 0.24 to 1.07"
    if at.thinned:
        return None
    if at.winograd and at.plane >= (1024 if at.grouped else 400):
        return None
    if at.group_in <= 4 and not at.grouped and not at.patches and at.spatial > 1:
        return None
    if not at.last and (
        (at.strided and at.taps > 1 and at.group_in <= 64 and at.plane >= 400)
        or (at.grouped and at.plane >= 1024)
        or (at.taps == 1 and at.spatial == 2 and math.prod(at.problem.input) >= 2048)
    ):
        return None
    return "gradients that no max pool thins out, of this convolution, measured 0.24 to 1.07"


def _of_bfloat16(at: _Seen) -> str | None:
    if not has_bfloat16_matrix_units():
        return None
    if at.depthwise:
        if at.problem.save or at.pooled or not (at.last or at.strided or at.plane < 784):
            return None
        return (
            "depthwise convolutions in bfloat16 on a CPU with AMX, in channels-last tensors, with strides or "
            "of images of less than 784 pixels, measured 0.65 to 1.3"
        )
    large = at.plane >= 1024 if at.grouped else at.plane >= 2048
    kept = at.pooled or (at.spatial == 3 and not at.problem.save) or at.grouped
    if not at.last and large and kept and (at.winograd or at.taps == 1 or at.group_in < 16):
        return None
    if not at.last and at.group_in < 16 and not at.grouped and not at.problem.save:
        return None
    return "bfloat16 on a CPU with AMX, whose tiles they use, measured 0.10 to 1.3"
