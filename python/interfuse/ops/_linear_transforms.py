"""How autograd, forward-mode differentiation and vmap see the registered linear ops."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from interfuse.ops._linear_problem import PARAM_COUNT, LinearParams
from interfuse.ops._vmap import is_mapped, sample, stacked
from interfuse.reference import linear as reference
from interfuse.torch_state import (
    SingleLevelFunction,
    apply_at_this_level,
    has_tangent,
    redispatch_below_autograd,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interfuse.ops._linear_problem import Two


class Tensors(NamedTuple):
    """What the forward op takes, in its order."""

    inputs: Sequence[Tensor]
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """In the order of the backward op's mask and results."""
        return (*self.inputs, self.weight, self.bias)


def call_backward(
    params: LinearParams, grad_y: Tensor, tensors: Tensors, y: Tensor | None, pre: Tensor, mask: list[bool]
) -> list[Tensor]:
    """The registered backward op."""
    return torch.ops.interfuse.linear_backward.default(grad_y, *tensors, y, pre, *params.as_args(), mask)


class ThroughOp:
    """The registered ops, called from the autograd kernel of one of them."""

    def __init__(self, op: Any, keyset: Any, params: LinearParams) -> None:
        self.op, self.keyset, self.params = op, keyset, params

    def forward(self, tensors: Tensors) -> Two:
        return redispatch_below_autograd(self.op, self.keyset, *tensors, *self.params.as_args(), True)

    def backward(self, *arguments: Any) -> list[Tensor]:
        return call_backward(self.params, *arguments)


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _params(args: Sequence[Any]) -> LinearParams:
    return LinearParams(*args[:PARAM_COUNT])


class Forward(SingleLevelFunction):
    """linear with what its backward needs saved, whether or not the caller asked for that."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: ThroughOp,
        save: bool,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        *inputs: Tensor,
    ) -> Two:
        y, pre = kernels.forward(Tensors(inputs, weight, bias, scale))
        kept = y if kernels.params.backward_needs_y else None
        ctx.save_for_backward(kept, pre, weight, bias, scale, *inputs)
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        if not save:
            pre = pre.new_empty(0)
        ctx.mark_non_differentiable(pre)
        return y, pre

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        if grad_y is None:
            return (None,) * len(needs)
        y, pre, weight, bias, scale, *inputs = ctx.saved_tensors
        mask = [*needs[5:], needs[2], needs[3]]
        grads = ctx.kernels.backward(grad_y, Tensors(inputs, weight, bias, scale), y, pre, mask)
        *by_inputs, by_weight, by_bias = (
            g if wanted else None for g, wanted in zip(grads, mask, strict=True)
        )
        return (None, None, by_weight, by_bias, None, *by_inputs)


class _Backward(SingleLevelFunction):
    """The backward op, whose own derivative is that of the reference's backward."""

    @staticmethod
    def forward(
        ctx: Any,
        op: Any,
        keyset: Any,
        params: LinearParams,
        mask: list[bool],
        y: Tensor | None,
        pre: Tensor,
        scale: Tensor | None,
        grad_y: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(scale, grad_y, bias, weight, *inputs)
        ctx.params, ctx.mask = params, mask
        ctx.set_materialize_grads(False)
        tensors = Tensors(inputs, weight, bias, scale)
        return tuple(redispatch_below_autograd(op, keyset, grad_y, *tensors, y, pre, *params.as_args(), mask))

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor | None) -> tuple[Any, ...]:
        scale, *values = ctx.saved_tensors
        wanted = [s is not None and asked for s, asked in zip(seconds, ctx.mask, strict=True)]
        nothing = (None,) * 7
        if not any(wanted):
            return (*nothing, *(None for _ in values))
        # An int8 weight is a constant; a bias may not be there.
        places = [i for i, t in enumerate(values) if t is not None and t.is_floating_point()]

        def gradients(*leaves: Tensor) -> tuple[Tensor, ...]:
            all_values = list(values)
            for place, leaf in zip(places, leaves, strict=True):
                all_values[place] = leaf
            grad_y, bias, weight, *inputs = all_values
            results = reference.backward(grad_y, inputs, weight, bias, scale, ctx.params, wanted)
            return tuple(r for r in results if r is not None)

        vjp = torch.func.vjp(gradients, *[values[i] for i in places])[1]
        found = dict(
            zip(places, vjp(tuple(s for s, want in zip(seconds, wanted, strict=True) if want)), strict=True)
        )
        return (*nothing, *(found.get(i) for i in range(len(values))))


