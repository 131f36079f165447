"""conv_pool's named cases: one list for the tests, the benchmark and the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Case:
    """Shapes as torch has them, and the public function's arguments behind the bias."""

    name: str
    input: tuple[int, ...]  # (batch, channels, *sizes)
    weight: tuple[int, ...]  # (out_channels, channels / groups, *kernel)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    bias: bool = True
    dtype: torch.dtype = torch.float32
    bench: str = ""  # "bar": a row that carries the bars; "further": a row beside them; "": not timed


BLOCK = {"activation": "relu", "pool": "max", "pool_size": 2}

# The four rows of the design: a stack of CNN blocks at 224x224, and a 3-d one.
BARS = (
    Case("first-224", (1, 3, 224, 224), (64, 3, 3, 3), BLOCK, bench="bar"),
    Case("second-111", (8, 32, 111, 111), (64, 32, 3, 3), BLOCK, bench="bar"),
    Case("third-54", (8, 64, 54, 54), (128, 64, 3, 3), BLOCK, bench="bar"),
    Case("conv3d-55", (2, 32, 10, 55, 55), (64, 32, 3, 3, 3), BLOCK, bench="bar"),
)

# What else people run, chosen to show where interfuse loses as well as where it wins.
FURTHER = tuple(
    Case(name, shape, weight, arguments, dtype=dtype, bench="further")
    for name, shape, weight, arguments, dtype in (
        ("gray-64", (8, 1, 64, 64), (32, 1, 3, 3), {**BLOCK, "padding": 1}, torch.float32),
        ("small-32", (32, 3, 32, 32), (32, 3, 3, 3), {**BLOCK, "padding": 1}, torch.float32),
        ("third-54-b1", (1, 64, 54, 54), (128, 64, 3, 3), BLOCK, torch.float32),
        ("deep-14", (8, 256, 14, 14), (256, 256, 3, 3), {**BLOCK, "padding": 1}, torch.float32),
        ("stem-224", (1, 3, 224, 224), (64, 3, 7, 7),
         {"stride": 2, "padding": 3, "activation": "relu", "pool": "max", "pool_size": 3, "pool_stride": 2,
          "pool_padding": 1}, torch.float32),
        ("pointwise-56", (8, 64, 56, 56), (128, 64, 1, 1), BLOCK, torch.float32),
        ("five-56", (8, 32, 56, 56), (64, 32, 5, 5), {**BLOCK, "padding": 2}, torch.float32),
        ("strided-56", (8, 64, 56, 56), (128, 64, 3, 3), {**BLOCK, "padding": 1, "stride": 2}, torch.float32),
        ("dilated-56", (8, 32, 56, 56), (64, 32, 3, 3), {**BLOCK, "padding": 2, "dilation": 2},
         torch.float32),
        ("depthwise-56", (8, 128, 56, 56), (128, 1, 3, 3), {**BLOCK, "padding": 1, "groups": 128},
         torch.float32),
        ("audio-1000", (8, 40, 1000), (64, 40, 5), {**BLOCK, "padding": 2}, torch.float32),
        ("volume-first", (2, 1, 16, 112, 112), (32, 1, 3, 3, 3), BLOCK, torch.float32),
        ("third-54-avg", (8, 64, 54, 54), (128, 64, 3, 3), {**BLOCK, "pool": "avg"}, torch.float32),
        ("third-54-gelu", (8, 64, 54, 54), (128, 64, 3, 3), {**BLOCK, "activation": "gelu"}, torch.float32),
        ("third-54-unpooled", (8, 64, 54, 54), (128, 64, 3, 3), {"activation": "relu"}, torch.float32),
        ("second-111-bf16", (8, 32, 111, 111), (64, 32, 3, 3), BLOCK, torch.bfloat16),
        ("third-54-bf16", (8, 64, 54, 54), (128, 64, 3, 3), BLOCK, torch.bfloat16),
    )
)  # fmt: skip

CASES = BARS + FURTHER
