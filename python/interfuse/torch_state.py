"""Everything of torch's private interface that interfuse reads, in one place.

torch offers no public way to ask 'would a plain call of a CPU kernel be all that happens here?'; these
functions ask its thread-local state piece by piece.
"""
# ruff: noqa: SLF001

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo import disallow_in_graph
from torch._dynamo.backends.registry import _BACKENDS
from torch._dynamo.eval_frame import OptimizedModule
from torch._functorch.utils import enable_single_level_autograd_function
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

if TYPE_CHECKING:
    from torch.nn import Module

__all__ = [
    "DLPACK_EXCHANGE",
    "GLOBAL_HOOKS",
    "TRACED_TENSORS",
    "WATCHERS",
    "OptimizedModule",
    "SingleLevelFunction",
    "apply",
    "apply_at_this_level",
    "children",
    "current_parameters",
    "has_bfloat16_matrix_units",
    "has_hooks",
    "has_tangent",
    "in_forward_mode",
    "in_transform",
    "is_autocast_active",
    "is_plain_eager",
    "is_tracing",
    "is_untouched",
    "is_watched_globally",
    "let_compile_see_recurrent_modules",
    "offer_backend",
    "redispatch_below_autograd",
]

# DLPack's table of functions that tell where and how a tensor lies in memory.
DLPACK_EXCHANGE = Tensor.__dlpack_c_exchange_api__

# Each returns something true where it would see a call made now, or change it: transforms, modes, autocast,
# profiler, tracer. Forward-mode levels are the one thing that is no function of torch's.
WATCHERS = (
    torch._C._are_functorch_transforms_active,
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._is_any_autocast_enabled,
    torch.autograd._profiler_enabled,  # type: ignore[attr-defined]
    torch._C._get_tracing_state,
)
_functorch_active, _dispatch_modes, _function_modes, _autocast_active, _profiling, _tracing_state = WATCHERS


def has_bfloat16_matrix_units() -> bool:
    """Whether torch's bfloat16 convolutions and matrix products run on AMX tiles here."""
    return bool(torch.cpu._is_amx_tile_supported())


def in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def in_transform() -> bool:
    """Whether torch.func's transforms or forward-mode differentiation would see a call made now."""
    return bool(_functorch_active()) or in_forward_mode()


def is_plain_eager() -> bool:
    """No transform, mode, tracer, autocast, profiler or forward-mode level would see a call made now."""
    return not (
        _functorch_active()
        or _dispatch_modes()
        or _function_modes()
        or _autocast_active()
        or _profiling()
        or _tracing_state()
        or forward_ad._current_level >= 0
    )


def is_watched_by_modes() -> bool:
    """Whether a mode, of tensor subclasses or of the dispatcher, would see a tensor being made."""
    return bool(_dispatch_modes() or _function_modes())


def is_batched_gradient(t: Tensor) -> bool:
    """Whether it is one of several at once (is_grads_batched), which shows in no level of a transform."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(t))


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of them carries a forward-mode tangent at the current level."""
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def apply(function: Any, *args: Any) -> Any:
    """function.apply of a SingleLevelFunction, which torch's type stubs do not know."""
    return function.apply(*args)


def apply_at_this_level(function: Any, *args: Any) -> Any:
    """function.apply inside an op's autograd kernel.

    An autograd.Function normally runs before the dispatcher and walks through the functorch levels itself.
    Inside a kernel the dispatcher does that walk, hence a single-level function.
    """
    if _functorch_active():
        with enable_single_level_autograd_function():
            return function.apply(*args)
    return function.apply(*args)


def redispatch_below_autograd(op: Any, keyset: Any, *args: Any) -> Any:
    """The same op below autograd, as torch.library's own autograd kernels call it."""
    with torch._C._AutoDispatchBelowAutograd():
        if _functorch_active():
            # A Function's forward runs without grad; the outer functorch levels, which come next, need it.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


# What tracers and exporters pass through a model in the place of tensors.
TRACED_TENSORS = (FakeTensor, FunctionalTensor)


def children(module: Module) -> list[tuple[str, Module]]:
    """The children that are there, by name, in order. (named_children leaves out those that come twice.)"""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def current_parameters(module: Module, names: list[str]) -> list[Any]:
    """By name, as they are now: functional_call and parametrizations put others in their place."""
    parameters = module._parameters
    return [parameters[name] if name in parameters else getattr(module, name) for name in names]


def let_compile_see_recurrent_modules() -> None:
    """torch.compile breaks its graph at every nn.RNN, LSTM and GRU by type, whatever forward it has, unless
    `allow_rnn` is set. With the flag it would also unroll torch's own over all steps, so that their functions
    are kept out of graphs: a module that is not ours breaks the graph as before."""
    if not dynamo_config.allow_rnn:
        dynamo_config.allow_rnn = True
        for name in ("rnn_tanh", "rnn_relu", "lstm", "gru"):
            disallow_in_graph(getattr(torch._VF, name))


def offer_backend(name: str, place: str) -> None:
    """A backend for torch.compile by name, loaded when it is first asked for. Installed packages are found by
    their entry points, but only once something else has been looked up in vain."""
    _BACKENDS.setdefault(name, EntryPoint(name=name, value=place, group="torch_dynamo_backends"))


def is_autocast_active() -> bool:
    """For any kind of device."""
    return bool(_autocast_active())


def is_tracing() -> bool:
    """Whether torch.jit.trace is recording."""
    return bool(_tracing_state())


def has_hooks(module: Module) -> bool:
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )


# Of hooks on all modules.
GLOBAL_HOOKS = (
    _global_forward_hooks,
    _global_forward_pre_hooks,
    _global_backward_hooks,
    _global_backward_pre_hooks,
)


def is_watched_globally() -> bool:
    return any(GLOBAL_HOOKS)


def is_untouched(module: Module, forward: object) -> bool:
    """Whether calling the module means calling this forward of its class, with nothing looking on."""
    state = module.__dict__
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
        or "forward" in state
        or "_conv_forward" in state
        or type(module).forward is not forward
    )
