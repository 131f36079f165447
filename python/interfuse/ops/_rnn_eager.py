"""The short way from an eager call to the native kernels: one cache lookup, no dispatcher.

It is taken only where nothing could tell the difference: plain CPU tensors of float32 and no transform, mode,
tracer, autocast or profiler active. Every other call goes the long way through the registered op.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from interfuse._native import RnnDesc, rnn_call, rnn_forward
from interfuse.bounded_cache import BoundedCache
from interfuse.ops import _rnn_native as native
from interfuse.ops._rnn_checks import Inputs, RnnParams, State, check, op_problem, resolve, with_batch
from interfuse.ops._rnn_native import pointer
from interfuse.ops._rnn_problem import empty_outputs
from interfuse.ops._rnn_transforms import Forward, call_backward, table_gradient
from interfuse.torch_state import DLPACK_EXCHANGE, WATCHERS, apply, in_forward_mode, is_plain_eager

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from interfuse.ops._rnn_problem import Four

_grad_enabled = torch.is_grad_enabled
_threads = torch.get_num_threads
_float32, _strided = torch.float32, torch.strided


def _is_plain(t: Any) -> bool:
    kind = type(t)
    return (kind is Tensor or kind is Parameter) and t.is_cpu and not t.is_neg()


class Direct:
    """The native kernels of one training problem, called without the dispatcher."""

    needs_y = False

    def __init__(self, inputs: Inputs, params: RnnParams) -> None:
        self.problem, self.params = op_problem(*inputs, params, True), params
        y, hn, cn, self._reserve = empty_outputs(
            replace(self.problem, device=torch.device("meta")), native.reserve_row(self.problem)
        )
        self._shapes = (y.shape, hn.shape, cn.shape)

    def forward(self, inputs: Inputs) -> Four:
        return native.run(self.problem, *inputs)

    def backward(
        self,
        grads: Sequence[Tensor | None],
        inputs: Inputs,
        y: Tensor | None,
        reserve: Tensor,
        mask: list[bool],
    ) -> Sequence[Tensor | None]:
        """Saved tensors may come back through the user's hooks as anything, and gradients from any graph."""
        if _grad_enabled() or not is_plain_eager() or not self._as_saved(grads, inputs, reserve):
            return call_backward(self.params, grads, inputs, y, reserve, mask)
        grad_y, grad_hn, grad_cn = grads
        results = native.run_backward(self.problem, grad_y, grad_hn, grad_cn, *inputs, y, reserve, mask)
        if inputs.table is not None and results[0] is not None:
            ids, lengths = inputs.x, inputs.lengths
            results[0] = table_gradient(self.problem, results[0], ids, lengths, self.params.padding_idx)
        return results

    def _as_saved(self, grads: Sequence[Tensor | None], inputs: Inputs, reserve: Tensor) -> bool:
        for t, shape in zip((*grads, reserve), (*self._shapes, self._reserve.shape), strict=True):
            if t is not None and not (
                _is_plain(t) and t.shape == shape and t.dtype is _float32 and t.layout is _strided
            ):
                return False
        if not all(t is None or _is_plain(t) for t in (*inputs[:5], *inputs.weights)):
            return False
        return op_problem(*inputs, self.params, True) is self.problem


@dataclass(frozen=True, slots=True)
class Plan:
    """What is left to do for one combination of shapes, strides, dtypes and arguments."""

    desc: RnnDesc
    shapes: list[tuple[int, ...]]  # of the weights
    places: list[int]  # of the core's addresses among the weights; -1 for none
    y: tuple[int, ...]
    hn: tuple[int, ...]
    cn: tuple[int, ...] | None
    direct: Direct | None

    @property
    def outputs(self) -> tuple[Any, ...]:
        """Sizes and strides."""
        return tuple(
            None if size is None else (size, torch.empty(size, device="meta").stride())
            for size in (self.y, self.hn, self.cn)
        )


# False: this combination takes the long way.
_plans: BoundedCache[Plan | Literal[False]] = BoundedCache(1024)


@dataclass(frozen=True, slots=True)
class Recent:
    """An inference call that took the short way. The next one most often is the same with another x."""

    arguments: tuple[Any, ...]
    run: Callable[..., tuple[Tensor, Tensor, Tensor | None] | None]


# By the first weight's id, x's shape, and what is absent: a hint only, since ids return.
_recent: BoundedCache[Recent] = BoundedCache(1024)


def run(
    x: Tensor,
    weights: Sequence[Tensor],
    hx: State | None,
    lengths: Tensor | None,
    table: Tensor | None,
    arguments: tuple[Any, ...],
    check_first: Callable[[], object] | None = None,
) -> tuple[Tensor, State] | None:
    """The outputs, or None where the call must go the long way. `arguments` are those of `resolve`.

    check_first raises a caller's own errors; it runs where no call of these shapes has passed before.
    """
    h0: Any = None
    c0: Any = None
    if hx is not None:
        if arguments[0] == "lstm" and type(hx) is tuple and len(hx) == 2:
            h0, c0 = hx
        else:
            h0 = hx  # anything else is not plain
    if type(x) is Tensor and not _grad_enabled() and not in_forward_mode():
        try:
            recent = _recent.get((id(weights[0]), x.shape, hx is None, lengths is None))
        except (RuntimeError, TypeError, IndexError):  # a nested tensor has no shape, a mistake no weights
            return None
        if recent is not None and recent.arguments == arguments:
            results = recent.run(x, table, lengths, h0, c0, weights, _threads())
            if results is not None:
                y, hn, cn = results
                return y, hn if cn is None else (hn, cn)
    if not is_plain_eager() or not _is_plain(x):
        return None
    return _find_and_run(x, weights, hx, h0, c0, lengths, table, arguments, check_first)


