"""Triton kernels of the losses of two tensors.

elementwise, elementwise_gradient   binary cross-entropy and squared error, each tensor read once
total                               what the programs of `elementwise` summed, in their order
contrastive, contrastive_gradient   pairs of rows
similarity_gradient                 InfoNCE: of one modality, from both directions' sums of exponentials

The sums of exponentials themselves are those of losses_kernels.py, one modality being the other's weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .losses_kernels import logits
from .products import dot


@triton.jit
def _log_of_one_plus(u):
    """For 0 <= u <= 1: twice the area tangent of u / (2 + u), whose series ends below float32's rounding
    there. The logarithm of 1 + u would keep nothing of a small u."""
    z = u / (u + 2.0)
    w = z * z
    series = 1.0 / 11 + w * (1.0 / 13)
    series = 1.0 / 7 + w * (1.0 / 9 + w * series)
    return 2.0 * z * (1.0 + w * (1.0 / 3 + w * (1.0 / 5 + w * series)))


@triton.jit
def _factor(values, row_stride, col_stride, at, inside, columns):
    return tl.load(values + at // columns * row_stride + at % columns * col_stride, mask=inside, other=0.0)


@triton.jit
def _load(x, target, pos_weight, pos_row, pos_col, at, inside, columns):
    """An element of the input, of the target, and the positive class's weight."""
    positive = 1.0
    if pos_weight is not None:
        positive = _factor(pos_weight, pos_row, pos_col, at, inside, columns)
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    return a, tl.load(target + at, mask=inside, other=0.0).to(tl.float32), positive


@triton.jit
def elementwise(
    x, target, weight, weight_row, weight_col, pos_weight, pos_row, pos_col, losses, sums, count, columns,
    span, BCE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`span` elements: their losses, or the sum of these."""
    pid = tl.program_id(0)
    begin = (pid.to(tl.int64) if WIDE else pid) * span
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, span, BLOCK):
        at = begin + start + tl.arange(0, BLOCK)
        inside = at < count
        a, t, positive = _load(x, target, pos_weight, pos_row, pos_col, at, inside, columns)
        if BCE:
            # Parts that do not cancel: far from 0 the logarithm is all that is left.
            loss = tl.where(a < 0.0, -positive * t * a, (1.0 - t) * a)
            loss += (1.0 + (positive - 1.0) * t) * _log_of_one_plus(tl.exp(-tl.abs(a)))
        else:
            loss = (a - t) * (a - t)
        if weight is not None:
            loss *= _factor(weight, weight_row, weight_col, at, inside, columns)
        if losses is not None:
            tl.store(losses + at, loss, mask=inside)
        else:
            acc += tl.where(inside, loss, 0.0)
    if losses is None:
        tl.store(sums + pid, tl.sum(acc, 0))


@triton.jit
def total(sums, loss, count, scale, BLOCK: tl.constexpr):
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        acc += tl.load(sums + at, mask=at < count, other=0.0)
    tl.store(loss, tl.sum(acc, 0) * scale)


@triton.jit
def elementwise_gradient(
    x, target, weight, weight_row, weight_col, pos_weight, pos_row, pos_col, grad_loss, grad, count, columns,
    scale, BCE: tl.constexpr, EACH: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """EACH: grad_loss holds one for each element, else one for all."""
    pid = tl.program_id(0)
    at = (pid.to(tl.int64) if WIDE else pid) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    a, t, positive = _load(x, target, pos_weight, pos_row, pos_col, at, inside, columns)
    if BCE:
        e = tl.exp(-tl.abs(a))
        of_zero = tl.where(a < 0.0, 1.0, e) / (1.0 + e)
        value = (1.0 - t) - (1.0 + (positive - 1.0) * t) * of_zero
    else:
        value = 2.0 * (a - t)
    if weight is not None:
        value *= _factor(weight, weight_row, weight_col, at, inside, columns)
    if EACH:
        value *= tl.load(grad_loss + at, mask=inside, other=0.0)
    else:
        value *= tl.load(grad_loss) * scale
    tl.store(grad + at, value.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def contrastive(
    a, b, target, loss, slope, row_count, columns, margin, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """ROWS pairs: their losses, and what a pair's difference is multiplied by in the gradient."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < row_count
    squares = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, columns, COLS):
        cols = start + tl.arange(0, COLS)
        at = rows[:, None] * columns + cols[None, :]
        inside = row_ok[:, None] & (cols < columns)[None, :]
        apart = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
        apart -= tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
        squares += apart * apart
    square = tl.sum(squares, 1)
    distance = tl.sqrt(square)
    label = tl.load(target + rows, mask=row_ok, other=0.0)
    # A NaN is neither beyond the margin nor short of it, and must stay.
    gap = tl.where(distance > margin, 0.0, margin - distance)
    tl.store(loss + rows, 0.5 * (label * square + (1.0 - label) * gap * gap), mask=row_ok)
    # At distance 0 there is no direction to push in: the gradient there is 0.
    apart = tl.where(distance == 0.0, 0.0, gap / tl.where(distance == 0.0, 1.0, distance))
    tl.store(slope + rows, label - (1.0 - label) * apart, mask=row_ok)


