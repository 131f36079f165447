"""From a checked rnn problem to launches of its Triton kernels: which kernel, blocks, what is kept where.

Nothing here touches a device, so the tests compile the very same launches ahead of time from meta tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from interfuse.kernels import rnn_backward_kernels as backward_kernels
from interfuse.kernels import rnn_kernels as kernels
from interfuse.kernels.launch import (
    Launch,
    Tile,
    allows_tf32,
    interpreting,
    multiprocessors,
    power_of_two,
    shared_bytes,
)
from torch import Tensor

from interfuse.numerics import get_precision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interfuse.ops._rnn_problem import RnnProblem

CELLS = {"lstm": "lstm", "gru": "gru", "rnn_tanh": "tanh", "rnn_relu": "relu"}
# Bytes of recurrent weights that one program keeps in shared memory, and what else it needs there.
RESIDENT_BYTES = 128 * 1024
BESIDE_RESIDENT_BYTES = 20 * 1024  # triton 3.7.1 takes 4 KiB more than 3.9
# One program of a recurrence at a time is what a multiprocessor runs; the assembler would spill to fit more.
MOST_REGISTERS = 255
# Elements moved by one program of the kernels that only copy.
COPIED = 2048

Argument = Tensor | int | float | None


def arithmetic(problem: RnnProblem) -> str:
    """How a product of float32 is done; the shorter types have one way only."""
    tf32 = problem.dtype == torch.float32 and get_precision() != "highest" and allows_tf32("rnn")
    return "tf32" if tf32 else "ieee"


def _on_vector_units(problem: RnnProblem) -> bool:
    return problem.dtype == torch.float32 and arithmetic(problem) == "ieee"


@dataclass(frozen=True)
class Recurrence:
    """Which of the two kernels walks through time, and its blocks: rows are sequences, cols are units."""

    resident: bool
    forward: Tile
    backward: Tile

    def constants(self, tile: Tile) -> dict[str, int]:
        blocks = {"ROWS": tile.rows, "UNITS": tile.cols}
        return blocks if self.resident else {**blocks, "DEPTH": tile.depth}


def recurrence(problem: RnnProblem) -> Recurrence:
    """Weights on the chip where they fit and the matrix unit multiplies them; else read at every step.

    A matrix unit takes 16 sequences at a time and no fewer. More share a program only when there are more
    blocks of them than multiprocessors. Blocks of one weight matrix are twice as deep as those of all gates.
    Warps and stages are such that nothing spills on the architectures tested.
    """
    p, size = problem, torch.finfo(problem.dtype).bits // 8
    padded = power_of_two(p.hidden_size, 16, 1 << 30)
    vector_units = _on_vector_units(p)
    room = min(RESIDENT_BYTES, shared_bytes(p.device) - BESIDE_RESIDENT_BYTES)
    if not vector_units and not p.proj_size and p.gates * padded * padded * size <= room:
        tile = Tile(16, padded, padded, 8 if padded > 128 or p.gates * padded > 256 else 4, 1)
        return Recurrence(True, tile, tile)
    if vector_units:
        tile = Tile(16, min(padded, 32), 16, 8, 3)
        return Recurrence(False, tile, tile)
    crowded = math.ceil(p.batch / 16) * p.directions > multiprocessors(p.device)
    one_by_one = p.hidden_size % 16 or p.output_size % 16  # each element is read at its own address
    rows, warps, stages = (16, 8, 2) if one_by_one else (32, 8, 3) if crowded else (16, 4, 2)
    cols, deepest = min(padded, 64), 128 // size
    backward_warps = 8 if p.proj_size else warps
    return Recurrence(
        False,
        Tile(rows, cols, power_of_two(p.output_size, 16, deepest), warps, stages),
        Tile(rows, cols, power_of_two(p.gates * p.hidden_size, 16, 2 * deepest), backward_warps, 3),
    )


class Kept(NamedTuple):
    """What one layer's recurrence writes beside its final states, both directions side by side."""

    y: Tensor  # (tokens, directions, out)
    gates: Tensor | None  # (tokens, directions, 4, hidden)
    state: Tensor | None  # (tokens or sequences, directions, hidden) in float32
    middle: Tensor | None  # (tokens or sequences, directions, hidden): an LSTM's h before the projection


def _kept_sizes(problem: RnnProblem, layer: int) -> dict[str, tuple[int, torch.dtype]]:
    """{field of Kept: (elements of a token, dtype)} of what a layer's training forward reserves."""
    p = problem
    hidden = p.directions * p.hidden_size
    sizes: dict[str, tuple[int, torch.dtype]] = {}
    if layer + 1 < p.layers:
        sizes["y"] = (p.directions * p.output_size, p.dtype)
    if p.gates > 1:
        sizes["gates"] = (4 * hidden, p.dtype)
    if p.cell == "lstm":
        sizes["state"] = (hidden, torch.float32)
    if p.proj_size:
        sizes["middle"] = (hidden, p.dtype)
    return sizes


