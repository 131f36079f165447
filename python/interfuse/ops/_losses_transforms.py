"""How autograd, forward-mode differentiation and vmap see the registered linear_cross_entropy ops."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interfuse.ops._losses_problem import PARAM_COUNT, CrossEntropyParams, Results, Tensors
from interfuse.ops._vmap import sample, stacked
from interfuse.reference import losses as reference
from interfuse.torch_state import (
    SingleLevelFunction,
    apply_at_this_level,
    has_tangent,
    redispatch_below_autograd,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

TENSOR_COUNT = len(Tensors._fields)


def _params(args: Sequence[Any]) -> CrossEntropyParams:
    return CrossEntropyParams(*args[:PARAM_COUNT])


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class Forward(SingleLevelFunction):
    """The loss, with its gradients computed along with it where it is one number."""

    @staticmethod
    def forward(
        ctx: Any,
        op: Any,
        keyset: Any,
        params: CrossEntropyParams,
        asked: list[bool],
        target: Tensor,
        weight: Tensor | None,
        x: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
    ) -> Results:
        mask = [bool(needed) for needed in ctx.needs_input_grad[6:]]
        computed = [ours or theirs for ours, theirs in zip(mask, asked, strict=True)] if asked else mask
        t = Tensors(x, linear_weight, target, linear_bias, weight)
        results = Results(*redispatch_below_autograd(op, keyset, *t, *params.as_args(), computed))
        ctx.save_for_backward(*t, *results[1:])
        ctx.params, ctx.mask = params, mask
        ctx.set_materialize_grads(False)
        if not asked:
            results = Results(results.loss, *(r.new_empty(0) for r in results[1:]))
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        before = (None,) * 6
        if grad_loss is None:
            return (*before, None, None, None)
        saved = ctx.saved_tensors
        t, lse, grads = Tensors(*saved[:TENSOR_COUNT]), saved[TENSOR_COUNT], saved[TENSOR_COUNT + 1 :]
        params, mask = ctx.params, ctx.mask
        if torch.is_grad_enabled() or not params.is_number:
            backward_op = torch.ops.interfuse.linear_cross_entropy_backward.default
            grads = backward_op(grad_loss, *t, lse, *params.as_args(), mask)
        else:
            # A product and not the saved tensor itself: what is returned may become somebody's .grad, which
            # the next backward adds to in place.
            grads = [g * grad_loss if wanted else g for g, wanted in zip(grads, mask, strict=True)]
        return (*before, *(g if wanted else None for g, wanted in zip(grads, mask, strict=True)))


class _Backward(SingleLevelFunction):
    """The backward op, whose own derivative is that of the reference's backward."""

    @staticmethod
    def forward(
        ctx: Any,
        op: Any,
        keyset: Any,
        params: CrossEntropyParams,
        mask: list[bool],
        lse: Tensor,
        target: Tensor,
        weight: Tensor | None,
        grad_loss: Tensor,
        x: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
    ) -> tuple[Tensor, ...]:
        t = Tensors(x, linear_weight, target, linear_bias, weight)
        ctx.save_for_backward(grad_loss, *t)
        ctx.params, ctx.mask = params, mask
        ctx.set_materialize_grads(False)
        return tuple(redispatch_below_autograd(op, keyset, grad_loss, *t, lse, *params.as_args(), mask))

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor | None) -> tuple[Any, ...]:
        grad_loss, *rest = ctx.saved_tensors
        t = Tensors(*rest)
        wanted = [s is not None and asked for s, asked in zip(seconds, ctx.mask, strict=True)]
        before = (None,) * 7
        if not any(wanted):
            return (*before, None, None, None, None)
        leaves = [grad_loss, t.input, t.linear_weight]
        if t.linear_bias is not None:
            leaves.append(t.linear_bias)

        def gradients(grad: Tensor, x: Tensor, linear_weight: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
            given = Tensors(x, linear_weight, t.target, bias[0] if bias else None, t.weight)
            results = reference.cross_entropy_backward(grad, given, ctx.params, wanted)
            return tuple(r for r in results if r is not None)

        vjp = torch.func.vjp(gradients, *leaves)[1]
        found = vjp(tuple(s for s, want in zip(seconds, wanted, strict=True) if want))
        return (*before, *found, *([None] if t.linear_bias is None else []))


def autograd_kernel(op: Any, keyset: Any, *args: Any) -> Results:
    t, params, asked = Tensors(*args[:TENSOR_COUNT]), _params(args[TENSOR_COUNT:]), args[-1]
    values = (t.input, t.linear_weight, t.linear_bias)
    if has_tangent(*values):
        loss = reference.cross_entropy(t, params)
        nothing = [t.input.new_empty(0) for _ in range(3)]
        return Results(loss, loss.new_empty(0), *nothing)
    if _wants_grad(*values):
        return apply_at_this_level(Forward, op, keyset, params, list(asked), t.target, t.weight, *values)
    return redispatch_below_autograd(op, keyset, *args)


def autograd_kernel_backward(op: Any, keyset: Any, *args: Any) -> Any:
    grad_loss, t, lse = args[0], Tensors(*args[1 : TENSOR_COUNT + 1]), args[TENSOR_COUNT + 1]
    params, mask = _params(args[TENSOR_COUNT + 2 :]), args[-1]
    values = (t.input, t.linear_weight, t.linear_bias)
    if has_tangent(grad_loss, *values):
        results = reference.cross_entropy_backward(grad_loss, t, params, mask)
        return tuple(t.input.new_empty(0) if r is None else r for r in results)
    if _wants_grad(grad_loss, *values):
        rest = (lse, t.target, t.weight, grad_loss, *values)
        return apply_at_this_level(_Backward, op, keyset, params, list(mask), *rest)
    return redispatch_below_autograd(op, keyset, *args)


def register_autograd(library: torch.library.Library, op: Any, backward_op: Any) -> None:
    library.impl("linear_cross_entropy", partial(autograd_kernel, op), "Autograd", with_keyset=True)
    library.impl(
        "linear_cross_entropy_backward",
        partial(autograd_kernel_backward, backward_op),
        "Autograd",
        with_keyset=True,
    )


def _vmap(op: Any, count: int, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """Each sample is a call: its logits are as large as all else together, so that nothing is lost."""
    samples = [op(*sample(args[:count], in_dims[:count], i), *args[count:]) for i in range(info.batch_size)]
    return stacked(samples)


def register_vmap(library: torch.library.Library, op: Any, backward_op: Any) -> None:
    torch.library.register_vmap(
        "interfuse::linear_cross_entropy", partial(_vmap, op, TENSOR_COUNT), lib=library
    )
    torch.library.register_vmap(
        "interfuse::linear_cross_entropy_backward",
        partial(_vmap, backward_op, TENSOR_COUNT + 2),
        lib=library,
    )
