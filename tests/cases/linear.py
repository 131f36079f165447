"""linear's named cases: one list for the tests, the benchmark and the command line."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """A chain of dense layers; the first takes several inputs, which the others cannot."""

    name: str
    lead: tuple[int, ...]  # of the inputs, but for the last dimension
    widths: tuple[int, ...]  # of the inputs
    outputs: tuple[int, ...]  # of each layer
    activations: tuple[str, ...]  # of each layer
    bias: bool = True
    dtype: torch.dtype = torch.float32
    bench: str = ""  # "bar": a row that carries the bars; "further": a row beside them; "": not timed


def _head(batch: int) -> Case:
    """A CNN's and an RNN's features, joined and classified."""
    return Case(f"head-b{batch}", (batch,), (512, 128), (512, 10), ("relu", "none"), bench="bar")


def _large(batch: int) -> Case:
    """What follows the last convolution of a VGG network."""
    return Case(f"large-b{batch}", (batch,), (25_088,), (512,), ("none",), bench="bar")


BARS = (_head(1), _head(32), _head(256), _large(1), _large(32))

# What else people run.
FURTHER = (
    Case("siamese-b1", (1,), (64,), (32, 16, 1), ("relu", "relu", "sigmoid"), bench="further"),
    Case("siamese-b64", (64,), (64,), (32, 16, 1), ("relu", "relu", "sigmoid"), bench="further"),
    Case("classifier-b1", (1,), (512,), (10,), ("softmax",), bench="further"),
    Case("three-b16", (16,), (2048, 768, 256), (1024,), ("gelu",), bench="further"),
    Case("sequence", (8, 128), (256,), (256,), ("tanh",), bench="further"),
    Case(
        "head-b32-bf16", (32,), (512, 128), (512, 10), ("relu", "none"), dtype=torch.bfloat16, bench="further"
    ),
)

ACTIVATIONS = ("none", "relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "softmax")

# One layer each: every activation, tails of rows, columns and outputs, sizes of one, no rows at all.
SMALL = (
    *(Case(f"activation-{name}", (7,), (19, 8), (13,), (name,)) for name in ACTIVATIONS),
    *(
        Case(f"tails-{rows}-{width}-{out}", (rows,), (width, 3), (out,), ("relu",))
        for rows, width, out in ((1, 1, 1), (1, 37, 5), (2, 16, 4), (3, 64, 10), (5, 65, 17), (13, 31, 33))
    ),
    Case("no-bias", (6,), (20,), (9,), ("tanh",), bias=False),
    Case("no-rows", (0,), (12, 4), (6,), ("relu",)),
    Case("one-vector", (), (24,), (7,), ("none",)),
    Case("leading", (2, 3, 4), (10, 6), (5,), ("softmax",)),
    Case("deep", (4,), (2500, 77), (18,), ("none",)),
    Case("deeper-one-row", (1,), (9000,), (6,), ("none",)),
    Case("many-rows", (210,), (33,), (20,), ("gelu",)),
    Case("matrix-units", (140,), (70, 5, 200), (43,), ("none",)),
    Case("matrix-units-one-panel", (25,), (70, 5, 4200), (43,), ("none",)),
    Case("many-inputs", (3,), (1, 2, 3, 4, 5, 6, 7, 8), (9,), ("silu",)),
)

CASES = (*BARS, *FURTHER, *SMALL)
