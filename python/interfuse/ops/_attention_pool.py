"""attention_pool: the weighted sum of a sequence by a learned context, as one op.

Beside `attention` in its rooms: the public function, its checks, the table of implementations, the registered
ops, autograd and vmap. The projection before the kernel is a matrix product of torch's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interfuse import _native, memory
from interfuse.autocast import autocast_dtype, cast
from interfuse.dispatch import Implementation, choose
from interfuse.ops import _attention_triton as triton
from interfuse.ops import _native_limits
from interfuse.ops._attention_native import pointer
from interfuse.ops._dtypes import DTYPES
from interfuse.ops._native_limits import DTYPE_NAMES
from interfuse.reference import attention as reference
from interfuse.torch_state import (
    SingleLevelFunction,
    apply_at_this_level,
    has_tangent,
    redispatch_below_autograd,
)

if TYPE_CHECKING:
    from interfuse.ops._attention_problem import Three


@dataclass(frozen=True)
class PoolProblem:
    """A checked call of attention_pool."""

    batch: int
    steps: int
    width: int
    hidden: int
    dtype: torch.dtype
    device: torch.device


def fail(sentence: str) -> ValueError:
    return ValueError(f"attention_pool: {sentence}")


def attention_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    context: Tensor,
    *,
    lengths: Tensor | None = None,
    return_weights: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """sum over t of softmax(context . tanh(weight x[t] + bias)) x[t]: as in hierarchical attention nets.

    Args:
        x: (batch, steps, width).
        weight: (hidden, width); bias: (hidden,) or None; context: (hidden,).
        lengths: (batch,) int64: how many steps of each sequence are real. A sequence without any gives zeros.
        return_weights: also return the weights (batch, steps).
        backend: None to choose the fastest, or "native", "triton" or "reference"; one that cannot run the
            call raises its reason.
    """
    for name, t in (("x", x), ("weight", weight), ("bias", bias), ("context", context), ("lengths", lengths)):
        if not isinstance(t, Tensor) and not (t is None and name in ("bias", "lengths")):
            raise TypeError(f"attention_pool: {name} must be a torch tensor; got {type(t).__name__}.")
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[1] != x.shape[2]:
        raise fail(
            f"x must be (batch, steps, width) and weight (hidden, width); got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}."
        )
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        x, weight, context = cast(x, dtype), cast(weight, dtype), cast(context, dtype)
        bias = None if bias is None else cast(bias, dtype)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise fail(
                f"x and {name} must have one dtype and device; got {x.dtype} on {x.device} and {t.dtype} on "
                f"{t.device}. Convert one of them."
            )
    hidden = F.linear(x, weight, bias)
    y, weights = torch.ops.interfuse.attention_pool.default(x, hidden, context, lengths, backend or "")
    return (y, weights) if return_weights else y


def check(x: Tensor, hidden: Tensor, context: Tensor, lengths: Tensor | None) -> PoolProblem:
    if x.dim() != 3 or hidden.dim() != 3 or x.shape[:2] != hidden.shape[:2]:
        raise fail(
            f"x must be (batch, steps, width) and hidden (batch, steps, hidden); got {tuple(x.shape)} and "
            f"{tuple(hidden.shape)}."
        )
    if x.dtype not in DTYPES:
        raise fail(
            f"the dtype must be float32, bfloat16, float16 or float64; got {x.dtype}. Convert x first."
        )
    for name, t in (("hidden", hidden), ("context", context)):
        if t.dtype != x.dtype or t.device != x.device:
            raise fail(
                f"x and {name} must have one dtype and device; got {x.dtype} on {x.device} and {t.dtype} on "
                f"{t.device}. Convert one of them."
            )
    if tuple(context.shape) != (hidden.shape[2],):
        raise fail(
            f"context must have shape ({hidden.shape[2]},), as weight has rows; got {tuple(context.shape)}."
        )
    if x.shape[2] == 0 or hidden.shape[2] == 0:
        raise fail(
            f"width and hidden must not be 0; got x {tuple(x.shape)} and hidden {tuple(hidden.shape)}."
        )
    if lengths is not None and (lengths.dtype != torch.int64 or tuple(lengths.shape) != (x.shape[0],)):
        raise fail(
            f"lengths must be int64 of shape ({x.shape[0]},), one for each sequence; got {lengths.dtype} of "
            f"shape {tuple(lengths.shape)}."
        )
    return PoolProblem(x.shape[0], x.shape[1], x.shape[2], hidden.shape[2], x.dtype, x.device)


def _check_values(problem: PoolProblem, lengths: Tensor | None) -> None:
    if lengths is None or lengths.numel() == 0:
        return
    least, most = int(lengths.min()), int(lengths.max())
    if least < 0 or most > problem.steps:
        raise fail(
            f"lengths must be from 0 to {problem.steps}, the steps of x; got {least if least < 0 else most}."
        )


def _native_why_not(problem: PoolProblem) -> str | None:
    return _native_limits.why_not(problem.device, problem.dtype)


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _head(problem: PoolProblem, x: Tensor, hidden: Tensor) -> list[Any]:
    """The first arguments of both native functions."""
    sizes = (problem.batch, problem.steps, problem.width, problem.hidden)
    return [DTYPE_NAMES[problem.dtype], sizes, (*x.stride()[:2], *hidden.stride()[:2])]


def _lengths(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.cpu().contiguous()


def _native_run(
    problem: PoolProblem, x: Tensor, hidden: Tensor, context: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    y, weights = x.new_empty(problem.batch, problem.width), x.new_empty(problem.batch, problem.steps)
    x, hidden, context, lengths = _rows(x), _rows(hidden), context.contiguous(), _lengths(lengths)
    pointers = [pointer(t) for t in (x, hidden, context, lengths, y, weights)]
    arguments = [*_head(problem, x, hidden), *pointers, torch.get_num_threads()]
    _native.attention_pool_forward(*arguments)
    return y, weights


def _native_backward(
    problem: PoolProblem,
    grad_y: Tensor,
    grad_weights: Tensor | None,
    x: Tensor,
    hidden: Tensor,
    context: Tensor,
    lengths: Tensor | None,
) -> Three:
    grad_x, grad_hidden = (memory.empty(t.shape, dtype=t.dtype) for t in (x, hidden))
    grad_context = torch.empty(problem.batch, problem.hidden)
    x, hidden, context, lengths = _rows(x), _rows(hidden), context.contiguous(), _lengths(lengths)
    grad_y, grad_weights = grad_y.contiguous(), None if grad_weights is None else grad_weights.contiguous()
    pointers = [
        pointer(t)
        for t in (x, hidden, context, lengths, grad_y, grad_weights, grad_x, grad_hidden, grad_context)
    ]
    arguments = [*_head(problem, x, hidden), *pointers, torch.get_num_threads()]
    _native.attention_pool_backward(*arguments)
    return grad_x, grad_hidden, grad_context.sum(0).to(context.dtype)


def _reference_run(problem: PoolProblem, *inputs: Any) -> tuple[Tensor, Tensor]:
    _check_values(problem, inputs[-1])
    return reference.pool(*inputs)


def _reference_backward(problem: PoolProblem, *arguments: Any) -> Three:
    _check_values(problem, arguments[-1])
    return reference.pool_backward(*arguments)


POOL_IMPLEMENTATIONS = (
    Implementation("native", _native_why_not, _native_run, _native_backward),
    Implementation("triton", triton.pool_why_not, triton.pool_run, triton.pool_run_backward),
    Implementation("reference", lambda problem: None, _reference_run, _reference_backward),
)


def _run(
    x: Tensor, hidden: Tensor, context: Tensor, lengths: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    problem = check(x, hidden, context, lengths)
    return choose(POOL_IMPLEMENTATIONS, problem, backend).run(problem, x, hidden, context, lengths)


def _fake(
    x: Tensor, hidden: Tensor, context: Tensor, lengths: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    problem = check(x, hidden, context, lengths)
    choose(POOL_IMPLEMENTATIONS, problem, backend)
    return x.new_empty(problem.batch, problem.width), x.new_empty(problem.batch, problem.steps)


def _check_grads(problem: PoolProblem, grad_y: Tensor, grad_weights: Tensor | None) -> None:
    for name, t, shape in (
        ("grad_y", grad_y, (problem.batch, problem.width)),
        ("grad_weights", grad_weights, (problem.batch, problem.steps)),
    ):
        if t is not None and (
            tuple(t.shape) != shape or t.dtype != problem.dtype or t.device != problem.device
        ):
            raise fail(
                f"the backward op's {name} must have shape {shape}, {problem.dtype}, on {problem.device}; "
                f"got {tuple(t.shape)}, {t.dtype}, on {t.device}."
            )


def _run_backward(grad_y: Tensor, grad_weights: Tensor | None, *args: Any) -> Three:
    problem = check(*args[:4])
    _check_grads(problem, grad_y, grad_weights)
    return choose(POOL_IMPLEMENTATIONS, problem, args[4]).run_backward(
        problem, grad_y, grad_weights, *args[:4]
    )


def _fake_backward(grad_y: Tensor, grad_weights: Tensor | None, *args: Any) -> Three:
    _check_grads(check(*args[:4]), grad_y, grad_weights)
    x, hidden, context = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in args[:3])
    return x, hidden, context


class _Forward(SingleLevelFunction):
    @staticmethod
    def forward(
        ctx: Any, op: Any, keyset: Any, backend: str, *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return redispatch_below_autograd(op, keyset, *inputs, backend)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_weights: Tensor | None) -> tuple[Any, ...]:
        if grad_y is None and grad_weights is None:
            return (None,) * 7
        x = ctx.saved_tensors[0]
        grad_y = x.new_zeros(x.shape[0], x.shape[2]) if grad_y is None else grad_y
        op = torch.ops.interfuse.attention_pool_backward.default
        grads = op(grad_y, grad_weights, *ctx.saved_tensors, ctx.backend)
        wanted = ctx.needs_input_grad[3:6]
        return (None, None, None, *(g if w else None for g, w in zip(grads, wanted, strict=True)), None)


class _Backward(SingleLevelFunction):
    """The backward op, whose own derivative is that of the reference's backward."""

    @staticmethod
    def forward(ctx: Any, op: Any, keyset: Any, backend: str, *tensors: Tensor | None) -> Three:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return redispatch_below_autograd(op, keyset, *tensors, backend)

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        asked = [i for i, s in enumerate(seconds) if s is not None]
        if not asked:
            return (None,) * 9
        places = [i for i in range(5) if tensors[i] is not None]

        def outputs(*leaves: Tensor) -> tuple[Tensor, ...]:
            given = list(tensors)
            for place, leaf in zip(places, leaves, strict=True):
                given[place] = leaf
            results = reference.pool_backward(*given)
            return tuple(results[i] for i in asked)

        vjp = torch.func.vjp(outputs, *[tensors[i] for i in places])[1]
        found = dict(zip(places, vjp(tuple(seconds[i] for i in asked)), strict=True))
        return (None, None, None, *(found.get(i) for i in range(6)))


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autograd(op: Any, keyset: Any, *args: Any) -> tuple[Tensor, Tensor]:
    if has_tangent(*args[:3]):
        return reference.pool(*args[:4])
    if _wants_grad(*args[:3]):
        return apply_at_this_level(_Forward, op, keyset, args[4], *args[:4])
    return redispatch_below_autograd(op, keyset, *args)


