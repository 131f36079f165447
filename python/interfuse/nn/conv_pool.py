"""ConvPool1d, ConvPool2d and ConvPool3d: torch.nn.ConvNd with the activation and the pooling after it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from interfuse.activations import ACTIVATIONS, activation_arguments
from interfuse.ops import _conv_pool_eager as eager
from interfuse.ops._conv_pool_checks import IntOrInts, Options, as_ints, fail
from interfuse.ops._conv_pool_problem import POOLS
from interfuse.ops.conv_pool import run_op

if TYPE_CHECKING:
    from typing_extensions import Self

_MAX_POOLS = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}
_AVG_POOLS = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}


def pool_arguments(pool: str | nn.Module | None, spatial: int) -> dict[str, Any]:
    """conv_pool's pooling arguments for a torch module or a name; ValueError says why there are none."""
    if pool is None or type(pool) is nn.Identity:
        return {"pool": None}
    if isinstance(pool, str):
        return {"pool": pool}
    kind: Any = type(pool)
    at: Any = pool
    dimensions = _MAX_POOLS.get(kind) or _AVG_POOLS.get(kind)
    if dimensions is None:
        raise fail(
            f"the pool must be MaxPool{spatial}d, AvgPool{spatial}d or Identity of torch.nn, a name among "
            f"{', '.join(POOLS)}, or None; got {kind.__module__}.{kind.__qualname__}."
        )
    if dimensions != spatial:
        raise fail(f"a {spatial}-d convolution is followed by a {spatial}-d pool; got {kind.__qualname__}.")
    shared = {
        "pool_size": as_ints("kernel_size", at.kernel_size, spatial),
        "pool_stride": as_ints("stride", at.stride, spatial),
        "pool_padding": as_ints("padding", at.padding, spatial),
        "ceil_mode": at.ceil_mode,
    }
    if kind in _MAX_POOLS:
        if at.return_indices:
            raise fail(
                "a MaxPool with return_indices=True returns two tensors, which the fused module cannot."
            )
        if any(d != 1 for d in as_ints("dilation", at.dilation, spatial)):
            raise fail(f"the fused pooling windows are dense; got a MaxPool with dilation {at.dilation}.")
        return {"pool": "max", **shared}
    if getattr(at, "divisor_override", None) is not None:
        raise fail(
            f"average pooling divides by the window's size; got divisor_override={at.divisor_override}."
        )
    return {"pool": "avg", "count_include_pad": at.count_include_pad, **shared}


