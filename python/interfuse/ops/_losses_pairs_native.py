"""The compiled core as an implementation of the losses of two tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from interfuse import _native, memory
from interfuse.ops import _native_limits
from interfuse.ops._native_limits import DTYPE_NAMES

if TYPE_CHECKING:
    from collections.abc import Sequence

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


class InfoNce(NamedTuple):
    """What the core is told beside the tensors."""

    reduction: str
    symmetric: bool
    normalize: bool
    temperature: float


def empty_similarities(rows: int) -> Tensor:
    """Room for the matrix as the core keeps it (see csrc/interfuse.h)."""
    return memory.empty((rows * (rows + rows // 16 + 64),), dtype=torch.float32)


def _info_nce_arguments(a: Tensor, s: InfoNce) -> tuple[str, str, bool, bool, int, int, float]:
    rows, features = a.shape
    return DTYPE_NAMES[a.dtype], s.reduction, s.symmetric, s.normalize, rows, features, s.temperature


def run_info_nce(a: Tensor, b: Tensor, s: InfoNce, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss, and for each row both directions' logarithms of sums and losses: (4, rows)."""
    loss = torch.empty(len(a) if s.reduction == "none" else ())
    sums = torch.empty(4, len(a))
    pointers = [t.data_ptr() for t in (a, b, loss, *sums)]
    pointers.append(0 if kept is None else kept.data_ptr())
    _native.info_nce(*_info_nce_arguments(a, s), pointers, torch.get_num_threads())
    return loss, sums


def run_info_nce_backward(
    grad_loss: Tensor,
    a: Tensor,
    b: Tensor,
    s: InfoNce,
    sums: Sequence[Tensor | None],
    kept: Tensor | None,
    needs: Sequence[bool],
) -> tuple[list[Tensor | None], float]:
    """The gradients of both matrices where they are needed, and of the temperature."""
    grads = [
        memory.empty(t.shape, dtype=t.dtype) if needed else None
        for t, needed in zip((a, b), needs, strict=False)
    ]
    given = (a, b, *sums, kept, grad_loss.contiguous(), *grads)
    pointers = [0 if t is None else t.data_ptr() for t in given]
    slope = _native.info_nce_backward(*_info_nce_arguments(a, s), pointers, needs[2], torch.get_num_threads())
    return grads, slope


def run_similarities(first: Tensor, second: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The registered op: rows are divided by their lengths and the temperature already."""
    settings = InfoNce("none", symmetric, False, 1.0)
    loss, sums = run_info_nce(first.contiguous(), second.contiguous(), settings, None)
    return loss, sums[0].clone(), sums[1].clone() if symmetric else sums.new_empty(0)


def run_similarities_backward(
    grad_loss: Tensor, first: Tensor, second: Tensor, lse: Tensor, other_lse: Tensor, symmetric: bool
) -> tuple[Tensor, Tensor]:
    settings = InfoNce("none", symmetric, False, 1.0)
    sums = (lse.contiguous(), other_lse.contiguous() if symmetric else None, None, None)
    a, b, needs = first.contiguous(), second.contiguous(), (True, True, False)
    (one, other), _ = run_info_nce_backward(grad_loss, a, b, settings, sums, None, needs)
    return one, other  # type: ignore[return-value]
