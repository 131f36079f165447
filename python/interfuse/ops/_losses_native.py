"""The compiled core as an implementation of linear_cross_entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from interfuse import _native
from interfuse.ops import _native_limits
from interfuse.ops._losses_problem import (
    CrossEntropyProblem,
    Gradients,
    Results,
    Tensors,
    empty_gradients,
    empty_results,
)
from interfuse.ops._native_limits import DTYPE_NAMES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def why_not(problem: CrossEntropyProblem) -> str | None:
    return _native_limits.why_not(problem.device, problem.dtype)


def _desc(problem: CrossEntropyProblem, input_row_stride: int) -> _native.CrossEntropyDesc:
    p = problem.params
    return _native.CrossEntropyDesc(
        DTYPE_NAMES[problem.dtype],
        problem.rows,
        problem.classes,
        problem.features,
        input_row_stride,
        p.reduction,
        p.ignore_index,
        p.label_smoothing,
    )


def _readable(t: Tensors) -> Tensors:
    """As the core reads them: rows of the input at any distance, everything else dense."""
    x, rest = t.input, [None if s is None else s.contiguous() for s in t[1:]]
    return Tensors(x if x.stride(1) == 1 and x.stride(0) >= 0 else x.contiguous(), *rest)  # type: ignore[arg-type]


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _in_the_cores_order(t: Tensors) -> list[int]:
    return _addresses((t.input, t.linear_weight, t.linear_bias, t.weight, t.target))


def run(problem: CrossEntropyProblem, t: Tensors, mask: Sequence[bool]) -> Results:
    results, t = empty_results(problem, mask), _readable(t)
    _native.cross_entropy_forward(
        _desc(problem, t.input.stride(0)),
        _in_the_cores_order(t),
        results.loss.data_ptr(),
        results.lse.data_ptr(),
        _addresses(results[2:]),
        torch.get_num_threads(),
    )
    return results


def run_backward(
    problem: CrossEntropyProblem, grad_loss: Tensor, t: Tensors, lse: Tensor, mask: Sequence[bool]
) -> Gradients:
    grads, t = empty_gradients(problem, mask), _readable(t)
    grad_loss, lse = grad_loss.contiguous(), lse.contiguous()
    _native.cross_entropy_backward(
        _desc(problem, t.input.stride(0)),
        _in_the_cores_order(t),
        lse.data_ptr(),
        grad_loss.data_ptr(),
        _addresses(grads),
        torch.get_num_threads(),
    )
    return grads
