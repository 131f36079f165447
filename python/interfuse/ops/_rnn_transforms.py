"""How autograd, forward-mode differentiation and vmap see the registered rnn ops."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from interfuse.ops._rnn_checks import PARAM_COUNT, Inputs, RnnParams, check, op_problem
from interfuse.ops._vmap import is_mapped, sample, stacked
from interfuse.reference import rnn as reference
from interfuse.torch_state import (
    SingleLevelFunction,
    apply_at_this_level,
    has_tangent,
    is_batched_gradient,
    redispatch_below_autograd,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interfuse.ops._rnn_problem import Four, RnnProblem


class Kernels(Protocol):
    """The kernels of one call, reached through the dispatcher or directly."""

    params: RnnParams
    needs_y: bool  # by the backward

    def forward(self, inputs: Inputs) -> Four: ...

    def backward(
        self,
        grads: Sequence[Tensor | None],
        inputs: Inputs,
        y: Tensor | None,
        reserve: Tensor,
        mask: list[bool],
    ) -> Sequence[Tensor | None]: ...


def call_backward(
    params: RnnParams,
    grads: Sequence[Tensor | None],
    inputs: Inputs,
    y: Tensor | None,
    reserve: Tensor,
    mask: list[bool],
) -> Sequence[Tensor]:
    """The registered backward op."""
    return torch.ops.interfuse.rnn_backward.default(*grads, *inputs, y, reserve, *params.as_args(), mask)


class ThroughOp:
    def __init__(self, op: Any, keyset: Any, params: RnnParams, needs_y: bool) -> None:
        self.op, self.keyset, self.params, self.needs_y = op, keyset, params, needs_y

    def forward(self, inputs: Inputs) -> Four:
        return redispatch_below_autograd(self.op, self.keyset, *inputs, *self.params.as_args(), True)

    def backward(self, *arguments: Any) -> Sequence[Tensor]:
        return call_backward(self.params, *arguments)


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class Forward(SingleLevelFunction):
    """rnn with what its backward needs saved, whether or not the caller asked for that."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        save: bool,
        x: Tensor,
        table: Tensor | None,
        lengths: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> Four:
        y, hn, cn, reserve = kernels.forward(Inputs(x, table, lengths, h0, c0, weights))
        kept = y if kernels.needs_y else None
        ctx.save_for_backward(x, table, lengths, h0, c0, *weights, kept, reserve)
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        if not save:
            reserve = reserve.new_empty(0)
        ctx.mark_non_differentiable(*((reserve,) if kernels.params.cell == "lstm" else (cn, reserve)))
        return y, hn, cn, reserve

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if all(g is None for g in grads[:3]):
            return (None,) * len(ctx.needs_input_grad)
        x, table, lengths, h0, c0, *weights, y, reserve = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        mask = [needs[0] or needs[1], *needs[3:]]
        inputs = Inputs(x, table, lengths, h0, c0, weights)
        if any(g is not None and is_batched_gradient(g) for g in grads[:3]):
            # which has rules for torch's own ops only
            params = ctx.kernels.params
            results = gradients(
                op_problem(*inputs, params, True), grads[:3], inputs, params.padding_idx, mask
            )
        else:
            results = ctx.kernels.backward(grads[:3], inputs, y, reserve, mask)
        grad_x, *rest = (g if wanted else None for g, wanted in zip(results, mask, strict=True))
        first = (grad_x, None) if table is None else (None, grad_x)
        return (None, None, *first, None, *rest)


def gradients(
    problem: RnnProblem,
    grads: Sequence[Tensor | None],
    inputs: Inputs,
    padding_idx: int,
    mask: Sequence[bool],
) -> list[Tensor | None]:
    """The backward op's results by the reference, differentiable themselves; None where not wanted."""
    x, table, lengths, h0, c0, weights = inputs
    rows = x if table is None else reference.chosen_rows(problem, x, table, lengths)
    results = reference.backward(problem, grads, rows, lengths, h0, c0, weights, mask)
    if table is not None and results[0] is not None:
        results[0] = table_gradient(problem, results[0], x, lengths, padding_idx)
    return results


