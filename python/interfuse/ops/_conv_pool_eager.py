"""The short way from an eager call to the native kernels: one cache lookup, no dispatcher.

It is taken only where nothing could tell the difference: plain CPU tensors and no transform, mode, tracer,
autocast or profiler active. Every other call goes the long way through the registered op, which converts the
twenty arguments between Python and C++ several times (20 microseconds in inference, 100 in training).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from interfuse import numerics
from interfuse._native import ConvPoolDesc, conv_pool_call, conv_pool_forward
from interfuse.bounded_cache import BoundedCache
from interfuse.ops import _conv_pool_native as native
from interfuse.ops._conv_pool_checks import Options, check, check_batched, resolve
from interfuse.ops._conv_pool_preference import rather_not
from interfuse.ops._conv_pool_problem import ConvPoolParams, ConvPoolProblem, Three, empty_outputs
from interfuse.ops._conv_pool_transforms import Forward, backward_op
from interfuse.reference import conv_pool as reference
from interfuse.torch_state import DLPACK_EXCHANGE, WATCHERS, apply, in_forward_mode, is_plain_eager

if TYPE_CHECKING:
    from collections.abc import Callable

    from interfuse.ops._conv_pool_transforms import Saved

_grad_enabled = torch.is_grad_enabled
_threads = torch.get_num_threads


class Direct:
    """The native kernels of one training problem, called without the dispatcher."""

    def __init__(self, problem: ConvPoolProblem) -> None:
        self.problem, self.params = problem, problem.params
        y, index, pre = empty_outputs(replace(problem, device=torch.device("meta")))
        channels = problem.out_channels
        # Of grad_y, x, weight, bias, y, index and pre.
        self._shapes = (
            y.shape, (problem.batch, problem.in_channels, *problem.input),
            (channels, problem.in_channels // problem.params.groups, *problem.kernel), (channels,), y.shape,
            index.shape, pre.shape)  # fmt: skip
        self._dtypes = (problem.dtype,) * 5 + (torch.uint8, problem.dtype)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Three:
        return native.run(self.problem, x, weight, bias)

    def backward(self, grad_y: Tensor, saved: Saved, mask: list[bool]) -> Three:
        """Saved tensors may come back through the user's hooks as anything, and grad_y from any graph."""
        if _grad_enabled() or not is_plain_eager() or not self._as_saved(grad_y, *saved):
            return backward_op(self.params, grad_y, saved, mask)
        return native.run_backward(self.problem, grad_y, *saved, mask)

    def _as_saved(self, *tensors: Tensor | None) -> bool:
        return all(
            t is None
            or ((type(t) is Tensor or type(t) is Parameter) and t.is_cpu and not t.is_neg()
                and t.shape == shape and t.dtype is dtype and t.layout is torch.strided)
            for t, shape, dtype in zip(tensors, self._shapes, self._dtypes, strict=True)
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """What is left to do for one combination of shapes, strides, dtypes and arguments."""

    params: ConvPoolParams
    size: tuple[int, ...]
    strides: tuple[int, ...]
    desc: ConvPoolDesc | None  # None: torch's own functions are faster
    direct: Direct | Literal["torch"] | None  # in training; None: through the op


# False: this combination takes the long way.
_plans: BoundedCache[Plan | Literal[False]] = BoundedCache(1024)


@dataclass(frozen=True, slots=True)
class Recent:
    """An inference call that took the short way. The next one most often is the same with another x."""

    arguments: tuple[Any, ...]
    precision: str
    run: Callable[[Tensor, Tensor, Tensor | None, int], Tensor | None]


# By the weight's id and x's shape: a hint only, since ids return. A weak reference to the weight would say
# more, but torch.utils.swap_tensors refuses tensors that have one.
_recent: BoundedCache[Recent] = BoundedCache(1024)


def run(x: Tensor, weight: Tensor, bias: Tensor | None, arguments: tuple[Any, ...]) -> Tensor | None:
    """The output, or None where the call must go the long way. `arguments` are Options' values in order."""
    if type(x) is Tensor and not _grad_enabled() and not in_forward_mode():
        try:
            recent = _recent.get((id(weight), x.shape))
        except RuntimeError:  # a nested tensor has no shape
            return None
        if (
            recent is not None
            and recent.precision == numerics._precision  # noqa: SLF001
            and recent.arguments == arguments
        ):
            y = recent.run(x, weight, bias, _threads())
            if y is not None:
                return y
    return _find_and_run(x, weight, bias, arguments) if is_plain_eager() else None


def _find_and_run(
    x: Tensor, weight: Tensor, bias: Tensor | None, arguments: tuple[Any, ...]
) -> Tensor | None:
    """A call that is not a recent one. The tests are written out for each tensor: calls would cost more."""
    kind = type(x)
    if not ((kind is Tensor or kind is Parameter) and x.is_cpu and not x.is_neg()):
        return None
    kind = type(weight)
    if not ((kind is Parameter or kind is Tensor) and weight.is_cpu and not weight.is_neg()):
        return None
    if bias is not None:
        kind = type(bias)
        if not ((kind is Parameter or kind is Tensor) and bias.is_cpu and not bias.is_neg()):
            return None
    try:
        bias_key = None if bias is None else (bias.shape, bias.stride(), bias.dtype)
        precision = numerics._precision  # noqa: SLF001
        key = (x.shape, x.stride(), x.dtype, weight.shape, weight.stride(), weight.dtype, bias_key, arguments,
               precision)  # fmt: skip
        plan = _plans.get(key)
    except (RuntimeError, TypeError):  # a layout without strides, a list among the options
        return None
    if plan is None:
        plan = _plans.put(key, _plan(x, weight, bias, Options(*arguments)))
    if plan is False:
        return None
    if not _grad_enabled():
        if plan.desc is None:
            return _by_torch(plan, x, weight, bias)
        again = conv_pool_call(
            DLPACK_EXCHANGE, WATCHERS, (Tensor, Parameter), plan.desc, x, weight, bias, plan.size,
            plan.strides)  # fmt: skip
        _recent.put((id(weight), x.shape), Recent(arguments, precision, again))
    elif x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad):
        if plan.direct == "torch":
            return _by_torch(plan, x, weight, bias)
        return None if plan.direct is None else apply(Forward, plan.direct, x, weight, bias, False)[0]
    if plan.desc is None:
        return _by_torch(plan, x, weight, bias)
    y = x.new_empty_strided(plan.size, plan.strides)
    bias_pointer = 0 if bias is None else bias.data_ptr()
    conv_pool_forward(
        plan.desc, x.data_ptr(), weight.data_ptr(), bias_pointer, y.data_ptr(), 0, 0, _threads()
    )
    return y


