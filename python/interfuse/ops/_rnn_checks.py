"""The checks of rnn: from what the user or the dispatcher passes to an RnnProblem.

Every error about arguments, shapes, dtypes or devices of rnn is raised in this file, so that eager calls,
tracing and direct calls of the registered op all say the same sentence. What lengths and ids hold is not
known before the op runs: `check_values` is for those implementations that do not look themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from interfuse.bounded_cache import BoundedCache
from interfuse.ops._dtypes import DTYPES
from interfuse.ops._rnn_problem import CELLS, GATES, RnnProblem
from interfuse.reference.rnn import valid_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

State = Tensor | tuple[Tensor, Tensor]

WEIGHT_DTYPES = {"": None, "bfloat16": torch.bfloat16}


def fail(sentence: str) -> ValueError:
    return ValueError(f"rnn: {sentence}")


@dataclass(frozen=True)
class RnnParams:
    """The registered op's parameters, in its order. All else follows from the tensors' shapes."""

    cell: str
    bidirectional: bool = False
    batch_first: bool = False
    padding_idx: int = -1  # a row of the table that gets no gradient; -1: none
    weight_dtype: str = ""
    backend: str = ""

    def as_args(self) -> tuple[object, ...]:
        return (
            self.cell, self.bidirectional, self.batch_first, self.padding_idx, self.weight_dtype,
            self.backend)  # fmt: skip


PARAM_COUNT = 6


class Inputs(NamedTuple):
    """The tensors that the forward op takes, in its order."""

    x: Tensor
    table: Tensor | None
    lengths: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    weights: Sequence[Tensor]

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """In the order of the backward op's mask and results."""
        return (self.x if self.table is None else self.table, self.h0, self.c0, *self.weights)


def weight_names(p: RnnProblem) -> list[str]:
    """torch.nn's names of the flat weights."""
    kinds = ["weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if p.bias else ())]
    kinds += ["weight_hr"] if p.proj_size else []
    return [
        f"{kind}_l{run // p.directions}{'_reverse' if run % p.directions else ''}"
        for run in range(p.runs)
        for kind in kinds
    ]


def check_types(x: object, hx: object, weights: object, cell: str, **tensors: object) -> None:
    """Whether everything that should be a tensor is one; hx is one tensor, or two for the LSTM."""
    if cell not in CELLS:
        raise fail(f"cell must be one of {', '.join(CELLS)}; got {cell!r}.")
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"rnn: weights must be a list of tensors; got {type(weights).__name__}.")
    pair = cell == "lstm"
    if hx is not None and (isinstance(hx, Tensor) == pair or (pair and len(hx) != 2)):  # type: ignore[arg-type]
        allowed = "a pair (h0, c0)" if pair else "one tensor"
        raise TypeError(f"rnn: the initial state of cell {cell!r} is {allowed}; got {type(hx).__name__}.")
    states = () if hx is None else tuple(hx) if pair else (hx,)  # type: ignore[arg-type]
    named = {"input": x, **{f"weights[{i}]": w for i, w in enumerate(weights)},
             **{f"hx[{i}]": t for i, t in enumerate(states)}}  # fmt: skip
    named.update({name: t for name, t in tensors.items() if t is not None})
    for name, t in named.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"rnn: {name} must be a torch tensor; got {type(t).__name__}.")


def resolve(
    x: Tensor,
    hx: State | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    table: Tensor | None,
    arguments: tuple[Any, ...],
) -> RnnParams:
    """The user's arguments as the registered op takes them. `check` judges the tensors."""
    cell, bidirectional, batch_first, padding_idx, weight_dtype, backend = arguments
    check_types(x, hx, weights, cell, lengths=lengths, table=table)
    if weight_dtype not in (None, torch.bfloat16, torch.float32):
        raise fail(f"weight_dtype must be None or torch.bfloat16; got {weight_dtype!r}.")
    if backend is not None and not isinstance(backend, str):
        raise fail(f"backend must be a name or None; got {backend!r}.")
    if padding_idx is not None and table is None:
        raise fail(f"padding_idx names a row of the table, and there is no table; got {padding_idx!r}.")
    if padding_idx is not None and padding_idx < 0 and table is not None:
        padding_idx += table.shape[0]
        if padding_idx < 0:
            raise fail(f"padding_idx must be a row of the table's {table.shape[0]}; got {arguments[3]}.")
    return RnnParams(
        cell=cell,
        bidirectional=bool(bidirectional),
        batch_first=bool(batch_first),
        padding_idx=-1 if padding_idx is None else padding_idx,
        weight_dtype="bfloat16" if weight_dtype == torch.bfloat16 else "",
        backend=backend or "",
    )