def _autograd_backward(op: Any, keyset: Any, *args: Any) -> Three:
    if has_tangent(*args[:5]):
        return reference.pool_backward(*args[:6])
    if _wants_grad(*args[:5]):
        return apply_at_this_level(_Backward, op, keyset, args[6], *args[:6])
    return redispatch_below_autograd(op, keyset, *args)


def _vmap(op: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """Sample by sample: the context, and in backward its gradient, is each sample's own."""
    samples = [
        op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    results = tuple(torch.stack(list(ts)) for ts in zip(*samples, strict=True))
    return results, (0,) * len(results)


_TENSORS = "Tensor x, Tensor hidden, Tensor context, Tensor? lengths, str backend"

_library = torch.library.Library("interfuse", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library.define(f"attention_pool({_TENSORS}) -> (Tensor y, Tensor weights)", tags=_tags)
_library.define(
    f"attention_pool_backward(Tensor grad_y, Tensor? grad_weights, {_TENSORS}) "
    "-> (Tensor grad_x, Tensor grad_hidden, Tensor grad_context)",
    tags=_tags,
)
_library.impl("attention_pool", _run, "CompositeExplicitAutograd")
_library.impl("attention_pool_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("interfuse::attention_pool", _fake, lib=_library)
torch.library.register_fake("interfuse::attention_pool_backward", _fake_backward, lib=_library)
for _name, _kernel in (("attention_pool", _autograd), ("attention_pool_backward", _autograd_backward)):
    _op = getattr(torch.ops.interfuse, _name).default
    _library.impl(_name, partial(_kernel, _op), "Autograd", with_keyset=True)
    torch.library.register_vmap(f"interfuse::{_name}", partial(_vmap, _op), lib=_library)
