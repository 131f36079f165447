"""The short way from an eager call to the native kernels: one cache lookup, no dispatcher.

It is taken only where nothing could tell the difference: plain CPU tensors and no transform, mode, tracer,
autocast or profiler active. Every other call goes the long way through the registered op.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from interfuse._native import LinearDesc, linear_call, linear_chain, linear_forward
from interfuse.bounded_cache import BoundedCache
from interfuse.ops import _linear_native as native
from interfuse.ops import _linear_training as training
from interfuse.ops._linear_checks import Options, as_list, check, check_types, resolve
from interfuse.torch_state import DLPACK_EXCHANGE, GLOBAL_HOOKS, WATCHERS, in_forward_mode, is_plain_eager

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from interfuse.ops._linear_checks import Inputs, Layer

_grad_enabled = torch.is_grad_enabled
_threads = torch.get_num_threads


def is_plain(t: Any) -> bool:
    """Whether t is a tensor that the core may read by pointer: of no subclass, on the CPU, as it is."""
    kind = type(t)
    return (kind is Tensor or kind is Parameter) and t.is_cpu and not t.is_neg()


class Chain(NamedTuple):
    """Modules whose layers a call runs: their dictionary, their type, its forward, and where they keep their
    tensors: "_parameters" or "_buffers"."""

    modules: dict[str, Any] | None
    kind: type
    forward: Any
    held: str


NO_CHAIN = Chain(None, type(None), None, "")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is left to do for one combination of shapes, strides, dtypes and arguments."""

    desc: LinearDesc
    size: tuple[int, ...]
    trains: LinearDesc | None


# Inference calls that took the short way, by the first weight's id, the first input's shape and the number of
# layers; see _conv_pool_eager. A chain of modules is found by its dictionary of them, too.
_recent: BoundedCache[Callable[[Sequence[Tensor], Any, int], Tensor | None]] = BoundedCache(1024)


def _key_of(inputs: Sequence[Tensor], layers: list[Layer]) -> tuple[Any, ...]:
    return id(layers[0][0]), inputs[0].shape, len(layers)


def _again(inputs: Sequence[Tensor], layers: list[Layer]) -> Tensor | None:
    """The output of a call like a recent one, else None."""
    if _grad_enabled():
        return training.again(inputs, layers)
    if in_forward_mode():
        return None
    try:
        recent = _recent.get(_key_of(inputs, layers))
    except (RuntimeError, TypeError, IndexError, AttributeError):  # nested tensors, none, or none at all
        return None
    return None if recent is None else recent(inputs, layers, _threads())


def _remember(
    inputs: Sequence[Tensor],
    layers: list[Layer],
    descs: list[LinearDesc],
    size: tuple[int, ...],
    chain: Chain = NO_CHAIN,
) -> None:
    strides = torch.empty(size, device="meta").stride()
    call = linear_call(
        DLPACK_EXCHANGE, WATCHERS, (Tensor, Parameter), descs, tuple(inputs), layers, size, strides,
        (chain.kind, chain.forward, GLOBAL_HOOKS, chain.held))  # fmt: skip
    _recent.put(_key_of(inputs, layers), call)
    if chain.modules is not None:
        _remember_modules(inputs, layers, chain)


def _remember_modules(inputs: Sequence[Tensor], layers: list[Layer], chain: Chain) -> None:
    """A call that is known by its first weight is known by its modules from now on; ids return."""
    key = (id(chain.modules), inputs[0].shape)
    call = _recent.get(_key_of(inputs, layers))
    if call is not None and _recent.get(key) is not call:
        _recent.put(key, call)


def run_modules(inputs: tuple[Tensor, ...], modules: dict[str, Any]) -> Tensor | None:
    """The output of a chain of modules in an inference call like a recent one, else None.

    The core finds their tensors and looks for hooks, which takes a third of the time that Python needs.
    """
    if _grad_enabled() or in_forward_mode():
        return None
    try:
        recent = _recent.get((id(modules), inputs[0].shape))
    except (RuntimeError, IndexError, AttributeError):  # nested tensors, none, or none at all
        return None
    return None if recent is None else recent(inputs, modules, _threads())


# False: this combination takes the long way.
_plans: BoundedCache[Plan | Literal[False]] = BoundedCache(1024)


def run(
    inputs: Inputs, weight: Tensor, bias: Tensor | None, scale: Tensor | None, arguments: tuple[Any, ...]
) -> Tensor | None:
    """The output, or None where the call must go the long way. `arguments` are Options' values in order."""
    tensors = (inputs,) if isinstance(inputs, Tensor) else inputs
    layers: list[Layer] = [(weight, bias, scale, arguments)]
    y = _again(tensors, layers)
    if y is not None:
        return y
    if not is_plain_eager():
        return None
    key = _key(tensors, weight, bias, scale, arguments)
    if key is None:
        return None
    try:
        plan = _plans.get(key)
    except TypeError:  # a list among the arguments
        return None
    if plan is None:
        plan = _plans.put(key, _plan(tensors, weight, bias, scale, Options(*arguments)))
    if plan is False:
        return None
    if _grad_enabled() and training.wanted(tensors, layers):
        return None if plan.trains is None else training.first(tensors, layers, [plan.trains], [plan.size])
    if not _grad_enabled():
        _remember(tensors, layers, [plan.desc], plan.size)
    y = tensors[0].new_empty(plan.size)
    linear_forward(
        plan.desc,
        [x.data_ptr() for x in tensors],
        weight.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        0,
        _threads(),
    )
    return y