def _find_and_run(
    x: Tensor,
    weights: Sequence[Tensor],
    hx: State | None,
    h0: Any,
    c0: Any,
    lengths: Tensor | None,
    table: Tensor | None,
    arguments: tuple[Any, ...],
    check_first: Callable[[], object] | None,
) -> tuple[Tensor, State] | None:
    """A call that is not a recent one."""
    key_of_rest: Any = None
    if hx is not None or lengths is not None or table is not None:
        rest = (h0, c0, lengths, table)
        if not all(t is None or (_is_plain(t) and t.is_contiguous()) for t in rest):
            return None
        key_of_rest = tuple([None if t is None else (t.shape, t.dtype) for t in rest])
    try:
        key = (
            x.shape,
            x.stride(),
            x.dtype,
            key_of_rest,
            len(weights),
            weights[0].shape,
            weights[1].shape,
            arguments,
        )
        plan = _plans.get(key)
        if plan is None:
            if check_first is not None:
                check_first()
            plan = _plans.put(key, _plan(x, weights, h0, c0, lengths, table, arguments))
    except (RuntimeError, TypeError, AttributeError, IndexError):  # what the long way has a sentence for
        return None
    if plan is False:
        return None
    pointers = []
    wants_grad = False
    for w, shape in zip(weights, plan.shapes, strict=True):
        kind = type(w)
        if not ((kind is Parameter or kind is Tensor) and w.is_cpu and w.dtype is _float32
                and w.shape == shape and w.layout is _strided and w.is_contiguous()
                and not w.is_neg()):  # fmt: skip
            return None
        wants_grad = wants_grad or w.requires_grad
        pointers.append(w.data_ptr())
    if _grad_enabled() and (wants_grad or _any_wants_grad(x, h0, c0, table)):
        if plan.direct is None:
            return None
        y, hn, cn, _ = apply(Forward, plan.direct, False, x, table, lengths, h0, c0, *weights)
        return y, (hn, cn) if plan.cn is not None else hn
    if not _grad_enabled() and type(weights) is list:
        again = rnn_call(
            DLPACK_EXCHANGE, WATCHERS, (Tensor, Parameter), plan.desc, (x, table, lengths, h0, c0), weights,
            plan.places, plan.outputs)  # fmt: skip
        _recent.put((id(weights[0]), x.shape, hx is None, lengths is None), Recent(arguments, again))
    pointers.append(0)
    make = weights[0].new_empty
    y, hn = make(plan.y), make(plan.hn)
    cn = None if plan.cn is None else make(plan.cn)
    if table is None:
        data, ids = x.data_ptr(), 0
    else:
        data, ids = table.data_ptr(), x.data_ptr()
    rnn_forward(
        plan.desc, data, ids, pointer(lengths), pointer(h0), pointer(c0), [pointers[i] for i in plan.places],
        y.data_ptr(), hn.data_ptr(), pointer(cn), 0, _threads())  # fmt: skip
    return y, hn if cn is None else (hn, cn)


def _any_wants_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _plan(
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Any,
    c0: Any,
    lengths: Tensor | None,
    table: Tensor | None,
    arguments: tuple[Any, ...],
) -> Plan | Literal[False]:
    """The plan, or False where another implementation runs or something is to be converted first."""
    hx = h0 if arguments[0] != "lstm" or h0 is None else (h0, c0)
    params = resolve(x, hx, weights, lengths, table, arguments)
    if params.backend not in ("", "native"):
        return False
    batched, inputs = with_batch(Inputs(x, table, lengths, h0, c0, weights), params)
    if inputs.x.dtype == torch.int32:
        return False
    problem = check(*inputs, params, False)
    if native.why_not(problem) is not None or problem.dtype is not _float32:
        return False
    if problem.batch == 0 or not native.reads(problem, inputs.x):
        return False
    y, hn, cn, _ = empty_outputs(replace(problem, device=torch.device("meta")), 0)
    if not batched:
        y, hn = y.squeeze(0 if params.batch_first else 1), hn.squeeze(1)
        cn = cn.squeeze(1) if params.cell == "lstm" else cn
    trainable = batched and not params.weight_dtype
    return Plan(
        desc=native.make_desc(problem, problem.batch, problem.steps, native.time_strides(problem, inputs.x)),
        shapes=problem.weight_shapes(),
        places=native.places(problem),
        y=tuple(y.shape),
        hn=tuple(hn.shape),
        cn=tuple(cn.shape) if params.cell == "lstm" else None,
        direct=Direct(inputs, params) if trainable else None,
    )
