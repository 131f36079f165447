"""The Triton kernels as an implementation of conv_pool; triton is imported only when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interfuse.ops import _triton
from interfuse.ops._conv_pool_problem import ConvPoolProblem, fused_why_not

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def why_not(problem: ConvPoolProblem) -> str | None:
    reason = _triton.why_not(problem.device) or fused_why_not(problem)
    if reason is not None:
        return reason
    from interfuse.kernels import conv_pool as kernels

    return kernels.why_not(problem)


def run(
    problem: ConvPoolProblem, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from interfuse.kernels import conv_pool as kernels

    return kernels.forward(x, weight, bias, problem.params, problem.save)


def run_backward(
    problem: ConvPoolProblem,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor | None,
    index: Tensor,
    pre: Tensor,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    from interfuse.kernels import conv_pool as kernels

    return kernels.backward(grad_y, x, weight, y, index, pre, bias is not None, problem.params, tuple(mask))
