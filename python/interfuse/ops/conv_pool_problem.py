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


@dataclass(frozen=True)
class ConvPoolProblem:
    """A checked call: what an implementation's `why_not` looks at."""

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
