"""How autograd, forward-mode differentiation and vmap see the registered attention ops."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interfuse.ops._attention_problem import PARAM_COUNT, AttentionParams, Three
from interfuse.reference import attention as reference
from interfuse.torch_state import (
    SingleLevelFunction,
    apply_at_this_level,
    has_tangent,
    redispatch_below_autograd,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _params(args: Sequence[Any]) -> AttentionParams:
    return AttentionParams(*args[:PARAM_COUNT])


class Forward(SingleLevelFunction):
    """attention with what its backward needs saved, whether or not the caller asked for that."""

    @staticmethod
    def forward(
        ctx: Any,
        op: Any,
        keyset: Any,
        params: AttentionParams,
        return_weights: bool,
        save: bool,
        *inputs: Tensor | None,
    ) -> Three:
        y, lse, weights = redispatch_below_autograd(
            op, keyset, *inputs, *params.as_args(), return_weights, True
        )
        ctx.save_for_backward(*inputs, y, lse)
        ctx.params = params
        ctx.set_materialize_grads(False)
        if not save:
            lse = lse.new_empty(0)
        ctx.mark_non_differentiable(*((lse,) if return_weights else (lse, weights)))
        return y, lse, weights

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, _: Any, grad_weights: Tensor | None) -> tuple[Any, ...]:
        nothing = (None,) * 5
        if grad_y is None and grad_weights is None:
            return nothing + (None,) * 6
        *inputs, y, lse = ctx.saved_tensors
        grad_y = torch.zeros_like(y) if grad_y is None else grad_y
        wanted = list(ctx.needs_input_grad[5:8])
        grads = torch.ops.interfuse.attention_backward.default(
            grad_y, grad_weights, *inputs, y, lse, *ctx.params.as_args(), wanted
        )
        return (*nothing, *(g if w else None for g, w in zip(grads, wanted, strict=True)), *(None,) * 3)


class _Backward(SingleLevelFunction):
    """The backward op, whose own derivative is that of the reference's backward."""

    @staticmethod
    def forward(
        ctx: Any, op: Any, keyset: Any, params: AttentionParams, wanted: list[bool], *tensors: Tensor | None
    ) -> Three:
        ctx.save_for_backward(*tensors[:8])
        ctx.params, ctx.wanted = params, wanted
        ctx.set_materialize_grads(False)
        return redispatch_below_autograd(op, keyset, *tensors, *params.as_args(), wanted)

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        asked = [i for i, s in enumerate(seconds) if s is not None and ctx.wanted[i]]
        nothing = (None,) * len(ctx.needs_input_grad)
        if not asked:
            return nothing
        # What can be differentiated: the gradients of y and of the weights, and q, k, v.
        places = [i for i in range(5) if tensors[i] is not None]

        def outputs(*leaves: Tensor) -> tuple[Tensor, ...]:
            given = list(tensors)
            for place, leaf in zip(places, leaves, strict=True):
                given[place] = leaf
            results = reference.backward(ctx.params, *given)
            return tuple(results[i] for i in asked)

        vjp = torch.func.vjp(outputs, *[tensors[i] for i in places])[1]
        found = dict(zip(places, vjp(tuple(seconds[i] for i in asked)), strict=True))
        return (*(None,) * 4, *(found.get(i) for i in range(len(nothing) - 4)))


def autograd_kernel(op: Any, keyset: Any, *args: Any) -> Three:
    inputs, params, return_weights, save = args[:6], _params(args[6:]), args[-2], args[-1]
    if has_tangent(*inputs[:4]):
        y, lse, weights = reference.forward(params, *inputs)
        return y, lse if save else lse.new_empty(0), weights if return_weights else weights.new_empty(0)
    if _wants_grad(inputs[3]):
        raise RuntimeError(
            "interfuse::attention gives no gradient of the mask, and this mask requires one. Call "
            "interfuse.ops.attention, which runs such a call by the reference, or detach the mask."
        )
    if _wants_grad(*inputs[:3]):
        return apply_at_this_level(Forward, op, keyset, params, return_weights, save, *inputs)
    return redispatch_below_autograd(op, keyset, *args)


def autograd_kernel_backward(op: Any, keyset: Any, *args: Any) -> Three:
    params, wanted = _params(args[10:]), args[-1]
    if has_tangent(*args[:5]):
        return reference.backward(params, *args[:8])
    if _wants_grad(*args[:5]):
        return apply_at_this_level(_Backward, op, keyset, params, wanted, *args[:10])
    return redispatch_below_autograd(op, keyset, *args)


def register_autograd(library: torch.library.Library, op: Any, backward_op: Any) -> None:
    library.impl("attention", partial(autograd_kernel, op), "Autograd", with_keyset=True)
    library.impl(
        "attention_backward", partial(autograd_kernel_backward, backward_op), "Autograd", with_keyset=True
    )


# vmap: every sample is an entry of a larger batch.


def _into_batch(t: Tensor | None, dim: int | None, count: int) -> Tensor | None:
    if t is None:
        return None
    t = t.unsqueeze(0).expand(count, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.flatten(0, 1)


def _mask_into_batch(mask: Tensor | None, dim: int | None, count: int, batch: int) -> Tensor | None:
    """A mask of any number of dimensions, which the batch then has one of."""
    if mask is None:
        return None
    mask = mask.unsqueeze(0) if dim is None else mask.movedim(dim, 0)
    mask = mask.reshape(mask.shape[0], *(1,) * (5 - mask.dim()), *mask.shape[1:])
    return mask.expand(count, batch, *mask.shape[2:]).flatten(0, 1)


def _batched_inputs(inputs: Sequence[Any], dims: Sequence[Any], count: int) -> list[Tensor | None]:
    q, q_dim = inputs[0], dims[0]
    batch = q.shape[0] if q_dim != 0 else q.shape[1]
    batched = [_into_batch(t, d, count) for t, d in zip(inputs, dims, strict=True)]
    batched[3] = _mask_into_batch(inputs[3], dims[3], count, batch)
    return batched


def _split(results: Three, count: int) -> tuple[Any, Any]:
    dims = tuple(0 if t.dim() > 1 else None for t in results)
    return tuple(t.unflatten(0, (count, -1)) if t.dim() > 1 else t for t in results), dims


def _vmap_forward(op: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    count = info.batch_size
    return _split(op(*_batched_inputs(args[:6], in_dims[:6], count), *args[6:]), count)


def _vmap_backward(op: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    count = info.batch_size
    grads, saved = (
        [_into_batch(t, d, count) for t, d in zip(args[part], in_dims[part], strict=True)]
        for part in (slice(0, 2), slice(8, 10))
    )
    inputs = _batched_inputs(args[2:8], in_dims[2:8], count)
    return _split(op(*grads, *inputs, *saved, *args[10:]), count)


def register_vmap(library: torch.library.Library, op: Any, backward_op: Any) -> None:
    torch.library.register_vmap("interfuse::attention", partial(_vmap_forward, op), lib=library)
    torch.library.register_vmap(
        "interfuse::attention_backward", partial(_vmap_backward, backward_op), lib=library
    )