def _key(
    inputs: Any, weight: Any, bias: Any, scale: Any, arguments: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """What a plan depends on; None where a tensor is none that the core may read by pointer.

    The tests are written out for weight and inputs, since a call for each costs a tenth of all this.
    """
    kind = type(weight)
    if not ((kind is Parameter or kind is Tensor) and weight.is_cpu and not weight.is_neg()):
        return None
    if not (bias is None or is_plain(bias)) or not (scale is None or is_plain(scale)):
        return None
    try:
        keys = []
        for x in inputs:
            kind = type(x)
            if not ((kind is Tensor or kind is Parameter) and x.is_cpu and not x.is_neg()):
                return None
            keys.append((x.shape, x.stride(), x.dtype))
        return (
            *keys,
            weight.shape,
            weight.stride(),
            weight.dtype,
            None if bias is None else (bias.shape, bias.stride(), bias.dtype),
            None if scale is None else (scale.shape, scale.stride(), scale.dtype),
            arguments,
        )
    except (RuntimeError, TypeError):  # a layout without strides, inputs that are no list
        return None


def _plan(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, scale: Tensor | None, options: Options
) -> Plan | Literal[False]:
    """The plan, or False where another implementation runs or something is to be converted first."""
    tensors = as_list(inputs)
    check_types(weight, bias, scale)
    problem = check(tensors, weight, bias, scale, resolve(options), save=False)
    if options.backend not in (None, "native") or native.why_not(problem) is not None:
        return False
    strides = [native.row_stride(x) for x in tensors]
    if not all(t is None or t.is_contiguous() for t in (weight, bias, scale)):
        return False
    known = [stride for stride in strides if stride is not None]
    if len(known) < len(strides):
        return False
    saving = replace(problem, save=True)
    return Plan(
        desc=native.make_desc(problem, known),
        size=(*problem.lead, problem.out_features),
        trains=native.make_desc(saving, known) if native.why_not(saving) is None else None,
    )


@dataclass(frozen=True, slots=True)
class ChainPlan:
    descs: list[LinearDesc]
    sizes: list[tuple[int, ...]]
    trains: list[LinearDesc] | None


_chains: BoundedCache[ChainPlan | Literal[False]] = BoundedCache(256)


def run_chain(
    inputs: tuple[Tensor, ...], layers: list[Layer], chain: Chain = NO_CHAIN
) -> Tensor | None:
    """What the last layer gives, by one call of the core; None where the layers must be called one by one."""
    y = _again(inputs, layers)
    if y is not None:
        if chain.modules is not None and not _grad_enabled():
            _remember_modules(inputs, layers, chain)
        return y
    if not layers or not is_plain_eager():
        return None
    grad = _grad_enabled()
    keys, pointers = [], []
    taken: tuple[Tensor, ...] = inputs
    for weight, bias, scale, arguments in layers:
        key = _key(taken, weight, bias, scale, arguments)
        if key is None:
            return None
        keys.append(key)
        pointers.append(
            (
                weight.data_ptr(),
                0 if scale is None else scale.data_ptr(),
                0 if bias is None else bias.data_ptr(),
            )
        )
        taken = ()
    whole = tuple(keys)
    plan = _chains.get(whole)
    if plan is None:
        plan = _chains.put(whole, _chain_plan(inputs, layers))
    if plan is False:
        return None
    if grad and training.wanted(inputs, layers):
        return None if plan.trains is None else training.first(inputs, layers, plan.trains, plan.sizes)
    if not grad:
        _remember(inputs, layers, plan.descs, plan.sizes[-1], chain)
    y = inputs[0].new_empty(plan.sizes[-1])
    linear_chain(plan.descs, [x.data_ptr() for x in inputs], pointers, y.data_ptr(), _threads())
    return y


def _chain_plan(inputs: Sequence[Tensor], layers: Sequence[Layer]) -> ChainPlan | Literal[False]:
    plans: list[Plan] = []
    for weight, bias, scale, arguments in layers:
        plan = _plan(inputs, weight, bias, scale, Options(*arguments))
        if plan is False:
            return False
        plans.append(plan)
        inputs = [torch.empty(plan.size, dtype=inputs[0].dtype)]
    trains = [plan.trains for plan in plans if plan.trains is not None]
    return ChainPlan(
        [plan.desc for plan in plans],
        [plan.size for plan in plans],
        trains if len(trains) == len(plans) else None,
    )
