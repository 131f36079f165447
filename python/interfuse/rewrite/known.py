"""What torch's own modules and functions compute, read at the moment of the call.

Ops plug in here by kind: which callees are activations, which are poolings, and what their settings say. A
module counts only if its type is exactly torch's, its forward is torch's, and nothing watches or changes it:
`is_untouched` is asked at every call, so that a hook registered after optimize() is honoured.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interfuse.autocast import autocast_dtype
from interfuse.torch_state import TRACED_TENSORS, has_hooks, is_untouched, is_watched_globally

# Tensors that an op of ours can take. Other subclasses (DTensor, user types) may mean something else by a
# convolution; tracers and exporters bring the two beside Tensor.
PLAIN_TENSORS = frozenset({Tensor, nn.Parameter, *TRACED_TENSORS})

CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)
LINEAR_LOSS: Any = getattr(nn, "LinearCrossEntropyLoss", None)  # torch has it since 2.13

Arguments = Sequence[Any]
Keywords = Mapping[str, Any]


class Activation(NamedTuple):
    name: str
    slope: Any = 0.01  # whatever the module or the call says

    @property
    def increasing(self) -> bool:
        """Pooling by maximum before it gives what pooling after it gives, gradients included."""
        if self.name == "leaky_relu":
            return isinstance(self.slope, (int, float)) and self.slope > 0
        return self.name == "relu"

    @property
    def is_constant(self) -> bool:
        """Whether its slope is a number, as the ops take it, and not a tensor."""
        return isinstance(self.slope, (int, float))

    def settings(self) -> dict[str, Any]:
        """As the ops call it."""
        return {"activation": self.name, "negative_slope": self.slope}


RELU, GELU, GELU_TANH, SILU, TANH, SIGMOID = map(
    Activation, ("relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid")
)


class Pool(NamedTuple):
    kind: str
    spatial: int
    size: Any
    stride: Any
    padding: Any
    ceil_mode: bool
    count_include_pad: bool

    def settings(self) -> dict[str, Any]:
        """As conv_pool calls it."""
        return {
            "pool": self.kind,
            "pool_size": self.size,
            "pool_stride": self.stride,
            "pool_padding": self.padding,
            "ceil_mode": self.ceil_mode,
            "count_include_pad": self.count_include_pad,
        }


def is_ours(module: object) -> bool:
    return type(module).__module__.startswith("interfuse.")


def is_quantised(module: nn.Module, file: str) -> bool:
    """Whether a module is of the `file` of torch.ao.nn that has these operations; not its packed weights."""
    where, name = type(module).__module__, type(module).__name__
    return where.startswith("torch.ao.nn") and where.endswith(file) and "Packed" not in name


def why_not_type(module: nn.Module, types: Container[object], names: str) -> str | None:
    """Why a module may compute something else than torch's `types`, which the report calls `names`."""
    name = type(module).__name__
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"{name} has no weight yet: call the model once, then optimise it"
    if nn.utils.parametrize.is_parametrized(module):
        return "it is parametrised, so that its weights are computed anew at every call"
    if type(module).__module__.startswith("torch.ao."):
        return f"{name} is a quantised module, or one being prepared for it"
    if type(module) not in types:
        return f"its type {name} is not exactly {names}, so it may compute something else"
    return f"{name} {REPLACED}" if _is_replaced(type(module)) else None


def why_not_module(module: nn.Module, types: Container[object], names: str) -> str | None:
    """Why calling a module may mean something else than what torch's `types` compute, hooks and all."""
    reason = why_not_type(module, types, names)
    if reason is None and (watched := touched(module)) is not None:
        return f"{type(module).__name__} {watched}"
    return reason


def touched(module: nn.Module) -> str | None:
    """Why `is_untouched` says no, for the report."""
    state = module.__dict__
    if has_hooks(module):
        return "has hooks"
    if is_watched_globally():
        return "is watched by a global module hook"
    if "forward" in state or "_conv_forward" in state:
        return "has a forward of its own on the instance"
    return REPLACED if _is_replaced(type(module)) else None


def _is_replaced(cls: type[nn.Module]) -> bool:
    """Whether a class of torch's has another forward than torch's own."""
    forward = FORWARDS.get(cls)
    return forward is not None and (cls.forward is not forward or not forward.__module__.startswith("torch."))


# Modules, by exact type: how to read an activation or a pool from one.


def _gelu(m: Any) -> Activation:
    return GELU_TANH if m.approximate == "tanh" else GELU


def _max_pool(spatial: int) -> Callable[[Any], Pool | str]:
    def read(m: Any) -> Pool | str:
        return max_pool(
            spatial, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
        )

    return read


def _avg_pool(spatial: int) -> Callable[[Any], Pool | str]:
    def read(m: Any) -> Pool | str:
        divisor = getattr(m, "divisor_override", None)
        return avg_pool(
            spatial, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, divisor
        )

    return read


