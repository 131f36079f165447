"""What one call of rnn asks for: its parameters, its sizes, and what its implementations return.

An implementation is a module with

    why_not(problem) -> str | None
    reserve_row(problem) -> int          float32 elements that a training forward keeps for each token
    run(problem, x, table, lengths, h0, c0, weights) -> (y, hn, cn, reserve)
    run_backward(problem, grad_y, grad_hn, grad_cn, x, table, lengths, h0, c0, weights, y, reserve, mask)
        -> gradients of x (or of the table's rows that x chose), h0, c0 and the weights

Everything is checked before: shapes, dtypes, devices, layouts (x and ids may have any strides, the rest is
contiguous). `weights` are torch's flat weights: for each layer, for each direction, weight_ih, weight_hh, and
where there are such, bias_ih, bias_hh, weight_hr. Gradients that are not wanted are None or anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interfuse import memory

if TYPE_CHECKING:
    from collections.abc import Sequence

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
CELLS = tuple(GATES)

Four = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class RnnProblem:
    """A checked call: what an implementation's `why_not` looks at. Caches are keyed by its identity."""

    cell: str  # one of CELLS
    layers: int
    directions: int  # 2: the second runs from each sequence's own end
    bias: bool
    batch_first: bool  # x, y and ids are (batch, steps, ...), otherwise (steps, batch, ...)
    batch: int
    steps: int
    input_size: int
    hidden_size: int
    proj_size: int  # 0 without a projection
    vocabulary: int  # 0: x holds floats; else int64 ids choosing rows of a (vocabulary, input_size) table
    dtype: torch.dtype  # of everything but ids and lengths
    device: torch.device
    ragged: bool  # lengths are given: (batch,) int64, each from 0 to steps
    states: bool  # the initial states are given, both of an LSTM; otherwise they are zeros
    weight_dtype: torch.dtype | None  # bfloat16: recurrent weights may be rounded to it (inference alone)
    save: bool  # a backward will follow
    backend: str = ""

    @property
    def output_size(self) -> int:
        """Of one direction."""
        return self.proj_size or self.hidden_size

    @property
    def gates(self) -> int:
        return GATES[self.cell]

    @property
    def runs(self) -> int:
        return self.layers * self.directions

    @property
    def weights_per_run(self) -> int:
        return 2 + 2 * self.bias + (self.proj_size > 0)

    def layer_input(self, layer: int) -> int:
        return self.input_size if layer == 0 else self.directions * self.output_size

    def weight_shapes(self) -> list[tuple[int, ...]]:
        """Of the flat weights, in order."""
        rows, hidden, out = self.gates * self.hidden_size, self.hidden_size, self.output_size
        shapes: list[tuple[int, ...]] = []
        for run in range(self.runs):
            shapes += [(rows, self.layer_input(run // self.directions)), (rows, out)]
            shapes += [(rows,), (rows,)] if self.bias else []
            shapes += [(out, hidden)] if self.proj_size else []
        return shapes

    def sequence_shape(self, size: int) -> tuple[int, int, int]:
        """Of x, y and their gradients."""
        if self.batch_first:
            return self.batch, self.steps, size
        return self.steps, self.batch, size


def empty_outputs(problem: RnnProblem, reserve_row: int) -> Four:
    """Unwritten (y, hn, cn, reserve) as the op returns them.

    cn is (0,) but for the LSTM, and reserve where nothing is saved. The reserve is (batch * steps,
    reserve_row): what it holds is its implementation's own business.
    """
    p = problem

    def empty(*shape: int, dtype: torch.dtype = p.dtype) -> Tensor:
        return memory.empty(shape, dtype=dtype, device=p.device, keep=p.save)

    return (
        empty(*p.sequence_shape(p.directions * p.output_size)),
        empty(p.runs, p.batch, p.output_size),
        empty(p.runs, p.batch, p.hidden_size) if p.cell == "lstm" else empty(0),
        empty(p.batch * p.steps, reserve_row, dtype=torch.float32)
        if p.save and reserve_row
        else empty(0, dtype=torch.float32),
    )


def empty_gradients(problem: RnnProblem, mask: Sequence[bool]) -> list[Tensor | None]:
    """Unwritten gradients of x (or of the chosen rows), h0, c0, weights; None where the mask says no."""
    p = problem
    shapes = [
        p.sequence_shape(p.input_size),
        (p.runs, p.batch, p.output_size),
        (p.runs, p.batch, p.hidden_size),
        *p.weight_shapes(),
    ]
    return [
        memory.empty(shape, dtype=p.dtype, device=p.device) if wanted else None
        for shape, wanted in zip(shapes, mask, strict=True)
    ]
