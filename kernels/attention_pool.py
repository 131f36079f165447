"""Attention pooling in Triton: sum over t of softmax(context . tanh(hidden[t])) x[t], forward and backward.

Memory is what it takes: hidden is read once for the scores and once for its gradient, x once each way. Sums
over a sequence are one program's work, in order, so results are the same at every run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from interfuse.kernels.activations import tanh
from interfuse.kernels.attention_kernels import length_of
from interfuse.kernels.attention_launches import MOST_REGISTERS
from interfuse.kernels.launch import Launch, device_why_not, on_device_of, power_of_two

if TYPE_CHECKING:
    from torch import Tensor

    from interfuse.ops._attention_pool import PoolProblem
    from interfuse.ops._attention_problem import Three

ROWS, COLS = 32, 64  # steps by elements of a block


@triton.jit
def load_block(at, rows, cols, stride, count, width):
    ok = (rows < count)[:, None] & (cols < width)[None, :]
    block = tl.load(at + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=ok, other=0.0)
    return block.to(tl.float32)


@triton.jit
def pool_scores(
    hidden, context, lengths, found, steps, size, h_batch, h_step, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """found[t] = context . tanh(hidden[t]) of ROWS steps; -inf beyond the length."""
    tiles = tl.cdiv(steps, ROWS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    count = length_of(lengths, b, steps)
    acc = tl.zeros((ROWS,), tl.float32)
    for start in range(0, size, COLS):
        cols = start + tl.arange(0, COLS)
        u = tl.load(context + cols, mask=cols < size, other=0.0).to(tl.float32)
        acc += tl.sum(tanh(load_block(hidden + b * h_batch, rows, cols, h_step, count, size)) * u[None, :], 1)
    tl.store(found + b * steps + rows, tl.where(rows < count, acc, float("-inf")), mask=rows < steps)


@triton.jit
def softmax_sums(scores, steps, ROWS: tl.constexpr):
    """The maximum of a sequence's scores, and the sum of their exponentials over it; 0 and 1 of nothing."""
    best = float("-inf")
    total = 0.0
    for start in range(0, steps, ROWS):
        rows = start + tl.arange(0, ROWS)
        s = tl.load(scores + rows, mask=rows < steps, other=float("-inf"))
        now = tl.maximum(best, tl.max(s, 0))
        offset = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(best - offset) + tl.sum(tl.exp(s - offset), 0)
        best = now
    return tl.where(best == float("-inf"), 0.0, best), tl.where(total == 0.0, 1.0, total)


