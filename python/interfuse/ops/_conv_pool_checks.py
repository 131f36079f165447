"""The checks of conv_pool: from what the user or the dispatcher passes to a ConvPoolProblem.

Every error about arguments, shapes, dtypes or devices of conv_pool is raised in this file, so that eager
calls, tracing, the modules and direct calls of the registered op all say the same sentence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from interfuse.activations import ACTIVATIONS
from interfuse.bounded_cache import BoundedCache
from interfuse.ops._conv_pool_problem import (
    PARAM_NAMES,
    POOLS,
    PRECISIONS,
    ConvPoolParams,
    ConvPoolProblem,
    pooled_size,
    suggests_channels_last,
)
from interfuse.ops._dtypes import DTYPES

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

IntOrInts = int | Sequence[int]


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


class Options(NamedTuple):
    """The public function's arguments from `stride` on, as the user gave them."""

    stride: object
    padding: object
    dilation: object
    groups: int
    padding_mode: str
    activation: str | None
    negative_slope: float
    pool: str | None
    pool_size: object
    pool_stride: object
    pool_padding: object
    ceil_mode: bool
    count_include_pad: bool
    backend: str | None


def resolve(kernel: tuple[int, ...], options: Options, precision: str) -> ConvPoolParams:
    """The user's arguments as the registered op takes them. `check` judges the values."""
    o, count = options, len(kernel)
    if o.padding_mode not in PADDING_MODES:
        raise fail(f"padding_mode must be one of {', '.join(PADDING_MODES)}; got {o.padding_mode!r}.")
    stride = as_ints("stride", o.stride, count)
    dilation = as_ints("dilation", o.dilation, count)
    if not is_int(o.groups):
        raise fail(f"groups must be an integer; got {o.groups!r}.")
    for name, text in (("activation", o.activation), ("pool", o.pool), ("backend", o.backend)):
        if text is not None and not isinstance(text, str):
            raise fail(f"{name} must be a name or None; got {text!r}.")
    if not isinstance(o.negative_slope, (int, float)):
        raise fail(f"negative_slope must be a number; got {o.negative_slope!r}.")
    if o.pool is None or o.pool == "none":
        window = window_stride = (1,) * count
        window_padding, ceil_mode, count_include_pad = (0,) * count, False, True
    else:
        window = as_ints("pool_size", o.pool_size, count)
        window_stride = window if o.pool_stride is None else as_ints("pool_stride", o.pool_stride, count)
        window_padding = as_ints("pool_padding", o.pool_padding, count)
        ceil_mode, count_include_pad = bool(o.ceil_mode), bool(o.count_include_pad)
    return ConvPoolParams(
        stride=stride,
        padding=as_padding(o.padding, kernel, stride, dilation),
        dilation=dilation,
        groups=o.groups,
        activation=o.activation or "none",
        negative_slope=float(o.negative_slope),
        pool=o.pool or "none",
        pool_size=window,
        pool_stride=window_stride,
        pool_padding=window_padding,
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
        precision=precision,
        backend=o.backend or "",
    )


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


def check_batched(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether x has a batch dimension, from its and the weight's dimensions."""
    for name, t in (("input", x), ("weight", weight), ("bias", bias)):
        if not isinstance(t, Tensor) and not (t is None and name == "bias"):
            raise TypeError(f"conv_pool: the {name} must be a torch tensor; got {type(t).__name__}.")
    check_weight(weight)
    if x.dim() not in (weight.dim(), weight.dim() - 1):
        raise fail_dimensions(x, weight)
    return x.dim() == weight.dim()


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


_problems: BoundedCache[ConvPoolProblem] = BoundedCache(1024)


def op_params(args: Sequence[object]) -> ConvPoolParams:
    """The parameters from the registered op's arguments; the dispatcher hands lists."""
    return ConvPoolParams(*_hashable(args[: len(PARAM_NAMES)]))  # type: ignore[arg-type]


def _hashable(args: Sequence[object]) -> tuple[object, ...]:
    return tuple([tuple(a) if type(a) is list else a for a in args])


def op_problem(
    x: Tensor, weight: Tensor, bias: Tensor | None, args: Sequence[object], save: bool
) -> ConvPoolProblem:
    """`check` of the registered op's arguments, remembered by shapes, strides, dtypes and devices."""
    if any(t is not None and t.layout != torch.strided for t in (x, weight, bias)):
        return check(x, weight, bias, op_params(args), save)  # raises; such tensors have no strides
    key = (x.shape, x.stride(), x.dtype, x.device, weight.shape, weight.stride(), weight.dtype, weight.device,
           None if bias is None else (bias.shape, bias.dtype, bias.device),
           _hashable(args[: len(PARAM_NAMES)]), save)  # fmt: skip
    return _problems.get(key) or _problems.put(key, check(x, weight, bias, op_params(args), save))
