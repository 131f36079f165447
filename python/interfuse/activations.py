"""The activations that the ops fuse: their names, torch's own functions for them, and their derivatives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

# What every op with an activation knows; some have further ones of their own.
ACTIVATIONS = ("none", "relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid")

# Their derivative needs the value before the activation; the others' follows from the value after it.
NEEDS_PREACTIVATION = ("gelu", "gelu_tanh", "silu")

aten = torch.ops.aten


def activate(t: Tensor, name: str, negative_slope: float) -> Tensor:
    match name:
        case "none":
            return t
        case "relu":
            return torch.relu(t)
        case "leaky_relu":
            return F.leaky_relu(t, negative_slope)
        case "gelu":
            return F.gelu(t)
        case "gelu_tanh":
            return F.gelu(t, approximate="tanh")
        case "silu":
            return F.silu(t)
        case "tanh":
            return torch.tanh(t)
        case "sigmoid":
            return torch.sigmoid(t)
        case "softmax":
            return torch.softmax(t, -1)
    raise ValueError(f"There is no activation {name!r}.")


def activate_backward(grad: Tensor, pre: Tensor, value: Tensor, name: str, negative_slope: float) -> Tensor:
    """The gradient before the activation, in operations that have a derivative themselves."""
    match name:
        case "none":
            return grad
        case "relu":
            return aten.threshold_backward(grad, value, 0)
        case "leaky_relu":
            return aten.leaky_relu_backward(grad, pre, negative_slope, False)
        case "gelu":
            return aten.gelu_backward(grad, pre)
        case "gelu_tanh":
            return aten.gelu_backward(grad, pre, approximate="tanh")
        case "silu":
            gate = torch.sigmoid(pre)  # written out: aten.silu_backward has no derivative
            return grad * gate * (1 + pre * (1 - gate))
        case "tanh":
            return aten.tanh_backward(grad, value)
        case "sigmoid":
            return aten.sigmoid_backward(grad, value)
        case "softmax":
            return value * (grad - (grad * value).sum(-1, keepdim=True))
    raise ValueError(f"There is no activation {name!r}.")


_MODULES = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}


def activation_arguments(
    activation: str | nn.Module | None,
    names: tuple[str, ...],
    fail: Callable[[str], ValueError],
) -> dict[str, Any]:
    """An op's activation arguments for a torch module or a name; `fail`'s error says why there are none.

    Softmax is for ops whose `names` hold it, and only over the last dimension.
    """
    if activation is None or type(activation) is nn.Identity:
        return {"activation": None}
    if isinstance(activation, str):
        return {"activation": activation}
    kind = type(activation)
    if kind in _MODULES:
        return {"activation": _MODULES[kind]}
    if isinstance(activation, nn.LeakyReLU) and kind is nn.LeakyReLU:
        return {"activation": "leaky_relu", "negative_slope": activation.negative_slope}
    if isinstance(activation, nn.GELU) and kind is nn.GELU:
        return {"activation": "gelu_tanh" if activation.approximate == "tanh" else "gelu"}
    softmax = "softmax" in names
    if softmax and isinstance(activation, nn.Softmax) and kind is nn.Softmax:
        if activation.dim == -1:
            return {"activation": "softmax"}
        raise fail(
            f"softmax is over the last dimension; got a Softmax with dim={activation.dim}. Use dim=-1."
        )
    raise fail(
        "the activation must be ReLU, LeakyReLU, GELU, SiLU, Tanh, Sigmoid"
        f"{', Softmax' if softmax else ''} or Identity of torch.nn, a name among "
        f"{', '.join(names)}, or None; got {kind.__module__}.{kind.__qualname__}."
    )