def table_gradient(
    problem: RnnProblem, grad_rows: Tensor, ids: Tensor, lengths: Tensor | None, padding_idx: int
) -> Tensor:
    """The table's gradient from that of its chosen rows, which is zero beyond a sequence's end."""
    ids = reference.valid_ids(problem, ids, lengths)
    floats = grad_rows if problem.dtype == torch.float64 else grad_rows.float()
    table = torch.ops.aten.embedding_dense_backward(floats, ids, problem.vocabulary, padding_idx, False)
    return table.to(problem.dtype)


class _Backward(SingleLevelFunction):
    """The backward op, whose own derivative is that of the reference's backward."""

    @staticmethod
    def forward(
        ctx: Any,
        op: Any,
        keyset: Any,
        count: int,
        params: RnnParams,
        mask: list[bool],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        grads, inputs, saved = tensors[:3], unflatten(tensors[3:], count), tensors[8 + count :]
        ctx.save_for_backward(*tensors[: 8 + count])
        ctx.params, ctx.mask, ctx.count = params, mask, count
        ctx.set_materialize_grads(False)
        results = redispatch_below_autograd(op, keyset, *grads, *inputs, *saved, *params.as_args(), mask)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor | None) -> tuple[Any, ...]:
        tensors, count = ctx.saved_tensors, ctx.count
        inputs = unflatten(tensors[3:], count)
        wanted = [s is not None and asked for s, asked in zip(seconds, ctx.mask, strict=True)]
        # What can be differentiated: three gradients and the forward's inputs, neither ids nor lengths.
        places = [i for i, t in enumerate(tensors) if t is not None and t.is_floating_point()]
        if not any(wanted):
            return (None,) * len(ctx.needs_input_grad)
        problem = check(*inputs, ctx.params, False)

        def outputs(*leaves: Tensor) -> tuple[Tensor, ...]:
            all_tensors = list(tensors)
            for place, leaf in zip(places, leaves, strict=True):
                all_tensors[place] = leaf
            results = gradients(
                problem, all_tensors[:3], unflatten(all_tensors[3:], count), ctx.params.padding_idx, wanted
            )
            return tuple(r for r in results if r is not None)

        vjp = torch.func.vjp(outputs, *[tensors[i] for i in places])[1]
        found = dict(
            zip(places, vjp(tuple(s for s, want in zip(seconds, wanted, strict=True) if want)), strict=True)
        )
        return (*(None,) * 5, *(found.get(i) for i in range(len(ctx.needs_input_grad) - 5)))


def unflatten(tensors: Sequence[Any], count: int) -> Inputs:
    x, table, lengths, h0, c0 = tensors[:5]
    return Inputs(x, table, lengths, h0, c0, tensors[5 : 5 + count])


def _params(args: Sequence[Any]) -> RnnParams:
    return RnnParams(*args[:PARAM_COUNT])


def autograd_kernel(op: Any, needs_y: Any, keyset: Any, *args: Any) -> Four:
    inputs, params, save = Inputs(*args[:6]), _params(args[6:]), args[-1]
    values = inputs.differentiable()
    if has_tangent(*values):
        problem = check(*inputs, params, False)
        x, table, lengths, h0, c0, weights = inputs
        rows = x if table is None else reference.chosen_rows(problem, x, table, lengths)
        return *reference.forward(problem, rows, lengths, h0, c0, weights), _empty_reserve(weights)
    if _wants_grad(*values):
        kernels = ThroughOp(op, keyset, params, needs_y(check(*inputs, params, True)))
        return apply_at_this_level(Forward, kernels, save, *inputs[:5], *inputs.weights)
    return redispatch_below_autograd(op, keyset, *args)


def _empty_reserve(weights: Sequence[Tensor]) -> Tensor:
    return weights[0].new_empty(0, dtype=torch.float32)


