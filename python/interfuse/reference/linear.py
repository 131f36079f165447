"""activation(concatenated inputs @ weight^T + bias) in plain torch, its backward as the formula.

Not as autograd: so it runs inside a kernel, where autograd is switched off, and can itself be differentiated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from interfuse.activations import activate, activate_backward
from interfuse.autocast import without_autocast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from interfuse.ops._linear_problem import LinearParams, LinearProblem, Two


def whole_weight(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight as a matrix of the inputs' dtype: rounded integers times their scale, or another float."""
    if scale is not None:
        weight = weight.to(scale.dtype) * scale.unsqueeze(-1)
    return weight.to(dtype)


def forward(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, scale: Tensor | None, p: LinearParams
) -> Tensor:
    """The output alone. Differentiable by torch in every way that torch's own functions are."""
    return activate(preactivation(inputs, weight, bias, scale), p.activation, p.negative_slope)


def preactivation(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    return F.linear(torch.cat(list(inputs), -1), whole_weight(weight, scale, inputs[0].dtype), bias)


def backward(
    grad_y: Tensor,
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    p: LinearParams,
    mask: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of inputs, weight and bias where the mask asks for them, from the inputs anew."""
    pre = preactivation(inputs, weight, bias, scale)
    value = activate(pre, p.activation, p.negative_slope)
    grad = activate_backward(grad_y, pre, value, p.activation, p.negative_slope)
    *wants_inputs, wants_weight, wants_bias = mask
    grads: list[Tensor | None] = [None] * len(inputs)
    if any(wants_inputs):
        all_inputs = grad @ whole_weight(weight, scale, grad.dtype)
        parts = all_inputs.split([x.shape[-1] for x in inputs], -1)
        grads = [part if wanted else None for part, wanted in zip(parts, wants_inputs, strict=True)]
    rows = grad.reshape(-1, grad.shape[-1])
    x = torch.cat(list(inputs), -1)
    by_weight = rows.T @ x.reshape(-1, x.shape[-1]) if wants_weight else None
    if by_weight is not None and by_weight.dtype != weight.dtype:
        by_weight = by_weight.to(weight.dtype)
    return [*grads, by_weight, rows.sum(0) if wants_bias else None]


def run(
    problem: LinearProblem,
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
) -> Two:
    """The registered op: (y, pre), with pre as every implementation saves it."""
    p = problem.params
    with without_autocast(problem.device):  # the caller has cast already
        pre = preactivation(inputs, weight, bias, scale)
        y = activate(pre, p.activation, p.negative_slope).contiguous()
    saved = pre.contiguous() if problem.save and p.saves_pre else pre.new_empty(0)
    return y, saved


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
    with without_autocast(problem.device):
        grads = backward(grad_y, inputs, weight, bias, scale, problem.params, mask)
    dtypes = [*(x.dtype for x in inputs), weight.dtype, problem.dtype]
    return [
        torch.empty(0, dtype=dtype, device=problem.device)
        if g is None
        else g.clone(memory_format=torch.contiguous_format)
        for g, dtype in zip(grads, dtypes, strict=True)
    ]