@triton.jit
def contrastive_gradient(
    a, b, slope, grad_loss, grad_a, grad_b, row_count, columns, ROWS: tl.constexpr, COLS: tl.constexpr
):
    tiles = tl.cdiv(row_count, ROWS)
    pid = tl.program_id(0)
    rows = (pid % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = pid // tiles * COLS + tl.arange(0, COLS)
    row_ok = rows < row_count
    scale = tl.load(slope + rows, mask=row_ok, other=0.0) * tl.load(grad_loss + rows, mask=row_ok, other=0.0)
    at = rows[:, None] * columns + cols[None, :]
    inside = row_ok[:, None] & (cols < columns)[None, :]
    apart = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    apart -= tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
    value = apart * scale[:, None]
    tl.store(grad_a + at, value.to(grad_a.dtype.element_ty), mask=inside)
    tl.store(grad_b + at, (-value).to(grad_b.dtype.element_ty), mask=inside)


@triton.jit
def similarity_gradient(
    x, x_row, other, lse, other_lse, scale, at_partner, grad, row_count, features,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS rows and WIDTH features of the gradient of x, over all rows of the other modality.

    The gradient of the similarities z, of which COLS columns exist at a time, is
    scale[row] exp(z - lse[row]) + scale[column] exp(z - other_lse[column]) - at_partner [row == column],
    and each of the first two is there only where its logarithms are given.
    """
    tiles = tl.cdiv(row_count, ROWS)
    pid = tl.program_id(0)
    rows = (pid % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    wide = pid // tiles * WIDTH + tl.arange(0, WIDTH)
    row_ok, wide_ok = rows < row_count, wide < features
    if lse is not None:
        row_lse = tl.load(lse + rows, mask=row_ok, other=0.0)
        row_scale = tl.load(scale + rows, mask=row_ok, other=0.0)
    partner = tl.load(at_partner + rows, mask=row_ok, other=0.0)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, row_count, COLS):
        cols = start + tl.arange(0, COLS).to(tl.int64)
        col_ok = cols < row_count
        z = logits(
            x, x_row, other, None, rows, cols, row_ok, col_ok, features, PRECISION, WIDEN, ROWS, COLS, DEPTH
        )
        g = tl.where(rows[:, None] == cols[None, :], -partner[:, None], 0.0)
        if lse is not None:
            g += row_scale[:, None] * tl.exp(z - row_lse[:, None])
        if other_lse is not None:
            col_lse = tl.load(other_lse + cols, mask=col_ok, other=0.0)
            col_scale = tl.load(scale + cols, mask=col_ok, other=0.0)
            g += col_scale[None, :] * tl.exp(z - col_lse[None, :])
        g = tl.where(col_ok[None, :], g, 0.0)
        values = tl.load(
            other + cols[:, None] * features + wide[None, :],
            mask=col_ok[:, None] & wide_ok[None, :],
            other=0.0,
        )
        acc = dot(g.to(values.dtype), values, acc, PRECISION, WIDEN)
    at = rows[:, None] * features + wide[None, :]
    tl.store(grad + at, acc.to(grad.dtype.element_ty), mask=row_ok[:, None] & wide_ok[None, :])
