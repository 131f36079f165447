"""How autograd, forward-mode differentiation and vmap see the registered conv_pool ops."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interfuse.autocast import without_autocast
from interfuse.ops._conv_pool_checks import op_params
from interfuse.reference import conv_pool as reference
from interfuse.torch_state import (
    SingleLevelFunction,
    apply_at_this_level,
    has_tangent,
    is_batched_gradient,
    redispatch_below_autograd,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from interfuse.ops._conv_pool_eager import Direct
    from interfuse.ops._conv_pool_problem import ConvPoolParams, Three

    Saved = tuple[
        Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor
    ]  # x, weight, bias, y, index, pre


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class ThroughOp:
    """The kernels of one call, reached through the dispatcher."""

    def __init__(self, op: Any, keyset: Any, args: tuple[Any, ...]) -> None:
        self.op, self.keyset, self.args = op, keyset, args
        self.params = op_params(args)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Three:
        return redispatch_below_autograd(self.op, self.keyset, x, weight, bias, *self.args, True)

    def backward(self, grad_y: Tensor, saved: Saved, mask: list[bool]) -> Three:
        return backward_op(self.params, grad_y, saved, mask)


def backward_op(params: ConvPoolParams, grad_y: Tensor, saved: Saved, mask: list[bool]) -> Three:
    return torch.ops.interfuse.conv_pool_backward.default(grad_y, *saved, *params.as_args(), mask)


class Forward(SingleLevelFunction):
    """conv_pool with what its backward needs saved, whether or not the caller asked for that."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: ThroughOp | Direct,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        save: bool,
    ) -> Three:
        y, index, pre = kernels.forward(x, weight, bias)
        ctx.save_for_backward(x, weight, bias, y if kernels.params.backward_needs_y else None, index, pre)
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        if not save:
            index, pre = index.new_empty(0), pre.new_empty(0)
        ctx.mark_non_differentiable(index, pre)
        return y, index, pre

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_y is None:
            return (None,) * 5
        mask = list(ctx.needs_input_grad[1:4])
        if is_batched_gradient(grad_y):  # which has rules for torch's own ops only
            x, weight, bias = ctx.saved_tensors[:3]
            grads = reference.backward(grad_y, x, weight, bias, ctx.kernels.params, mask)
        else:
            grads = ctx.kernels.backward(grad_y, ctx.saved_tensors, mask)
        return (None, *(g if wanted else None for g, wanted in zip(grads, mask, strict=True)), None)


class _Backward(SingleLevelFunction):
    """The backward op, whose own derivative is that of the reference's backward."""

    @staticmethod
    def forward(
        ctx: Any,
        op: Any,
        keyset: Any,
        grad_y: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *rest: Any,
    ) -> Three:
        grads = redispatch_below_autograd(op, keyset, grad_y, x, weight, bias, *rest)
        ctx.save_for_backward(grad_y, x, weight, bias)
        ctx.params, ctx.mask = op_params(rest[3:]), rest[-1]
        ctx.set_materialize_grads(False)
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        grad_y, x, weight, bias = ctx.saved_tensors
        wanted = [g is not None and asked for g, asked in zip(grads, ctx.mask, strict=True)]
        nothing = (None,) * (len(ctx.needs_input_grad) - 6)
        if not any(wanted):
            return (None,) * len(ctx.needs_input_grad)

        def gradients(
            grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
        ) -> tuple[Tensor, ...]:
            results = reference.backward(grad_y, x, weight, bias, ctx.params, wanted)
            return tuple(g for g, want in zip(results, wanted, strict=True) if want and g is not None)

        inputs = [t for t in (grad_y, x, weight, bias) if t is not None]
        vjp = torch.func.vjp(gradients, *inputs)[1]
        second = vjp(tuple(g for g, want in zip(grads, wanted, strict=True) if want))
        second = (*second, None) if bias is None else second
        return (None, None, *second, *nothing)


def autograd_kernel(
    op: Any,
    torch_trains: Callable[[Tensor, Tensor, Tensor | None, Sequence[Any]], bool],
    keyset: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *args: Any,
) -> Three:
    wants_grad = _wants_grad(x, weight, bias)
    # Without the saved tensors being asked for, nothing tells whose backward runs.
    if has_tangent(x, weight, bias) or (wants_grad and not args[-1] and torch_trains(x, weight, bias, args)):
        with without_autocast(x.device):  # the caller has cast already
            y = reference.forward(x, weight, bias, op_params(args))
        index = torch.empty(0, dtype=torch.uint8, device=x.device)
        return y, index, torch.empty(0, dtype=x.dtype, device=x.device)
    if wants_grad:
        kernels = ThroughOp(op, keyset, args[:-1])
        return apply_at_this_level(Forward, kernels, x, weight, bias, args[-1])
    return redispatch_below_autograd(op, keyset, x, weight, bias, *args)


