"""What one call of conv_pool asks for: its parameters, its sizes, and what its implementations return."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from interfuse import memory
from interfuse.activations import NEEDS_PREACTIVATION

if TYPE_CHECKING:
    from collections.abc import Sequence

POOLS = ("none", "max", "avg")
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
PRECISIONS = ("default", "highest")

# The winner's position is one byte, and 255 means 'no gradient'.
LARGEST_INDEXED_WINDOW = 255

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
        """The fields in the order of the registered op's schema.

        Written out: dataclasses.astuple copies every value deeply, and Dynamo traces no attrgetter.
        """
        return (
            self.stride, self.padding, self.dilation, self.groups, self.activation, self.negative_slope,
            self.pool, self.pool_size, self.pool_stride, self.pool_padding, self.ceil_mode,
            self.count_include_pad, self.precision, self.backend)  # fmt: skip


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


def memory_format(problem: ConvPoolProblem) -> torch.memory_format:
    """Of y, of what is saved, and of grad_x."""
    if not problem.channels_last:
        return torch.contiguous_format
    return torch.channels_last if problem.spatial == 2 else torch.channels_last_3d


def weight_format(weight: Tensor) -> torch.memory_format:
    """As it lies, where an implementation reads and writes that: channels_last or contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
    if last is None or weight.is_contiguous() or not weight.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def empty_outputs(problem: ConvPoolProblem) -> Three:
    """Unwritten (y, index, pre) as the op returns them; (0,) where nothing is saved."""
    p, device, form = problem.params, problem.device, memory_format(problem)
    shape = (problem.batch, problem.out_channels, *problem.out_sizes)
    y = memory.empty(shape, dtype=problem.dtype, device=device, memory_format=form, keep=problem.save)
    if problem.save and p.saves_index:
        index = memory.empty(shape, dtype=torch.uint8, device=device, memory_format=form)
    else:
        index = torch.empty(0, dtype=torch.uint8, device=device)
    if problem.save and p.saves_pre:
        sizes = problem.conv_sizes if p.saves_pre == "conv" else problem.out_sizes
        shape = (problem.batch, problem.out_channels, *sizes)
        pre = memory.empty(shape, dtype=problem.dtype, device=device, memory_format=form)
    else:
        pre = torch.empty(0, dtype=problem.dtype, device=device)
    return y, index, pre


def empty_gradients(problem: ConvPoolProblem, x: Tensor, weight: Tensor, mask: Sequence[bool]) -> Three:
    """Unwritten (grad_x, grad_weight, grad_bias) as the backward op returns them; (0,) where not wanted."""

    def empty(wanted: bool, shape: Sequence[int], form: torch.memory_format) -> Tensor:
        if not wanted:
            return torch.empty(0, dtype=x.dtype, device=x.device)
        return memory.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)

    return (
        empty(mask[0], x.shape, memory_format(problem)),
        empty(mask[1], weight.shape, weight_format(weight)),
        empty(mask[2], (problem.out_channels,), torch.contiguous_format),
    )


def fused_why_not(problem: ConvPoolProblem) -> str | None:
    """What no fused kernel does, whatever the device: these go to the reference."""
    p = problem.params
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
