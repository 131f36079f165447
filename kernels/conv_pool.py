"""conv_pool on a GPU: what the op calls to run the Triton kernels, and when it cannot.

conv_pool_launches.py lists the launches of a problem, conv_pool_kernels.py holds the kernels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from interfuse.kernels import conv_pool_launches as plan
from interfuse.kernels.launch import device_why_not, on_device_of
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from interfuse.ops._conv_pool_checks import check
from interfuse.ops._conv_pool_problem import empty_gradients, empty_outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from interfuse.kernels.launch import Tile
    from torch import Tensor

    from interfuse.ops._conv_pool_problem import ConvPoolParams, ConvPoolProblem


def why_not(problem: ConvPoolProblem) -> str | None:
    """The sentence that says why these kernels cannot run the problem, or None."""
    return device_why_not(problem.device, problem.dtype)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, params: ConvPoolParams, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, index, pre) as the registered op returns them."""
    problem = check(x, weight, bias, params, save)
    y, index, pre = empty_outputs(problem)
    with on_device_of(x):
        if params.pool == "avg" and pre.numel() > 0 and not _windows_cover(problem):
            pre.zero_()  # places that no window reads are never computed; their gradient is zero
        for launch in plan.forward_launches(problem, x, weight, bias, y, index, pre):
            launch.run()
    return y, index, pre


def _windows_cover(problem: ConvPoolProblem) -> bool:
    p = problem.params
    return all(
        stride <= size and (out - 1) * stride - pad + size >= conv
        for size, stride, pad, out, conv in zip(
            p.pool_size, p.pool_stride, p.pool_padding, problem.out_sizes, problem.conv_sizes, strict=True
        )
    )


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    index: Tensor,
    pre: Tensor,
    has_bias: bool,
    params: ConvPoolParams,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x, grad_weight, grad_bias) as the registered op returns them: (0,) where the mask says no."""
    problem = check(x, weight, None, params, True)
    wanted = (mask[0], mask[1], mask[2] and has_bias)
    grad_x, grad_weight, grad_bias = empty_gradients(problem, x, weight, wanted)
    # The products write the weight's gradient filter by filter, channel by channel.
    rows = grad_weight if grad_weight.is_contiguous() else grad_weight.new_empty(grad_weight.shape)
    asked = [grad if yes else None for grad, yes in zip((grad_x, rows, grad_bias), wanted, strict=True)]
    with on_device_of(x):
        for launch in plan.backward_launches(problem, grad_y, x, weight, y, index, pre, asked):
            launch.run()
        if rows is not grad_weight:
            grad_weight.copy_(rows)
    return grad_x, grad_weight, grad_bias


def median_milliseconds(step: Callable[[], object]) -> float:
    return float(do_bench(step, return_mode="median"))


def tune(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    params: ConvPoolParams,
    milliseconds: Callable[[Callable[[], object]], float] = median_milliseconds,
) -> dict[str, Tile]:
    """Time the candidate tiles of a training step on these tensors, and use the fastest in later calls.

    Another tile may add in another order, so results stay repeatable only between calls with one choice.
    Nothing calls this by itself. A choice holds for calls of the same sizes, dtype and device.
    """
    problem = check(x, weight, bias, params, True)
    y, index, pre = forward(x, weight, bias, params, True)
    saved = (y if params.backward_needs_y else None, index, pre, bias is not None, params)
    steps = {
        plan.forward_product: lambda: forward(x, weight, bias, params, True),
        plan.input_gradient_product: lambda: backward(y, x, weight, *saved, (True, False, False)),
        plan.weight_gradient_product: lambda: backward(y, x, weight, *saved, (False, True, False)),
    }
    chosen = {}
    for product_of, step in steps.items():
        product = product_of(problem, plan.Geometry.of(problem))
        times = {}
        for tile in plan.candidates(product):
            plan.tuned.put(product, tile)
            try:
                times[tile] = milliseconds(step)
            except OutOfResources:  # more shared memory than this device has
                times[tile] = math.inf
        chosen[product.kernel] = plan.tuned.put(product, min(times, key=times.__getitem__))
    return chosen
