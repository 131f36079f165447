"""FusionLinear, DenseChain and CompactLinear: dense layers over several inputs, with their activations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interfuse.activations import activation_arguments
from interfuse.ops import _linear_eager as eager
from interfuse.ops._linear_checks import WEIGHT_DTYPES, Options, fail
from interfuse.ops._linear_problem import ACTIVATIONS
from interfuse.ops.linear import quantize_weight, run_op
from interfuse.torch_state import children, is_untouched

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Self

    from interfuse.ops._linear_checks import Layer


def _widths(in_features: int | Sequence[int]) -> tuple[int, ...]:
    widths = (in_features,) if isinstance(in_features, int) else tuple(in_features)
    if not widths or not all(isinstance(w, int) and w > 0 for w in widths):
        raise fail(f"in_features must be a positive integer, or one for each input; got {in_features!r}.")
    return widths


class _Dense(nn.Module):
    """What a dense layer is, whatever its weight is kept as."""

    in_features: tuple[int, ...]
    out_features: int
    activation: str | None
    negative_slope: float

    def _layer(self) -> Layer:
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> Tensor:
        weight, bias, scale, arguments = self._layer()
        if not torch.compiler.is_dynamo_compiling():
            y = eager.run(inputs, weight, bias, scale, arguments)
            if y is not None:
                return y
        return run_op(inputs, weight, bias, scale, Options(*arguments))

    def extra_repr(self) -> str:
        widths = " + ".join(str(width) for width in self.in_features)
        parts = [f"{widths}, {self.out_features}"]
        if self._layer()[1] is None:
            parts.append("bias=False")
        if self.activation not in (None, "none"):
            parts.append(f"activation={self.activation!r}")
            if self.activation == "leaky_relu":
                parts.append(f"negative_slope={self.negative_slope}")
        return ", ".join(parts)


class FusionLinear(_Dense):
    """torch.nn.Linear over the concatenation of its inputs, which is never made, and an activation.

    Called with one tensor for each entry of in_features. Parameters are named, shaped and initialised as
    those of torch.nn.Linear(sum(in_features), out_features), so a state_dict moves either way.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int,
        bias: bool = True,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__()
        if (activation or "none") not in ACTIVATIONS:
            raise fail(f"activation must be None or one of {', '.join(ACTIVATIONS)}; got {activation!r}.")
        self.in_features = _widths(in_features)
        self.out_features = out_features
        self.activation = activation
        self.negative_slope = negative_slope
        # torch's own module checks the rest and initialises the parameters.
        whole: Any = nn.Linear(sum(self.in_features), out_features, bias, device, dtype)
        self.weight = whole.weight
        self.register_parameter("bias", whole.bias)

    @classmethod
    def from_torch(
        cls,
        linear: nn.Linear,
        activation: str | nn.Module | None = None,
        in_features: int | Sequence[int] | None = None,
    ) -> Self:
        """The fused module of a torch.nn.Linear and what follows it, sharing the Linear's Parameters.

        `activation` is a torch module, a name, or None; `in_features` cuts the Linear's columns into inputs.
        """
        if type(linear) is not nn.Linear:
            raise fail(
                f"from_torch takes a torch.nn.Linear and no subclass, whose forward could differ; got "
                f"{type(linear).__module__}.{type(linear).__qualname__}."
            )
        widths = _widths(linear.in_features if in_features is None else in_features)
        if sum(widths) != linear.in_features:
            raise fail(f"in_features {widths} must add up to the Linear's {linear.in_features} columns.")
        arguments = activation_arguments(activation, ACTIVATIONS, fail)
        has_bias = linear.bias is not None
        module = cls(
            widths, linear.out_features, has_bias, device="meta", dtype=linear.weight.dtype, **arguments
        )
        at: Any = linear
        module.weight, module.bias = at.weight, at.bias
        return module.train(linear.training)

    def reset_parameters(self) -> None:
        """torch.nn.Linear's initialisation."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight.shape[1])
            nn.init.uniform_(self.bias, -bound, bound)

    def _layer(self) -> Layer:
        parameters = self._parameters
        weight: Any = parameters.get("weight")
        if weight is None:  # parametrized: an attribute of another kind
            weight = self.weight
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401 (self.bias is slow)
        return weight, bias, None, (self.activation, self.negative_slope, None)


class CompactLinear(_Dense):
    """A FusionLinear for inference, with its weight rounded to bfloat16 or int8.

    Few rows at a time take as long as the weight's bytes take to read: half of them, or a quarter. Weight,
    scale and bias are buffers; they get no gradient.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: FusionLinear, weight_dtype: torch.dtype = torch.int8) -> None:
        super().__init__()
        if not isinstance(layer, FusionLinear):
            raise fail(f"CompactLinear takes a FusionLinear; got {type(layer).__qualname__}. See from_torch.")
        if weight_dtype not in WEIGHT_DTYPES:
            raise fail(f"weight_dtype must be torch.int8 or torch.bfloat16; got {weight_dtype}.")
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.activation, self.negative_slope = layer.activation, layer.negative_slope
        weight, scale = layer.weight.detach(), None
        if weight_dtype == torch.int8:
            weight, scale = quantize_weight(weight)
        else:
            weight = weight.to(weight_dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.train(layer.training)

    def _layer(self) -> Layer:
        buffers = self._buffers
        weight: Any = buffers["weight"]
        return weight, buffers["bias"], buffers["scale"], (self.activation, self.negative_slope, None)


class DenseChain(nn.Sequential):
    """FusionLinear layers one after the other; the first may take several inputs.

    Where nobody needs the values between (no gradients, no hooks on the layers), all layers are one call of
    the native core.
    """

    def __init__(self, *layers: FusionLinear | CompactLinear) -> None:
        for i, layer in enumerate(layers):
            if not isinstance(layer, _Dense):
                raise fail(
                    f"DenseChain takes FusionLinear and CompactLinear layers; layer {i} is a "
                    f"{type(layer).__qualname__}. See DenseChain.from_torch."
                )
            if i and layer.in_features != (layers[i - 1].out_features,):
                raise fail(
                    f"layer {i} of the chain must take one input of {layers[i - 1].out_features} columns, "
                    f"what layer {i - 1} gives; it takes {layer.in_features}."
                )
        super().__init__(*layers)

    @classmethod
    def from_torch(
        cls, modules: Iterable[nn.Module], in_features: int | Sequence[int] | None = None
    ) -> DenseChain:
        """The chain of a torch.nn.Sequential of Linear modules and activations, sharing their Parameters.

        `in_features` cuts the first Linear's columns into inputs.
        """
        layers: list[FusionLinear] = []
        waiting: list[nn.Module] = []

        def flush(activation: nn.Module | None = None) -> None:
            if waiting:
                linear: Any = waiting.pop()
                layers.append(FusionLinear.from_torch(linear, activation, None if layers else in_features))

        for module in modules:
            if type(module) is nn.Linear:
                flush()
                waiting.append(module)
            elif waiting:
                flush(module)
            else:
                raise fail(
                    f"a chain is made of Linear modules, each with at most one activation behind it; got a "
                    f"{type(module).__qualname__} in another place."
                )
        flush()
        return cls(*layers)

    def forward(self, *inputs: Tensor) -> Tensor:
        if not torch.compiler.is_dynamo_compiling():
            again = eager.run_modules(inputs, self._modules)
            if again is not None:
                return again
            layers = []
            for layer in self._modules.values():
                if type(layer) not in _LAYERS or not is_untouched(layer, _Dense.forward):
                    break
                dense: Any = layer
                layers.append(dense._layer())  # noqa: SLF001
            else:
                compact = type(next(iter(self._modules.values()), None)) is CompactLinear
                kind, held = (CompactLinear, "_buffers") if compact else (FusionLinear, "_parameters")
                chain = eager.Chain(self._modules, kind, _Dense.forward, held)
                y = eager.run_chain(inputs, layers, chain)
                if y is not None:
                    return y
        for _, module in children(self):
            inputs = (module(*inputs),)
        return inputs[0]


_LAYERS: tuple[type[Any], ...] = (FusionLinear, CompactLinear)
