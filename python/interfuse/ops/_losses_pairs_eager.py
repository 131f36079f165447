"""The short way from eager calls on the CPU to the kernels of the losses of two tensors, or to torch's own.

It is taken only where nothing could tell the difference: plain dense tensors in float32 and no transform,
mode, tracer, autocast or profiler active. Every other call goes the long way through the registered op.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interfuse.ops import _losses_pairs_native as native
from interfuse.ops._linear_eager import is_plain
from interfuse.ops._losses_problem import REDUCTIONS, Elements, Factor
from interfuse.reference import losses as reference
from interfuse.torch_state import SingleLevelFunction, apply, is_batched_gradient, is_plain_eager

if TYPE_CHECKING:
    from collections.abc import Sequence

# Elements from which on a training step takes less time here than with torch's functions: these enter and
# leave autograd in C++, which takes some 15 us less. (2 threads; a squared error is little work beside that.)
LEAST_TRAINED = {"bce_with_logits": 1 << 14, "mse": 1 << 18}

_NO_FACTOR = Factor(None, (0, 0))
_FLOAT32 = torch.float32


def is_dense(*tensors: Any) -> bool:
    """Whether the kernels may read them by pointer, from first to last."""
    return all(
        is_plain(t) and t.layout is torch.strided and t.dtype is _FLOAT32 and t.is_contiguous()
        for t in tensors
    )


def is_short(backend: str | None, reduction: object) -> bool:
    if torch.compiler.is_compiling() or not is_plain_eager():
        return False
    return backend in (None, "native") and reduction in REDUCTIONS


def as_saved(grad_loss: Tensor, saved: Sequence[Tensor | None], shapes: Sequence[torch.Size | None]) -> bool:
    """Saved tensors may come back through the user's hooks as anything, and grad_loss from any graph."""
    if torch.is_grad_enabled() or not is_plain_eager():
        return False
    if not is_plain(grad_loss) or is_batched_gradient(grad_loss) or grad_loss.dtype is not _FLOAT32:
        return False
    return all(
        t is None or (is_dense(t) and t.shape == shape) for t, shape in zip(saved, shapes, strict=True)
    )


class _Elementwise(SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, e: Elements) -> Tensor:
        tensors = (x, e.target, e.weight.values, e.pos_weight.values)
        ctx.save_for_backward(*tensors)
        ctx.settings = e.weight.strides, e.pos_weight.strides, e.kind, e.reduction
        ctx.shapes = [None if t is None else t.shape for t in tensors]
        ctx.set_materialize_grads(False)
        return native.run(e)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, None]:
        if grad_loss is None:
            return None, None
        x, target, weight, pos_weight = saved = ctx.saved_tensors
        first, second, kind, reduction = ctx.settings
        if as_saved(grad_loss, saved, ctx.shapes):
            factors = Factor(weight, first), Factor(pos_weight, second)
            return native.run_backward(grad_loss, Elements(x, target, *factors, kind, reduction)), None
        if torch.is_grad_enabled():
            grad = reference.elementwise_backward(grad_loss, x, target, weight, pos_weight, kind, reduction)
            return grad, None
        op = torch.ops.interfuse.elementwise_loss_backward.default
        return op(grad_loss, *saved, kind, reduction, ""), None


def _torchs(e: Elements) -> Tensor:
    if e.kind == "mse":
        return F.mse_loss(e.input, e.target, reduction=e.reduction)
    return F.binary_cross_entropy_with_logits(
        e.input, e.target, e.weight.values, reduction=e.reduction, pos_weight=e.pos_weight.values
    )


def _factor(t: Tensor | None, x: Tensor) -> Factor | None:
    """None where it lies otherwise than most do: like the input, or one for each column."""
    if t is None:
        return _NO_FACTOR
    if not is_dense(t) or t.requires_grad or x.dim() == 0:
        return None
    if t.shape == x.shape:
        return Factor(t, (x.shape[-1], 1))
    return Factor(t, (0, 1)) if t.shape == x.shape[-1:] else None


def elementwise(
    kind: str, x: Any, target: Any, weight: Any, pos_weight: Any, reduction: str, backend: str | None
) -> Tensor | None:
    """The loss, or None where the call must go the long way."""
    if not (is_short(backend, reduction) and is_dense(x, target)):
        return None
    if target.requires_grad or target.shape != x.shape:
        return None
    first, second = _factor(weight, x), _factor(pos_weight, x)
    if first is None or second is None:
        return None
    e = Elements(x, target, first, second, kind, reduction)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return native.run(e)
    if backend is None and x.numel() < LEAST_TRAINED[kind]:
        return _torchs(e)
    return apply(_Elementwise, x, e)


class _Contrastive(SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, target: Tensor, margin: float, reduction: str) -> Tensor:
        loss, slope = native.run_contrastive(a, b, target, margin)
        ctx.save_for_backward(a, b, target, slope)
        ctx.settings, ctx.shapes = (margin, reduction), (a.shape, b.shape, target.shape, slope.shape)
        ctx.set_materialize_grads(False)
        return reference.reduced(loss, reduction)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Any, ...]:
        nothing = (None,) * 3
        if grad_loss is None:
            return (None, None, *nothing)
        a, b, target, slope = saved = ctx.saved_tensors
        margin, reduction = ctx.settings
        short = as_saved(grad_loss, saved, ctx.shapes)
        if reduction == "mean":
            grad_loss = grad_loss / len(target)
        rows = grad_loss.expand(target.shape)
        if short:
            return (*native.run_contrastive_backward(rows, a, b, slope), *nothing)
        if torch.is_grad_enabled():
            slope = reference.contrastive_slope(a, b, target, margin)
            return (*reference.contrastive_backward(rows, a, b, slope), *nothing)
        op = torch.ops.interfuse.contrastive_loss_backward.default
        return (*op(rows, a, b, slope, ""), *nothing)


def contrastive(
    a: Any, b: Any, target: Any, margin: Any, reduction: str, backend: str | None
) -> Tensor | None:
    """The loss, or None where the call must go the long way."""
    if not (is_short(backend, reduction) and is_dense(a, b) and is_plain(target)):
        return None
    if a.dim() != 2 or a.shape != b.shape or target.shape != a.shape[:1] or target.requires_grad:
        return None
    if type(margin) is not float or not 0 <= margin < float("inf"):
        return None
    if not is_dense(target):
        target = target.to(_FLOAT32).contiguous()
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return apply(_Contrastive, a, b, target, margin, reduction)
    return reference.reduced(native.run_contrastive(a, b, target, margin)[0], reduction)
