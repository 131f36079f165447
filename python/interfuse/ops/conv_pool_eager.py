"""The short way from an eager inference call to the native kernel: no dispatcher, one cache lookup.

It is taken only where nothing could tell the difference: plain CPU tensors, no gradient wanted, no transform,
mode, tracer, autocast or profiler active. Every other call goes the long way through the registered op.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from interfuse import numerics
from interfuse._native import ConvPoolDesc, conv_pool_forward
from interfuse.bounded_cache import BoundedCache
from interfuse.ops import conv_pool_native as native
from interfuse.ops.conv_pool_checks import Options, check, check_batched, resolve
from interfuse.ops.conv_pool_problem import empty_outputs
from interfuse.torch_state import is_plain_eager

_grad_enabled = torch.is_grad_enabled
_threads = torch.get_num_threads
_precision = numerics.get_precision


@dataclass(frozen=True, slots=True)
class Plan:
    """What is left to do for one combination of shapes, strides, dtypes and arguments."""

    desc: ConvPoolDesc
    size: tuple[int, ...]
    strides: tuple[int, ...]


# False: this combination takes the long way.
_plans: BoundedCache[Plan | bool] = BoundedCache(1024)


def run(x: Tensor, weight: Tensor, bias: Tensor | None, arguments: tuple[Any, ...]) -> Tensor | None:
    """The output, or None where the call must go the long way.

    The tests are written out for each tensor, since a call for each would cost a tenth of all this.
    """
    if not is_plain_eager():
        return None
    kind = type(x)
    if not ((kind is Tensor or kind is Parameter) and x.is_cpu and not x.is_neg()):
        return None
    kind = type(weight)
    if not ((kind is Parameter or kind is Tensor) and weight.is_cpu and not weight.is_neg()):
        return None
    if bias is None:
        if _grad_enabled() and (x.requires_grad or weight.requires_grad):
            return None
    else:
        kind = type(bias)
        if not ((kind is Parameter or kind is Tensor) and bias.is_cpu and not bias.is_neg()):
            return None
        if _grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
            return None
    try:
        bias_key = None if bias is None else (bias.shape, bias.stride(), bias.dtype)
        key = (x.shape, x.stride(), x.dtype, weight.shape, weight.stride(), weight.dtype, bias_key, arguments,
               _precision())  # fmt: skip
        plan = _plans.get(key)
    except (RuntimeError, TypeError):  # a layout without strides, a list among the options
        return None
    if plan is None:
        plan = _plans.put(key, _plan(x, weight, bias, Options(*arguments)))
    if not isinstance(plan, Plan):
        return None
    y = x.new_empty_strided(plan.size, plan.strides)
    bias_pointer = 0 if bias is None else bias.data_ptr()
    conv_pool_forward(
        plan.desc, x.data_ptr(), weight.data_ptr(), bias_pointer, y.data_ptr(), 0, 0, _threads()
    )
    return y


def _plan(x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Plan | bool:
    """The plan, or False where something is to be done before or after the kernel, or another one runs."""
    batched = check_batched(x, weight)
    x = x if batched else x.unsqueeze(0)
    params = resolve(tuple(weight.shape[2:]), options, _precision())
    if options.padding_mode != "zeros" or options.backend not in (None, "native"):
        return False
    problem = check(x, weight, bias, params, save=False)
    if native.why_not(problem) is not None or problem.batch == 0 or not native.reads(problem, x):
        return False
    if not weight.is_contiguous() or not (bias is None or bias.is_contiguous()):
        return False
    y = empty_outputs(replace(problem, device=torch.device("meta")))[0]
    if not batched:
        y = y.squeeze(0)
    return Plan(native.describe(problem, x.stride()), tuple(y.shape), y.stride())
