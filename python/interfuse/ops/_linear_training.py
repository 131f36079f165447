"""A training step of dense layers, one behind the other, as one step of autograd over the native kernels.

Forward and backward of all layers are one call of the core each. It is for eager calls in which nothing could
tell the difference (see _linear_eager.py); what backward cannot do this way goes through the registered ops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from interfuse._native import linear_training
from interfuse.bounded_cache import BoundedCache
from interfuse.ops._linear_checks import Options, resolve
from interfuse.reference import linear as reference
from interfuse.torch_state import (
    DLPACK_EXCHANGE,
    WATCHERS,
    SingleLevelFunction,
    apply,
    in_forward_mode,
    is_batched_gradient,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from interfuse._native import LinearDesc
    from interfuse.ops._linear_checks import Layer
    from interfuse.ops._linear_problem import LinearParams

_grad_enabled = torch.is_grad_enabled
_threads = torch.get_num_threads


class Steps(NamedTuple):
    """The core's two calls for tensors like those they were made for; each gives None for others."""

    forward: Callable[[tuple[Any, ...], tuple[Any, ...], int], tuple[list[Tensor], list[Tensor]] | None]
    backward: Callable[[Tensor, tuple[Any, ...], tuple[bool, ...], int], list[Tensor | None] | None]
    params: list[LinearParams]
    keeps: list[bool]  # whether backward reads what a layer gave


_recent: BoundedCache[Steps] = BoundedCache(1024)


def wanted(inputs: Sequence[Tensor], layers: Sequence[Layer]) -> bool:
    """Whether a gradient could be asked for."""
    for layer in layers:
        bias = layer[1]
        if layer[0].requires_grad or (bias is not None and bias.requires_grad):
            return True
    return any(x.requires_grad for x in inputs)


def again(inputs: Sequence[Tensor], layers: list[Layer]) -> Tensor | None:
    """The output of a step like a recent one, else None."""
    if in_forward_mode():
        return None
    try:
        steps = _recent.get((id(layers[0][0]), inputs[0].shape, len(layers)))
        if steps is None or not wanted(inputs, layers):
            return None
    except (RuntimeError, TypeError, IndexError, AttributeError):  # nested tensors, none, or none at all
        return None
    return _run(steps, inputs, layers)


def first(
    inputs: Sequence[Tensor], layers: list[Layer], descs: list[LinearDesc], sizes: Sequence[tuple[int, ...]]
) -> Tensor | None:
    """The output of a step that `descs` are the plans of; the next ones like it are run by `again`."""
    params = [resolve(Options(*arguments)) for *_, arguments in layers]
    # What a layer gives is the next one's input; the last one's only some activations need.
    keeps = [*(True for _ in params[1:]), params[-1].backward_needs_y]
    described = [
        (weight, bias, arguments, keep, size, torch.empty(size, device="meta").stride())
        for (weight, bias, _, arguments), keep, size in zip(layers, keeps, sizes, strict=True)
    ]
    calls = linear_training(DLPACK_EXCHANGE, WATCHERS, (Tensor, Parameter), descs, tuple(inputs), described)
    steps = Steps(*calls, params, keeps)
    _recent.put((id(layers[0][0]), inputs[0].shape, len(layers)), steps)
    return _run(steps, inputs, layers)


def _run(steps: Steps, inputs: Sequence[Tensor], layers: list[Layer]) -> Tensor | None:
    tensors: list[Any] = [*inputs]
    arguments = []
    for weight, bias, scale, values in layers:
        if scale is not None:
            return None
        tensors += (weight, bias)
        arguments.append(values)
    made = steps.forward(tuple(tensors), tuple(arguments), _threads())
    if made is None:
        return None
    y: Tensor = apply(_Chain, steps, *made, *tensors)
    return y


class _Chain(SingleLevelFunction):
    """What the core has computed, as a step of autograd."""

    @staticmethod
    def forward(
        ctx: Any, steps: Steps, ys: list[Tensor], pres: list[Tensor], *tensors: Tensor | None
    ) -> Tensor:
        kept = [y for y, keep in zip(ys, steps.keeps, strict=True) if keep]
        ctx.save_for_backward(*tensors, *kept, *pres)
        ctx.steps = steps
        ctx.set_materialize_grads(False)
        return ys[-1]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        if grad_y is None:
            return (None,) * len(needs)
        steps, saved, mask = ctx.steps, ctx.saved_tensors, needs[3:]
        grads = None
        # Saved tensors may come back through the user's hooks as anything, and grad_y from any transform.
        if not (_grad_enabled() or in_forward_mode() or is_batched_gradient(grad_y)):
            grads = steps.backward(grad_y.contiguous(), saved, mask, _threads())
        if grads is None:
            grads = _by_ops(steps.params, saved[: len(mask)], grad_y, mask)
        return (None, None, None, *grads)


def _by_ops(
    params: Sequence[LinearParams], tensors: Sequence[Tensor | None], grad_y: Tensor, mask: Sequence[bool]
) -> list[Tensor | None]:
    """The same gradients by ops that have derivatives and transforms of their own."""
    create, several = _grad_enabled(), is_batched_gradient(grad_y)
    with torch.enable_grad():
        apart: list[Any] = [
            _leaf(t) if yes and t is not None else t for t, yes in zip(tensors, mask, strict=True)
        ]
        count = len(apart) - 2 * len(params)
        values = apart[:count]
        for i, each in enumerate(params):
            weight, bias = apart[count + 2 * i], apart[count + 2 * i + 1]
            if several:  # is_grads_batched has rules for torch's own ops only
                y = reference.forward(values, weight, bias, None, each)
            else:
                y = torch.ops.interfuse.linear.default(values, weight, bias, None, *each.as_args(), False)[0]
            values = [y]
        leaves = [t for t, yes in zip(apart, mask, strict=True) if yes]
        grads = iter(torch.autograd.grad(values[0], leaves, grad_y, create_graph=create))
    return [next(grads) if yes else None for yes in mask]


def _leaf(t: Tensor) -> Tensor:
    """A view, because one tensor may stand in two places, whose gradients are asked for apart; a hook may
    have given it back without its graph."""
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
