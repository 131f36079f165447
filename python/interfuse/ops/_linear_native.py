"""The compiled core as an implementation of linear."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interfuse import _native
from interfuse.bounded_cache import BoundedCache
from interfuse.ops._linear_problem import LinearProblem, Two, empty_gradients, empty_outputs
from interfuse.ops._native_limits import DTYPE_NAMES, why_not_on

if TYPE_CHECKING:
    from collections.abc import Sequence

_WEIGHT_NAMES = {**DTYPE_NAMES, torch.int8: "int8"}


def why_not(problem: LinearProblem) -> str | None:
    reason = why_not_on(problem.device)
    if reason is not None:
        return reason
    if problem.dtype not in DTYPE_NAMES:
        return f"the native kernels compute in float32 and bfloat16; the inputs are {problem.dtype}."
    if problem.save and problem.weight_dtype != problem.dtype:
        return (
            f"the native kernels train weights of the inputs' dtype; the inputs are {problem.dtype} and the "
            f"weight is {problem.weight_dtype}."
        )
    return leaky_why_not(problem)


def leaky_why_not(problem: LinearProblem) -> str | None:
    """What no fused kernel does, whatever the device."""
    p = problem.params
    if problem.save and p.activation == "leaky_relu" and p.negative_slope < 0:
        return (
            f"leaky_relu's gradient is told from the sign of its output, which needs a slope of at least 0; "
            f"this one is {p.negative_slope}."
        )
    return None


def make_desc(problem: LinearProblem, row_strides: Sequence[int]) -> _native.LinearDesc:
    """The core's plan for inputs of these row strides."""
    p = problem.params
    return _native.LinearDesc(
        dtype=DTYPE_NAMES[problem.dtype],
        weight_dtype=_WEIGHT_NAMES[problem.weight_dtype],
        rows=problem.rows,
        out_features=problem.out_features,
        widths=problem.widths,
        row_strides=row_strides,
        activation=p.activation,
        negative_slope=p.negative_slope,
        save=problem.save,
    )


def row_stride(x: Tensor) -> int | None:
    """The distance of x's rows where they lie at equal distances, each dense; None where they do not."""
    if x.shape[-1] != 1 and x.stride(-1) != 1:
        return None
    step: int | None = None
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if step is None:
            first, step = stride, stride * size
        elif stride != step:
            return None
        else:
            step = stride * size
    return x.shape[-1] if step is None else first


_descs: BoundedCache[_native.LinearDesc] = BoundedCache(512)


def _prepare(problem: LinearProblem, inputs: Sequence[Tensor]) -> tuple[list[Tensor], _native.LinearDesc]:
    """The inputs in a layout that the core reads, and the core's plan for them."""
    readable, strides = [], []
    for x in inputs:
        stride = row_stride(x)
        readable.append(x if stride is not None else x.contiguous())
        strides.append(x.shape[-1] if stride is None else stride)
    key = (problem, *strides)
    return readable, _descs.get(key) or _descs.put(key, make_desc(problem, strides))


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def run(
    problem: LinearProblem,
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
) -> Two:
    y, pre = empty_outputs(problem)
    readable, desc = _prepare(problem, inputs)
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    scale = None if scale is None else scale.contiguous()
    _native.linear_forward(
        desc,
        [x.data_ptr() for x in readable],
        weight.data_ptr(),
        pointer(scale),
        pointer(bias),
        y.data_ptr(),
        pre.data_ptr(),
        torch.get_num_threads(),
    )
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
    readable, desc = _prepare(problem, inputs)
    grad_y, weight, pre = grad_y.contiguous(), weight.contiguous(), pre.contiguous()
    y = y.contiguous() if y is not None and problem.params.backward_needs_y else None
    *grad_inputs, grad_weight, grad_bias = (g.data_ptr() for g in grads)
    _native.linear_backward(
        desc,
        grad_y.data_ptr(),
        [x.data_ptr() for x in readable],
        weight.data_ptr(),
        pointer(y),
        pre.data_ptr(),
        grad_inputs,
        grad_weight,
        grad_bias,
        torch.get_num_threads(),
    )
    return grads
