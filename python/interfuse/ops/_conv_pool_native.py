"""The compiled core as an implementation of conv_pool, and the short way to it in eager inference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interfuse import _native
from interfuse.bounded_cache import BoundedCache
from interfuse.ops import _native_limits
from interfuse.ops._conv_pool_problem import (
    ConvPoolProblem,
    Three,
    empty_gradients,
    empty_outputs,
    fused_why_not,
    memory_format,
    weight_format,
)
from interfuse.ops._native_limits import DTYPE_NAMES

if TYPE_CHECKING:
    from collections.abc import Sequence

_LARGEST_SIZE = 2**31 - 1


def why_not(problem: ConvPoolProblem) -> str | None:
    reason = _native_limits.why_not(problem.device, problem.dtype)
    if reason is not None:
        return reason
    if max(*problem.input, *problem.params.padding, *problem.params.dilation) > _LARGEST_SIZE:
        return f"the native kernels take sizes up to {_LARGEST_SIZE}; the input's are {problem.input}."
    return fused_why_not(problem)


def describe(problem: ConvPoolProblem) -> tuple[str, str]:
    """The kernel that the core would run for a dense x, and its reason for that one."""
    shape = (problem.batch, problem.in_channels, *problem.input)
    desc = make_desc(
        problem, torch.empty(shape, device="meta", memory_format=memory_format(problem)).stride()
    )
    return desc.algorithm, desc.why


def make_desc(
    problem: ConvPoolProblem, strides: tuple[int, ...], weight_channels_last: bool = False
) -> _native.ConvPoolDesc:
    """The core's plan for an x of these strides and a weight that lies so."""
    p, spatial = problem.params, problem.spatial
    return _native.ConvPoolDesc(
        spatial=spatial,
        dtype=DTYPE_NAMES[problem.dtype],
        channels_last=problem.channels_last,
        weight_channels_last=weight_channels_last,
        batch=problem.batch,
        in_channels=problem.in_channels,
        out_channels=problem.out_channels,
        groups=p.groups,
        input=problem.input,
        kernel=problem.kernel,
        stride=p.stride,
        padding=p.padding,
        dilation=p.dilation,
        x_strides=[*strides[:2], *[0] * (3 - spatial), *strides[2:]],
        activation=p.activation,
        negative_slope=p.negative_slope,
        pool=p.pool,
        pool_size=p.pool_size,
        pool_stride=p.pool_stride,
        pool_padding=p.pool_padding,
        ceil_mode=p.ceil_mode,
        count_include_pad=p.count_include_pad,
        precision=p.precision,
        save=problem.save,
    )


def reads(problem: ConvPoolProblem, x: Tensor) -> bool:
    """Whether the core takes x's strides as they are: unit stride along its innermost axis."""
    axis = 1 if problem.channels_last else -1
    return x.shape[axis] == 1 or x.stride(axis) == 1


def lies_channels_last(weight: Tensor) -> bool:
    return weight_format(weight) != torch.contiguous_format


_descs: BoundedCache[_native.ConvPoolDesc] = BoundedCache(512)


def _prepare(
    problem: ConvPoolProblem, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, _native.ConvPoolDesc]:
    """x and the weight in layouts that the core reads, and the core's plan for them."""
    if not reads(problem, x):
        x = x.contiguous(memory_format=memory_format(problem))
    last = lies_channels_last(weight)
    if not last:
        weight = weight.contiguous()
    key = (problem, x.stride(), last)
    return x, weight, _descs.get(key) or _descs.put(key, make_desc(*key))


def _covered(problem: ConvPoolProblem) -> bool:
    """Whether some window holds each element of the convolution: the core writes `pre` only under windows."""
    p = problem.params
    return all(
        step <= window and (count - 1) * step + window - pad >= size
        for size, count, window, step, pad in zip(
            problem.conv_sizes, problem.out_sizes, p.pool_size, p.pool_stride, p.pool_padding, strict=True
        )
    )


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def run(problem: ConvPoolProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Three:
    y, index, pre = empty_outputs(problem)
    if problem.batch == 0:
        return y, index, pre
    if pre.dim() > 1 and not _covered(problem):
        pre.zero_()
    x, weight, desc = _prepare(problem, x, weight)
    bias = None if bias is None else bias.contiguous()
    _native.conv_pool_forward(
        desc,
        x.data_ptr(),
        weight.data_ptr(),
        _pointer(bias),
        y.data_ptr(),
        index.data_ptr(),
        pre.data_ptr(),
        torch.get_num_threads(),
    )
    return y, index, pre


def run_backward(
    problem: ConvPoolProblem,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor | None,
    index: Tensor,
    pre: Tensor,
    mask: Sequence[bool],
) -> Three:
    grads = empty_gradients(problem, x, weight, mask)
    if problem.batch == 0:
        for grad in grads:
            grad.zero_()
        return grads
    x, weight, desc = _prepare(problem, x, weight)
    form = memory_format(problem)
    grad_y = grad_y.contiguous(memory_format=form)
    y = y.contiguous(memory_format=form) if y is not None and problem.params.backward_needs_y else None
    index, pre = (t.contiguous(memory_format=form) if t.dim() > 1 else t for t in (index, pre))
    grad_x, grad_weight, grad_bias = grads
    _native.conv_pool_backward(
        desc,
        grad_y.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        _pointer(y),
        index.data_ptr(),
        pre.data_ptr(),
        grad_x.data_ptr(),
        grad_weight.data_ptr(),
        grad_bias.data_ptr(),
        torch.get_num_threads(),
    )
    return grads