def with_batch(inputs: Inputs, p: RnnParams) -> tuple[bool, Inputs]:
    """Whether the input has a batch, and the inputs with one."""
    x, table, lengths, h0, c0, weights = inputs
    dims = 3 if table is None else 2
    if x.dim() == dims:
        return True, inputs
    if x.dim() != dims - 1:
        raise fail(
            f"the input must have {dims} dimensions, or {dims - 1} without a batch; got {tuple(x.shape)}."
        )
    for name, t in (("h0", h0), ("c0", c0)):
        if t is not None and t.dim() != 2:
            raise fail(f"{name} must have 2 dimensions for an input without a batch; got {t.dim()}.")
    h0, c0 = (None if t is None else t.unsqueeze(1) for t in (h0, c0))
    lengths = lengths.reshape(1) if lengths is not None and lengths.dim() == 0 else lengths
    return False, Inputs(x.unsqueeze(0 if p.batch_first else 1), table, lengths, h0, c0, weights)


def _structure(weights: Sequence[Tensor], p: RnnParams) -> tuple[int, int, bool, int]:
    """(layers, hidden_size, bias, proj_size), told from the weights."""
    if p.cell not in CELLS:
        raise fail(f"cell must be one of {', '.join(CELLS)}; got {p.cell!r}.")
    if len(weights) < 2 or weights[0].dim() != 2 or weights[1].dim() != 2:
        raise fail(
            "weights must be torch's flat weights, beginning with the matrices weight_ih_l0, weight_hh_l0; "
            f"got {len(weights)} tensors of shapes {[tuple(w.shape) for w in weights[:2]]}."
        )
    (rows, _), out, gates = weights[0].shape, weights[1].shape[1], GATES[p.cell]
    if rows == 0 or rows % gates != 0:
        raise fail(
            f"weight_ih_l0 of cell {p.cell!r} needs {gates} * hidden_size rows, for its gates; got {rows}."
        )
    hidden = rows // gates
    projected = bool(out != hidden)
    if projected and (p.cell != "lstm" or not 0 < out < hidden):
        allowed = f"{hidden} columns" + (
            ", or fewer with a projection (weight_hr)" if p.cell == "lstm" else ""
        )
        raise fail(f"weight_hh_l0 needs {allowed}, after weight_ih_l0's {rows} rows; got {out}.")
    bias = len(weights) > 2 and weights[2].dim() == 1
    each, directions = 2 + 2 * bias + projected, 1 + p.bidirectional
    if len(weights) % (each * directions) != 0:
        raise fail(
            f"each layer has {each * directions} weights ({directions} direction{'s' * p.bidirectional}, "
            f"{'with' if bias else 'without'} biases, {'with' if projected else 'without'} projections); got "
            f"{len(weights)} tensors. Pass all of them in torch's order, or another value of bidirectional."
        )
    return len(weights) // (each * directions), hidden, bias, out if projected else 0


