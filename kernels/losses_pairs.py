"""The losses of two tensors on a GPU: what the ops call to run the Triton kernels, and when they cannot.

losses_pairs_launches.py lists the launches, losses_pairs_kernels.py holds the kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from interfuse.kernels import losses_pairs_launches as plan
from interfuse.kernels.launch import device_why_not, on_device_of
from interfuse.kernels.losses import run as run_cross_entropy

from interfuse.ops._losses_problem import CrossEntropyParams, CrossEntropyProblem, Similarity, Tensors

if TYPE_CHECKING:
    from torch import Tensor

    from interfuse.ops._losses_problem import Elements, PairProblem


def why_not(problem: PairProblem) -> str | None:
    """The sentence that says why these kernels cannot run the problem, or None."""
    return device_why_not(problem.device, problem.dtype)


def _mean_of(e: Elements) -> float:
    """What the sum over all elements is multiplied by. The mean of none is NaN."""
    if e.reduction != "mean":
        return 1.0
    return 1.0 / e.input.numel() if e.input.numel() else float("nan")


def run(e: Elements) -> Tensor:
    loss = e.empty_loss()
    with on_device_of(loss):
        if e.reduction == "none":
            plan.elementwise_launch(e, loss)[0].run()
        else:
            launch, sums = plan.elementwise_launch(e, None)
            launch.run()
            plan.total_launch(sums, _mean_of(e), loss).run()
    return loss


def run_backward(grad_loss: Tensor, e: Elements) -> Tensor:
    grad = torch.empty_like(e.input)
    with on_device_of(grad):
        plan.elementwise_gradient_launch(e, _mean_of(e), grad_loss.contiguous(), grad).run()
    return grad


def run_contrastive(input1: Tensor, input2: Tensor, target: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    a, b, target = input1.contiguous(), input2.contiguous(), target.contiguous()
    loss, slope = torch.empty_like(target), torch.empty_like(target)
    with on_device_of(loss):
        plan.contrastive_launch(a, b, target, margin, loss, slope).run()
    return loss, slope


def run_contrastive_backward(
    grad_loss: Tensor, input1: Tensor, input2: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    a, b = input1.contiguous(), input2.contiguous()
    grads = torch.empty_like(a), torch.empty_like(b)
    with on_device_of(a):
        plan.contrastive_gradient_launch(a, b, slope.contiguous(), grad_loss.contiguous(), *grads).run()
    return grads


def _problem(x: Tensor) -> CrossEntropyProblem:
    """One modality chooses from the other: as many classes as rows."""
    params = CrossEntropyParams(reduction="none")
    return CrossEntropyProblem(params, len(x), len(x), x.shape[1], x.dtype, x.device, has_bias=False)


def run_info_nce(first: Tensor, second: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The similarities are computed once for each direction's sums, some columns at a time."""
    partner = torch.arange(len(first), device=first.device)
    keep = [True, True, False]
    rows = run_cross_entropy(_problem(first), Tensors(first, second, partner, None, None), keep)
    if not symmetric:
        return rows.loss, rows.lse, first.new_empty(0, dtype=torch.float32)
    columns = run_cross_entropy(_problem(first), Tensors(second, first, partner, None, None), keep)
    return (rows.loss + columns.loss) / 2, rows.lse, columns.lse


def run_info_nce_backward(
    grad_loss: Tensor, first: Tensor, second: Tensor, lse: Tensor, other_lse: Tensor, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """The similarities are computed again for each of the two gradients."""
    a, b, grad_loss = first.contiguous(), second.contiguous(), grad_loss.contiguous()
    grads = torch.empty_like(a), torch.empty_like(b)
    scale = grad_loss / 2 if symmetric else grad_loss
    lse, other = lse.contiguous(), other_lse.contiguous() if symmetric else None
    sides = Similarity(a, b, lse, other), Similarity(b, a, other, lse)
    with on_device_of(a):
        for side, grad in zip(sides, grads, strict=True):
            plan.similarity_gradient_launch(_problem(a), side, scale, grad_loss, grad).run()
    return grads
