"""Triton kernels of linear_cross_entropy: logits exist in registers, their gradient for some rows at a time.

sums       over a part of the classes: each row's largest logit, the sum of exponentials, its label's logit
combine    the parts together: the logarithm of the sum of exponentials, and the loss
gradient   of the logits, from that logarithm
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products import dot


@triton.jit
def logits(
    x, x_row, weight, bias, rows, outs, row_ok, out_ok, features, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, features, DEPTH):
        k = start + tl.arange(0, DEPTH)
        inside = k < features
        a = tl.load(x + rows[:, None] * x_row + k[None, :], mask=row_ok[:, None] & inside[None, :], other=0.0)
        b = tl.load(
            weight + outs[None, :] * features + k[:, None], mask=out_ok[None, :] & inside[:, None], other=0.0
        )
        acc = dot(a, b, acc, PRECISION, WIDEN)
    if bias is not None:
        acc += tl.load(bias + outs, mask=out_ok, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def sums(
    x, x_row, weight, bias, class_weight, target, top, total, weighted, label, row_count, classes, features,
    part, SMOOTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """ROWS rows and `part` classes. Parts vary slowest: programs that run together share the weight."""
    tiles = tl.cdiv(row_count, ROWS)
    pid = tl.program_id(0)
    split = pid // tiles
    rows = (pid % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < row_count
    labels = tl.load(target + rows, mask=row_ok, other=-1)
    # Not -inf: a row that begins with logits of -inf would subtract infinities.
    most = tl.full((ROWS,), -3.4028235e38, tl.float32)
    summed = tl.zeros((ROWS,), tl.float32)
    spread = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS,), tl.float32)
    begin = split.to(tl.int64) * part
    for start in range(0, part, COLS):
        outs = begin + start + tl.arange(0, COLS)
        out_ok = outs < classes
        z = logits(
            x, x_row, weight, bias, rows, outs, row_ok, out_ok, features, PRECISION, WIDEN, ROWS, COLS, DEPTH
        )
        found += tl.sum(tl.where(outs[None, :] == labels[:, None], z, 0.0), 1)
        if SMOOTH:
            if class_weight is not None:
                each = tl.load(class_weight + outs, mask=out_ok, other=0.0)[None, :]
                spread += tl.sum(tl.where(out_ok[None, :], z * each, 0.0), 1)
            else:
                spread += tl.sum(tl.where(out_ok[None, :], z, 0.0), 1)
        z = tl.where(out_ok[None, :], z, float("-inf"))
        # A NaN stays in the sum of exponentials; a maximum may drop it.
        larger = tl.maximum(most, tl.max(tl.where(z == z, z, -3.4028235e38), 1))
        summed = summed * tl.exp(most - larger) + tl.sum(tl.exp(z - larger[:, None]), 1)
        most = larger
    at = split.to(tl.int64) * row_count + rows
    tl.store(top + at, most, mask=row_ok)
    tl.store(total + at, summed, mask=row_ok)
    if SMOOTH:
        tl.store(weighted + at, spread, mask=row_ok)
    here = (labels >= begin) & (labels < begin + part) & (labels < classes)
    tl.store(label + rows, found, mask=row_ok & here)


@triton.jit
def combine(
    top, total, weighted, label, of_label, counts, loss, lse, row_count, parts, smoothing, by_class, weights,
    SMOOTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows: their parts in order. counts: 1 where a row counts, of_label: its label's weight."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < row_count
    most = tl.full((ROWS,), -3.4028235e38, tl.float32)
    summed = tl.zeros((ROWS,), tl.float32)
    spread = tl.zeros((ROWS,), tl.float32)
    for i in range(parts):
        at = i * row_count + rows
        larger = tl.maximum(most, tl.load(top + at, mask=row_ok, other=0.0))
        summed = summed * tl.exp(most - larger)
        summed += tl.load(total + at, mask=row_ok, other=1.0) * tl.exp(
            tl.load(top + at, mask=row_ok, other=0.0) - larger
        )
        most = larger
        if SMOOTH:
            spread += tl.load(weighted + at, mask=row_ok, other=0.0)
    log_sum = most + tl.log(summed)
    each = tl.load(of_label + rows, mask=row_ok, other=0.0)
    value = (1.0 - smoothing) * each * (log_sum - tl.load(label + rows, mask=row_ok, other=0.0))
    if SMOOTH:
        value += by_class * (tl.load(weights) * log_sum - spread)
    counted = tl.load(counts + rows, mask=row_ok, other=0.0) > 0.0
    tl.store(loss + rows, tl.where(counted, value, 0.0), mask=row_ok)
    tl.store(lse + rows, log_sum, mask=row_ok)


@triton.jit
def gradient(
    x, x_row, weight, bias, class_weight, target, lse, by_softmax, by_label, by_class, to, row_count, classes,
    features, SMOOTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """ROWS rows and COLS classes: by_softmax exp(z - lse) - by_label [class == label] - by_class weight."""
    tiles = tl.cdiv(row_count, ROWS)
    pid = tl.program_id(0)
    rows = (pid % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    outs = (pid // tiles).to(tl.int64) * COLS + tl.arange(0, COLS)
    row_ok, out_ok = rows < row_count, outs < classes
    z = logits(
        x, x_row, weight, bias, rows, outs, row_ok, out_ok, features, PRECISION, WIDEN, ROWS, COLS, DEPTH
    )
    labels = tl.load(target + rows, mask=row_ok, other=-1)
    log_sum = tl.load(lse + rows, mask=row_ok, other=0.0)
    value = tl.exp(z - log_sum[:, None]) * tl.load(by_softmax + rows, mask=row_ok, other=0.0)[:, None]
    if SMOOTH:
        each = tl.load(by_class + rows, mask=row_ok, other=0.0)[:, None]
        if class_weight is not None:
            value -= each * tl.load(class_weight + outs, mask=out_ok, other=0.0)[None, :]
        else:
            value -= each
    at_label = tl.load(by_label + rows, mask=row_ok, other=0.0)[:, None]
    value -= tl.where(outs[None, :] == labels[:, None], at_label, 0.0)
    at = rows[:, None] * classes + outs[None, :]
    tl.store(to + at, value.to(to.dtype.element_ty), mask=row_ok[:, None] & out_ok[None, :])