class _ConvPoolNd(nn.Module):
    """Shared by the three. Parameters are named and initialised as torch.nn.ConvNd's, for its state_dicts."""

    _conv_type: ClassVar[Any]
    _spatial: ClassVar[int]

    weight: nn.Parameter
    bias: nn.Parameter | None
    _arguments: tuple[Any, ...]  # of a call, as Options has them

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrInts,
        stride: IntOrInts = 1,
        padding: str | IntOrInts = 0,
        dilation: IntOrInts = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        pool: str | None = None,
        pool_size: IntOrInts = 2,
        pool_stride: IntOrInts | None = None,
        pool_padding: IntOrInts = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None:
        super().__init__()
        if (activation or "none") not in ACTIVATIONS:
            raise fail(f"activation must be None or one of {', '.join(ACTIVATIONS)}; got {activation!r}.")
        if (pool or "none") not in POOLS:
            raise fail(f"pool must be None or one of {', '.join(POOLS)}; got {pool!r}.")
        spatial = self._spatial
        # torch's own module checks the arguments and initialises the parameters.
        conv = self._conv_type(
            in_channels, out_channels, as_ints("kernel_size", kernel_size, spatial),
            as_ints("stride", stride, spatial),
            padding if isinstance(padding, str) else as_ints("padding", padding, spatial),
            as_ints("dilation", dilation, spatial), groups, bias, padding_mode, device, dtype)  # fmt: skip
        self.in_channels = conv.in_channels
        self.out_channels = conv.out_channels
        self.kernel_size = conv.kernel_size
        self.stride = conv.stride
        self.padding = conv.padding
        self.dilation = conv.dilation
        self.groups = conv.groups
        self.padding_mode = conv.padding_mode
        self.activation = activation
        self.negative_slope = negative_slope
        self.pool = pool
        self.pool_size = as_ints("pool_size", pool_size, spatial)
        self.pool_stride = None if pool_stride is None else as_ints("pool_stride", pool_stride, spatial)
        self.pool_padding = as_ints("pool_padding", pool_padding, spatial)
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad  # the last: from here on _arguments is complete
        self.weight = conv.weight
        self.register_parameter("bias", conv.bias)

    def __setattr__(self, name: str, value: Any) -> None:
        """Any setting may be changed later; the call's arguments follow at once and not at every call."""
        super().__setattr__(name, value)
        state = self.__dict__
        if name in Options._fields and "count_include_pad" in state:
            state["_arguments"] = (*map(state.__getitem__, Options._fields[:-1]), None)

    @classmethod
    def from_torch(
        cls,
        conv: nn.Module,
        activation: str | nn.Module | None = None,
        pool: str | nn.Module | None = None,
    ) -> Self:
        """The fused module of a torch convolution and what follows it, sharing the convolution's Parameters.

        `activation` and `pool` are torch modules, names, or None; a pool given by name has window 2.
        """
        if type(conv) is not cls._conv_type:
            raise fail(
                f"{cls.__name__}.from_torch takes a torch.nn.{cls._conv_type.__name__} and no subclass, "
                f"whose forward could differ; got {type(conv).__module__}.{type(conv).__qualname__}."
            )
        at: Any = conv
        module = cls(
            at.in_channels, at.out_channels, at.kernel_size, at.stride, at.padding, at.dilation, at.groups,
            at.bias is not None, at.padding_mode, "meta", at.weight.dtype,
            **activation_arguments(activation, ACTIVATIONS, fail),
            **pool_arguments(pool, cls._spatial))  # fmt: skip
        module.weight, module.bias = at.weight, at.bias
        return module.train(conv.training)

    def reset_parameters(self) -> None:
        """torch.nn.ConvNd's initialisation."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        parameters = self._parameters
        weight: Tensor | None = parameters.get("weight")
        if weight is None:  # parametrized: an attribute of another kind
            weight = self.weight
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401 (self.bias is slow)
        arguments = self._arguments
        if not torch.compiler.is_dynamo_compiling():
            y = eager.run(input, weight, bias, arguments)
            if y is not None:
                return y
        return run_op(input, weight, bias, Options(*arguments))

    def extra_repr(self) -> str:
        parts = [
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        ]
        zeros, ones = (0,) * self._spatial, (1,) * self._spatial
        usuals = {"padding": zeros, "dilation": ones, "groups": 1, "padding_mode": "zeros"}
        for name, usual in usuals.items():
            value = getattr(self, name)
            if value != usual:
                parts.append(f"{name}={value!r}")
        if self.bias is None:
            parts.append("bias=False")
        if self.activation not in (None, "none"):
            parts.append(f"activation={self.activation!r}")
            if self.activation == "leaky_relu":
                parts.append(f"negative_slope={self.negative_slope}")
        if self.pool not in (None, "none"):
            parts.append(f"pool={self.pool!r}, pool_size={self.pool_size}")
            if self.pool_stride not in (None, self.pool_size):
                parts.append(f"pool_stride={self.pool_stride}")
            for name, usual in {"pool_padding": zeros, "ceil_mode": False}.items():
                value = getattr(self, name)
                if value != usual:
                    parts.append(f"{name}={value!r}")
            if self.pool == "avg" and not self.count_include_pad:
                parts.append("count_include_pad=False")
        return ", ".join(parts)


class ConvPool1d(_ConvPoolNd):
    """torch.nn.Conv1d, an activation and a pooling in one kernel; see `interfuse.ops.conv_pool`."""

    _conv_type = nn.Conv1d
    _spatial = 1


class ConvPool2d(_ConvPoolNd):
    """torch.nn.Conv2d, an activation and a pooling in one kernel; see `interfuse.ops.conv_pool`."""

    _conv_type = nn.Conv2d
    _spatial = 2


class ConvPool3d(_ConvPoolNd):
    """torch.nn.Conv3d, an activation and a pooling in one kernel; see `interfuse.ops.conv_pool`."""

    _conv_type = nn.Conv3d
    _spatial = 3