@triton.jit
def pool_sums(
    x, scores, lengths, y, weights, steps, width, x_batch, x_step, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """COLS elements of a sequence's sum; the first program of a sequence also writes its weights."""
    tiles = tl.cdiv(width, COLS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    cols = tile * COLS + tl.arange(0, COLS)
    count = length_of(lengths, b, steps)
    scores += b * steps
    best, total = softmax_sums(scores, steps, ROWS)
    acc = tl.zeros((COLS,), tl.float32)
    for start in range(0, steps, ROWS):
        rows = start + tl.arange(0, ROWS)
        s = tl.load(scores + rows, mask=rows < steps, other=float("-inf"))
        p = tl.exp(s - best) / total
        if tile == 0:
            at = weights + b * steps + rows
            tl.store(at, p.to(weights.dtype.element_ty), mask=rows < steps)
        acc += tl.sum(p[:, None] * load_block(x + b * x_batch, rows, cols, x_step, count, width), 0)
    tl.store(y + b * width + cols, acc.to(y.dtype.element_ty), mask=cols < width)


@triton.jit
def pool_slopes(
    x, scores, lengths, grad_y, grad_weights, slopes, steps, width, x_batch, x_step,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """slopes[t]: the gradient of the score at t, from those of the sum and of the weights."""
    b = tl.program_id(0).to(tl.int64)
    count = length_of(lengths, b, steps)
    scores += b * steps
    slopes += b * steps
    best, total = softmax_sums(scores, steps, ROWS)
    origin = float("-inf")
    for start in range(0, steps, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows < count
        acc = tl.zeros((ROWS,), tl.float32)
        for begin in range(0, width, COLS):
            cols = begin + tl.arange(0, COLS)
            g = tl.load(grad_y + b * width + cols, mask=cols < width, other=0.0).to(tl.float32)
            acc += tl.sum(load_block(x + b * x_batch, rows, cols, x_step, count, width) * g[None, :], 1)
        if grad_weights is not None:
            acc += tl.load(grad_weights + b * steps + rows, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(scores + rows, mask=rows < steps, other=float("-inf"))
        origin = tl.maximum(origin, tl.max(tl.where(inside & (s == best), acc, float("-inf")), 0))
        tl.store(slopes + rows, acc, mask=rows < steps)
    tl.debug_barrier()  # other threads of this program wrote some of the slopes
    # Measured from the heaviest step: where one step has nearly all the weight, its slope and the mean would
    # cancel.
    origin = tl.where(origin == float("-inf"), 0.0, origin)  # a sequence without steps
    mean = 0.0
    for start in range(0, steps, ROWS):
        rows = start + tl.arange(0, ROWS)
        s = tl.load(scores + rows, mask=rows < steps, other=float("-inf"))
        slope = tl.load(slopes + rows, mask=rows < steps, other=0.0)
        mean += tl.sum(tl.exp(s - best) / total * (slope - origin), 0)
    for start in range(0, steps, ROWS):
        rows = start + tl.arange(0, ROWS)
        s = tl.load(scores + rows, mask=rows < steps, other=float("-inf"))
        slope = tl.load(slopes + rows, mask=rows < steps, other=0.0)
        tl.store(slopes + rows, tl.exp(s - best) / total * (slope - origin - mean), mask=rows < steps)


@triton.jit
def pool_grad_x(
    scores, lengths, grad_y, grad_x, steps, width, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """grad_x[t] = weight[t] * grad_y, COLS elements of a whole sequence."""
    tiles = tl.cdiv(width, COLS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    cols = tl.program_id(0) % tiles * COLS + tl.arange(0, COLS)
    scores += b * steps
    best, total = softmax_sums(scores, steps, ROWS)
    g = tl.load(grad_y + b * width + cols, mask=cols < width, other=0.0).to(tl.float32)
    count = length_of(lengths, b, steps)
    for start in range(0, steps, ROWS):
        rows = start + tl.arange(0, ROWS)
        s = tl.load(scores + rows, mask=rows < steps, other=float("-inf"))
        value = tl.where((rows < count)[:, None], (tl.exp(s - best) / total)[:, None] * g[None, :], 0.0)
        at = grad_x + (b * steps + rows)[:, None] * width + cols[None, :]
        ok = (rows < steps)[:, None] & (cols < width)[None, :]
        tl.store(at, value.to(grad_x.dtype.element_ty), mask=ok)


@triton.jit
def pool_grad_hidden(
    hidden, context, lengths, slopes, grad_hidden, grad_context, steps, size, h_batch, h_step,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """COLS elements of a sequence's grad_hidden, and of its part of the context's gradient."""
    tiles = tl.cdiv(size, COLS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    cols = tl.program_id(0) % tiles * COLS + tl.arange(0, COLS)
    count = length_of(lengths, b, steps)
    u = tl.load(context + cols, mask=cols < size, other=0.0).to(tl.float32)
    acc = tl.zeros((COLS,), tl.float32)
    for start in range(0, steps, ROWS):
        rows = start + tl.arange(0, ROWS)
        value = tanh(load_block(hidden + b * h_batch, rows, cols, h_step, count, size))
        slope = tl.load(slopes + b * steps + rows, mask=rows < count, other=0.0)[:, None]
        acc += tl.sum(slope * value, 0)
        at = grad_hidden + (b * steps + rows)[:, None] * size + cols[None, :]
        ok = (rows < steps)[:, None] & (cols < size)[None, :]
        tl.store(at, (slope * u[None, :] * (1.0 - value * value)).to(grad_hidden.dtype.element_ty), mask=ok)
    tl.store(grad_context + b * size + cols, acc, mask=cols < size)


def why_not(problem: PoolProblem) -> str | None:
    return device_why_not(problem.device, problem.dtype)


def _blocks(width: int) -> dict[str, int]:
    return {"ROWS": ROWS, "COLS": power_of_two(width, 16, COLS)}


def scores_launch(
    problem: PoolProblem, hidden: Tensor, context: Tensor, lengths: Tensor | None, found: Tensor
) -> Launch:
    p = problem
    args = {"hidden": hidden, "context": context, "lengths": lengths, "found": found, "steps": p.steps,
            "size": p.hidden, "h_batch": hidden.stride(0), "h_step": hidden.stride(1)}  # fmt: skip
    return Launch(pool_scores, p.batch * triton.cdiv(p.steps, ROWS), args, _blocks(p.hidden))


def sums_launch(
    problem: PoolProblem, x: Tensor, scores: Tensor, lengths: Tensor | None, y: Tensor, weights: Tensor
) -> Launch:
    p, blocks = problem, _blocks(problem.width)
    args = {"x": x, "scores": scores, "lengths": lengths, "y": y, "weights": weights, "steps": p.steps,
            "width": p.width, "x_batch": x.stride(0), "x_step": x.stride(1)}  # fmt: skip
    return Launch(pool_sums, p.batch * triton.cdiv(p.width, blocks["COLS"]), args, blocks)


def slopes_launch(
    problem: PoolProblem, x: Tensor, scores: Tensor, lengths: Tensor | None, grad_y: Tensor,
    grad_weights: Tensor | None, slopes: Tensor,
) -> Launch:  # fmt: skip
    p = problem
    args = {"x": x, "scores": scores, "lengths": lengths, "grad_y": grad_y, "grad_weights": grad_weights,
            "slopes": slopes, "steps": p.steps, "width": p.width, "x_batch": x.stride(0),
            "x_step": x.stride(1)}  # fmt: skip
    return Launch(pool_slopes, p.batch, args, _blocks(p.width))


def grad_x_launch(
    problem: PoolProblem, scores: Tensor, lengths: Tensor | None, grad_y: Tensor, grad_x: Tensor
) -> Launch:
    p, blocks = problem, _blocks(problem.width)
    args = {"scores": scores, "lengths": lengths, "grad_y": grad_y, "grad_x": grad_x, "steps": p.steps,
            "width": p.width}  # fmt: skip
    return Launch(pool_grad_x, p.batch * triton.cdiv(p.width, blocks["COLS"]), args, blocks)


def grad_hidden_launch(
    problem: PoolProblem, hidden: Tensor, context: Tensor, lengths: Tensor | None, slopes: Tensor,
    grad_hidden: Tensor, grad_context: Tensor,
) -> Launch:  # fmt: skip
    p, blocks = problem, _blocks(problem.hidden)
    args = {"hidden": hidden, "context": context, "lengths": lengths, "slopes": slopes,
            "grad_hidden": grad_hidden, "grad_context": grad_context, "steps": p.steps, "size": p.hidden,
            "h_batch": hidden.stride(0), "h_step": hidden.stride(1)}  # fmt: skip
    programs = p.batch * triton.cdiv(p.hidden, blocks["COLS"])
    return Launch(pool_grad_hidden, programs, args, blocks, registers=MOST_REGISTERS)


def dense_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _scores(problem: PoolProblem, hidden: Tensor, context: Tensor, lengths: Tensor | None) -> Tensor:
    found = torch.empty(problem.batch, problem.steps, dtype=torch.float32, device=hidden.device)
    scores_launch(problem, hidden, context, lengths, found).run()
    return found


def run(
    problem: PoolProblem, x: Tensor, hidden: Tensor, context: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    y, weights = x.new_empty(problem.batch, problem.width), x.new_empty(problem.batch, problem.steps)
    x, hidden, context = dense_rows(x), dense_rows(hidden), context.contiguous()
    with on_device_of(x):
        scores = _scores(problem, hidden, context, lengths)
        sums_launch(problem, x, scores, lengths, y, weights).run()
    return y, weights


def run_backward(
    problem: PoolProblem,
    grad_y: Tensor,
    grad_weights: Tensor | None,
    x: Tensor,
    hidden: Tensor,
    context: Tensor,
    lengths: Tensor | None,
) -> Three:
    grad_x, grad_hidden = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, hidden))
    x, hidden, context = dense_rows(x), dense_rows(hidden), context.contiguous()
    grad_y, grad_weights = grad_y.contiguous(), None if grad_weights is None else grad_weights.contiguous()
    slopes = torch.empty(problem.batch, problem.steps, dtype=torch.float32, device=x.device)
    each = torch.empty(problem.batch, problem.hidden, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        scores = _scores(problem, hidden, context, lengths)
        slopes_launch(problem, x, scores, lengths, grad_y, grad_weights, slopes).run()
        grad_x_launch(problem, scores, lengths, grad_y, grad_x).run()
        grad_hidden_launch(problem, hidden, context, lengths, slopes, grad_hidden, each).run()
    return grad_x, grad_hidden, each.sum(0).to(context.dtype)
