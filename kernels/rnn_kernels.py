"""Triton kernels of rnn, forward: one body each for LSTM, GRU and RNN, both directions, ragged or not.

    input_gates       what the input contributes to every gate of every token: one product over all of time
    resident_forward  the recurrence with the weights kept on the chip by one program, for small hidden sizes
    stream_forward    the recurrence that reads the weights again at every step, for any size

A program of the recurrence owns ROWS sequences and one direction, all units of them, for all of their steps:
programs never wait for each other, so nothing is assumed about how many run at once. Each walks to the end of
its own longest sequence. Step s of a sequence is time s forwards, and time length - 1 - s backwards.

A token is one time of one sequence: `time * token_t + sequence * token_b`, so that either may come first.
Tensors are numbered by token, then direction: `pre` (GATES, HIDDEN) in float32, `gates` (4, HIDDEN) and `y`
(OUT) in the tensors' dtype, `state` (HIDDEN) in float32: an LSTM's c, of every token where SAVE, else of
every sequence; a GRU's unrounded h of every sequence. OUT is the projection's size, or HIDDEN.

Conditions are blocks even where a scalar would do: the interpreter makes integers of a block and a scalar.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, sigmoid, tanh
from .products import dot


@triton.jit
def sequence_lengths(lengths, b, batch, steps):
    """The lengths of the sequences b, which are zero outside the batch and never past the steps."""
    if lengths is None:
        found = tl.where(b < batch, steps, 0)
    else:
        found = tl.minimum(tl.maximum(tl.load(lengths + b, mask=b < batch, other=0), 0), steps)
    return found.to(tl.int32)


@triton.jit
def times(step, length, direction):
    return tl.where(direction == 0, step, length - 1 - step)


@triton.jit
def lstm(a0, a1, a2, a3, c):
    i = sigmoid(a0)
    f = sigmoid(a1)
    g = tanh(a2)
    o = sigmoid(a3)
    c = f * c + i * g
    return i, f, g, o, c, o * tanh(c)


@triton.jit
def gru(a0, a1, hidden, new, h):
    r = sigmoid(a0)
    z = sigmoid(a1)
    n = tanh(new + r * hidden)
    return r, z, n, n + z * (h - n)


@triton.jit
def store_gates(at, ok, v0, v1, v2, v3, hidden):
    kind = at.dtype.element_ty
    tl.store(at, v0.to(kind), mask=ok)
    tl.store(at + hidden, v1.to(kind), mask=ok)
    tl.store(at + 2 * hidden, v2.to(kind), mask=ok)
    tl.store(at + 3 * hidden, v3.to(kind), mask=ok)


@triton.jit
def load_gates(at, ok, hidden, GATES: tl.constexpr):
    """Up to four gates of `at`; what a cell does not have comes out as its first and is never used."""
    v0 = tl.load(at, mask=ok, other=0.0)
    v1 = v0
    v2 = v0
    v3 = v0
    if GATES > 1:
        v1 = tl.load(at + hidden, mask=ok, other=0.0)
        v2 = tl.load(at + 2 * hidden, mask=ok, other=0.0)
    if GATES > 3:
        v3 = tl.load(at + 3 * hidden, mask=ok, other=0.0)
    return v0, v1, v2, v3


@triton.jit
def initial(states, d, b, batch, u, ok, size):
    """The given initial states of the units u as float32, or zeros."""
    if states is None:
        value = tl.zeros(ok.shape, tl.float32)
    else:
        at = states + ((d * batch + b) * size)[:, None] + u[None, :]
        value = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    return value


@triton.jit
def input_gates(
    x, ids, weight, bias, recurrent_bias, lengths, out, tokens, inner, x_outer, x_inner, ids_outer,
    ids_inner, vocabulary, out_outer, out_inner, first_step,
    INPUT: tl.constexpr, GATE_ROWS: tl.constexpr, SHARED_BIAS: tl.constexpr, BATCH_FIRST: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[token] = x[token] @ weight^T + bias: ROWS tokens by COLS gate rows.

    Tokens are numbered (outer, inner) as y is; x has any strides. `inner` or `tokens` say how many steps are
    done, from first_step on. With ids, x is a table whose rows they choose; an id outside of it gives NaN,
    because a kernel cannot raise. Tokens past their sequence's end are neither read nor written. The
    recurrent bias is added to the first SHARED_BIAS rows (a GRU multiplies the rest of it by a gate first).
    """
    COL_TILES: tl.constexpr = (GATE_ROWS + COLS - 1) // COLS
    pid = tl.program_id(0)
    cols = pid % COL_TILES * COLS + tl.arange(0, COLS)
    token = (pid // COL_TILES).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    outer = token // inner
    within = token % inner
    live = token < tokens
    if BATCH_FIRST:
        within += first_step
    else:
        outer += first_step
    if lengths is not None:
        if BATCH_FIRST:
            live = live & (within < tl.load(lengths + outer, mask=live, other=0))
        else:
            live = live & (outer < tl.load(lengths + within, mask=live, other=0))
    if tl.max(live.to(tl.int32), axis=0) > 0:
        known = live
        if ids is not None:
            row = tl.load(ids + outer * ids_outer + within * ids_inner, mask=live, other=0)
            known = live & (row >= 0) & (row < vocabulary)
            row = row * INPUT
        else:
            row = outer * x_outer + within * x_inner
        cols_ok = cols < GATE_ROWS
        acc = tl.zeros((ROWS, COLS), tl.float32)
        for start in range(0, INPUT, DEPTH):
            k = start + tl.arange(0, DEPTH)
            k_ok = k < INPUT
            a = tl.load(x + row[:, None] + k[None, :], mask=known[:, None] & k_ok[None, :], other=0.0)
            w = tl.load(
                weight + (cols * INPUT)[None, :] + k[:, None],
                mask=cols_ok[None, :] & k_ok[:, None],
                other=0.0,
            )
            acc = dot(a, w, acc, PRECISION, WIDEN)
        if bias is not None:
            shift = tl.load(bias + cols, mask=cols_ok, other=0.0).to(tl.float32)
            shift += tl.load(recurrent_bias + cols, mask=cols < SHARED_BIAS, other=0.0).to(tl.float32)
            acc += shift[None, :]
        acc = tl.where(known[:, None], acc, float("nan"))
        at = outer * out_outer + within * out_inner
        tl.store(out + at[:, None] + cols[None, :], acc, mask=live[:, None] & cols_ok[None, :])


@triton.jit
def resident_forward(
    pre, w_hh, b_hn, h0, c0, lengths, y, hn, cn, gates, state, batch, steps, token_t, token_b,
    CELL: tl.constexpr, GATES: tl.constexpr, HIDDEN: tl.constexpr, DIRECTIONS: tl.constexpr,
    SAVE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """The recurrence with h and c in registers, weights read once; UNITS is HIDDEN rounded up; no projection.

    The compiler keeps the weights in shared memory: they are operands of the products and never change.

    The next step's input is loaded before this step's product, so that memory is waited for only once.
    """
    pid = tl.program_id(0)
    d = pid % DIRECTIONS
    b = (pid // DIRECTIONS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    length = sequence_lengths(lengths, b, batch, steps)
    u = tl.arange(0, UNITS)
    u_ok = u < HIDDEN
    unit = (b < batch)[:, None] & u_ok[None, :]
    kind = w_hh.dtype.element_ty
    at = w_hh + d * (GATES * HIDDEN * HIDDEN) + (u * HIDDEN)[None, :] + u[:, None]
    w0, w1, w2, w3 = load_gates(at, u_ok[None, :] & u_ok[:, None], HIDDEN * HIDDEN, GATES)
    h = initial(h0, d, b, batch, u, unit, HIDDEN)
    c = tl.zeros((ROWS, UNITS), tl.float32)
    if CELL == "lstm":
        c = initial(c0, d, b, batch, u, unit, HIDDEN)
    shift = tl.zeros((UNITS,), tl.float32)
    if b_hn is not None:
        shift = tl.load(b_hn + d * HIDDEN + u, mask=u_ok, other=0.0).to(tl.float32)
    token = times(0, length, d) * token_t + b * token_b
    onward = tl.where(d == 0, token_t, -token_t)
    ok = (length > 0)[:, None] & u_ok[None, :]
    first = pre + (token * DIRECTIONS + d)[:, None] * (GATES * HIDDEN) + u[None, :]
    n0, n1, n2, n3 = load_gates(first, ok, HIDDEN, GATES)
    for s in range(tl.max(length, axis=0)):
        a0 = n0
        a1 = n1
        a2 = n2
        a3 = n3
        ok = (s < length)[:, None] & u_ok[None, :]
        here = token * DIRECTIONS + d
        token += onward
        later = pre + (token * DIRECTIONS + d)[:, None] * (GATES * HIDDEN) + u[None, :]
        n0, n1, n2, n3 = load_gates(later, (s + 1 < length)[:, None] & u_ok[None, :], HIDDEN, GATES)
        operand = h.to(kind)
        a0 = dot(operand, w0, a0, PRECISION, WIDEN)
        if GATES > 1:
            a1 = dot(operand, w1, a1, PRECISION, WIDEN)
        if CELL == "lstm":
            a2 = dot(operand, w2, a2, PRECISION, WIDEN)
            a3 = dot(operand, w3, a3, PRECISION, WIDEN)
            i, f, g, o, new_c, new = lstm(a0, a1, a2, a3, c)
            c = tl.where(ok, new_c, c)
            if SAVE:
                store_gates(gates + (here * (4 * HIDDEN))[:, None] + u[None, :], ok, i, f, g, o, HIDDEN)
                tl.store(state + (here * HIDDEN)[:, None] + u[None, :], c, mask=ok)
        elif CELL == "gru":
            hidden = dot(operand, w2, tl.broadcast_to(shift[None, :], (ROWS, UNITS)), PRECISION, WIDEN)
            r, z, n, new = gru(a0, a1, hidden, a2, h)
            if SAVE:
                store_gates(gates + (here * (4 * HIDDEN))[:, None] + u[None, :], ok, r, z, n, hidden, HIDDEN)
        else:
            new = activate(a0, 0.0, CELL)
        h = tl.where(ok, new, h)
        tl.store(y + (here * HIDDEN)[:, None] + u[None, :], h.to(kind), mask=ok)
    final = ((d * batch + b) * HIDDEN)[:, None] + u[None, :]
    tl.store(hn + final, h.to(kind), mask=unit)
    if CELL == "lstm":
        tl.store(cn + final, c.to(kind), mask=unit)


@triton.jit
def stream_forward(
    pre, w_hh, w_hr, b_hn, h0, c0, lengths, y, hn, cn, gates, state, middle, swap, batch, steps, token_t,
    token_b, size, out, size_row, out_row,
    CELL: tl.constexpr, GATES: tl.constexpr, DIRECTIONS: tl.constexpr, SAVE: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """The recurrence of any size: UNITS units at a time, weights read in blocks of DEPTH inputs.

    h goes from step to step through two halves of `swap` (2, DIRECTIONS, batch, out_row), of which a program
    uses its own rows alone: a barrier between its threads is all the order that takes. With a
    projection, o * tanh(c) goes through `middle` (HIDDEN), numbered like an LSTM's state, in the same way.

    The weights' rows and those of `swap` have `size_row` or `out_row` elements, multiples of 16 that end in
    zeros: reads of them need no mask inside 16 bytes, whatever the sizes are.
    """
    pid = tl.program_id(0)
    d = pid % DIRECTIONS
    b = (pid // DIRECTIONS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = b < batch
    length = sequence_lengths(lengths, b, batch, steps)
    kind = w_hh.dtype.element_ty
    onward = tl.where(d == 0, token_t, -token_t)
    own = (d * batch + b) * out_row
    half = batch * (DIRECTIONS * out_row)
    for start in range(0, out, UNITS):
        u = start + tl.arange(0, UNITS)
        unit = inside[:, None] & (u < out)[None, :]
        value = initial(h0, d, b, batch, u, unit, out)
        tl.store(swap + own[:, None] + u[None, :], value.to(kind), mask=unit)
        if CELL == "gru":
            tl.store(state + ((b * DIRECTIONS + d) * out)[:, None] + u[None, :], value, mask=unit)
    tl.debug_barrier()
    for s in range(tl.max(length, axis=0)):
        live = s < length
        token = times(s, length, d) * token_t + b * token_b
        here = token * DIRECTIONS + d
        cell = here
        before = (token - onward) * DIRECTIONS + d
        if not SAVE:
            cell = b * DIRECTIONS + d
            before = cell
        source = swap + (s % 2) * half + own
        target = swap + ((s + 1) % 2) * half + own
        for start in range(0, size, UNITS):
            u = start + tl.arange(0, UNITS)
            u_ok = u < size
            ok = live[:, None] & u_ok[None, :]
            a0, a1, a2, a3 = load_gates(pre + (here * (GATES * size))[:, None] + u[None, :], ok, size, GATES)
            hidden = tl.zeros((ROWS, UNITS), tl.float32)
            if b_hn is not None:
                shift = tl.load(b_hn + d * size + u, mask=u_ok, other=0.0).to(tl.float32)
                hidden += shift[None, :]
            for inner in range(0, out_row, DEPTH):
                k = inner + tl.arange(0, DEPTH)
                k_ok = k < out_row
                h = tl.load(source[:, None] + k[None, :], mask=live[:, None] & k_ok[None, :], other=0.0)
                w = w_hh + d * (GATES * size * out_row) + (u * out_row)[None, :] + k[:, None]
                w_ok = u_ok[None, :] & k_ok[:, None]
                a0 = dot(h, tl.load(w, mask=w_ok, other=0.0), a0, PRECISION, WIDEN)
                if GATES > 1:
                    w += size * out_row
                    a1 = dot(h, tl.load(w, mask=w_ok, other=0.0), a1, PRECISION, WIDEN)
                    w += size * out_row
                    if CELL == "gru":
                        hidden = dot(h, tl.load(w, mask=w_ok, other=0.0), hidden, PRECISION, WIDEN)
                    else:
                        a2 = dot(h, tl.load(w, mask=w_ok, other=0.0), a2, PRECISION, WIDEN)
                        w += size * out_row
                        a3 = dot(h, tl.load(w, mask=w_ok, other=0.0), a3, PRECISION, WIDEN)
            if CELL == "lstm":
                started = (s + tl.zeros((ROWS,), tl.int32) > 0)[:, None]
                c = tl.load(state + (before * size)[:, None] + u[None, :], mask=ok & started, other=0.0)
                if c0 is not None:
                    c += initial(c0, d, b, batch, u, ok & (started == 0), size)
                i, f, g, o, c, new = lstm(a0, a1, a2, a3, c)
                tl.store(state + (cell * size)[:, None] + u[None, :], c, mask=ok)
                if SAVE:
                    store_gates(gates + (here * (4 * size))[:, None] + u[None, :], ok, i, f, g, o, size)
            elif CELL == "gru":
                carry = state + ((b * DIRECTIONS + d) * size)[:, None] + u[None, :]
                r, z, n, new = gru(a0, a1, hidden, a2, tl.load(carry, mask=ok, other=0.0))
                tl.store(carry, new, mask=ok)
                if SAVE:
                    store_gates(gates + (here * (4 * size))[:, None] + u[None, :], ok, r, z, n, hidden, size)
            else:
                new = activate(a0, 0.0, CELL)
            if w_hr is None:
                tl.store(y + (here * out)[:, None] + u[None, :], new.to(kind), mask=ok)
                tl.store(target[:, None] + u[None, :], new.to(kind), mask=ok)
            else:
                tl.store(middle + (cell * size)[:, None] + u[None, :], new.to(kind), mask=ok)
        if w_hr is not None:
            tl.debug_barrier()
            for start in range(0, out, UNITS):
                p = start + tl.arange(0, UNITS)
                p_ok = p < out
                acc = tl.zeros((ROWS, UNITS), tl.float32)
                for inner in range(0, size_row, DEPTH):
                    k = inner + tl.arange(0, DEPTH)
                    m = tl.load(
                        middle + (cell * size)[:, None] + k[None, :],
                        mask=live[:, None] & (k < size)[None, :],
                        other=0.0,
                    )
                    w = tl.load(
                        w_hr + d * (out * size_row) + (p * size_row)[None, :] + k[:, None],
                        mask=p_ok[None, :] & (k < size_row)[:, None],
                        other=0.0,
                    )
                    acc = dot(m, w, acc, PRECISION, WIDEN)
                ok = live[:, None] & p_ok[None, :]
                tl.store(y + (here * out)[:, None] + p[None, :], acc.to(kind), mask=ok)
                tl.store(target[:, None] + p[None, :], acc.to(kind), mask=ok)
        tl.debug_barrier()
    # The final states: of each sequence's last step, or the initial ones where there was none.
    some = length > 0
    ended = swap + (length % 2) * half + own
    token = times(length - 1, length, d) * token_t + b * token_b
    cell = b * DIRECTIONS + d
    if SAVE:
        cell = token * DIRECTIONS + d
    for start in range(0, out, UNITS):
        u = start + tl.arange(0, UNITS)
        unit = inside[:, None] & (u < out)[None, :]
        h = tl.load(ended[:, None] + u[None, :], mask=unit, other=0.0)
        tl.store(hn + ((d * batch + b) * out)[:, None] + u[None, :], h, mask=unit)
    if CELL == "lstm":
        for start in range(0, size, UNITS):
            u = start + tl.arange(0, UNITS)
            unit = inside[:, None] & (u < size)[None, :]
            c = tl.load(state + (cell * size)[:, None] + u[None, :], mask=unit & some[:, None], other=0.0)
            if c0 is not None:
                c += initial(c0, d, b, batch, u, unit & (some == 0)[:, None], size)
            tl.store(cn + ((d * batch + b) * size)[:, None] + u[None, :], c.to(kind), mask=unit)