def _check_placed(named: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
    for name, t in named.items():
        if t.dtype != dtype:
            raise fail(
                f"input, states and weights must have one dtype; weight_ih_l0 is {dtype} and {name} is "
                f"{t.dtype}. Convert one of them, or run under autocast."
            )
        if t.device != device:
            raise fail(
                f"input, states and weights must be on one device; weight_ih_l0 is on {device} and {name} on "
                f"{t.device}. Move one of them."
            )
        if t.layout != torch.strided:
            raise fail(f"{name} must be a dense tensor; got layout {t.layout}. Call to_dense() on it first.")


def _check_input(x: Tensor, table: Tensor | None, lengths: Tensor | None, p: RnnParams, w: Tensor) -> None:
    order = "(batch, steps" if p.batch_first else "(steps, batch"
    if table is None:
        if x.dim() != 3:
            raise fail(f"the input must have 3 dimensions, {order}, input_size); got {tuple(x.shape)}.")
        if x.shape[2] != w.shape[1]:
            raise fail(
                f"weight_ih_l0 of shape {tuple(w.shape)} takes an input of size {w.shape[1]}; the input's "
                f"shape is {tuple(x.shape)}."
            )
    else:
        if x.dim() != 2 or x.dtype != torch.int64:
            raise fail(
                f"with a table the input holds int64 token ids of shape {order}); got {x.dtype} of shape "
                f"{tuple(x.shape)}."
            )
        if x.device != w.device or x.layout != torch.strided:
            raise fail(
                f"the token ids must be a dense tensor on {w.device}, where the weights are; got {x.layout} "
                f"on {x.device}."
            )
        if table.dim() != 2 or table.shape[0] == 0 or table.shape[1] != w.shape[1]:
            raise fail(
                f"the table must have at least one row and {w.shape[1]} columns, as weight_ih_l0 of shape "
                f"{tuple(w.shape)} takes; got {tuple(table.shape)}."
            )
        if not -1 <= p.padding_idx < table.shape[0]:
            raise fail(
                f"padding_idx must be a row of the table's {table.shape[0]}, or None; got {p.padding_idx}."
            )
    if w.shape[1] == 0:
        raise fail(f"the input size must be at least 1; weight_ih_l0 has shape {tuple(w.shape)}.")
    batch, steps = (0, 1) if p.batch_first else (1, 0)
    if x.shape[steps] == 0:
        raise fail(f"the input must have at least one step; its shape is {tuple(x.shape)}.")
    if lengths is not None and (
        lengths.dtype != torch.int64
        or lengths.dim() != 1
        or lengths.shape[0] != x.shape[batch]
        or lengths.layout != torch.strided
        or lengths.device.type not in ("cpu", x.device.type)
    ):
        raise fail(
            f"lengths must be an int64 tensor with one entry for each of the {x.shape[batch]} sequences, on "
            f"the CPU or on the input's device; got {lengths.dtype} of shape {tuple(lengths.shape)} on "
            f"{lengths.device}."
        )


def check(
    x: Tensor,
    table: Tensor | None,
    lengths: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    p: RnnParams,
    save: bool,
) -> RnnProblem:
    """The checked problem, or a ValueError that says what was given, what is allowed and what to do."""
    layers, hidden, bias, proj = _structure(weights, p)
    first = weights[0]
    if first.dtype not in DTYPES:
        raise fail(f"the dtype must be float32, bfloat16, float16 or float64; weight_ih_l0 is {first.dtype}.")
    if p.weight_dtype not in WEIGHT_DTYPES:
        raise fail(f"weight_dtype must be None or torch.bfloat16; got {p.weight_dtype!r}.")
    if save and p.weight_dtype:
        raise fail(
            "rounded recurrent weights (weight_dtype) are for inference; call it under torch.no_grad(), or "
            "train without weight_dtype."
        )
    _check_input(x, table, lengths, p, first)
    batch, steps = (0, 1) if p.batch_first else (1, 0)
    problem = RnnProblem(
        cell=p.cell,
        layers=layers,
        directions=1 + p.bidirectional,
        bias=bias,
        batch_first=p.batch_first,
        batch=x.shape[batch],
        steps=x.shape[steps],
        input_size=first.shape[1],
        hidden_size=hidden,
        proj_size=proj,
        vocabulary=0 if table is None else table.shape[0],
        dtype=first.dtype,
        device=first.device,
        ragged=lengths is not None,
        states=h0 is not None,
        weight_dtype=WEIGHT_DTYPES[p.weight_dtype],
        save=save,
        backend=p.backend,
    )
    named = dict(zip(weight_names(problem), weights, strict=True))
    for (name, w), shape in zip(named.items(), problem.weight_shapes(), strict=True):
        if tuple(w.shape) != tuple(shape):
            raise fail(
                f"{name} must have shape {tuple(shape)}, after weight_ih_l0 and weight_hh_l0; got "
                f"{tuple(w.shape)}."
            )
    if (h0 is None) != (c0 is None) and (p.cell == "lstm" or c0 is not None):
        raise fail(
            "an LSTM takes both initial states, h0 and c0, or none of them; every other cell takes h0 alone."
        )
    expected = (("h0", h0, problem.output_size), ("c0", c0, hidden))
    for name, t, size in expected:
        if t is not None and tuple(t.shape) != (problem.runs, problem.batch, size):
            raise fail(
                f"{name} must have shape {(problem.runs, problem.batch, size)}: layers * directions, batch, "
                f"size; got {tuple(t.shape)}."
            )
    named["the input" if table is None else "the table"] = x if table is None else table
    named.update({name: t for name, t, _ in expected if t is not None})
    _check_placed(named, first.dtype, first.device)
    return problem


def check_saved(
    problem: RnnProblem,
    grads: Sequence[Tensor | None],
    y: Tensor | None,
    reserve: Tensor,
    reserve_row: int,
    needs_y: bool,
    mask: Sequence[bool],
) -> None:
    """The tensors that only the backward op takes: the kernels read them by pointer."""
    p = problem
    y_shape, dtype = p.sequence_shape(p.directions * p.output_size), p.dtype
    rows = (p.batch * p.steps, reserve_row) if reserve_row else (0,)
    expected = (
        ("grad_y", grads[0], y_shape, dtype),
        ("grad_hn", grads[1], (p.runs, p.batch, p.output_size), dtype),
        ("grad_cn", grads[2], (p.runs, p.batch, p.hidden_size), dtype),
        ("y", y, y_shape, dtype),
        ("reserve", reserve, rows, torch.float32),
    )
    for name, t, shape, wanted in expected:
        if t is not None and (tuple(t.shape) != tuple(shape) or t.dtype != wanted or t.device != p.device):
            raise fail(
                f"the backward op's {name} must have shape {tuple(shape)}, {wanted}, on {p.device}; got "
                f"{tuple(t.shape)}, {t.dtype}, on {t.device}. "
                "Pass what the forward op returned with save=True."
            )
    if needs_y and y is None:
        raise fail("the backward op on this device needs the output y.")
    if grads[2] is not None and p.cell != "lstm":
        raise fail(f"cell {p.cell!r} has no cell state; got a gradient of one.")
    if len(mask) != 3 + len(p.weight_shapes()):
        raise fail(
            f"the backward op's mask has one entry for the input, h0, c0 and each weight, "
            f"{3 + len(p.weight_shapes())} in all; got {len(mask)}."
        )


def check_values(p: RnnProblem, x: Tensor, lengths: Tensor | None) -> None:
    """That lengths and token ids are in range; on a GPU without waiting for it, as torch's embedding does."""
    if lengths is not None:
        right = ((lengths >= 0) & (lengths <= p.steps)).all()
        if lengths.device.type != "cpu":
            torch._assert_async(right, f"rnn: a length is not between 0 and {p.steps}")  # noqa: SLF001
        elif not right:
            row = int(((lengths < 0) | (lengths > p.steps)).nonzero()[0])
            raise fail(
                f"the length of sequence {row} is {int(lengths[row])}; allowed is 0 to {p.steps}, the "
                "number of steps of the input."
            )
    if p.vocabulary:
        ids = valid_ids(p, x, None if lengths is None else lengths.to(x.device))
        right = ((ids >= 0) & (ids < p.vocabulary)).all()
        if ids.device.type != "cpu":
            torch._assert_async(right, f"rnn: a token id is not in the table of {p.vocabulary} rows")  # noqa: SLF001
        elif not right:
            wrong = int(ids[(ids < 0) | (ids >= p.vocabulary)][0])
            raise fail(f"token id {wrong} is outside the embedding's {p.vocabulary} rows.")


_problems: BoundedCache[RnnProblem] = BoundedCache(1024)


def _key(t: Tensor | None) -> object:
    return None if t is None else (t.shape, t.dtype, t.device, t.layout)


def op_problem(
    x: Tensor,
    table: Tensor | None,
    lengths: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    params: RnnParams,
    save: bool,
) -> RnnProblem:
    """`check` of the registered op's arguments, remembered by shapes, dtypes and devices."""
    key = (*map(_key, (x, table, lengths, h0, c0, *weights)), len(weights), params, save)
    return _problems.get(key) or _problems.put(key, check(x, table, lengths, h0, c0, weights, params, save))