def _floats(elements: int, dtype: torch.dtype) -> int:
    return -(-elements * torch.finfo(dtype).bits // 32)


def reserve_row(problem: RnnProblem) -> int:
    """float32 elements that a training forward keeps for each token."""
    return sum(
        _floats(*size) for layer in range(problem.layers) for size in _kept_sizes(problem, layer).values()
    )


def kept(problem: RnnProblem, y: Tensor, reserve: Tensor) -> list[Kept]:
    """Each layer's part of the reserve, which lie there one after the other, and of y."""
    tokens, flat, start = problem.batch * problem.steps, reserve.view(-1), 0
    layers = []
    for layer in range(problem.layers):
        fields: dict[str, Tensor] = {"y": y}
        for name, (elements, dtype) in _kept_sizes(problem, layer).items():
            floats = tokens * _floats(elements, dtype)
            fields[name] = flat[start : start + floats].view(dtype)[: tokens * elements]
            start += floats
        layers.append(Kept(fields["y"], *(fields.get(name) for name in Kept._fields[1:])))
    return layers


def scratch(problem: RnnProblem, y: Tensor) -> list[Kept]:
    """The same where nothing is kept: states and outputs of inner layers are written over."""
    p = problem

    def empty(elements: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(elements, dtype=dtype, device=p.device)

    hidden = p.batch * p.directions * p.hidden_size
    state = empty(hidden, torch.float32) if p.cell == "lstm" else None
    middle = empty(hidden, p.dtype) if p.proj_size else None
    inner = [empty(y.numel(), p.dtype) for _ in range(min(p.layers - 1, 2))]
    return [
        Kept(y if layer + 1 == p.layers else inner[layer % 2], None, state, middle)
        for layer in range(p.layers)
    ]


class RunWeights(NamedTuple):
    """The parameters of one layer and direction."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None


def run_weights(problem: RnnProblem, weights: Sequence[Tensor], layer: int) -> list[RunWeights]:
    """Of the layer's directions."""
    p, each = problem, problem.weights_per_run
    runs = []
    for run in range(layer * p.directions, (layer + 1) * p.directions):
        w_ih, w_hh, *rest = weights[run * each : (run + 1) * each]
        b_ih, b_hh = rest[:2] if p.bias else (None, None)
        runs.append(RunWeights(w_ih, w_hh, b_ih, b_hh, rest[-1] if p.proj_size else None))
    return runs


def side_by_side(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Both directions' in one piece; of one direction, what there is."""
    given = [t for t in tensors if t is not None]
    if len(given) < 2:
        return given[0] if given else None
    return torch.stack(given)


def new_gate_bias(problem: RnnProblem, runs: Sequence[RunWeights]) -> Tensor | None:
    """A GRU's recurrent bias of its new gate, which is multiplied by another gate first."""
    if problem.cell != "gru":
        return None
    return side_by_side([None if run.b_hh is None else run.b_hh[2 * problem.hidden_size :] for run in runs])


def _row(size: int) -> int:
    """Elements of an aligned row: 16 bytes of any dtype, and what the just-in-time compiler takes note of."""
    return math.ceil(size / 16) * 16


def _recurrent_weights(runs: Sequence[RunWeights], aligned: bool) -> dict[str, Argument]:
    """Aligned: rows end in zeros."""
    found: dict[str, Argument] = {}
    for name in ("w_hh", "w_hr"):
        weights = side_by_side([getattr(run, name) for run in runs])
        if weights is not None and aligned and weights.shape[-1] % 16 > 0:
            weights = F.pad(weights, (0, -weights.shape[-1] % 16))
        found[name] = weights
    return found


def _walk(problem: RnnProblem) -> dict[str, Argument]:
    """Where a token lies."""
    p = problem
    token_t, token_b = (1, p.steps) if p.batch_first else (p.batch, 1)
    return {"batch": p.batch, "steps": p.steps, "token_t": token_t, "token_b": token_b}


def _cell(problem: RnnProblem) -> dict[str, object]:
    return {
        "CELL": CELLS[problem.cell],
        "GATES": problem.gates,
        "DIRECTIONS": problem.directions,
    }


def _sizes(problem: RnnProblem) -> dict[str, Argument]:
    """Not constants of the kernels that read the weights at every step: unrolled, their loops would spill."""
    size, out = problem.hidden_size, problem.output_size
    return {"size": size, "out": out, "size_row": _row(size), "out_row": _row(out)}


def _products(problem: RnnProblem) -> dict[str, object]:
    return {"PRECISION": arithmetic(problem), "WIDEN": interpreting()}


def _programs(problem: RnnProblem, rows: int) -> int:
    return math.ceil(problem.batch / rows) * problem.directions


@dataclass(frozen=True)
class Inputs:
    """The input of one layer as kernels read it: x, the rows of a table that ids choose, or y of the last."""

    x: Tensor
    ids: Tensor | None
    size: int
    inner: int  # tokens of one outer index
    x_strides: tuple[int, int]
    ids_strides: tuple[int, int]
    ends_are_zero: bool = False  # past the sequences' ends

    def args(self) -> dict[str, Argument]:
        return {
            "x": self.x,
            "ids": self.ids,
            "inner": self.inner,
            "x_outer": self.x_strides[0],
            "x_inner": self.x_strides[1],
            "ids_outer": self.ids_strides[0],
            "ids_inner": self.ids_strides[1],
            "vocabulary": 0 if self.ids is None else self.x.shape[0],
        }


def first_inputs(problem: RnnProblem, x: Tensor, table: Tensor | None) -> Inputs:
    """Of layer 0: x is read where it lies, as long as an input's elements lie together."""
    inner = problem.steps if problem.batch_first else problem.batch
    if table is not None:
        return Inputs(table, x, problem.input_size, inner, (0, 0), (x.stride(0), x.stride(1)))
    if x.stride(2) != 1:
        x = x.contiguous()
    return Inputs(x, None, problem.input_size, inner, (x.stride(0), x.stride(1)), (0, 0))


def inner_inputs(problem: RnnProblem, y: Tensor, layer: int) -> Inputs:
    """Of a later layer: the outputs of the one before."""
    size = problem.layer_input(layer)
    inner = problem.steps if problem.batch_first else problem.batch
    return Inputs(y, None, size, inner, (inner * size, size), (0, 0), ends_are_zero=True)


def at_steps(problem: RnnProblem, t: Tensor, steps: range) -> Tensor:
    """The rows of these steps, of a tensor with a row a token; in one dimension where they lie together."""
    p = problem
    if len(steps) == p.steps:
        return t
    if p.batch_first:
        return t.unflatten(0, (p.batch, p.steps))[:, steps.start : steps.stop]
    return t[steps.start * p.batch : steps.stop * p.batch]


def _input_tile(problem: RnnProblem, rows: int, cols: int) -> Tile:
    rows, cols = power_of_two(rows, 16, 64), power_of_two(cols, 16, 64)
    if _on_vector_units(problem):
        return Tile(rows, cols, 16, 4, 2)
    return Tile(rows, cols, 32, 4, 3)


def input_launch(
    problem: RnnProblem,
    inputs: Inputs,
    run: RunWeights,
    direction: int,
    lengths: Tensor | None,
    pre: Tensor,
    steps: range | None = None,
) -> Launch:
    """What fills one direction of pre (tokens, directions, gates, hidden), or some steps of it."""
    p = problem
    steps = range(p.steps) if steps is None else steps
    tokens, gate_rows = p.batch * len(steps), p.gates * p.hidden_size
    tile = _input_tile(p, tokens, gate_rows)
    out_token = p.directions * gate_rows
    return Launch(
        kernels.input_gates,
        math.ceil(tokens / tile.rows) * math.ceil(gate_rows / tile.cols),
        {
            **inputs.args(),
            "weight": run.w_ih,
            "bias": run.b_ih,
            "recurrent_bias": run.b_hh,
            "lengths": lengths,
            "out": pre.view(-1)[direction * gate_rows :],
            "tokens": tokens,
            "inner": len(steps) if p.batch_first else p.batch,
            "out_outer": inputs.inner * out_token,
            "out_inner": out_token,
            "first_step": steps.start,
        },
        {
            "INPUT": inputs.size,
            "GATE_ROWS": gate_rows,
            "SHARED_BIAS": 2 * p.hidden_size if p.cell == "gru" else gate_rows,
            "BATCH_FIRST": p.batch_first,
            **_products(p),
            **tile.constants(),
        },
        tile.warps,
        tile.stages,
    )


class Walk(NamedTuple):
    """One layer's tensors on its way through time; the states are this layer's."""

    runs: Sequence[RunWeights]
    kept: Kept
    pre: Tensor
    lengths: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    hn: Tensor
    cn: Tensor | None


class WalkBack(NamedTuple):
    """The same on its way back, which fills grads, grad_out with a projection, and grad_h0 and grad_c0."""

    runs: Sequence[RunWeights]
    kept: Kept
    lengths: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    grad_y: Tensor | None
    grad_hn: Tensor | None
    grad_cn: Tensor | None
    grads: Tensor
    grad_out: Tensor | None
    grad_h0: Tensor | None
    grad_c0: Tensor | None


def forward_launch(problem: RnnProblem, walk: Walk) -> Launch:
    """One layer's recurrence."""
    p, chosen = problem, recurrence(problem)
    tile = chosen.forward
    args: dict[str, Argument] = {
        "pre": walk.pre,
        **_recurrent_weights(walk.runs, aligned=not chosen.resident),
        "b_hn": new_gate_bias(p, walk.runs),
        "h0": walk.h0,
        "c0": walk.c0,
        "lengths": walk.lengths,
        "y": walk.kept.y,
        "hn": walk.hn,
        "cn": walk.cn,
        "gates": walk.kept.gates,
        "state": walk.kept.state,
        **_walk(p),
    }
    constants = {**_cell(p), "SAVE": p.save, **_products(p), **chosen.constants(tile)}
    if chosen.resident:
        del args["w_hr"]
        constants["HIDDEN"] = p.hidden_size
    else:
        shape = 2 * p.directions * p.batch * _row(p.output_size)
        swap = torch.zeros(shape, dtype=p.dtype, device=walk.pre.device)
        args |= {"middle": walk.kept.middle, "swap": swap, **_sizes(p)}
        if p.cell == "gru":
            shape = p.batch * p.directions * p.hidden_size
            args["state"] = torch.empty(shape, dtype=torch.float32, device=walk.pre.device)
    return Launch(
        kernels.resident_forward if chosen.resident else kernels.stream_forward,
        _programs(p, tile.rows),
        args,
        constants,
        tile.warps,
        tile.stages,
        MOST_REGISTERS,
    )


def backward_launch(problem: RnnProblem, walk: WalkBack) -> Launch:
    """One layer's recurrence backwards."""
    p, chosen = problem, recurrence(problem)
    tile = chosen.backward
    args: dict[str, Argument] = {
        "grad_y": walk.grad_y,
        "grad_hn": walk.grad_hn,
        "grad_cn": walk.grad_cn,
        **_recurrent_weights(walk.runs, aligned=not chosen.resident),
        "h0": walk.h0,
        "c0": walk.c0,
        "lengths": walk.lengths,
        "y": walk.kept.y,
        "gates": walk.kept.gates,
        "state": walk.kept.state,
        "grads": walk.grads,
        "grad_h0": walk.grad_h0,
        "grad_c0": walk.grad_c0,
        **_walk(p),
    }
    constants = {**_cell(p), **_products(p), **chosen.constants(tile)}
    if chosen.resident:
        del args["w_hr"]
        constants["HIDDEN"] = p.hidden_size
    else:
        shape = p.batch * p.directions * p.hidden_size
        carry = torch.empty(shape, dtype=torch.float32, device=walk.grads.device) if p.gates > 1 else None
        args |= {"grad_out": walk.grad_out, "carry": carry, **_sizes(p)}
    return Launch(
        backward_kernels.resident_backward if chosen.resident else backward_kernels.stream_backward,
        _programs(p, tile.rows),
        args,
        constants,
        tile.warps,
        tile.stages,
        MOST_REGISTERS,
    )


def _copied(size: int) -> dict[str, int]:
    """Blocks of the kernels that only copy rows of so many elements."""
    cols = power_of_two(size, 16, 256)
    return {"ROWS": COPIED // cols, "COLS": cols}


def previous_states_launch(
    problem: RnnProblem, y: Tensor, lengths: Tensor | None, h0: Tensor | None, out: Tensor
) -> Launch:
    p, blocks = problem, _copied(problem.output_size)
    tokens = p.batch * p.steps
    return Launch(
        backward_kernels.previous_states,
        math.ceil(tokens / blocks["ROWS"]) * p.directions,
        {
            "y": y,
            "h0": h0,
            "lengths": lengths,
            "out": out,
            "tokens": tokens,
            "inner": p.steps if p.batch_first else p.batch,
            **_walk(p),
        },
        {"OUT": p.output_size, "DIRECTIONS": p.directions, "BATCH_FIRST": p.batch_first, **blocks},
    )


def dense_inputs_launch(problem: RnnProblem, inputs: Inputs, lengths: Tensor | None, out: Tensor) -> Launch:
    p, blocks = problem, _copied(inputs.size)
    tokens = p.batch * p.steps
    return Launch(
        backward_kernels.dense_inputs,
        math.ceil(tokens / blocks["ROWS"]),
        {
            **inputs.args(),
            "lengths": lengths,
            "out": out,
            "tokens": tokens,
            "batch": p.batch,
            "steps": p.steps,
        },
        {"INPUT": inputs.size, "BATCH_FIRST": p.batch_first, **blocks},
    )
