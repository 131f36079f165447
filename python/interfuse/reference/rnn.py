"""Recurrent layers in plain torch, step by step. Its backward is torch's own differentiation of that loop.

Sequences shorter than the batch's steps keep their last state, and their outputs beyond their end are zeros;
the second direction starts at each sequence's own end. Half precision computes in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interfuse.autocast import without_autocast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interfuse.ops._rnn_problem import Four, RnnProblem

Three = tuple[Tensor, Tensor, Tensor]


def why_not(problem: RnnProblem) -> str | None:
    return None


def reserve_row(problem: RnnProblem) -> int:
    return 0


def _cell(
    name: str, x: Tensor, h: Tensor, c: Tensor, w_hh: Tensor, b_hh: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One step: the input's share of the gates and the state before; the hidden and the cell state after."""
    if name == "gru":
        x_reset, x_update, x_new = x.chunk(3, -1)
        h_reset, h_update, h_new = F.linear(h, w_hh, b_hh).chunk(3, -1)
        reset, update = torch.sigmoid(x_reset + h_reset), torch.sigmoid(x_update + h_update)
        new = torch.tanh(x_new + reset * h_new)
        return new + update * (h - new), c
    gates = x + F.linear(h, w_hh, b_hh)
    if name == "lstm":
        enter, forget, new, leave = gates.chunk(4, -1)
        c = torch.sigmoid(forget) * c + torch.sigmoid(enter) * torch.tanh(new)
        return torch.sigmoid(leave) * torch.tanh(c), c
    return torch.tanh(gates) if name == "rnn_tanh" else torch.relu(gates), c


def valid_steps(p: RnnProblem, lengths: Tensor | None) -> Tensor | None:
    """(steps, batch): whether the sequence has that step."""
    if lengths is None:
        return None
    return torch.arange(p.steps, device=lengths.device).unsqueeze(1) < lengths


def chosen_rows(p: RnnProblem, ids: Tensor, table: Tensor, lengths: Tensor | None) -> Tensor:
    """The table's rows in x's place. Beyond a sequence's end an id may be anything, also out of range."""
    return F.embedding(valid_ids(p, ids, lengths), table)


def valid_ids(p: RnnProblem, ids: Tensor, lengths: Tensor | None) -> Tensor:
    valid = valid_steps(p, lengths)
    if valid is None:
        return ids
    return torch.where(valid.t() if p.batch_first else valid, ids, 0)


def forward(
    p: RnnProblem,
    x: Tensor,
    lengths: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
) -> Three:
    """(y, hn, cn), differentiable in every way torch knows. Where there is a table, x holds its rows."""
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    x = (x.transpose(0, 1) if p.batch_first else x).to(dtype)
    weights = [w.to(dtype) for w in weights]
    valid = valid_steps(p, lengths)

    def reverse(t: Tensor) -> Tensor:
        if valid is None or lengths is None:
            return t.flip(0)
        step = torch.arange(p.steps, device=t.device).unsqueeze(1)
        source = torch.where(valid, lengths - 1 - step, step)
        return t.gather(0, source.unsqueeze(-1).expand_as(t))

    def start(given: Tensor | None, run: int, size: int) -> Tensor:
        return x.new_zeros(p.batch, size) if given is None else given[run].to(dtype)

    def one_direction(x: Tensor, run: int) -> Three:
        w_ih, w_hh, *rest = weights[run * p.weights_per_run : (run + 1) * p.weights_per_run]
        b_ih, b_hh = rest[:2] if p.bias else (None, None)
        if p.weight_dtype is not None:
            w_hh = w_hh.to(p.weight_dtype).to(dtype)
        h, c = start(h0, run, p.output_size), start(c0, run, p.hidden_size)
        outputs = []
        for t, gates in enumerate(F.linear(x, w_ih, b_ih)):
            h_after, c_after = _cell(p.cell, gates, h, c, w_hh, b_hh)
            if p.proj_size:
                h_after = F.linear(h_after, rest[-1])
            if valid is None:
                h, c = h_after, c_after
                outputs.append(h)
            else:
                here = valid[t].unsqueeze(-1)
                h, c = torch.where(here, h_after, h), torch.where(here, c_after, c)
                outputs.append(torch.where(here, h_after, 0))
        return torch.stack(outputs), h, c

    if valid is not None:
        x = torch.where(valid.unsqueeze(-1), x, 0)  # what stands beyond the end may be NaN
    states, cells = [], []
    for layer in range(p.layers):
        outputs = []
        for direction in range(p.directions):
            y, h, c = one_direction(x if direction == 0 else reverse(x), layer * p.directions + direction)
            outputs.append(y if direction == 0 else reverse(y))
            states.append(h)
            cells.append(c)
        x = torch.cat(outputs, -1)
    y = x.transpose(0, 1) if p.batch_first else x
    cn = torch.stack(cells) if p.cell == "lstm" else x.new_empty(0)
    return y.to(p.dtype), torch.stack(states).to(p.dtype), cn.to(p.dtype)


def backward(
    p: RnnProblem,
    grads: Sequence[Tensor | None],
    x: Tensor,
    lengths: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    mask: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, h0, c0 and the weights; None where the mask says no. Differentiable itself."""
    given = [x, h0, c0, *weights]
    wanted = [i for i, asked in enumerate(mask) if asked and given[i] is not None]

    def outputs(*leaves: Tensor) -> tuple[Tensor, ...]:
        inputs: list[Any] = list(given)
        for i, leaf in zip(wanted, leaves, strict=True):
            inputs[i] = leaf
        x, h0, c0, *weights = inputs
        y, hn, cn = forward(p, x, lengths, h0, c0, weights)
        return (y, hn, cn) if p.cell == "lstm" else (y, hn)

    results: list[Tensor | None] = [None] * len(given)
    if not wanted:
        return results
    y, vjp, *_ = torch.func.vjp(outputs, *[given[i] for i in wanted])
    cotangents = [torch.zeros_like(t) if g is None else g for t, g in zip(y, grads, strict=False)]
    for i, grad in zip(wanted, vjp(tuple(cotangents)), strict=True):
        results[i] = grad
    return results


def run(
    problem: RnnProblem,
    x: Tensor,
    table: Tensor | None,
    lengths: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
) -> Four:
    with without_autocast(x.device):
        if table is not None:
            x = chosen_rows(problem, x, table, lengths)
        y, hn, cn = forward(problem, x, lengths, h0, c0, weights)
    return y.contiguous(), hn, cn, x.new_empty(0, dtype=torch.float32)


def run_backward(
    problem: RnnProblem,
    grad_y: Tensor | None,
    grad_hn: Tensor | None,
    grad_cn: Tensor | None,
    x: Tensor,
    table: Tensor | None,
    lengths: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor | None,
    reserve: Tensor,
    mask: Sequence[bool],
) -> list[Tensor | None]:
    with without_autocast(x.device):
        if table is not None:
            x = chosen_rows(problem, x, table, lengths)
        return backward(problem, (grad_y, grad_hn, grad_cn), x, lengths, h0, c0, weights, mask)
