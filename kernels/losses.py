"""linear_cross_entropy on a GPU: what the op calls to run the Triton kernels, and when it cannot.

losses_launches.py lists the launches of a problem, losses_kernels.py holds the kernels. The logits' gradient
is written for some rows at a time; the two products that read it are torch's own matrix products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from interfuse.kernels import losses_launches as plan
from interfuse.kernels.launch import device_why_not, on_device_of

from interfuse.ops._losses_problem import Results, Tensors, empty_gradients, empty_results, with_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from interfuse.ops._losses_problem import CrossEntropyProblem, Gradients


def why_not(problem: CrossEntropyProblem) -> str | None:
    """The sentence that says why these kernels cannot run the problem, or None."""
    return device_why_not(problem.device, problem.dtype)


def _dense(t: Tensors) -> Tensors:
    x = t.input if t.input.stride(1) == 1 else t.input.contiguous()
    return Tensors(x, *(None if s is None else s.contiguous() for s in t[1:]))  # type: ignore[arg-type]


def labels_of(problem: CrossEntropyProblem, t: Tensors) -> plan.Labels:
    counts = t.target != problem.params.ignore_index
    weight = counts.to(torch.float32)
    if t.weight is not None:
        weight = weight * t.weight[torch.where(counts, t.target, 0).clamp(0, problem.classes - 1)]
    return plan.Labels(counts.to(torch.float32), weight)


def weights_of(problem: CrossEntropyProblem, t: Tensors) -> Tensor:
    """The sum of the classes' weights, where kernels read it."""
    if t.weight is not None:
        return t.weight.sum()
    return torch.full((), float(problem.classes), dtype=torch.float32, device=problem.device)


def run(problem: CrossEntropyProblem, t: Tensors, mask: Sequence[bool]) -> Results:
    results, t = empty_results(problem, mask), _dense(t)
    labels = labels_of(problem, t)
    rows = torch.empty(problem.rows, dtype=torch.float32, device=problem.device)
    lse = results.lse if mask else torch.empty_like(rows)
    if problem.rows:
        with on_device_of(t.input):
            parts = plan.empty_parts(problem, problem.device)
            plan.sums_launch(problem, t, parts).run()
            plan.combine_launch(problem, parts, labels, weights_of(problem, t), rows, lse).run()
    reduction = problem.params.reduction
    if reduction == "none":
        return results._replace(loss=rows)
    loss = rows.sum() / labels.weight.sum() if reduction == "mean" else rows.sum()
    wanted = with_loss(problem.params, mask)
    grads: Gradients = (results.grad_input, results.grad_weight, results.grad_bias)
    if any(wanted):
        grads = _gradients(problem, torch.ones_like(loss), t, lse, labels, wanted)
    return Results(loss, results.lse, *grads)


def run_backward(
    problem: CrossEntropyProblem, grad_loss: Tensor, t: Tensors, lse: Tensor, mask: Sequence[bool]
) -> Gradients:
    t = _dense(t)
    return _gradients(problem, grad_loss, t, lse.contiguous(), labels_of(problem, t), mask)


def _gradients(
    problem: CrossEntropyProblem,
    grad_loss: Tensor,
    t: Tensors,
    lse: Tensor,
    labels: plan.Labels,
    mask: Sequence[bool],
) -> Gradients:
    p, grads = problem.params, empty_gradients(problem, mask)
    by_input, by_weight, by_bias = grads
    scale = grad_loss / labels.weight.sum() if p.reduction == "mean" else grad_loss
    # A mean over no rows is 0 / 0, but its gradient is zero.
    scale = torch.where(labels.counts > 0, scale, 0)
    by_label = scale * (1 - p.label_smoothing) * labels.weight
    by_class = scale * (p.label_smoothing / problem.classes)
    by_softmax = by_label + by_class * weights_of(problem, t)
    # Sums over several chunks are kept in float32.
    weight_sum = torch.zeros_like(by_weight, dtype=torch.float32)
    bias_sum = torch.zeros_like(by_bias, dtype=torch.float32)
    step = plan.chunk_rows(problem)
    for first in range(0, problem.rows, step):
        part = slice(first, first + step)
        some = t._replace(input=t.input[part], target=t.target[part])
        shape = (some.input.shape[0], problem.classes)
        grad = torch.empty(shape, dtype=problem.dtype, device=problem.device)
        with on_device_of(grad):
            plan.gradient_launch(
                problem, some, lse[part], by_softmax[part], by_label[part], by_class[part], grad
            ).run()
        if mask[0]:
            torch.mm(grad, t.linear_weight, out=by_input[part])
        if mask[1]:
            weight_sum += grad.T @ some.input
        if mask[2]:
            bias_sum += grad.sum(0, dtype=torch.float32)
    by_weight.copy_(weight_sum)
    by_bias.copy_(bias_sum)
    return grads