def autograd_kernel_backward(op: Any, keyset: Any, *args: Any) -> Sequence[Tensor]:
    grads, inputs, params, mask = args[:3], Inputs(*args[3:9]), _params(args[11:]), args[-1]
    values = (*grads, *inputs.differentiable())
    if has_tangent(*values):
        problem = check(*inputs, params, False)
        results = gradients(problem, grads, inputs, params.padding_idx, mask)
        return [inputs.weights[0].new_empty(0) if r is None else r for r in results]
    if _wants_grad(*values):
        flat = (*grads, *inputs[:5], *inputs.weights, *args[9:11])
        return apply_at_this_level(_Backward, op, keyset, len(inputs.weights), params, mask, *flat)
    return redispatch_below_autograd(op, keyset, *args)


def register_autograd(library: torch.library.Library, op: Any, backward_op: Any, needs_y: Any) -> None:
    library.impl("rnn", partial(autograd_kernel, op, needs_y), "Autograd", with_keyset=True)
    library.impl("rnn_backward", partial(autograd_kernel_backward, backward_op), "Autograd", with_keyset=True)


# vmap. Where only sequences and states are mapped, the mapped dimension joins the batch. Otherwise each
# sample is a call: its weights are its own.


def _into_batch(t: Tensor | None, dim: int | None, count: int, axis: int) -> Tensor | None:
    """The mapped dimension, made one with the batch, which is the axis-th of a single sample."""
    if t is None:
        return None
    t = (
        t.unsqueeze(axis).expand(*t.shape[:axis], count, *t.shape[axis:])
        if dim is None
        else t.movedim(dim, axis)
    )
    return t.flatten(axis, axis + 1)


def _vmap_forward(op: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    count, inputs, rest = info.batch_size, Inputs(*args[:6]), args[6:]
    if is_mapped(in_dims[1]) or is_mapped(in_dims[5]):
        return stacked([op(*sample(args[:6], in_dims[:6], i), *rest) for i in range(count)])
    axis = 0 if _params(rest).batch_first else 1
    y, hn, cn, reserve = op(
        _into_batch(inputs.x, in_dims[0], count, axis),
        inputs.table,
        _into_batch(inputs.lengths, in_dims[2], count, 0),
        _into_batch(inputs.h0, in_dims[3], count, 1),
        _into_batch(inputs.c0, in_dims[4], count, 1),
        inputs.weights,
        *rest,
    )
    y, hn = y.unflatten(axis, (count, -1)), hn.unflatten(1, (count, -1))
    lstm = cn.dim() > 1
    cn = cn.unflatten(1, (count, -1)) if lstm else cn
    # The reserve is of all samples at once; the backward's rule below does not read it.
    return (y, hn, cn, reserve), (axis, 1, 1 if lstm else None, None)


def _vmap_backward(
    op: Any, forward_op: Any, info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Any, Any]:
    """Sample by sample. Where the forward ran for all samples at once it runs again for each."""
    rest, reserve_dim = args[11:], in_dims[10]
    again = reserve_dim is None and is_mapped(in_dims[3:9])
    samples = []
    for i in range(info.batch_size):
        grads, inputs = sample(args[:3], in_dims[:3], i), sample(args[3:9], in_dims[3:9], i)
        y, reserve = sample(args[9:11], in_dims[9:11], i)
        if again:
            reserve = forward_op(*inputs, *rest[:PARAM_COUNT], True)[3]
        samples.append(op(*grads, *inputs, y, reserve, *rest))
    results, dims = stacked(samples)
    return list(results), list(dims)


def register_vmap(library: torch.library.Library, op: Any, backward_op: Any) -> None:
    torch.library.register_vmap("interfuse::rnn", partial(_vmap_forward, op), lib=library)
    torch.library.register_vmap(
        "interfuse::rnn_backward", partial(_vmap_backward, backward_op, op), lib=library
    )