def max_pool(
    spatial: int,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Pool | str:
    if return_indices:
        return "returns the indices of its maxima"
    if dilation not in (1, (1,) * spatial, [1] * spatial):
        return f"has dilation {dilation}"
    return Pool("max", spatial, kernel_size, stride or None, padding, ceil_mode, True)


def avg_pool(
    spatial: int,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Any = None,
) -> Pool | str:
    if divisor_override is not None:
        return "has a divisor of its own"
    return Pool("avg", spatial, kernel_size, stride or None, padding, ceil_mode, count_include_pad)


ACTIVATION_MODULES: dict[type[nn.Module], Callable[[Any], Activation]] = {
    nn.ReLU: lambda m: RELU,
    nn.LeakyReLU: lambda m: Activation("leaky_relu", m.negative_slope),
    nn.GELU: _gelu,
    nn.SiLU: lambda m: SILU,
    nn.Tanh: lambda m: TANH,
    nn.Sigmoid: lambda m: SIGMOID,
}
POOL_MODULES: dict[type[nn.Module], Callable[[Any], Pool | str]] = {
    nn.MaxPool1d: _max_pool(1),
    nn.MaxPool2d: _max_pool(2),
    nn.MaxPool3d: _max_pool(3),
    nn.AvgPool1d: _avg_pool(1),
    nn.AvgPool2d: _avg_pool(2),
    nn.AvgPool3d: _avg_pool(3),
}
# Each class's forward as it was when we were imported. One that another library replaces later is not ours.
FORWARDS: dict[type[nn.Module], Any] = {
    cls: cls.forward
    for cls in (
        *CONVOLUTIONS,
        *ACTIVATION_MODULES,
        *POOL_MODULES,
        *RECURRENT,
        nn.Embedding,
        nn.Linear,
        nn.MultiheadAttention,
        LINEAR_LOSS,
    )
    if cls is not None
}
REPLACED = "is of a class whose forward was replaced"


# Functions, and methods by name: the reader takes the arguments after the value, as the function itself does.


def _relu(inplace: bool = False) -> Activation:
    return RELU


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Activation:
    return Activation("leaky_relu", negative_slope)


def _functional_gelu(*, approximate: str = "none") -> Activation:
    return GELU_TANH if approximate == "tanh" else GELU


def _silu(inplace: bool = False) -> Activation:
    return SILU


def _plain(activation: Activation) -> Callable[[], Activation]:
    return lambda: activation


ACTIVATION_FUNCTIONS: dict[Any, Callable[..., Activation]] = {
    F.relu: _relu,
    F.leaky_relu: _leaky_relu,
    F.gelu: _functional_gelu,
    F.silu: _silu,
    torch.relu: _plain(RELU),
    torch.relu_: _plain(RELU),
    F.relu_: _plain(RELU),
    torch.tanh: _plain(TANH),
    torch.tanh_: _plain(TANH),
    F.tanh: _plain(TANH),
    torch.sigmoid: _plain(SIGMOID),
    torch.sigmoid_: _plain(SIGMOID),
    F.sigmoid: _plain(SIGMOID),
    "relu": _plain(RELU),
    "relu_": _plain(RELU),
    "tanh": _plain(TANH),
    "tanh_": _plain(TANH),
    "sigmoid": _plain(SIGMOID),
    "sigmoid_": _plain(SIGMOID),
}
POOL_FUNCTIONS: dict[Any, Callable[..., Pool | str]] = {
    F.max_pool1d: partial(max_pool, 1),
    F.max_pool2d: partial(max_pool, 2),
    F.max_pool3d: partial(max_pool, 3),
    torch.max_pool1d: partial(max_pool, 1),
    torch.max_pool2d: partial(max_pool, 2),
    torch.max_pool3d: partial(max_pool, 3),
    F.avg_pool1d: partial(avg_pool, 1),
    F.avg_pool2d: partial(avg_pool, 2),
    F.avg_pool3d: partial(avg_pool, 3),
    torch.avg_pool1d: partial(avg_pool, 1),
}


def activation_of(callee: Any, arguments: Arguments, keywords: Keywords) -> Activation | None:
    """The activation that calling this computes now, or None."""
    read = ACTIVATION_MODULES.get(type(callee))
    if read is not None:
        if arguments or keywords or not is_untouched(callee, FORWARDS[type(callee)]):
            return None
        return read(callee)
    function = None if isinstance(callee, nn.Module) else ACTIVATION_FUNCTIONS.get(callee)
    return None if function is None else function(*arguments, **keywords)


def pool_of(callee: Any, arguments: Arguments, keywords: Keywords) -> Pool | str | None:
    """The pool that calling this computes now, the reason why it is one we cannot take over, or None."""
    read = POOL_MODULES.get(type(callee))
    if read is not None:
        if arguments or keywords or not is_untouched(callee, FORWARDS[type(callee)]):
            return None
        return read(callee)
    function = None if isinstance(callee, nn.Module) else POOL_FUNCTIONS.get(callee)
    return None if function is None else function(*arguments, **keywords)


def tried(
    read: Callable[[Any, Arguments, Keywords], Any], callee: Any, arguments: Arguments, keywords: Keywords
) -> Any:
    """What `read`, one of the two above, finds; None for arguments that the function does not take, of which
    calling it will tell."""
    try:
        return read(callee, arguments, keywords)
    except TypeError:
        return None


def autocast_of(value: Tensor) -> torch.dtype | None:
    """The dtype that autocast would have products of this tensor computed in."""
    return None if value.dtype is torch.float64 else autocast_dtype(value.device)
