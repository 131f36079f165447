"""Attention in Triton: a tile of queries against all keys, forward, and two walks backward.

Every program owns what it writes, so results do not depend on the order in which programs run. Exponentials
are to base 2: the scores carry its logarithm. A row that attends to nothing has -inf for its maximum, which
is replaced by zero before anything is subtracted from it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from interfuse.kernels.products import dot

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def length_of(lengths, b, whole):
    """How much of batch entry b is real."""
    if lengths is None:
        n = whole
    else:
        n = tl.load(lengths + b).to(tl.int32)
    return n


@triton.jit
def load_rows(at, rows, columns, stride, count, WIDTH: tl.constexpr):
    """A block (rows, columns) of a matrix whose rows are `stride` apart; zero from row `count` on."""
    ok = (rows < count)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(at + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=ok, other=0.0)


@triton.jit
def scores(
    q, k, scale, mask, rows, cols, q_count, kv_count, mask_row, mask_col,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Of rows with cols, to base 2; -inf where one does not attend to the other."""
    s = tl.zeros((q.shape[0], k.shape[0]), tl.float32)
    s = dot(q, tl.trans(k), s, PRECISION, WIDEN) * scale
    allowed = (cols < kv_count)[None, :] & (rows < q_count)[:, None]
    if CAUSAL:
        allowed = allowed & (cols[None, :] <= rows[:, None])
    if MASK != "none":
        at = mask + rows.to(tl.int64)[:, None] * mask_row + cols.to(tl.int64)[None, :] * mask_col
        value = tl.load(at, mask=allowed, other=0)
        if MASK == "boolean":
            allowed = allowed & (value != 0)
        else:
            s += value.to(tl.float32) * LOG2E
    return tl.where(allowed, s, float("-inf"))


@triton.jit
def keys_end(kv_count, row_end, q_begin, q_count, CAUSAL: tl.constexpr):
    """The keys that a tile of queries reads end here; a tile of padding reads none."""
    end = kv_count
    if CAUSAL:
        end = tl.minimum(end, row_end)
    return tl.where(q_begin < q_count, end, 0)


