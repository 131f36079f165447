"""conv_pool by torch.nn.functional alone, called as a user would: what the op is compared with."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from interfuse.ops._conv_pool_checks import Options, resolve

if TYPE_CHECKING:
    from cases.conv_pool import Case
    from torch import Tensor

    from interfuse.ops._conv_pool_problem import ConvPoolParams

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVG_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def activate(t: Tensor, name: str | None, negative_slope: float) -> Tensor:
    if name in (None, "none"):
        return t
    if name == "leaky_relu":
        return F.leaky_relu(t, negative_slope)
    if name == "gelu_tanh":
        return F.gelu(t, approximate="tanh")
    return {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}[
        name
    ](t)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    **_: Any,
) -> Tensor:
    count = weight.dim() - 2
    if padding_mode != "zeros":
        kernel = weight.shape[2:]
        dilations = (dilation,) * count if isinstance(dilation, int) else dilation
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
            sides = [(total // 2, total - total // 2) for total in totals]
        else:
            sides = [(p, p) for p in ((padding,) * count if isinstance(padding, int) else padding)]
        x, padding = F.pad(x, [p for side in reversed(sides) for p in side], mode=padding_mode), 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel", UserWarning)
        return CONVS[count](x, weight, bias, stride, padding, dilation, groups)


def pool(
    t: Tensor,
    count: int,
    pool: str | None = None,
    pool_size: Any = 2,
    pool_stride: Any = None,
    pool_padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    **_: Any,
) -> Tensor:
    if pool in (None, "none"):
        return t
    if pool == "avg":
        return AVG_POOLS[count](t, pool_size, pool_stride, pool_padding, ceil_mode, count_include_pad)
    return MAX_POOLS[count](t, pool_size, pool_stride, pool_padding, 1, ceil_mode)


def conv_pool(x: Tensor, weight: Tensor, bias: Tensor | None = None, **arguments: Any) -> Tensor:
    value = convolve(x, weight, bias, **arguments)
    value = activate(value, arguments.get("activation"), arguments.get("negative_slope", 0.01))
    return pool(value, weight.dim() - 2, **arguments)


def truth(x: Tensor, weight: Tensor, bias: Tensor | None = None, **arguments: Any) -> Tensor:
    """conv_pool in float64."""
    return conv_pool(*(None if t is None else t.double() for t in (x, weight, bias)), **arguments)


def gradients(x: Tensor, weight: Tensor, bias: Tensor | None, grad_y: Tensor, arguments: Any) -> list[Tensor]:
    """In float64, of x, weight and, where there is one, bias."""
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = conv_pool(*leaves, **arguments)
    return list(torch.autograd.grad(y, leaves, grad_y.double()))


def params(case: Case, precision: str = "default") -> ConvPoolParams:
    """The registered op's parameters for a case."""
    defaults = Options(1, 0, 1, 1, "zeros", None, 0.01, None, 2, None, 0, False, True, None)
    return resolve(case.weight[2:], defaults._replace(**case.arguments), precision)


def tensors(case: Case, dtype: torch.dtype = torch.float32, channels_last: bool = False,
            seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Normal numbers of about unit output; the same for every call with the same arguments."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(case.input, generator=random).to(dtype)
    fan_in = torch.Size(case.weight[1:]).numel()
    weight = (torch.randn(case.weight, generator=random) / fan_in**0.5).to(dtype)
    bias = (torch.randn(case.weight[0], generator=random) / 2).to(dtype) if case.bias else None
    if channels_last and x.dim() > 3:
        x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return x, weight, bias


def integers(case: Case, dtype: torch.dtype = torch.float32,
             seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Small integers: every sum of products is exact in float32, so results are compared for equality."""
    random = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randint(-3, 4, shape, generator=random).to(dtype)

    return draw(case.input), draw(case.weight), draw((case.weight[0],)) if case.bias else None


def clear_gradient(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None, noise: float,
                   seed: int = 0) -> Tensor:  # fmt: skip
    """A random grad_y that is zero wherever rounding may decide which element gets the gradient.

    Two elements of a window closer than `noise`, or a relu's input that near to zero, may change places
    between float32 and float64. Both are found by disturbing the convolution's result and seeing whose
    gradient moves.
    """
    random = torch.Generator().manual_seed(seed)
    arguments: Any = {"activation": None, **case.arguments}
    pre = convolve(*(None if t is None else t.double() for t in (x, weight, bias)), **arguments)

    def gradient(pre: Tensor) -> tuple[Tensor, Tensor]:
        leaf = pre.detach().requires_grad_()
        value = activate(leaf, arguments["activation"], arguments.get("negative_slope", 0.01))
        y = pool(value, weight.dim() - 2, **arguments)
        return y, torch.autograd.grad(y.sum(), leaf)[0]

    y, undisturbed = gradient(pre)
    unclear = torch.zeros_like(pre, dtype=torch.bool)
    for _ in range(6):
        sign = torch.randint(0, 2, pre.shape, generator=random) * 2 - 1
        moved = gradient(pre + noise * sign)[1]
        unclear |= (moved - undisturbed).abs() > 0.01 + 0.05 * undisturbed.abs()
    # Windows holding an unclear element: the maximum of the marks under the same windows.
    if arguments.get("pool") == "avg":
        arguments["pool"] = "max"
    marks = pool(unclear.double(), weight.dim() - 2, **arguments)
    grad = torch.randn(y.shape, generator=random)
    return torch.where(marks > 0, 0.0, grad).to(x.dtype)