def _plan(x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Plan | Literal[False]:
    """The plan, or False where something is to be done before or after the kernel, or another one runs."""
    batched = check_batched(x, weight, bias)
    x = x if batched else x.unsqueeze(0)
    params = resolve(tuple(weight.shape[2:]), options, numerics.get_precision())
    if options.padding_mode != "zeros" or options.backend not in (None, "native"):
        return False
    problem = check(x, weight, bias, params, save=False)
    if native.why_not(problem) is not None or problem.batch == 0:
        return False
    training = replace(problem, save=True)
    by_torch = options.backend is None and rather_not(problem) is not None
    trains_by_torch = options.backend is None and rather_not(training) is not None
    if not (by_torch and trains_by_torch) and not _reads(problem, x, weight, bias):
        return False
    y = empty_outputs(replace(problem, device=torch.device("meta")))[0]
    if not batched:
        y = y.squeeze(0)
    direct: Direct | Literal["torch"] | None = Direct(training) if batched else None
    desc = None if by_torch else native.make_desc(problem, x.stride(), native.lies_channels_last(weight))
    return Plan(params, tuple(y.shape), y.stride(), desc, "torch" if trains_by_torch else direct)


def _reads(problem: ConvPoolProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the core takes the three as they lie in memory."""
    weight_fits = weight.is_contiguous() or native.lies_channels_last(weight)
    return native.reads(problem, x) and weight_fits and (bias is None or bias.is_contiguous())


def _by_torch(plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = reference.forward(x, weight, bias, plan.params)
    return y if y.stride() == plan.strides else y.new_empty_strided(plan.size, plan.strides).copy_(y)