@triton.jit
def forward(
    q, k, v, mask, q_lengths, kv_lengths, y, lse, scale, heads, group, queries, keys,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, y_batch, y_head, y_row,
    mask_batch, mask_head, mask_row, mask_col,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """y and lse of ROWS queries of one head. DEPTH and UNITS hold HEAD_DIM and VALUE_DIM."""
    tiles = tl.cdiv(queries, ROWS)
    begin = tl.program_id(0) % tiles * ROWS
    b = (tl.program_id(0) // tiles // heads).to(tl.int64)
    h = (tl.program_id(0) // tiles % heads).to(tl.int64)
    rows, e, u = begin + tl.arange(0, ROWS), tl.arange(0, DEPTH), tl.arange(0, UNITS)
    q_count, kv_count = length_of(q_lengths, b, queries), length_of(kv_lengths, b, keys)
    k += b * k_batch + h // group * k_head
    v += b * v_batch + h // group * v_head
    if MASK != "none":
        mask += b * mask_batch + h * mask_head
    own = load_rows(q + b * q_batch + h * q_head, rows, e, q_row, q_count, HEAD_DIM)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, UNITS), tl.float32)
    for start in range(0, keys_end(kv_count, begin + ROWS, begin, q_count, CAUSAL), COLS):
        cols = start + tl.arange(0, COLS)
        block = load_rows(k, cols, e, k_row, kv_count, HEAD_DIM)
        s = scores(own, block, scale, mask, rows, cols, q_count, kv_count, mask_row, mask_col,
                   MASK, CAUSAL, PRECISION, WIDEN)  # fmt: skip
        now = tl.maximum(best, tl.max(s, 1))
        offset = tl.where(now == float("-inf"), 0.0, now)
        p = tl.exp2(s - offset[:, None])
        factor = tl.exp2(best - offset)
        total = total * factor + tl.sum(p, 1)
        values = load_rows(v, cols, u, v_row, kv_count, VALUE_DIM)
        acc = dot(p.to(values.dtype), values, acc * factor[:, None], PRECISION, WIDEN)
        best = now
    empty = total == 0.0
    acc = tl.where(empty[:, None], 0.0, acc / tl.where(empty, 1.0, total)[:, None])
    at = y + b * y_batch + h * y_head + rows.to(tl.int64)[:, None] * y_row + u[None, :]
    inside = rows < queries
    tl.store(at, acc.to(y.dtype.element_ty), mask=inside[:, None] & (u < VALUE_DIM)[None, :])
    if lse is not None:
        value = LN2 * (best + tl.log2(tl.where(empty, 1.0, total)))
        tl.store(lse + (b * heads + h) * queries + rows, tl.where(empty, float("-inf"), value), mask=inside)


@triton.jit
def offsets(lse, at, ok):
    """What is subtracted from a row's scores, to base 2; +inf where it attends to nothing."""
    value = tl.load(lse + at, mask=ok, other=float("-inf"))
    return tl.where(value == float("-inf"), float("inf"), value * LOG2E)


@triton.jit
def probabilities(
    q, k, mask, q_lengths, kv_lengths, lse, weights, scale, heads, group, queries, keys,
    q_batch, q_head, q_row, k_batch, k_head, k_row, mask_batch, mask_head, mask_row, mask_col,
    HEAD_DIM: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The weights of ROWS queries with COLS keys, from the scores and the saved sums."""
    row_tiles, col_tiles = tl.cdiv(queries, ROWS), tl.cdiv(keys, COLS)
    pid = tl.program_id(0)
    cols = pid % col_tiles * COLS + tl.arange(0, COLS)
    rows = pid // col_tiles % row_tiles * ROWS + tl.arange(0, ROWS)
    b = (pid // col_tiles // row_tiles // heads).to(tl.int64)
    h = (pid // col_tiles // row_tiles % heads).to(tl.int64)
    e = tl.arange(0, DEPTH)
    q_count, kv_count = length_of(q_lengths, b, queries), length_of(kv_lengths, b, keys)
    if MASK != "none":
        mask += b * mask_batch + h * mask_head
    own = load_rows(q + b * q_batch + h * q_head, rows, e, q_row, q_count, HEAD_DIM)
    block = load_rows(k + b * k_batch + h // group * k_head, cols, e, k_row, kv_count, HEAD_DIM)
    s = scores(own, block, scale, mask, rows, cols, q_count, kv_count, mask_row, mask_col,
               MASK, CAUSAL, PRECISION, WIDEN)  # fmt: skip
    row = (b * heads + h) * queries + rows
    p = tl.exp2(s - offsets(lse, row, rows < queries)[:, None])
    ok = (rows < queries)[:, None] & (cols < keys)[None, :]
    tl.store(weights + row[:, None] * keys + cols[None, :], p.to(weights.dtype.element_ty), mask=ok)


@triton.jit
def row_sums(
    y, grad_y, q_lengths, delta, heads, queries, y_batch, y_head, y_row, g_batch, g_head, g_row,
    VALUE_DIM: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """delta = the sum over the values of y * grad_y, row by row; zero in padding."""
    tiles = tl.cdiv(queries, ROWS)
    rows, u = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS), tl.arange(0, UNITS)
    b = (tl.program_id(0) // tiles // heads).to(tl.int64)
    h = (tl.program_id(0) // tiles % heads).to(tl.int64)
    q_count = length_of(q_lengths, b, queries)
    left = load_rows(y + b * y_batch + h * y_head, rows, u, y_row, q_count, VALUE_DIM).to(tl.float32)
    right = load_rows(grad_y + b * g_batch + h * g_head, rows, u, g_row, q_count, VALUE_DIM).to(tl.float32)
    tl.store(delta + (b * heads + h) * queries + rows, tl.sum(left * right, 1), mask=rows < queries)


@triton.jit
def grad_scores(
    q, k, v, grad, scale, lse, delta, row, mask, rows, cols, queries, q_count, kv_count, mask_row, mask_col,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The probabilities of a block, and the gradients of its scores."""
    s = scores(q, k, scale, mask, rows, cols, q_count, kv_count, mask_row, mask_col,
               MASK, CAUSAL, PRECISION, WIDEN)  # fmt: skip
    inside = rows < queries
    p = tl.exp2(s - offsets(lse, row + rows, inside)[:, None])
    grad_p = dot(grad, tl.trans(v), tl.zeros_like(p), PRECISION, WIDEN)
    return p, p * (grad_p - tl.load(delta + row + rows, mask=inside, other=0.0)[:, None])


@triton.jit
def backward_queries(
    q, k, v, mask, q_lengths, kv_lengths, lse, delta, grad_y, grad_q, scale, natural, heads, group, queries,
    keys, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    out_batch, out_head, out_row, mask_batch, mask_head, mask_row, mask_col,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """The gradient of ROWS queries of one head. natural: the scale without the logarithm of 2."""
    tiles = tl.cdiv(queries, ROWS)
    begin = tl.program_id(0) % tiles * ROWS
    b = (tl.program_id(0) // tiles // heads).to(tl.int64)
    h = (tl.program_id(0) // tiles % heads).to(tl.int64)
    rows, e, u = begin + tl.arange(0, ROWS), tl.arange(0, DEPTH), tl.arange(0, UNITS)
    q_count, kv_count = length_of(q_lengths, b, queries), length_of(kv_lengths, b, keys)
    k += b * k_batch + h // group * k_head
    v += b * v_batch + h // group * v_head
    if MASK != "none":
        mask += b * mask_batch + h * mask_head
    own = load_rows(q + b * q_batch + h * q_head, rows, e, q_row, q_count, HEAD_DIM)
    grad = load_rows(grad_y + b * g_batch + h * g_head, rows, u, g_row, q_count, VALUE_DIM)
    row = (b * heads + h) * queries
    acc = tl.zeros((ROWS, DEPTH), tl.float32)
    for start in range(0, keys_end(kv_count, begin + ROWS, begin, q_count, CAUSAL), COLS):
        cols = start + tl.arange(0, COLS)
        block = load_rows(k, cols, e, k_row, kv_count, HEAD_DIM)
        values = load_rows(v, cols, u, v_row, kv_count, VALUE_DIM)
        _, gs = grad_scores(
            own, block, values, grad, scale, lse, delta, row, mask, rows, cols, queries, q_count, kv_count,
            mask_row, mask_col, MASK, CAUSAL, PRECISION, WIDEN,
        )  # fmt: skip
        acc = dot(gs.to(block.dtype), block, acc, PRECISION, WIDEN)
    at = grad_q + b * out_batch + h * out_head + rows.to(tl.int64)[:, None] * out_row + e[None, :]
    ok = (rows < queries)[:, None] & (e < HEAD_DIM)[None, :]
    tl.store(at, (acc * natural).to(grad_q.dtype.element_ty), mask=ok)


@triton.jit
def backward_keys(
    q, k, v, mask, q_lengths, kv_lengths, lse, delta, grad_y, grad_k, grad_v, scale, natural, heads, group,
    queries, keys, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    g_batch, g_head, g_row, gk_batch, gk_head, gk_row, gv_batch, gv_head, gv_row,
    mask_batch, mask_head, mask_row, mask_col,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """The gradients of COLS keys and values of one key head, over all queries of the heads that share it."""
    tiles, kv_heads = tl.cdiv(keys, COLS), heads // group
    begin = tl.program_id(0) % tiles * COLS
    b = (tl.program_id(0) // tiles // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) // tiles % kv_heads).to(tl.int64)
    cols, e, u = begin + tl.arange(0, COLS), tl.arange(0, DEPTH), tl.arange(0, UNITS)
    q_count, kv_count = length_of(q_lengths, b, queries), length_of(kv_lengths, b, keys)
    block = load_rows(k + b * k_batch + kv_head * k_head, cols, e, k_row, kv_count, HEAD_DIM)
    values = load_rows(v + b * v_batch + kv_head * v_head, cols, u, v_row, kv_count, VALUE_DIM)
    acc_k = tl.zeros((COLS, DEPTH), tl.float32)
    acc_v = tl.zeros((COLS, UNITS), tl.float32)
    first = 0
    if CAUSAL:
        first = begin // ROWS * ROWS
    end = tl.where(begin < kv_count, q_count, 0)
    for number in range(group):
        h = kv_head * group + number
        row = (b * heads + h) * queries
        from_q = q + b * q_batch + h * q_head
        from_grad = grad_y + b * g_batch + h * g_head
        from_mask = mask
        if MASK != "none":
            from_mask = mask + b * mask_batch + h * mask_head
        for start in range(first, end, ROWS):
            rows = start + tl.arange(0, ROWS)
            other = load_rows(from_q, rows, e, q_row, q_count, HEAD_DIM)
            grad = load_rows(from_grad, rows, u, g_row, q_count, VALUE_DIM)
            p, gs = grad_scores(
                other, block, values, grad, scale, lse, delta, row, from_mask, rows, cols, queries, q_count,
                kv_count, mask_row, mask_col, MASK, CAUSAL, PRECISION, WIDEN,
            )  # fmt: skip
            acc_v = dot(tl.trans(p.to(grad.dtype)), grad, acc_v, PRECISION, WIDEN)
            acc_k = dot(tl.trans(gs.to(other.dtype)), other, acc_k, PRECISION, WIDEN)
    inside = (cols < keys)[:, None]
    wide = cols.to(tl.int64)[:, None]
    at_k = grad_k + b * gk_batch + kv_head * gk_head + wide * gk_row + e[None, :]
    tl.store(at_k, (acc_k * natural).to(grad_k.dtype.element_ty), mask=inside & (e < HEAD_DIM)[None, :])
    at_v = grad_v + b * gv_batch + kv_head * gv_head + wide * gv_row + u[None, :]
    tl.store(at_v, acc_v.to(grad_v.dtype.element_ty), mask=inside & (u < VALUE_DIM)[None, :])