def autograd_kernel(op: Any, keyset: Any, *args: Any) -> Two:
    tensors, params, save = Tensors(*args[:4]), _params(args[4:]), args[-1]
    values = tensors.differentiable()
    if has_tangent(*values):
        return reference.forward(*tensors, params), tensors.inputs[0].new_empty(0)
    if _wants_grad(*values):
        inputs, weight, bias, scale = tensors
        kernels = ThroughOp(op, keyset, params)
        return apply_at_this_level(Forward, kernels, save, weight, bias, scale, *inputs)
    return redispatch_below_autograd(op, keyset, *args)


def autograd_kernel_backward(op: Any, keyset: Any, *args: Any) -> list[Tensor]:
    grad_y, tensors, (y, pre), params, mask = (
        args[0],
        Tensors(*args[1:5]),
        args[5:7],
        _params(args[7:]),
        args[-1],
    )
    inputs, weight, bias, scale = tensors
    values = (grad_y, *tensors.differentiable())
    if has_tangent(*values):
        results = reference.backward(grad_y, *tensors, params, mask)
        return [grad_y.new_empty(0) if r is None else r for r in results]
    if _wants_grad(*values):
        flat = (y, pre, scale, grad_y, bias, weight, *inputs)
        return list(apply_at_this_level(_Backward, op, keyset, params, mask, *flat))
    return redispatch_below_autograd(op, keyset, *args)


def register_autograd(library: torch.library.Library, op: Any, backward_op: Any) -> None:
    library.impl("linear", partial(autograd_kernel, op), "Autograd", with_keyset=True)
    library.impl(
        "linear_backward", partial(autograd_kernel_backward, backward_op), "Autograd", with_keyset=True
    )


# vmap. Where only the inputs are mapped, the mapped dimension joins their leading ones. Otherwise each sample
# is a call: its weight, or the weight's gradient, is its own.


def _in_front(t: Tensor, dim: int | None, count: int) -> Tensor:
    return t.unsqueeze(0).expand(count, *t.shape) if dim is None else t.movedim(dim, 0)


def _vmap_forward(op: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    count, (inputs, *weights), rest = info.batch_size, args[:4], args[4:]
    if is_mapped(in_dims[1:4]):
        return stacked([op(*sample(args[:4], in_dims[:4], i), *rest) for i in range(count)])
    together = [_in_front(x, d, count) for x, d in zip(inputs, in_dims[0], strict=True)]
    y, pre = op(together, *weights, *rest)
    return (y, pre), (0, 0 if pre.dim() > 1 else None)


def _vmap_backward(op: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    count, (grad_y, inputs, *weights, y, pre), rest = info.batch_size, args[:7], args[7:]
    mask = rest[-1]
    if is_mapped(in_dims[2:5]) or mask[-1] or mask[-2]:
        samples = [op(*sample(args[:7], in_dims[:7], i), *rest) for i in range(count)]
        results, dims = stacked(samples)
        return list(results), list(dims)
    together = [_in_front(x, d, count) for x, d in zip(inputs, in_dims[1], strict=True)]
    kept = None if y is None else _in_front(y, in_dims[5], count)
    # (0,) where the activation needs none, also for a single sample.
    has_pre = _params(rest).saves_pre
    saved = _in_front(pre, in_dims[6], count) if has_pre else sample(pre, in_dims[6], 0)
    results = op(_in_front(grad_y, in_dims[0], count), together, *weights, kept, saved, *rest)
    return results, [0 if wanted else None for wanted in mask]


def register_vmap(library: torch.library.Library, op: Any, backward_op: Any) -> None:
    torch.library.register_vmap("interfuse::linear", partial(_vmap_forward, op), lib=library)
    torch.library.register_vmap(
        "interfuse::linear_backward", partial(_vmap_backward, backward_op), lib=library
    )
