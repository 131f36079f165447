"""pool(act(conv(x, weight) + bias)) in plain torch, with its backward as the formula, not as autograd.

The backward is written with torch's own backward ops so that it runs inside a kernel (where autograd is
switched off) and can itself be differentiated: create_graph goes through this file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from interfuse.activations import activate, activate_backward
from interfuse.autocast import without_autocast
from interfuse.ops._conv_pool_problem import ConvPoolParams, ConvPoolProblem, memory_format, weight_format

if TYPE_CHECKING:
    from collections.abc import Sequence

aten = torch.ops.aten

_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_AVG_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def _pad(x: Tensor, p: ConvPoolParams) -> tuple[Tensor, tuple[int, ...]]:
    """x and the padding left for the convolution, which only knows equal sides."""
    lo, hi = p.padding[0::2], p.padding[1::2]
    if lo == hi:
        return x, lo
    sides = [side for d in reversed(range(p.spatial)) for side in (lo[d], hi[d])]
    return F.pad(x, sides), (0,) * p.spatial


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, p: ConvPoolParams) -> Tensor:
    x, padding = _pad(x, p)
    return _CONVS[p.spatial](x, weight, bias, p.stride, padding, p.dilation, p.groups)


def _activate(t: Tensor, p: ConvPoolParams) -> Tensor:
    return activate(t, p.activation, p.negative_slope)


def _max_pool(t: Tensor, p: ConvPoolParams) -> tuple[Tensor, Tensor]:
    """The pooled values, and each winner's flat position in its channel's plane."""
    return _MAX_POOLS[p.spatial](
        t, p.pool_size, p.pool_stride, p.pool_padding, 1, ceil_mode=p.ceil_mode, return_indices=True
    )


def _pool(t: Tensor, p: ConvPoolParams) -> Tensor:
    if p.pool == "none":
        return t
    if p.pool == "avg":
        return _AVG_POOLS[p.spatial](
            t, p.pool_size, p.pool_stride, p.pool_padding, p.ceil_mode, p.count_include_pad
        )
    return _MAX_POOLS[p.spatial](t, p.pool_size, p.pool_stride, p.pool_padding, 1, p.ceil_mode)


def _pool_backward(grad: Tensor, t: Tensor, p: ConvPoolParams) -> Tensor:
    if p.pool == "none":
        return grad
    if p.spatial == 1:  # torch has no 1-d pooling backward of its own: a plane of height 1
        size, stride, padding = (1, *p.pool_size), (1, *p.pool_stride), (0, *p.pool_padding)
        grad, t = grad.unsqueeze(2), t.unsqueeze(2)
    else:
        size, stride, padding = p.pool_size, p.pool_stride, p.pool_padding
    if p.pool == "avg":
        op = aten.avg_pool3d_backward if p.spatial == 3 else aten.avg_pool2d_backward
        out = op(grad, t, size, stride, padding, p.ceil_mode, p.count_include_pad, None)
    elif p.spatial == 3:
        _, where = aten.max_pool3d_with_indices(t, size, stride, padding, 1, p.ceil_mode)
        out = aten.max_pool3d_with_indices_backward(
            grad, t, size, stride, padding, [1, 1, 1], p.ceil_mode, where
        )
    else:
        _, where = aten.max_pool2d_with_indices(t, size, stride, padding, 1, p.ceil_mode)
        out = aten.max_pool2d_with_indices_backward(
            grad, t, size, stride, padding, [1, 1], p.ceil_mode, where
        )
    return out.squeeze(2) if p.spatial == 1 else out


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, p: ConvPoolParams) -> Tensor:
    """The output alone. Differentiable by torch in every way that torch's own functions are, and as fast."""
    pre = _convolve(x, weight, bias, p)
    # In place where nothing else needs the values: fresh memory costs more than the arithmetic.
    fresh = p.activation == "relu" and pre.dtype == torch.float32 and not pre.requires_grad
    return _pool(torch.relu_(pre) if fresh else _activate(pre, p), p)


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, p: ConvPoolParams, mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias where the mask asks for them, computed from the inputs anew."""
    pre = _convolve(x, weight, bias, p)
    value = _activate(pre, p)
    grad = activate_backward(_pool_backward(grad_y, value, p), pre, value, p.activation, p.negative_slope)
    padded, padding = _pad(x, p)
    grad_x, grad_weight, grad_bias = aten.convolution_backward(
        grad,
        padded,
        weight,
        [weight.shape[0]],
        p.stride,
        padding,
        p.dilation,
        False,
        [0] * p.spatial,
        p.groups,
        list(mask),
    )
    if mask[0] and padded is not x:
        for d in range(p.spatial):
            grad_x = grad_x.narrow(2 + d, p.padding[2 * d], x.shape[2 + d])
    return grad_x, grad_weight, grad_bias


def _window_position(where: Tensor, pre: Tensor, p: ConvPoolParams) -> Tensor:
    """Row-major position inside each window, from the flat position in the plane."""
    position = torch.zeros_like(where)
    rest = where
    factor = 1
    for d in reversed(range(p.spatial)):
        size = pre.shape[2 + d]
        starts = torch.arange(where.shape[2 + d], device=where.device) * p.pool_stride[d] - p.pool_padding[d]
        starts = starts.view([-1 if axis == d else 1 for axis in range(p.spatial)])
        position = position + factor * (rest % size - starts)
        rest = rest // size
        factor *= p.pool_size[d]
    return position


def run(
    problem: ConvPoolProblem, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered op: (y, index, pre), with index and pre as every implementation saves them."""
    with without_autocast(x.device):  # the caller has cast already
        return _run(problem, x, weight, bias)


def _run(
    problem: ConvPoolProblem, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    p, form = problem.params, memory_format(problem)
    index = torch.empty(0, dtype=torch.uint8, device=x.device)
    saved = torch.empty(0, dtype=x.dtype, device=x.device)
    pre = _convolve(x, weight, bias, p)
    value = _activate(pre, p)
    if not (problem.save and p.pool == "max"):
        y = _pool(value, p)
        if problem.save and p.saves_pre == "conv":
            saved = (value if p.activation in ("relu", "leaky_relu", "tanh", "sigmoid") else pre).clone(
                memory_format=form
            )
        elif problem.save and p.saves_pre == "pooled":
            saved = pre.clone(memory_format=form)
        return y.contiguous(memory_format=form), index, saved
    y, where = _max_pool(value, p)
    if p.saves_index:
        position = _window_position(where, pre, p)
        if p.activation == "relu":
            position = torch.where(y <= 0, 255, position)
        index = position.to(torch.uint8).contiguous(memory_format=form)
    if p.saves_pre:
        saved = pre.flatten(2).gather(2, where.flatten(2)).view_as(where).contiguous(memory_format=form)
    return y.contiguous(memory_format=form), index, saved


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered backward op. What the forward saved is not read: the reference computes it again."""
    with without_autocast(x.device):
        grads = backward(grad_y, x, weight, bias, problem.params, mask)
    forms = (memory_format(problem), weight_format(weight), torch.contiguous_format)
    nothing = torch.empty(0, dtype=x.dtype, device=x.device)
    grad_x, grad_weight, grad_bias = (
        nothing.clone() if g is None else g.contiguous(memory_format=form)
        for g, form in zip(grads, forms, strict=True)
    )
    return grad_x, grad_weight, grad_bias
