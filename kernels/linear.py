"""linear on a GPU: what the op calls to run the Triton kernels, and when it cannot.

linear_launches.py lists the launches of a problem, linear_kernels.py holds the kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from interfuse.kernels import linear_launches as plan
from interfuse.kernels.launch import device_why_not, on_device_of

from interfuse.ops._linear_problem import empty_gradients, empty_outputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from interfuse.ops._linear_problem import LinearProblem, Two


def why_not(problem: LinearProblem) -> str | None:
    """The sentence that says why these kernels cannot run the problem, or None."""
    if len(problem.widths) > plan.MOST_INPUTS:
        return (
            f"the Triton kernels take up to {plan.MOST_INPUTS} inputs; this call has {len(problem.widths)}."
        )
    if problem.save and problem.weight_dtype != problem.dtype:
        return (
            f"the Triton kernels train weights of the inputs' dtype; the inputs are {problem.dtype} and the "
            f"weight is {problem.weight_dtype}."
        )
    return device_why_not(problem.device, problem.dtype)


def _rows(problem: LinearProblem, t: Tensor) -> Tensor:
    """A tensor as (rows, width), with stride 1 along a row."""
    t = t.reshape(problem.rows, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def run(
    problem: LinearProblem,
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
) -> Two:
    y, pre = empty_outputs(problem)
    if problem.rows == 0:
        return y, pre
    rows = [_rows(problem, x) for x in inputs]
    bias = None if bias is None else bias.contiguous()
    scale = None if scale is None else scale.contiguous()
    saved = pre if problem.save and problem.params.saves_pre else None
    with on_device_of(y):
        for launch in plan.forward_launches(problem, rows, weight.contiguous(), bias, scale, y, saved):
            launch.run()
    return y, pre


def run_backward(
    problem: LinearProblem,
    grad_y: Tensor,
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    y: Tensor | None,
    pre: Tensor,
    mask: Sequence[bool],
) -> list[Tensor]:
    grads = empty_gradients(problem, mask)
    if problem.rows == 0:
        return [g.zero_() for g in grads]
    p = problem.params
    saved = pre if p.saves_pre else y if p.backward_needs_y else None
    rows = [_rows(problem, x) for x in inputs]
    wanted = [
        (g.view(problem.rows, -1) if i < len(rows) else g) if asked else None
        for i, (g, asked) in enumerate(zip(grads, mask, strict=True))
    ]
    grad_y = grad_y.contiguous().view(problem.rows, -1)
    saved = None if saved is None else saved.contiguous().view(problem.rows, -1)
    with on_device_of(grad_y):
        for launch in plan.backward_launches(problem, grad_y, rows, weight.contiguous(), saved, wanted):
            launch.run()
    return grads