def autograd_kernel_backward(
    op: Any, keyset: Any, grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> Three:
    if has_tangent(grad_y, x, weight, bias):
        mask = rest[-1]
        grads = reference.backward(grad_y, x, weight, bias, op_params(rest[3:]), mask)
        empty = torch.empty(0, dtype=x.dtype, device=x.device)
        grad_x, grad_weight, grad_bias = (empty if g is None else g for g in grads)
        return grad_x, grad_weight, grad_bias
    if _wants_grad(grad_y, x, weight, bias):
        return apply_at_this_level(_Backward, op, keyset, grad_y, x, weight, bias, *rest)
    return redispatch_below_autograd(op, keyset, grad_y, x, weight, bias, *rest)


def register_autograd(library: torch.library.Library, op: Any, backward_op: Any, torch_trains: Any) -> None:
    library.impl("conv_pool", partial(autograd_kernel, op, torch_trains), "Autograd", with_keyset=True)
    library.impl(
        "conv_pool_backward", partial(autograd_kernel_backward, backward_op), "Autograd", with_keyset=True
    )


# vmap. The mapped dimension goes into the batch where only x is mapped; otherwise into the channels, with
# that many times the groups, so that every sample meets its own weight in one call of the op.


def _front(t: Tensor, dim: int | None, count: int) -> Tensor:
    """t with the mapped dimension first, repeated without a copy where t is not mapped."""
    return t.unsqueeze(0).expand(count, *t.shape) if dim is None else t.movedim(dim, 0)


def _into_batch(t: Tensor, dim: int | None, count: int) -> Tensor:
    return _front(t, dim, count).flatten(0, 1)


def _into_channels(t: Tensor, dim: int | None, count: int) -> Tensor:
    """(B, N, C, ...) as (N, B * C, ...)."""
    return _front(t, dim, count).movedim(0, 1).flatten(1, 2)


def _split(t: Tensor, axis: int, count: int) -> tuple[Tensor, int | None]:
    """A result's mapped dimension out of its batch (axis 0) or channels (axis 1); unused results are (0,)."""
    return (t, None) if t.dim() == 1 else (t.unflatten(axis, (count, -1)), axis)


def _vmap_forward(
    op: Any, info: Any, in_dims: tuple[Any, ...], x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Any, Any]:
    count, (x_dim, w_dim, b_dim) = info.batch_size, in_dims[:3]
    if w_dim is None and b_dim is None:
        results, axis = op(_into_batch(x, x_dim, count), weight, bias, *args), 0
    else:
        params = op_params(args)
        results, axis = (
            op(
                _into_channels(x, x_dim, count),
                _into_batch(weight, w_dim, count),
                None if bias is None else _into_batch(bias, b_dim, count),
                *replace(params, groups=params.groups * count).as_args(),
                args[-1],
            ),
            1,
        )
    pairs = [_split(t, axis, count) for t in results]
    return tuple(t for t, _ in pairs), tuple(dim for _, dim in pairs)


def _vmap_backward(
    op: Any,
    info: Any,
    in_dims: tuple[Any, ...],
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor | None,
    index: Tensor,
    pre: Tensor,
    *args: Any,
) -> tuple[Any, Any]:
    count, mask = info.batch_size, args[-1]
    g_dim, x_dim, w_dim, b_dim, y_dim, index_dim, pre_dim = in_dims[:7]
    params = op_params(args)
    batched = w_dim is None and b_dim is None and not mask[1] and not mask[2]
    fold: Callable[[Tensor, int | None, int], Tensor] = _into_batch if batched else _into_channels

    def saved(t: Tensor, dim: int | None) -> Tensor:
        return t if t.dim() - (dim is not None) == 1 else fold(t, dim, count)

    if not batched:
        weight = _into_batch(weight, w_dim, count)
        bias = None if bias is None else _into_batch(bias, b_dim, count)
        params = replace(params, groups=params.groups * count)
    grad_x, grad_weight, grad_bias = op(
        fold(grad_y, g_dim, count),
        fold(x, x_dim, count),
        weight,
        bias,
        None if y is None else fold(y, y_dim, count),
        saved(index, index_dim),
        saved(pre, pre_dim),
        *params.as_args(),
        mask,
    )
    pairs = [_split(grad_x, 0 if batched else 1, count) if mask[0] else (grad_x, None)]
    for grad, asked in ((grad_weight, mask[1]), (grad_bias, mask[2])):
        pairs.append((grad.unflatten(0, (count, -1)), 0) if asked else (grad, None))
    return tuple(t for t, _ in pairs), tuple(dim for _, dim in pairs)


def register_vmap(library: torch.library.Library, op: Any, backward_op: Any) -> None:
    torch.library.register_vmap("interfuse::conv_pool", partial(_vmap_forward, op), lib=library)
    torch.library.register_vmap(
        "interfuse::conv_pool_backward", partial(_vmap_backward, backward_op), lib=library
    )
