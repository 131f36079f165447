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

# The classes of convolutions that models are made of, for `interfuse bench conv_pool --sweep`: is any of them
# slower than torch's own modules? It varies batch, layout, dtype and pool itself.
SWEEP = tuple(
    Case(name, shape, weight, {"activation": "relu", **arguments}, bench="sweep")
    for name, shape, weight, arguments in (
        *((f"depthwise-{size}x{size}-{channels}-k{k}{f'-s{s}' if s > 1 else ''}", (8, channels, size, size),
           (channels, 1, k, k), {"padding": k // 2, "stride": s, "groups": channels})
          for size, channels, k, s in ((112, 32, 3, 1), (56, 128, 3, 1), (56, 128, 3, 2), (14, 512, 3, 1),
                                       (28, 240, 5, 1), (14, 384, 7, 1))),
        *((f"pointwise-{size}x{size}-{i}-{o}{f'-s{s}' if s > 1 else ''}", (8, i, size, size), (o, i, 1, 1),
           {"stride": s})
          for size, i, o, s in ((56, 64, 256, 1), (28, 256, 128, 1), (14, 512, 512, 1), (7, 2048, 512, 1),
                                (56, 256, 512, 2))),
        *((f"dense-{size}x{size}-{i}-{o}-k{k}{f'-s{s}' if s > 1 else ''}", (8, i, size, size), (o, i, k, k),
           {"padding": k // 2, "stride": s})
          for size, i, o, k, s in ((56, 64, 64, 3, 1), (28, 128, 128, 3, 1), (14, 256, 256, 3, 1),
                                   (7, 512, 512, 3, 1), (56, 64, 128, 3, 2), (28, 64, 64, 5, 1),
                                   (224, 3, 64, 7, 2))),
        *((f"groups-{size}x{size}-{channels}-of-{each}", (8, channels, size, size), (channels, each, 3, 3),
           {"padding": 1, "groups": channels // each})
          for size, channels, each in ((56, 128, 16), (56, 128, 4), (14, 512, 16))),
        *((f"patches-{k}x{k}", (8, 3, 224, 224), (o, 3, k, k), {"stride": k})
          for k, o in ((4, 96), (16, 768))),
        ("1d-64-128-s2", (8, 64, 1000), (128, 64, 5), {"padding": 2, "stride": 2}),
        ("1d-80-512", (8, 80, 3000), (512, 80, 3), {"padding": 1, "activation": "gelu"}),
        ("1d-512-512", (8, 512, 500), (512, 512, 3), {"padding": 1}),
        ("1d-512-512-s2", (8, 512, 1599), (512, 512, 3), {"stride": 2, "activation": "gelu"}),
        ("1d-1-512-s5", (8, 1, 16000), (512, 1, 10), {"stride": 5, "activation": "gelu"}),
        ("3d-16-32", (8, 16, 16, 56, 56), (32, 16, 3, 3, 3), {"padding": 1}),
        ("3d-pointwise", (8, 64, 8, 28, 28), (128, 64, 1, 1, 1), {}),
    )
)  # fmt: skip


def _small(
    name: str, shape: tuple[int, ...], weight: tuple[int, ...], bias: bool = True, **arguments: Any
) -> Case:
    return Case(name, shape, weight, {**BLOCK, **arguments}, bias)


_ACTIVATIONS = ("none", "relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid")

# For the tests alone: small, and each with something that a kernel gets wrong first. Channel counts are
# seldom multiples of a vector, so that every tail is met.
EDGES = (
    *(
        _small(f"{activation}-{pool}", (2, 5, 9, 11), (19, 5, 3, 3), padding=1, activation=activation,
               negative_slope=0.2, pool=pool)
        for activation in _ACTIVATIONS for pool in ("none", "max", "avg")
    ),
    # Shapes that the fast paths take, with tails in every direction.
    _small("block-32", (2, 32, 13, 15), (48, 32, 3, 3)),
    _small("block-32-padded", (1, 32, 12, 17), (33, 32, 3, 3), padding=1),
    _small("block-wide", (1, 67, 7, 40), (70, 67, 3, 3), padding=1),
    _small("block-3d", (1, 32, 6, 9, 11), (35, 32, 3, 3, 3), padding=1),
    _small("block-3d-plain", (2, 17, 5, 8, 7), (18, 17, 3, 3, 3)),
    _small("block-overlapping", (1, 33, 14, 13), (34, 33, 3, 3), padding=1, pool_size=3, pool_stride=2),
    _small("block-unpooled", (1, 35, 10, 9), (33, 35, 3, 3), padding=1, pool=None),
    _small("block-avg-gelu", (1, 36, 10, 11), (33, 36, 3, 3), pool="avg", activation="gelu"),
    _small("first-rgb", (1, 3, 8, 35), (64, 3, 3, 3)),
    _small("first-gray", (2, 1, 17, 18), (33, 1, 3, 3), padding=1),
    _small("first-3d", (1, 1, 6, 13, 14), (16, 1, 3, 3, 3)),
    _small("first-3d-rgb", (2, 3, 6, 13, 14), (16, 3, 3, 3, 3)),
    _small("pointwise", (2, 21, 9, 8), (37, 21, 1, 1)),
    _small("pointwise-strided", (2, 16, 9, 8), (32, 16, 1, 1), stride=2, pool=None),
    _small("stem", (1, 3, 37, 33), (20, 3, 7, 7), stride=2, padding=3, pool_size=3, pool_stride=2,
           pool_padding=1),
    _small("five", (1, 6, 14, 12), (9, 6, 5, 5), padding=2),
    _small("depthwise", (2, 19, 10, 11), (19, 1, 3, 3), padding=1, groups=19),
    _small("depthwise-panels", (2, 144, 6, 9), (144, 1, 3, 3), padding=1, groups=144, stride=2, pool=None),
    _small("depthwise-dilated", (1, 32, 11, 13), (32, 1, 3, 5), padding=3, groups=32, dilation=(2, 3),
           activation="gelu", pool_size=3, pool_stride=2, pool_padding=1),
    _small("grouped", (2, 12, 9, 10), (10, 6, 3, 3), padding=1, groups=2),
    _small("grouped-pool-avg", (1, 9, 8, 9), (6, 3, 2, 2), groups=3, pool="avg"),
    _small("no-bias", (2, 7, 8, 9), (5, 7, 3, 3), bias=False),
    # Strides and paddings.
    _small("strided", (1, 5, 23, 21), (7, 5, 3, 3), stride=(2, 3), padding=(1, 2)),
    _small("dilated", (1, 4, 17, 15), (9, 4, 3, 3), dilation=(2, 3), padding=(2, 1)),
    _small("strided-dilated", (2, 4, 25, 22), (9, 4, 2, 3), stride=(3, 2), dilation=(1, 2), padding=1),
    _small("same-even", (1, 4, 9, 8), (6, 4, 4, 2), padding="same"),
    _small("same-dilated", (1, 4, 10, 9), (6, 4, 2, 3), padding="same", dilation=3),
    _small("valid", (1, 4, 9, 8), (6, 4, 3, 2), padding="valid"),
    _small("padding-beyond-kernel", (1, 3, 5, 4), (8, 3, 3, 3), padding=4),
    _small("reflect", (2, 3, 9, 8), (5, 3, 3, 3), padding=2, padding_mode="reflect"),
    _small("replicate", (2, 3, 5, 8), (5, 3, 3, 3), padding=(2, 1), padding_mode="replicate"),
    _small("circular", (2, 3, 9, 8), (5, 3, 4, 3), padding="same", padding_mode="circular"),
    # Pooling windows.
    _small("pool-overlapping", (1, 3, 13, 14), (6, 3, 3, 3), pool_size=3, pool_stride=1),
    _small("pool-gaps", (1, 3, 15, 14), (6, 3, 3, 3), pool_size=2, pool_stride=3),
    _small("pool-uneven", (1, 3, 12, 13), (6, 3, 3, 3), pool_size=(2, 3), pool_stride=(3, 1)),
    _small("pool-row", (1, 3, 12, 13), (6, 3, 3, 3), pool_size=(1, 4)),
    _small("pool-padded", (1, 3, 12, 13), (6, 3, 3, 3), pool_size=(3, 2), pool_padding=1),
    _small("pool-ceil", (1, 3, 10, 11), (6, 3, 3, 3), padding=1, pool_size=3, ceil_mode=True),
    _small("pool-ceil-dropped", (1, 3, 6, 6), (6, 3, 1, 1), pool_size=2, pool_stride=3, pool_padding=1,
           ceil_mode=True),
    _small("avg-padded", (1, 3, 12, 13), (6, 3, 3, 3), pool="avg", pool_size=3, pool_stride=2,
           pool_padding=1),
    _small("avg-padded-exclusive", (1, 3, 12, 13), (6, 3, 3, 3), pool="avg", pool_size=3, pool_stride=2,
           pool_padding=1, count_include_pad=False),
    _small("avg-ceil", (1, 3, 10, 11), (6, 3, 3, 3), pool="avg", pool_size=(3, 2), pool_padding=1,
           ceil_mode=True),
    _small("avg-ceil-exclusive", (1, 3, 11, 10), (6, 3, 3, 3), pool="avg", pool_size=(2, 3), pool_padding=1,
           ceil_mode=True, count_include_pad=False),
    _small("pool-everything", (2, 3, 9, 8), (6, 3, 3, 3), pool_size=(7, 6)),
    _small("pool-255", (1, 2, 16, 18), (3, 2, 1, 1), pool_size=(15, 17), pool_stride=1),
    _small("pool-256", (1, 2, 17, 18), (3, 2, 1, 1), pool_size=(16, 16), pool_stride=1),
    # The least of everything.
    _small("one-of-each", (1, 1, 1, 1), (1, 1, 1, 1), pool_size=1),
    _small("one-output", (1, 3, 3, 3), (5, 3, 3, 3), pool=None),
    _small("narrow", (2, 4, 20, 3), (9, 4, 3, 3), pool_size=(2, 1)),
    _small("flat", (2, 4, 3, 20), (9, 4, 3, 3), pool_size=(1, 2)),
    # One and three dimensions.
    _small("audio", (3, 11, 50), (17, 11, 5), padding=2),
    _small("audio-strided", (2, 4, 61), (7, 4, 4), stride=3, dilation=2, padding="valid", pool_size=3,
           pool_stride=2, pool_padding=1, ceil_mode=True),
    _small("audio-avg", (2, 4, 33), (6, 2, 4), padding="same", groups=2, pool="avg", pool_size=3,
           pool_padding=1, count_include_pad=False),
    _small("volume", (1, 3, 7, 8, 9), (5, 3, 3, 2, 1), stride=(1, 2, 1), padding=(2, 0, 1)),
    _small("volume-flat-pool", (1, 3, 4, 8, 9), (5, 3, 3, 3, 3), padding=1, pool_size=(1, 2, 2)),
    _small("volume-avg", (1, 4, 6, 7, 8), (6, 2, 2, 3, 3), groups=2, pool="avg", pool_size=(3, 2, 2),
           pool_stride=(2, 1, 2), pool_padding=1, ceil_mode=True),
    _small("volume-dilated", (2, 2, 9, 8, 7), (3, 2, 2, 3, 2), dilation=(3, 1, 2), padding="same",
           activation="silu"),
)  # fmt: skip
