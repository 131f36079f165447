"""What one call of conv_pool asks for: its parameters, its checked sizes, and what training saves.

Every error about arguments, shapes, dtypes or devices of conv_pool is raised in this file, so that
eager calls, tracing, the modules and direct calls of the registered op all say the same sentence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Literal

import torch
from torch import Tensor

ACTIVATIONS = ("none", "relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid")
POOLS = ("none", "max", "avg")
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
PRECISIONS = ("default", "highest")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Their derivative needs the value before the activation; the others' follows from the value after it.
NEEDS_PREACTIVATION = ("gelu", "gelu_tanh", "silu")

# The winner's position is one byte, and 255 means 'no gradient'.
LARGEST_INDEXED_WINDOW = 255

IntOrInts = int | Sequence[int]
Three = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class ConvPoolParams:
    """The registered op's parameters, in its order: all integers, one entry per spatial dimension.

    `padding` has two entries per dimension, low side then high side: (lo0, hi0, lo1, hi1, ...).
    With pool "none" the three pool lists are (1,...), (1,...), (0,...).
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    activation: str = "none"
    negative_slope: float = 0.01
    pool: str = "none"
    pool_size: tuple[int, ...] = ()
    pool_stride: tuple[int, ...] = ()
    pool_padding: tuple[int, ...] = ()
    ceil_mode: bool = False
    count_include_pad: bool = True
    precision: str = "default"
    backend: str = ""

    @property
    def spatial(self) -> int:
        return len(self.stride)

    @property
    def window(self) -> int:
        """Elements in one pooling window."""
        return math.prod(self.pool_size)

    @property
    def saves_index(self) -> bool:
        """Training saves the winner's position in each window as one byte."""
        return self.pool == "max" and self.window <= LARGEST_INDEXED_WINDOW

    @property
    def saves_pre(self) -> Literal["", "pooled", "conv"]:
        """Training saves a second tensor: of the output's shape, of the convolution's, or none."""
        if self.pool == "avg":
            return "conv" if self.activation != "none" else ""
        return "pooled" if self.activation in NEEDS_PREACTIVATION else ""

    @property
    def backward_needs_y(self) -> bool:
        """The activation's gradient is computed from the output itself."""
        if self.pool == "avg":
            return False
        if self.activation == "relu":
            return self.pool == "none"  # after a max pool the index says it: 255 where relu gave 0
        return self.activation in ("leaky_relu", "tanh", "sigmoid")

    def as_args(self) -> tuple[object, ...]:
        """The fields in the order of the registered op's schema."""
        return astuple(self)


PARAM_NAMES = tuple(field.name for field in fields(ConvPoolParams))


@dataclass(frozen=True, eq=False)
class ConvPoolProblem:
    """A checked call: what an implementation's `why_not` looks at. Caches are keyed by its identity."""

    params: ConvPoolParams
    batch: int
    in_channels: int
    out_channels: int
    input: tuple[int, ...]
    kernel: tuple[int, ...]
    conv_sizes: tuple[int, ...]
    out_sizes: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    channels_last: bool
    has_bias: bool
    save: bool

    @property
    def spatial(self) -> int:
        return len(self.input)


def fail(sentence: str) -> ValueError:
    return ValueError(f"conv_pool: {sentence}")


