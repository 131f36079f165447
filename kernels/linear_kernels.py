"""Triton kernels of linear: matrix products whose operand is cut into inputs, and what is done to rows.

    forward    y[row, out]    = activation(sum over (input, column)  x_input * weight + bias)
    gradient   g[row, out]    = the gradient before the activation
    product    c[row, column] = sum over k  a * b,  for the gradients of inputs and weight

The inputs are up to four pointers; those that are not there have width 0, and their loop does nothing. The
interpreter multiplies bfloat16 as raw integers, hence WIDEN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, activation_gradient


@triton.jit
def _add_input(
    acc, x, x_row, width, weight, column, depth, rows, outs, row_ok, out_ok, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """acc plus the product of one input's rows with its columns of the weight's."""
    for start in range(0, width, DEPTH):
        k = start + tl.arange(0, DEPTH)
        inside = k < width
        a = tl.load(x + rows[:, None] * x_row + k[None, :], mask=row_ok[:, None] & inside[None, :], other=0.0)
        b = tl.load(
            weight + outs[None, :] * depth + (column + k)[:, None],
            mask=out_ok[None, :] & inside[:, None],
            other=0,
        )
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        else:
            b = b.to(a.dtype)  # of a weight that is kept in fewer bits
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def forward(
    x0, x1, x2, x3, row0, row1, row2, row3, width0, width1, width2, width3, weight, bias, scale, y, pre,
    row_count, outputs, depth, slope, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """ROWS rows and COLS outputs. Row tiles vary slowest: the inputs' tiles are shared in the cache."""
    tiles = tl.cdiv(outputs, COLS)
    pid = tl.program_id(0)
    rows = (pid // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    outs = (pid % tiles).to(tl.int64) * COLS + tl.arange(0, COLS)
    row_ok, out_ok = rows < row_count, outs < outputs
    acc = tl.zeros((ROWS, COLS), tl.float32)
    acc = _add_input(
        acc, x0, row0, width0, weight, 0, depth, rows, outs, row_ok, out_ok, PRECISION, WIDEN, DEPTH
    )
    if x1 is not None:
        acc = _add_input(
            acc, x1, row1, width1, weight, width0, depth, rows, outs, row_ok, out_ok, PRECISION, WIDEN, DEPTH
        )
    if x2 is not None:
        acc = _add_input(
            acc, x2, row2, width2, weight, width0 + width1, depth, rows, outs, row_ok, out_ok, PRECISION,
            WIDEN, DEPTH,
        )  # fmt: skip
    if x3 is not None:
        acc = _add_input(
            acc, x3, row3, width3, weight, width0 + width1 + width2, depth, rows, outs, row_ok, out_ok,
            PRECISION, WIDEN, DEPTH,
        )  # fmt: skip
    if scale is not None:
        acc *= tl.load(scale + outs, mask=out_ok, other=0.0)[None, :]
    if bias is not None:
        acc += tl.load(bias + outs, mask=out_ok, other=0.0).to(tl.float32)[None, :]
    at = rows[:, None] * outputs + outs[None, :]
    live = row_ok[:, None] & out_ok[None, :]
    if pre is not None:
        tl.store(pre + at, acc.to(pre.dtype.element_ty), mask=live)
    tl.store(y + at, activate(acc, slope, ACTIVATION).to(y.dtype.element_ty), mask=live)


@triton.jit
def softmax(z, y, outputs, COLS: tl.constexpr):
    """One row: its largest element, the sum of its exponentials, and the quotients."""
    row = tl.program_id(0).to(tl.int64) * outputs
    most = tl.full((COLS,), float("-inf"), tl.float32)
    broken = tl.zeros((COLS,), tl.float32)
    for start in range(0, outputs, COLS):
        out = start + tl.arange(0, COLS)
        value = tl.load(z + row + out, mask=out < outputs, other=float("-inf"))
        most = tl.maximum(most, value)
        broken += tl.where(value != value, 1.0, 0.0)  # a maximum may drop a NaN
    top = tl.max(most, 0)
    top = tl.where(tl.sum(broken, 0) > 0, float("nan"), top)
    total = tl.zeros((COLS,), tl.float32)
    for start in range(0, outputs, COLS):
        out = start + tl.arange(0, COLS)
        value = tl.load(z + row + out, mask=out < outputs, other=float("-inf"))
        total += tl.where(out < outputs, tl.exp(value - top), 0.0)
    sum_of_all = tl.sum(total, 0)
    for start in range(0, outputs, COLS):
        out = start + tl.arange(0, COLS)
        value = tl.load(z + row + out, mask=out < outputs, other=float("-inf"))
        tl.store(y + row + out, (tl.exp(value - top) / sum_of_all).to(y.dtype.element_ty), mask=out < outputs)


@triton.jit
def gradient(grad, saved, to, count, slope, ACTIVATION: tl.constexpr, COLS: tl.constexpr):
    """The gradient before the activation, element by element."""
    at = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    g = tl.load(grad + at, mask=at < count, other=0.0).to(tl.float32)
    s = tl.load(saved + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(to + at, activation_gradient(g, s, slope, ACTIVATION).to(to.dtype.element_ty), mask=at < count)


@triton.jit
def softmax_gradient(grad, y, to, outputs, COLS: tl.constexpr):
    """The gradient before a softmax, one row."""
    row = tl.program_id(0).to(tl.int64) * outputs
    total = tl.zeros((COLS,), tl.float32)
    for start in range(0, outputs, COLS):
        out = start + tl.arange(0, COLS)
        g = tl.load(grad + row + out, mask=out < outputs, other=0.0).to(tl.float32)
        v = tl.load(y + row + out, mask=out < outputs, other=0.0).to(tl.float32)
        total += g * v
    mean = tl.sum(total, 0)
    for start in range(0, outputs, COLS):
        out = start + tl.arange(0, COLS)
        g = tl.load(grad + row + out, mask=out < outputs, other=0.0).to(tl.float32)
        v = tl.load(y + row + out, mask=out < outputs, other=0.0).to(tl.float32)
        tl.store(to + row + out, (v * (g - mean)).to(to.dtype.element_ty), mask=out < outputs)


@triton.jit
def product(
    a, b, c, a_row, a_step, b_step, c_row, row_count, column_count, depth, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """c = a b; b's and c's columns have stride 1."""
    tiles = tl.cdiv(column_count, COLS)
    pid = tl.program_id(0)
    rows = (pid // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (pid % tiles).to(tl.int64) * COLS + tl.arange(0, COLS)
    row_ok, column_ok = rows < row_count, columns < column_count
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH).to(tl.int64)
        inside = k < depth
        left = tl.load(
            a + rows[:, None] * a_row + k[None, :] * a_step, mask=row_ok[:, None] & inside[None, :], other=0.0
        )
        right = tl.load(
            b + k[:, None] * b_step + columns[None, :], mask=inside[:, None] & column_ok[None, :], other=0.0
        )
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    at = rows[:, None] * c_row + columns[None, :]
    tl.store(c + at, acc.to(c.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


@triton.jit
def column_sums(grad, to, row_count, outputs, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The bias's gradient: COLS columns, their rows in order."""
    outs = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    out_ok = outs < outputs
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, row_count, ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        at = rows[:, None] * outputs + outs[None, :]
        live = (rows < row_count)[:, None] & out_ok[None, :]
        total += tl.load(grad + at, mask=live, other=0.0).to(tl.float32)
    tl.store(to + outs, tl.sum(total, 0).to(to.dtype.element_ty), mask=out_ok)
