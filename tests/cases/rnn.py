"""rnn's named cases: one list for the tests, the benchmark and the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

MODULES = {"rnn_tanh": nn.RNN, "rnn_relu": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


@dataclass(frozen=True)
class Case:
    """What is run, in torch's words; the input has its batch first, as people mostly have it."""

    name: str
    cell: str  # one of MODULES
    batch: int
    steps: int
    inputs: int  # of an embedding's rows, where there is a vocabulary
    hidden: int
    layers: int = 1
    bidirectional: bool = False
    projection: int = 0
    bias: bool = True
    batch_first: bool = True
    vocabulary: int = 0  # more than 0: the input holds token ids
    ragged: bool = False  # lengths between a tenth of the steps and all
    states: bool = False  # an initial state is given
    bench: str = ""  # "bar": a row that carries the bars; "further": a row beside them; "": not timed

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def runs(self) -> int:
        """Layers and directions: of so many a state is made."""
        return self.layers * self.directions

    @property
    def outputs(self) -> int:
        return self.projection or self.hidden

    def module(self, modules: dict[str, type[nn.RNNBase]] = MODULES, seed: int = 0) -> nn.RNNBase:
        extra: dict[str, object] = {"nonlinearity": "relu"} if self.cell == "rnn_relu" else {}
        if self.projection:
            extra["proj_size"] = self.projection
        torch.manual_seed(seed)
        module = modules[self.cell](
            self.inputs, self.hidden, self.layers, bias=self.bias, batch_first=self.batch_first,
            bidirectional=self.bidirectional, **extra)  # fmt: skip
        if self.cell == "rnn_relu":  # unbounded: keep the state from growing with the steps
            with torch.no_grad():
                for p in module.parameters():
                    p.mul_(0.5)
        return module

    def input(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.steps) if self.batch_first else (self.steps, self.batch)
        if self.vocabulary:
            return torch.randint(self.vocabulary, shape, generator=generator)
        return torch.randn(*shape, self.inputs, generator=generator)

    def table(self, seed: int = 0) -> Tensor | None:
        if not self.vocabulary:
            return None
        return torch.randn(self.vocabulary, self.inputs, generator=torch.Generator().manual_seed(seed + 1))

    def lengths(self, seed: int = 0) -> Tensor | None:
        if not self.ragged:
            return None
        generator = torch.Generator().manual_seed(seed + 2)
        lengths = torch.randint(max(1, self.steps // 10), self.steps + 1, (self.batch,), generator=generator)
        lengths[:1] = self.steps
        return lengths

    def state(self, seed: int = 0) -> tuple[Tensor, ...]:
        """h0, or for the LSTM h0 and c0; nothing without an initial state."""
        if not self.states:
            return ()
        generator = torch.Generator().manual_seed(seed + 3)
        sizes = (self.outputs, self.hidden) if self.cell == "lstm" else (self.hidden,)
        return tuple(torch.randn(self.runs, self.batch, size, generator=generator) for size in sizes)


def _text(name: str, batch: int, cell: str = "lstm", bench: str = "bar", ragged: bool = False) -> Case:
    return Case(name, cell, batch, 64, 64, 128, 2, vocabulary=20_000, ragged=ragged, bench=bench)


def _audio(name: str, batch: int, cell: str = "lstm", bench: str = "bar") -> Case:
    return Case(name, cell, batch, 100, 40, 128, 2, bench=bench)


# The rows of the design: text through an embedding, audio features, and one wide layer; then the cells that
# torch runs step by step, and sequences of differing lengths.
BARS = (
    _text("text-b1", 1),
    _text("text-b8", 8),
    _text("text-b32", 32),
    _audio("audio-b1", 1),
    _audio("audio-b16", 16),
    Case("wide-512", "lstm", 1, 100, 512, 512, bench="bar"),
    _audio("gru-b1", 1, "gru"),
    _audio("gru-b16", 16, "gru"),
    _audio("rnn-b1", 1, "rnn_tanh"),
    _audio("rnn-b16", 16, "rnn_tanh"),
    Case("ragged-b32", "lstm", 32, 100, 40, 128, 2, ragged=True, bench="bar"),
)

# What else people run, chosen to show where interfuse loses as well as where it wins.
FURTHER = (
    Case("both-ways-b8", "lstm", 8, 64, 300, 128, bidirectional=True, bench="further"),
    Case("both-ways-gru-b32", "gru", 32, 100, 40, 128, 2, bidirectional=True, bench="further"),
    Case("projected-b8", "lstm", 8, 100, 80, 256, projection=64, bench="further"),
    Case("tiny-b64", "lstm", 64, 30, 8, 16, bench="further"),
    Case("long-b1", "gru", 1, 1000, 40, 64, bench="further"),
    Case("wide-1024-b16", "lstm", 16, 50, 256, 1024, bench="further"),
    _text("text-gru-b8", 8, "gru", "further"),
    _text("text-ragged-b32", 32, bench="further", ragged=True),
)

CASES = BARS + FURTHER

# For the tests alone: small, and each with something that a kernel gets wrong first. Sizes are seldom
# multiples of a vector, so that every tail is met.
EDGES = (
    *(Case(f"{cell}-plain", cell, 5, 9, 6, 20, states=True) for cell in MODULES),
    *(Case(f"{cell}-deep-both", cell, 13, 9, 6, 33, 2, bidirectional=True, ragged=True, states=True)
      for cell in MODULES),
    *(Case(f"{cell}-one", cell, 1, 40, 3, 64) for cell in MODULES),
    *(Case(f"{cell}-least", cell, 2, 1, 1, 1, states=True) for cell in MODULES),
    *(Case(f"{cell}-steps-first", cell, 4, 7, 5, 17, 2, batch_first=False, ragged=True) for cell in MODULES),
    *(Case(f"{cell}-no-bias", cell, 3, 8, 5, 19, 2, bias=False, bidirectional=True) for cell in MODULES),
    *(Case(f"{cell}-ids", cell, 4, 11, 7, 18, 2, vocabulary=13, ragged=cell != "gru") for cell in MODULES),
    Case("projected", "lstm", 5, 9, 6, 20, 2, True, projection=7, ragged=True, states=True),
    Case("projected-wide", "lstm", 3, 9, 6, 40, projection=17),
    Case("projected-one", "lstm", 2, 5, 3, 2, 2, projection=1, bias=False, states=True),
    Case("batch-33", "lstm", 33, 9, 6, 48),
    Case("batch-50", "gru", 50, 30, 4, 16, bidirectional=True, ragged=True),
    Case("deep", "gru", 2, 5, 3, 9, 5, states=True),
    Case("wide-input", "rnn_tanh", 3, 4, 130, 10),
    Case("wide-hidden", "lstm", 2, 5, 3, 131, states=True),
    Case("long", "gru", 2, 300, 3, 24),
)  # fmt: skip

# Timed on a GPU alone: one layer, from what one multiprocessor holds to what a cluster cannot.
GPU = (
    *(Case(f"lstm-{size}-b32", "lstm", 32, 512, size, size) for size in (128, 256, 512, 1024)),
    Case("gru-512-b32", "gru", 32, 512, 512, 512),
    Case("lstm-512-ragged-b32", "lstm", 32, 512, 512, 512, ragged=True),
)