def is_int(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def as_ints(name: str, value: object, count: int) -> tuple[int, ...]:
    """One integer per spatial dimension from an integer or a sequence of 1 or `count` integers."""
    if is_int(value):
        return (value,) * count  # type: ignore[return-value]
    if isinstance(value, (tuple, list)) and len(value) in (1, count) and all(is_int(v) for v in value):
        return tuple(value) if len(value) == count else tuple(value) * count
    raise fail(
        f"{name} must be an integer or {count} integers (one per spatial dimension of the weight); "
        f"got {value!r}."
    )


def as_padding(
    value: object, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...]:
    """(lo0, hi0, lo1, hi1, ...) from a number, one number per dimension, 'same' or 'valid'."""
    if value == "valid":
        return (0, 0) * len(kernel)
    if value == "same":
        if any(s != 1 for s in stride):
            raise fail(
                f"padding='same' needs stride 1, since the output has the input's size; got stride {stride}. "
                "Pass the padding as numbers instead."
            )
        both = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple(side for total in both for side in (total // 2, total - total // 2))
    if isinstance(value, str):
        raise fail(
            f"padding must be 'same', 'valid', an integer or one integer per dimension; got {value!r}."
        )
    return tuple(side for p in as_ints("padding", value, len(kernel)) for side in (p, p))


def resolve(
    kernel: tuple[int, ...],
    stride: object,
    padding: object,
    dilation: object,
    groups: int,
    activation: str | None,
    negative_slope: float,
    pool: str | None,
    pool_size: object,
    pool_stride: object,
    pool_padding: object,
    ceil_mode: bool,
    count_include_pad: bool,
    precision: str,
    backend: str | None,
) -> ConvPoolParams:
    """The user's arguments as the registered op takes them. `check` judges the values."""
    count = len(kernel)
    strides = as_ints("stride", stride, count)
    dilations = as_ints("dilation", dilation, count)
    if not is_int(groups):
        raise fail(f"groups must be an integer; got {groups!r}.")
    for name, text in (("activation", activation), ("pool", pool), ("backend", backend)):
        if text is not None and not isinstance(text, str):
            raise fail(f"{name} must be a name or None; got {text!r}.")
    if isinstance(negative_slope, (Tensor, str)) or negative_slope is None:
        raise fail(f"negative_slope must be a number; got {type(negative_slope).__name__}.")
    if pool is None or pool == "none":
        window = window_stride = (1,) * count
        window_padding = (0,) * count
        ceil_mode, count_include_pad = False, True
    else:
        window = as_ints("pool_size", pool_size, count)
        window_stride = window if pool_stride is None else as_ints("pool_stride", pool_stride, count)
        window_padding = as_ints("pool_padding", pool_padding, count)
    return ConvPoolParams(
        stride=strides,
        padding=as_padding(padding, kernel, strides, dilations),
        dilation=dilations,
        groups=groups,
        activation=activation or "none",
        negative_slope=float(negative_slope),
        pool=pool or "none",
        pool_size=window,
        pool_stride=window_stride,
        pool_padding=window_padding,
        ceil_mode=bool(ceil_mode),
        count_include_pad=bool(count_include_pad),
        precision=precision,
        backend=backend or "",
    )


def pooled_size(size: int, window: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """torch's rule: with ceil_mode the last window starts inside the input or its left padding."""
    out = (size + 2 * padding - window + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= size + padding:
        out -= 1
    return out


def suggests_channels_last(t: Tensor) -> bool:
    """torch's suggest_memory_format: channels vary fastest, decided like torch where sizes are 1."""
    if t.dim() not in (4, 5):
        return False
    strides, sizes = t.stride(), t.shape
    if strides[1] == 0:
        return False
    least = 0
    for d in (1, *range(t.dim() - 1, 1, -1), 0):
        if sizes[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * sizes[d] if sizes[d] > 1 else strides[d]
    return True


def check_params(p: ConvPoolParams) -> None:
    """The values of the parameters alone, whoever passed them."""
    count = p.spatial
    lengths = {
        "padding": 2 * count,
        "dilation": count,
        "pool_size": count,
        "pool_stride": count,
        "pool_padding": count,
    }
    for name, length in lengths.items():
        if len(getattr(p, name)) != length:
            raise fail(
                f"the op's {name} must have {length} entries for {count} strides; got {getattr(p, name)}."
            )
    for name, least in (
        ("stride", 1),
        ("padding", 0),
        ("dilation", 1),
        ("pool_size", 1),
        ("pool_stride", 1),
        ("pool_padding", 0),
    ):
        if any(v < least for v in getattr(p, name)):
            raise fail(f"{name} must be at least {least} in every dimension; got {getattr(p, name)}.")
    if p.groups < 1:
        raise fail(f"groups must be at least 1; got {p.groups}.")
    for name, allowed in (("activation", ACTIVATIONS), ("pool", POOLS), ("precision", PRECISIONS)):
        if getattr(p, name) not in allowed:
            raise fail(f"{name} must be one of {', '.join(allowed)}; got {getattr(p, name)!r}.")
    if not math.isfinite(p.negative_slope):
        raise fail(f"negative_slope must be a finite number; got {p.negative_slope}.")
    if any(2 * pad > size for pad, size in zip(p.pool_padding, p.pool_size, strict=True)):
        raise fail(
            f"pool_padding must be at most half of pool_size, so that every window holds an element; "
            f"got pool_padding {p.pool_padding} with pool_size {p.pool_size}."
        )


def check_weight(weight: Tensor) -> None:
    if weight.dim() not in (3, 4, 5):
        raise fail(
            "the weight must have 3, 4 or 5 dimensions (out_channels, in_channels / groups, *kernel); "
            f"got shape {tuple(weight.shape)}."
        )


def fail_dimensions(x: Tensor, weight: Tensor) -> ValueError:
    return fail(
        f"a {weight.dim() - 2}-d convolution takes an input of {weight.dim()} dimensions (batch, channels, "
        f"*sizes), or {weight.dim() - 1} without the batch; got shape {tuple(x.shape)}."
    )


def check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Dimensions, dtypes and devices of the three tensors."""
    check_weight(weight)
    if x.dim() != weight.dim():
        raise fail_dimensions(x, weight)
    if x.dtype not in DTYPES:
        raise fail(
            f"the input's dtype must be float32, bfloat16, float16 or float64; got {x.dtype}. "
            "Convert the input first."
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.dtype != x.dtype:
            raise fail(
                f"input and {name} must have one dtype; got {x.dtype} and {t.dtype}. "
                "Convert one of them, or run under autocast."
            )
        if t.device != x.device:
            raise fail(
                f"input and {name} must be on one device; got {x.device} and {t.device}. Move one of them."
            )
    for name, t in (("input", x), ("weight", weight), ("bias", bias)):
        if t is not None and t.layout != torch.strided:
            raise fail(
                f"the {name} must be a dense tensor; got layout {t.layout}. Call to_dense() on it first."
            )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise fail(
            f"the bias must have shape ({weight.shape[0]},), one entry per output channel of the weight; "
            f"got {tuple(bias.shape)}."
        )


def check_batched(x: Tensor, weight: Tensor, padding_mode: str) -> None:
    """What the public function has to know before it can add a missing batch dimension."""
    for name, t in (("input", x), ("weight", weight)):
        if not isinstance(t, Tensor):
            raise TypeError(f"conv_pool: the {name} must be a torch tensor; got {type(t).__name__}.")
    check_weight(weight)
    if x.dim() not in (weight.dim(), weight.dim() - 1):
        raise fail_dimensions(x, weight)
    if padding_mode not in PADDING_MODES:
        raise fail(f"padding_mode must be one of {', '.join(PADDING_MODES)}; got {padding_mode!r}.")


def check_saved(
    problem: ConvPoolProblem, grad_y: Tensor, y: Tensor | None, index: Tensor, pre: Tensor
) -> None:
    """The tensors that only the backward op takes: the kernels read them by pointer."""
    p = problem.params
    shape = (problem.batch, problem.out_channels, *problem.out_sizes)
    conv = (problem.batch, problem.out_channels, *problem.conv_sizes)
    pre_shape = {"": (0,), "pooled": shape, "conv": conv}[p.saves_pre]
    expected = [
        ("grad_y", grad_y, shape, problem.dtype),
        ("index", index, shape if p.saves_index else (0,), torch.uint8),
        ("pre", pre, pre_shape, problem.dtype),
    ]
    if p.backward_needs_y:
        if y is None:
            raise fail(
                f"the backward of activation {p.activation!r} with pool {p.pool!r} needs the output y."
            )
        expected.append(("y", y, shape, problem.dtype))
    for name, t, sizes, dtype in expected:
        if tuple(t.shape) != tuple(sizes) or t.dtype != dtype or t.device != problem.device:
            raise fail(
                f"the backward op's {name} must have shape {tuple(sizes)}, {dtype}, on {problem.device}; "
                f"got {tuple(t.shape)}, {t.dtype}, on {t.device}. "
                "Pass what the forward op returned with save=True."
            )


def check(x: Tensor, weight: Tensor, bias: Tensor | None, p: ConvPoolParams, save: bool) -> ConvPoolProblem:
    """The checked problem, or a ValueError that says what was given, what is allowed and what to do."""
    check_tensors(x, weight, bias)
    if p.spatial != weight.dim() - 2:
        raise fail(f"a {weight.dim() - 2}-d weight needs {weight.dim() - 2} strides; got {p.stride}.")
    check_params(p)
    batch, in_channels, *sizes = x.shape
    out_channels, group_channels, *kernel = weight.shape
    if in_channels != group_channels * p.groups:
        raise fail(
            f"the weight of shape {tuple(weight.shape)} with groups={p.groups} takes "
            f"{group_channels * p.groups} input channels; the input's shape is {tuple(x.shape)}."
        )
    if in_channels == 0 or out_channels == 0 or any(k == 0 for k in kernel):
        raise fail(
            f"channels and kernel must not be empty; got an input of shape {tuple(x.shape)} and a weight of "
            f"shape {tuple(weight.shape)}."
        )
    if out_channels % p.groups != 0:
        raise fail(f"out_channels must be a multiple of groups; got {out_channels} and {p.groups}.")
    conv, out = [], []
    for d, (size, k) in enumerate(zip(sizes, kernel, strict=True)):
        padded, extent = size + p.padding[2 * d] + p.padding[2 * d + 1], p.dilation[d] * (k - 1) + 1
        if size == 0 or padded < extent:
            raise fail(
                f"the input's spatial dimension {d} has {size} elements ({padded} with padding), fewer than "
                f"the kernel's {extent} (size {k}, dilation {p.dilation[d]}). Use a larger input or padding."
            )
        conv.append((padded - extent) // p.stride[d] + 1)
        pooled = pooled_size(conv[d], p.pool_size[d], p.pool_stride[d], p.pool_padding[d], p.ceil_mode)
        if pooled < 1:
            raise fail(
                f"the convolution's spatial dimension {d} has {conv[d]} elements, fewer than the pooling "
                f"window's {p.pool_size[d]} with padding {p.pool_padding[d]}. Use a larger input."
            )
        out.append(pooled)
    return ConvPoolProblem(
        params=p,
        batch=batch,
        in_channels=in_channels,
        out_channels=out_channels,
        input=tuple(sizes),
        kernel=tuple(kernel),
        conv_sizes=tuple(conv),
        out_sizes=tuple(out),
        dtype=x.dtype,
        device=x.device,
        channels_last=suggests_channels_last(x) or suggests_channels_last(weight),
        has_bias=bias is not None,
        save=save,
    )


def memory_format(problem: ConvPoolProblem) -> torch.memory_format:
    """Of y, of what is saved, and of grad_x."""
    if not problem.channels_last:
        return torch.contiguous_format
    return torch.channels_last if problem.spatial == 2 else torch.channels_last_3d


def empty_outputs(problem: ConvPoolProblem) -> Three:
    """Unwritten (y, index, pre) as the op returns them; (0,) where nothing is saved."""
    p, device, form = problem.params, problem.device, memory_format(problem)
    shape = (problem.batch, problem.out_channels, *problem.out_sizes)
    y = torch.empty(shape, dtype=problem.dtype, device=device, memory_format=form)
    if problem.save and p.saves_index:
        index = torch.empty(shape, dtype=torch.uint8, device=device, memory_format=form)
    else:
        index = torch.empty(0, dtype=torch.uint8, device=device)
    if problem.save and p.saves_pre:
        sizes = problem.conv_sizes if p.saves_pre == "conv" else problem.out_sizes
        shape = (problem.batch, problem.out_channels, *sizes)
        pre = torch.empty(shape, dtype=problem.dtype, device=device, memory_format=form)
    else:
        pre = torch.empty(0, dtype=problem.dtype, device=device)
    return y, index, pre


def empty_gradients(problem: ConvPoolProblem, x: Tensor, weight: Tensor, mask: Sequence[bool]) -> Three:
    """Unwritten (grad_x, grad_weight, grad_bias) as the backward op returns them; (0,) where not wanted."""

    def empty(wanted: bool, shape: Sequence[int], form: torch.memory_format) -> Tensor:
        if not wanted:
            return torch.empty(0, dtype=x.dtype, device=x.device)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)

    plain = torch.contiguous_format
    return (
        empty(mask[0], x.shape, memory_format(problem)),
        empty(mask[1], weight.shape, plain),
        empty(mask[2], (problem.out_channels,), plain),
    )


def fused_why_not(problem: ConvPoolProblem) -> str | None:
    """What no fused kernel does, whatever the device: these go to the reference."""
    p = problem.params
    if problem.dtype not in (torch.float32, torch.bfloat16):
        return f"the fused kernels compute in float32 and bfloat16; the tensors are {problem.dtype}."
    if p.pool == "max" and p.window > LARGEST_INDEXED_WINDOW:
        return (
            f"the winner's position in a max pooling window is kept in one byte, so a window has at most "
            f"{LARGEST_INDEXED_WINDOW} elements; this one has {p.window}."
        )
    if p.activation == "leaky_relu" and p.negative_slope < 0:
        return (
            f"leaky_relu's gradient is told from the sign of its output, which needs a slope of at least 0; "
            f"this one is {p.negative_slope}."
        )
    return None
