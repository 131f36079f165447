"""rnn: a stack of recurrent layers over a batch of sequences as one op.

From top to bottom: the public function, the table of implementations, the registered ops and their fake
kernels. Autograd and vmap stand in _rnn_transforms.py, errors in _rnn_checks.py, the short way of eager
calls in _rnn_eager.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interfuse.autocast import autocast_dtype, cast
from interfuse.dispatch import Implementation, choose
from interfuse.ops import _rnn_cuda as cuda
from interfuse.ops import _rnn_eager as eager
from interfuse.ops import _rnn_native as native
from interfuse.ops import _rnn_transforms as transforms
from interfuse.ops import _rnn_triton as triton
from interfuse.ops._rnn_checks import (
    Inputs,
    RnnParams,
    State,
    check,
    check_saved,
    check_values,
    op_problem,
    resolve,
    with_batch,
)
from interfuse.ops._rnn_problem import Four, RnnProblem, empty_gradients, empty_outputs
from interfuse.reference import rnn as reference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class RnnImplementation(Implementation):
    reserve_row: Callable[[RnnProblem], int]  # what a training forward keeps for each token, in floats
    needs_y: bool  # the backward reads the output


# In order of preference; the reference runs everything.
IMPLEMENTATIONS = (
    RnnImplementation("native", native.why_not, native.run, native.run_backward, native.reserve_row, False),
    RnnImplementation(
        "cuda", cuda.why_not, cuda.run, cuda.run_backward, cuda.reserve_row, True, rather_not=cuda.rather_not
    ),
    RnnImplementation("triton", triton.why_not, triton.run, triton.run_backward, triton.reserve_row, True),
    RnnImplementation(
        "reference", lambda problem: None, reference.run, reference.run_backward, lambda problem: 0, False
    ),
)


def rnn(
    input: Tensor,  # noqa: A002
    weights: Sequence[Tensor],
    hx: State | None = None,
    *,
    cell: str,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    table: Tensor | None = None,
    padding_idx: int | None = None,
    weight_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """What torch.nn.RNN, LSTM and GRU compute, from their flat weights. Returns output and last state.

    Args:
        input: (steps, batch, input_size), with batch_first (batch, steps, input_size), or without a batch
            (steps, input_size). With a table: int64 token ids of these shapes without the last dimension.
        weights: for each layer, for each direction: weight_ih, weight_hh, then, where the model has them,
            bias_ih, bias_hh and weight_hr, shaped as torch's. Everything else is told from their shapes.
        hx: the initial state (layers * directions, batch, size), for cell "lstm" a pair of them; None: zeros.
        cell: "rnn_tanh", "rnn_relu", "lstm" or "gru".
        dropout: the probability with which, in training, the input of every layer but the first is zeroed.
        lengths: (batch,) int64, each from 0 to steps: how many steps of each sequence are real. The output is
            zero beyond them, and the last state is that at the sequence's own end.
        table: (vocabulary, input_size): the input's ids choose its rows.
        padding_idx: the row of the table that gets no gradient.
        weight_dtype: torch.bfloat16 rounds the recurrent weights (inference alone, fewer bytes a step).
        backend: None to choose the fastest, or "native", "cuda", "triton" or "reference"; one that cannot
            run the call raises its reason.
    """
    arguments = (cell, bidirectional, batch_first, padding_idx, weight_dtype, backend)
    if not torch.compiler.is_dynamo_compiling() and not (training and dropout):
        result = eager.run(input, weights, hx, lengths, table, arguments)
        if result is not None:
            return result
    return run_long(input, weights, hx, lengths, table, arguments, dropout if training else 0.0)


def run_long(
    x: Tensor,
    weights: Sequence[Tensor],
    hx: State | None,
    lengths: Tensor | None,
    table: Tensor | None,
    arguments: tuple[Any, ...],
    dropout: float = 0.0,
) -> tuple[Tensor, State]:
    """The long way: what comes before and after the registered op, and the op."""
    params = resolve(x, hx, weights, lengths, table, arguments)
    h0, c0 = hx if isinstance(hx, (tuple, list)) else (hx, None)
    batched, inputs = with_batch(Inputs(x, table, lengths, h0, c0, weights), params)
    x, _, lengths, h0, c0, _ = inputs
    if table is not None and x.dtype == torch.int32:
        x = x.long()
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        if table is not None:  # rows first: converting all of the table would cost more
            problem = check(x, table, lengths, h0, c0, weights, params, False)
            here = None if lengths is None else lengths.to(x.device)
            padding = None if params.padding_idx < 0 else params.padding_idx
            x, table = F.embedding(reference.valid_ids(problem, x, here), table, padding), None
        x, weights = cast(x, dtype), [cast(w, dtype) for w in weights]
        h0, c0 = (None if t is None else cast(t, dtype) for t in (h0, c0))
    inputs = Inputs(x, table, lengths, h0, c0, weights)
    y, hn, cn = _with_dropout(inputs, params, dropout) if dropout else _call(inputs, params)
    if not batched:
        y, hn = y.squeeze(0 if params.batch_first else 1), hn.squeeze(1)
        cn = cn.squeeze(1) if params.cell == "lstm" else cn
    return y, (hn, cn) if params.cell == "lstm" else hn


def _call(inputs: Inputs, params: RnnParams) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.interfuse.rnn.default(*inputs, *params.as_args(), False)[:3]


def _with_dropout(inputs: Inputs, params: RnnParams, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    """Layer by layer, with the outputs between them dropped out."""
    problem = check(*inputs, params, False)
    y, table, lengths, h0, c0, weights = inputs
    each, runs = problem.weights_per_run * problem.directions, problem.directions
    states, cells = [], []
    for layer in range(problem.layers):
        here = slice(layer * runs, (layer + 1) * runs)
        start, cell = (None if t is None else t[here] for t in (h0, c0))
        y, hn, cn = _call(
            Inputs(y, table, lengths, start, cell, weights[layer * each : (layer + 1) * each]), params
        )
        if layer + 1 < problem.layers:
            y, table = F.dropout(y, dropout, True), None
        states.append(hn)
        cells.append(cn)
    return y, torch.cat(states), torch.cat(cells)


def _dense(inputs: Inputs, problem: RnnProblem, implementation: Implementation) -> Inputs:
    """As the implementations want them; the core checks lengths and ids itself."""
    x, table, lengths, h0, c0, weights = inputs
    if implementation.name != "native":
        check_values(problem, x, lengths)
        lengths = None if lengths is None else lengths.to(x.device, non_blocking=True)
    table, h0, c0 = (None if t is None else t.contiguous() for t in (table, h0, c0))
    return Inputs(x, table, lengths, h0, c0, [w.contiguous() for w in weights])


def _run(*args: Any) -> Four:
    inputs = Inputs(*args[:6])
    problem = op_problem(*inputs, RnnParams(*args[6:-1]), args[-1])
    implementation = choose(IMPLEMENTATIONS, problem, problem.backend)
    return implementation.run(problem, *_dense(inputs, problem, implementation))


def _backward_problem(args: Any, make: Callable[..., RnnProblem]) -> RnnProblem:
    return make(*args[3:9], RnnParams(*args[11:-1]), save=True)


def _checked_backward(problem: RnnProblem, args: tuple[Any, ...]) -> RnnImplementation:
    implementation: Any = choose(IMPLEMENTATIONS, problem, problem.backend)
    y, reserve = args[9:11]
    check_saved(
        problem, args[:3], y, reserve, implementation.reserve_row(problem), implementation.needs_y, args[-1]
    )
    return implementation


def _run_backward(*args: Any) -> list[Tensor]:
    problem = _backward_problem(args, op_problem)
    implementation = _checked_backward(problem, args)
    inputs = _dense(Inputs(*args[3:9]), problem, implementation)
    grads = [None if g is None else g.contiguous() for g in args[:3]]
    y, reserve, mask = args[9], args[10], args[-1]
    wanted = [bool(m) and (i > 2 or i == 0 or problem.states) for i, m in enumerate(mask)]
    wanted[2] = wanted[2] and problem.cell == "lstm"
    y = None if y is None else y.contiguous()
    results = implementation.run_backward(problem, *grads, *inputs, y, reserve.contiguous(), wanted)
    if problem.vocabulary and results[0] is not None and wanted[0]:
        results[0] = transforms.table_gradient(
            problem, results[0], inputs.x, inputs.lengths, RnnParams(*args[11:-1]).padding_idx
        )
    return [
        g if asked and g is not None else inputs.weights[0].new_empty(0)
        for g, asked in zip(results, mask, strict=True)
    ]


def _fake(*args: Any) -> Four:
    problem = check(*Inputs(*args[:6]), RnnParams(*args[6:-1]), args[-1])
    implementation: Any = choose(IMPLEMENTATIONS, problem, problem.backend)
    return empty_outputs(problem, implementation.reserve_row(problem))


def _fake_backward(*args: Any) -> list[Tensor]:
    problem = _backward_problem(args, check)
    _checked_backward(problem, args)
    inputs, mask = Inputs(*args[3:9]), args[-1]
    grads = empty_gradients(problem, mask)
    if inputs.table is not None and grads[0] is not None:
        grads[0] = torch.empty_like(inputs.table, memory_format=torch.contiguous_format)
    there = (True, inputs.h0 is not None, inputs.c0 is not None, *(True for _ in inputs.weights))
    return [
        g if yes and g is not None else inputs.weights[0].new_empty(0)
        for g, yes in zip(grads, there, strict=True)
    ]


def _needs_y(problem: RnnProblem) -> bool:
    implementation: Any = choose(IMPLEMENTATIONS, problem, problem.backend)
    return implementation.needs_y


_TENSORS = "Tensor x, Tensor? table, Tensor? lengths, Tensor? h0, Tensor? c0, Tensor[] weights"
_PARAMETERS = "str cell, bool bidirectional, bool batch_first, int padding_idx, str weight_dtype, str backend"

_library = torch.library.Library("interfuse", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library.define(
    f"rnn({_TENSORS}, {_PARAMETERS}, bool save) -> (Tensor y, Tensor hn, Tensor cn, Tensor reserve)",
    tags=_tags,
)
_library.define(
    f"rnn_backward(Tensor? grad_y, Tensor? grad_hn, Tensor? grad_cn, {_TENSORS}, Tensor? y, Tensor reserve, "
    f"{_PARAMETERS}, bool[] mask) -> Tensor[]",
    tags=_tags,
)
_library.impl("rnn", _run, "CompositeExplicitAutograd")
_library.impl("rnn_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("interfuse::rnn", _fake, lib=_library)
torch.library.register_fake("interfuse::rnn_backward", _fake_backward, lib=_library)
_OPS = (torch.ops.interfuse.rnn.default, torch.ops.interfuse.rnn_backward.default)
transforms.register_autograd(_library, *_OPS, _needs_y)
transforms.register_vmap(_library, *_OPS)
