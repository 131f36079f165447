"""The compiled core as an implementation of the losses of two tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from interfuse import _native, memory
from interfuse.ops import _native_limits
from interfuse.ops._native_limits import DTYPE_NAMES

if TYPE_CHECKING:
    from torch import Tensor

    from interfuse.ops._losses_problem import Elements, PairProblem


def why_not(problem: PairProblem) -> str | None:
    return _native_limits.why_not(problem.device, problem.dtype)


def _call(e: Elements, grad_loss: Tensor | None, loss: Tensor | None, grad: Tensor | None) -> None:
    x, columns = e.input, e.columns
    given = (x, e.target, e.weight.values, e.pos_weight.values, grad_loss, loss, grad)
    _native.elementwise_loss(
        e.kind,
        DTYPE_NAMES[x.dtype],
        e.reduction,
        x.numel() // columns if columns else 0,
        columns,
        e.weight.strides,
        e.pos_weight.strides,
        [0 if t is None else t.data_ptr() for t in given],
        torch.get_num_threads(),
    )


def run(e: Elements) -> Tensor:
    loss = e.empty_loss()
    _call(e, None, loss, None)
    return loss


def run_backward(grad_loss: Tensor, e: Elements) -> Tensor:
    grad = memory.empty(e.input.shape, dtype=e.input.dtype)
    _call(e, grad_loss.contiguous(), None, grad)
    return grad


def run_contrastive(input1: Tensor, input2: Tensor, target: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    a, b, labels = input1.contiguous(), input2.contiguous(), target.contiguous()
    loss, slope = torch.empty_like(labels), torch.empty_like(labels)
    pointers = [t.data_ptr() for t in (a, b, labels, loss, slope)]
    rows, columns = a.shape
    _native.contrastive_loss(DTYPE_NAMES[a.dtype], rows, columns, margin, pointers, torch.get_num_threads())
    return loss, slope


def run_contrastive_backward(
    grad_loss: Tensor, input1: Tensor, input2: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    a, b, given = input1.contiguous(), input2.contiguous(), (slope.contiguous(), grad_loss.contiguous())
    grads = memory.empty(a.shape, dtype=a.dtype), memory.empty(b.shape, dtype=b.dtype)
    rows, columns = a.shape
    pointers = [t.data_ptr() for t in (a, b, *given, *grads)]
    _native.contrastive_loss_backward(DTYPE_NAMES[a.dtype], rows, columns, pointers, torch.get_num_threads())
    return grads
