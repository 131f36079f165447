"""The losses in plain torch, and the gradients of linear_cross_entropy as formulas.

Not as autograd: so they run inside a kernel, where autograd is off, and can themselves be differentiated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from interfuse.autocast import without_autocast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from interfuse.ops._losses_problem import (
        CrossEntropyParams,
        CrossEntropyProblem,
        Gradients,
        Results,
        Tensors,
    )


def logits(t: Tensors) -> Tensor:
    """In the dtype of the loss."""
    from interfuse.ops._losses_problem import loss_dtype

    return F.linear(t.input, t.linear_weight, t.linear_bias).to(loss_dtype(t.input.dtype))


def cross_entropy(t: Tensors, p: CrossEntropyParams) -> Tensor:
    """The loss alone. Differentiable by torch in every way that torch's own functions are."""
    return F.cross_entropy(
        logits(t),
        t.target,
        t.weight,
        ignore_index=p.ignore_index,
        reduction=p.reduction,
        label_smoothing=p.label_smoothing,
    )


def cross_entropy_backward(
    grad_loss: Tensor, t: Tensors, p: CrossEntropyParams, mask: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of input, linear_weight and linear_bias where the mask asks for them."""
    z = logits(t)
    classes = z.shape[1]
    counts = t.target != p.ignore_index
    labels = torch.where(counts, t.target, 0)
    weight = z.new_ones(classes) if t.weight is None else t.weight
    of_label = torch.where(counts, weight[labels], 0)
    scale = grad_loss / of_label.sum() if p.reduction == "mean" else grad_loss
    # A mean over no rows is 0 / 0, but its gradient is zero, as torch's.
    scale = torch.where(counts, scale, 0)
    by_label = scale * (1 - p.label_smoothing) * of_label
    by_class = scale * (p.label_smoothing / classes)
    grad = torch.softmax(z, 1) * (by_label + by_class * weight.sum()).unsqueeze(1)
    grad = grad - by_class.unsqueeze(1) * weight
    grad = grad - F.one_hot(labels, classes) * by_label.unsqueeze(1)
    grad = grad.to(t.input.dtype)
    return [
        grad @ t.linear_weight if mask[0] else None,
        grad.T @ t.input if mask[1] else None,
        grad.sum(0) if mask[2] else None,
    ]


def run(problem: CrossEntropyProblem, t: Tensors, mask: Sequence[bool]) -> Results:
    """The registered op."""
    from interfuse.ops._losses_problem import Results, with_loss

    with without_autocast(problem.device):  # the caller has cast already
        loss = cross_entropy(t, problem.params)
        lse = torch.logsumexp(logits(t), 1) if mask else loss.new_empty(0)
    one = torch.ones((), dtype=problem.loss_dtype, device=problem.device)
    return Results(loss, lse, *run_backward(problem, one, t, lse, with_loss(problem.params, mask)))


def run_backward(
    problem: CrossEntropyProblem, grad_loss: Tensor, t: Tensors, lse: Tensor, mask: Sequence[bool]
) -> Gradients:
    if not any(mask):
        grads: list[Tensor | None] = [None, None, None]
    else:
        with without_autocast(problem.device):
            grads = cross_entropy_backward(grad_loss, t, problem.params, mask)
    first, second, third = (
        torch.empty(0, dtype=problem.dtype, device=problem.device)
        if g is None
        else g.clone(memory_format=torch.contiguous_format)
        for g in grads
    )
    return first, second, third
