"""The losses of two tensors as registered ops: implementations, fake kernels, autograd and vmap.

What is saved for backward are the inputs and numbers for each row, never a tensor of the inputs' size:
backward reads the inputs again, which was measured to be faster than to write the gradient and read it back.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interfuse.dispatch import Implementation, choose
from interfuse.ops import _losses_pairs_native as native
from interfuse.ops import _triton
from interfuse.ops._linear_native import row_stride
from interfuse.ops._losses_problem import Elements, Factor, PairProblem, empty_loss
from interfuse.ops._vmap import sample, stacked
from interfuse.reference import losses as reference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# ---- implementations


def _always(problem: PairProblem) -> str | None:
    return None


def _kernels() -> Any:
    from interfuse.kernels import losses_pairs

    return losses_pairs


def _triton_why_not(problem: PairProblem) -> str | None:
    return _triton.why_not(problem.device) or _kernels().why_not(problem)


def _in_triton(name: str) -> Callable[..., Any]:
    """triton is imported when a kernel is asked for."""

    def run(*arguments: Any) -> Any:
        return getattr(_kernels(), name)(*arguments)

    return run


def _tensors(e: Elements) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return e.input, e.target, e.weight.values, e.pos_weight.values


def _run_reference(e: Elements) -> Tensor:
    return reference.reduced(reference.elementwise(*_tensors(e), e.kind), e.reduction).clone()


def _run_reference_backward(grad_loss: Tensor, e: Elements) -> Tensor:
    grad = reference.elementwise_backward(grad_loss, *_tensors(e), e.kind, e.reduction)
    return grad.clone(memory_format=torch.contiguous_format)


# In order of preference; the references run everything.
ELEMENTWISE = (
    Implementation("native", native.why_not, native.run, native.run_backward),
    Implementation("triton", _triton_why_not, _in_triton("run"), _in_triton("run_backward")),
    Implementation("reference", _always, _run_reference, _run_reference_backward),
)
CONTRASTIVE = (
    Implementation("native", native.why_not, native.run_contrastive, native.run_contrastive_backward),
    Implementation(
        "triton", _triton_why_not, _in_triton("run_contrastive"), _in_triton("run_contrastive_backward")
    ),
    Implementation("reference", _always, reference.contrastive_rows, reference.contrastive_backward),
)
INFO_NCE = (
    Implementation("native", native.why_not, native.run_similarities, native.run_similarities_backward),
    Implementation(
        "triton", _triton_why_not, _in_triton("run_info_nce"), _in_triton("run_info_nce_backward")
    ),
    Implementation("reference", _always, reference.info_nce_rows, reference.info_nce_backward),
)


def _chosen(table: Sequence[Implementation], x: Tensor, backend: str) -> Implementation:
    return choose(table, PairProblem(x.dtype, x.device), backend)


# ---- registered ops


def _factor(t: Tensor | None, shape: torch.Size) -> Factor:
    if t is None:
        return Factor(None, (0, 0))
    t = t.expand(shape)
    if not shape:
        return Factor(t, (0, 0))
    rows = row_stride(t[..., :1])
    columns = 0 if shape[-1] == 1 else t.stride(-1)
    if rows is None or columns not in (0, 1):
        return Factor(t.contiguous(), (shape[-1], 1))
    return Factor(t, (rows, columns))


def _elements(
    x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, kind: str, reduction: str
) -> Elements:
    factors = _factor(weight, x.shape), _factor(pos_weight, x.shape)
    return Elements(x.contiguous(), target.contiguous(), *factors, kind, reduction)


def _run(x: Tensor, *args: Any) -> Tensor:
    *rest, backend = args
    return _chosen(ELEMENTWISE, x, backend).run(_elements(x, *rest))


def _run_backward(grad_loss: Tensor, x: Tensor, *args: Any) -> Tensor:
    *rest, backend = args
    return _chosen(ELEMENTWISE, x, backend).run_backward(grad_loss, _elements(x, *rest))


def _of_table(table: Sequence[Implementation], x: Tensor, *args: Any) -> Any:
    *rest, backend = args
    return _chosen(table, x, backend).run(x, *rest)


def _of_table_backward(table: Sequence[Implementation], grad_loss: Tensor, x: Tensor, *args: Any) -> Any:
    *rest, backend = args
    return _chosen(table, x, backend).run_backward(grad_loss, x, *rest)


def _fake(x: Tensor, *args: Any) -> Tensor:
    return empty_loss(x, args[-2])


def _fake_backward(grad_loss: Tensor, x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_contrastive(input1: Tensor, input2: Tensor, target: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty(target.shape, dtype=target.dtype, device=target.device) for _ in range(2))


def _fake_info_nce(input1: Tensor, input2: Tensor, symmetric: bool, backend: str) -> tuple[Tensor, ...]:
    rows = empty_loss(input1[:, 0], "none")
    other = torch.empty_like(rows) if symmetric else rows.new_empty(0)
    return rows, torch.empty_like(rows), other


def _fake_pair_backward(grad_loss: Tensor, input1: Tensor, input2: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (input1, input2))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, kind, reduction, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = kind, reduction, backend
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 6
    if grad_loss is None:
        return (None, *nothing)
    tensors = ctx.saved_tensors
    if torch.is_grad_enabled():
        return (reference.elementwise_backward(grad_loss, *tensors, *ctx.settings[:2]), *nothing)
    op = torch.ops.interfuse.elementwise_loss_backward.default
    return (op(grad_loss, *tensors, *ctx.settings), *nothing)


def _setup_contrastive(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input1, input2, target, margin, backend = inputs
    ctx.save_for_backward(input1, input2, target, output[1])
    ctx.settings = margin, backend
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_contrastive(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * 3
    if grad_loss is None:
        return (None, None, *nothing)
    input1, input2, target, slope = ctx.saved_tensors
    margin, backend = ctx.settings
    if torch.is_grad_enabled():
        slope = reference.contrastive_slope(input1, input2, target, margin)
        return (*reference.contrastive_backward(grad_loss, input1, input2, slope), *nothing)
    op = torch.ops.interfuse.contrastive_loss_backward.default
    return (*op(grad_loss, input1, input2, slope, backend), *nothing)


def _setup_info_nce(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input1, input2, symmetric, backend = inputs
    ctx.save_for_backward(input1, input2, *output[1:])
    ctx.settings = symmetric, backend
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_info_nce(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * 4
    input1, input2, *sums = ctx.saved_tensors
    symmetric, backend = ctx.settings
    if torch.is_grad_enabled():
        sums = reference.info_nce_rows(input1, input2, symmetric)[1:]
        return (*reference.info_nce_backward(grad_loss, input1, input2, *sums, symmetric), None, None)
    op = torch.ops.interfuse.info_nce_backward.default
    return (*op(grad_loss, input1, input2, *sums, symmetric, backend), None, None)


def _vmap(op: Any, count: int, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """Each sample is a call."""
    samples = [op(*sample(args[:count], in_dims[:count], i), *args[count:]) for i in range(info.batch_size)]
    if isinstance(samples[0], Tensor):
        return torch.stack(samples), 0
    return stacked(samples)


def register(library: torch.library.Library) -> None:
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    both = "Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, str kind, str reduction"
    both += ", str backend"
    pair, two = "Tensor input1, Tensor input2", "(Tensor grad1, Tensor grad2)"
    for name, schema, run, fake, tensors in (
        ("elementwise_loss", f"({both}) -> Tensor", _run, _fake, 4),
        ("elementwise_loss_backward", f"(Tensor grad_loss, {both}) -> Tensor", _run_backward,
         _fake_backward, 5),
        ("contrastive_loss",
         f"({pair}, Tensor target, float margin, str backend) -> (Tensor loss, Tensor slope)",
         partial(_of_table, CONTRASTIVE), _fake_contrastive, 3),
        ("contrastive_loss_backward", f"(Tensor grad_loss, {pair}, Tensor slope, str backend) -> {two}",
         partial(_of_table_backward, CONTRASTIVE), _fake_pair_backward, 4),
        ("info_nce",
         f"({pair}, bool symmetric, str backend) -> (Tensor loss, Tensor lse, Tensor other_lse)",
         partial(_of_table, INFO_NCE), _fake_info_nce, 2),
        ("info_nce_backward",
         f"(Tensor grad_loss, {pair}, Tensor lse, Tensor other_lse, bool symmetric, str backend) -> {two}",
         partial(_of_table_backward, INFO_NCE), _fake_pair_backward, 5),
    ):  # fmt: skip
        library.define(f"{name}{schema}", tags=tags)
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"interfuse::{name}", fake, lib=library)
        op = getattr(torch.ops.interfuse, name).default
        torch.library.register_vmap(f"interfuse::{name}", partial(_vmap, op, tensors), lib=library)
    for name, backward, setup in (
        ("elementwise_loss", _backward, _setup),
        ("contrastive_loss", _backward_contrastive, _setup_contrastive),
        ("info_nce", _backward_info_nce, _setup_info_nce),
    ):
        torch.library.register_autograd(f"interfuse::{name}", backward, setup_context=setup, lib=library)
