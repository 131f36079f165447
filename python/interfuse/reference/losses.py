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


def reduced(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def elementwise(
    x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, kind: str
) -> Tensor:
    """Each element's loss, in the dtype of losses."""
    from interfuse.ops._losses_problem import loss_dtype

    x, target = x.to(loss_dtype(x.dtype)), target.to(loss_dtype(x.dtype))
    if kind == "mse":
        loss = (x - target).square()
        return loss if weight is None else loss * weight
    return F.binary_cross_entropy_with_logits(x, target, weight, pos_weight=pos_weight, reduction="none")


def elementwise_backward(
    grad_loss: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    kind: str,
    reduction: str,
) -> Tensor:
    exact, target = x.to(grad_loss.dtype), target.to(grad_loss.dtype)
    if kind == "mse":
        grad = 2 * (exact - target)
    else:
        of_one = target if pos_weight is None else target * pos_weight
        grad = (1 - target) - (1 - target + of_one) * torch.sigmoid(-exact)
    if weight is not None:
        grad = grad * weight
    scale = grad_loss / x.numel() if reduction == "mean" else grad_loss
    return (grad * scale).to(x.dtype)


def contrastive_slope(a: Tensor, b: Tensor, target: Tensor, margin: float) -> Tensor:
    """What the rows' difference is multiplied by in the gradient of each loss."""
    distance = _distance(a, b, target.dtype)
    gap = (margin - distance).clamp(min=0)
    apart = torch.where(distance == 0, 0, gap / torch.where(distance == 0, 1, distance))
    return target - (1 - target) * apart


def contrastive_rows(a: Tensor, b: Tensor, target: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Each pair's loss, and the slope."""
    distance = _distance(a, b, target.dtype)
    gap = (margin - distance).clamp(min=0)
    loss = (target * distance.square() + (1 - target) * gap.square()) / 2
    return loss, contrastive_slope(a, b, target, margin)


def contrastive_backward(grad_loss: Tensor, a: Tensor, b: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    grad = (a.to(slope.dtype) - b.to(slope.dtype)) * (slope * grad_loss).unsqueeze(-1)
    return grad.to(a.dtype), -grad.to(b.dtype)


def info_nce_rows(first: Tensor, second: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's loss, and the logarithms of the sums of exponentials over rows and, if wanted, columns."""
    z = _similarities(first, second)
    lse = torch.logsumexp(z, 1)
    other = torch.logsumexp(z, 0) if symmetric else z.new_empty(0)
    return ((lse + other) / 2 if symmetric else lse) - z.diagonal(), lse, other


def info_nce_backward(
    grad_loss: Tensor, first: Tensor, second: Tensor, lse: Tensor, other_lse: Tensor, symmetric: bool
) -> tuple[Tensor, Tensor]:
    z = _similarities(first, second)
    grad = torch.exp(z - lse.unsqueeze(1)) * grad_loss.unsqueeze(1)
    if symmetric:
        grad = (grad + torch.exp(z - other_lse) * grad_loss) / 2
    grad = (grad - torch.diag_embed(grad_loss)).to(first.dtype)
    return grad @ second, grad.T @ first


def _similarities(first: Tensor, second: Tensor) -> Tensor:
    from interfuse.ops._losses_problem import loss_dtype

    return F.linear(first, second).to(loss_dtype(first.dtype))


def _distance(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where rows are alike, with a derivative of 0 instead of NaN."""
    square = (a.to(dtype) - b.to(dtype)).square().sum(-1)
    return torch.where(square == 0, 0, torch.where(square == 0, 1, square).sqrt())
