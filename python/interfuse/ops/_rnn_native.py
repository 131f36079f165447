"""The compiled core as an implementation of rnn. It computes in float32; halves are converted around it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interfuse import _native
from interfuse.bounded_cache import BoundedCache
from interfuse.ops._native_limits import why_not_on
from interfuse.ops._rnn_problem import Four, RnnProblem, empty_gradients, empty_outputs

if TYPE_CHECKING:
    from collections.abc import Sequence

_HALVES = (torch.bfloat16, torch.float16)


def why_not(problem: RnnProblem) -> str | None:
    reason = why_not_on(problem.device)
    if reason is None and problem.dtype == torch.float64:
        return "the native kernels compute in float32; the tensors are torch.float64."
    return reason


def make_desc(p: RnnProblem, batch: int, steps: int, strides: tuple[int, int]) -> _native.RnnDesc:
    """The core's plan for so much of the problem; strides are those of steps and batch."""
    return _native.RnnDesc(
        cell=p.cell,
        directions=p.directions,
        bias=p.bias,
        save=p.save,
        weight_dtype="float32" if p.weight_dtype is None else "bfloat16",
        batch_first=p.batch_first,
        batch=batch,
        steps=steps,
        input_size=int(p.input_size),
        hidden_size=int(p.hidden_size),
        proj_size=int(p.proj_size),
        layers=p.layers,
        x_strides=strides,
        vocabulary=int(p.vocabulary),
    )


_rows: BoundedCache[int] = BoundedCache(512)


def reserve_row(problem: RnnProblem) -> int:
    """What the core keeps is proportional to the tokens, so that a traced graph knows it for every batch."""
    p = problem
    key = (p.cell, p.directions, p.layers, int(p.hidden_size), int(p.proj_size))
    row = _rows.get(key)
    return row if row is not None else _rows.put(key, make_desc(replace(p, save=True), 1, 1, (0, 0)).reserve)


def time_strides(p: RnnProblem, x: Tensor) -> tuple[int, int]:
    """x's strides of steps and batch."""
    return (x.stride(1), x.stride(0)) if p.batch_first else (x.stride(0), x.stride(1))


def reads(p: RnnProblem, x: Tensor) -> bool:
    """Whether the core takes x's strides as they are."""
    return p.vocabulary > 0 or x.stride(2) == 1 or p.input_size == 1


_descs: BoundedCache[_native.RnnDesc] = BoundedCache(512)


def _desc(problem: RnnProblem, x: Tensor) -> _native.RnnDesc:
    key = (problem, x.stride())
    return _descs.get(key) or _descs.put(
        key, make_desc(problem, problem.batch, problem.steps, time_strides(problem, x))
    )


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


_places: BoundedCache[list[int]] = BoundedCache(512)


def places(p: RnnProblem) -> list[int]:
    """Which weight each of the core's addresses is: five for each layer and direction, -1 for none."""
    key = (p.runs, p.bias, p.proj_size > 0)
    known = _places.get(key)
    if known is None:
        numbers = iter(range(p.runs * p.weights_per_run))
        there = (True, True, p.bias, p.bias, p.proj_size > 0) * p.runs
        known = _places.put(key, [next(numbers) if yes else -1 for yes in there])
    return known


def addresses(p: RnnProblem, weights: Sequence[Tensor | None]) -> list[int]:
    pointers = [0 if w is None else w.data_ptr() for w in weights]
    pointers.append(0)
    return [pointers[place] for place in places(p)]


def _inputs(
    p: RnnProblem,
    x: Tensor,
    table: Tensor | None,
    lengths: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
    """x, what the core takes by pointer before the weights, and the weights: float32, in its layouts."""
    floats = [w.contiguous() for w in weights]
    if floats[0].dtype in _HALVES:
        floats = [w.float() for w in floats]
    lengths = None if lengths is None else lengths.contiguous()
    if table is not None:
        return x, [_float(table), x, lengths, _float(h0), _float(c0)], floats
    x = x.float()
    x = x if reads(p, x) else x.contiguous()
    return x, [x, None, lengths, _float(h0), _float(c0)], floats


def run(
    problem: RnnProblem,
    x: Tensor,
    table: Tensor | None,
    lengths: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
) -> Four:
    p = problem if problem.dtype == torch.float32 else replace(problem, dtype=torch.float32)
    y, hn, cn, reserve = empty_outputs(p, reserve_row(p) if p.save else 0)
    if p.batch:
        x, inputs, floats = _inputs(p, x, table, lengths, h0, c0, weights)
        desc = _desc(problem, x)
        if desc.reserve != reserve.numel():
            raise RuntimeError(
                f"rnn: the core keeps {desc.reserve} floats, but {reserve.numel()} were expected; the core "
                "and this Python package do not belong together. Install interfuse again."
            )
        arguments: list[Any] = [desc, *map(pointer, inputs), addresses(p, floats)]
        arguments += [*map(pointer, (y, hn, cn, reserve)), torch.get_num_threads()]
        _native.rnn_forward(*arguments)
    if problem.dtype in _HALVES:
        y, hn, cn = y.to(problem.dtype), hn.to(problem.dtype), cn.to(problem.dtype)
    return y, hn, cn, reserve


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
    p = problem if problem.dtype == torch.float32 else replace(problem, dtype=torch.float32)
    grads = empty_gradients(p, mask)
    if p.batch == 0:
        return [None if g is None else g.zero_().to(problem.dtype) for g in grads]
    x, inputs, floats = _inputs(p, x, table, lengths, h0, c0, weights)
    reserve = reserve.contiguous()
    incoming = [_float(g) for g in (grad_y, grad_hn, grad_cn)]
    arguments: list[Any] = [
        _desc(problem, x),
        *map(pointer, inputs),
        addresses(p, floats),
        reserve.data_ptr(),
    ]
    arguments += [*map(pointer, (*incoming, *grads[:3])), addresses(p, grads[3:]), torch.get_num_threads()]
    _native.rnn_backward(*arguments)
    if problem.dtype in _HALVES:
        grads = [None if g is None else g.to(problem.dtype) for g in grads]
    return grads
