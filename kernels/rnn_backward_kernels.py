"""Triton kernels of rnn, backward through time; numbered and divided among programs as in rnn_kernels.py.

    resident_backward  the recurrence backwards with the weights kept on the chip by one program
    stream_backward    the same for any size, reading the weights again at every step
    previous_states    every token's h before it, which the recurrent weights' gradient is a product with
    dense_inputs       the input rows (or the chosen rows of the table) side by side, zeros past the ends

The recurrences write `grads`, the gradient before the gates, per token and direction (SLOTS, HIDDEN): LSTM
i f g o, RNN one, and GRU n r z n', where n' is the gradient at the recurrent side of n. A GRU's first three
are what the input's gradients need and its last three, in the weights' order, what the recurrent ones need,
each in one piece. The weights' gradients are products over all tokens afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activation_gradient, tanh
from .products import dot
from .rnn_kernels import initial, load_gates, sequence_lengths, store_gates, times


@triton.jit
def lstm_gradient(dh, dc, i, f, g, o, c, c_before):
    """Gradients before the gates i, f, g, o, and of the cell state before."""
    t = tanh(c)
    dc += dh * o * (1.0 - t * t)
    d_i = dc * g * i * (1.0 - i)
    d_f = dc * c_before * f * (1.0 - f)
    d_g = dc * i * (1.0 - g * g)
    return d_i, d_f, d_g, dh * t * o * (1.0 - o), dc * f


@triton.jit
def gru_gradient(dh, r, z, n, hidden, h_before):
    """Gradients before n, r, z, at the recurrent side of n, and of the state before on its way past them."""
    d_n = dh * (1.0 - z) * (1.0 - n * n)
    return d_n, d_n * hidden * r * (1.0 - r), dh * (h_before - n) * z * (1.0 - z), d_n * r, dh * z


@triton.jit
def state_before(y, h0, d, b, batch, before, u, ok, first, size):
    """h before a token: the output of the one before it, or the initial state."""
    value = tl.load(y + (before * size)[:, None] + u[None, :], mask=ok & (first == 0), other=0.0).to(
        tl.float32
    )
    if h0 is not None:
        value += initial(h0, d, b, batch, u, ok & first, size)
    return value


@triton.jit
def _step_reads(
    s, length, grad_y, gates, state, y, h0, c0, d, b, batch, token_t, token_b, u,
    CELL: tl.constexpr, GATES: tl.constexpr, HIDDEN: tl.constexpr, DIRECTIONS: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """What step s reads: the gradient of its output, its gates, and a state.

    That state is an LSTM's c before the step (also where the step is past the end and the one before is not:
    there it is the last c), a GRU's h before it, and an RNN's h after it.
    """
    step = s + tl.zeros((ROWS,), tl.int32)
    u_ok = (u < HIDDEN)[None, :]
    ok = ((step >= 0) & (step < length))[:, None] & u_ok
    first = (step == 0)[:, None]
    token = times(step, length, d) * token_t + b * token_b
    here = token * DIRECTIONS + d
    before = (token - tl.where(d == 0, token_t, -token_t)) * DIRECTIONS + d
    spot = (here * HIDDEN)[:, None] + u[None, :]
    dh = tl.zeros((ROWS, UNITS), tl.float32)
    if grad_y is not None:
        dh = tl.load(grad_y + spot, mask=ok, other=0.0).to(tl.float32)
    v0 = dh
    v1 = dh
    v2 = dh
    v3 = dh
    if GATES > 1:
        v0, v1, v2, v3 = load_gates(gates + (here * (4 * HIDDEN))[:, None] + u[None, :], ok, HIDDEN, 4)
    if CELL == "lstm":
        reached = ((step > 0) & (step <= length))[:, None] & u_ok
        kept = tl.load(state + (before * HIDDEN)[:, None] + u[None, :], mask=reached, other=0.0)
        if c0 is not None:
            kept += initial(c0, d, b, batch, u, ok & first, HIDDEN)
    elif CELL == "gru":
        kept = state_before(y, h0, d, b, batch, before, u, ok, first, HIDDEN)
    else:
        kept = tl.load(y + spot, mask=ok, other=0.0).to(tl.float32)
    return dh, v0, v1, v2, v3, kept


@triton.jit
def resident_backward(
    grad_y, grad_hn, grad_cn, w_hh, h0, c0, lengths, y, gates, state, grads, grad_h0, grad_c0, batch, steps,
    token_t, token_b,
    CELL: tl.constexpr, GATES: tl.constexpr, HIDDEN: tl.constexpr, DIRECTIONS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Gradients before the gates, weights read once; what a step reads is loaded during the one before it."""
    SLOTS: tl.constexpr = 4 if GATES > 1 else 1
    pid = tl.program_id(0)
    d = pid % DIRECTIONS
    b = (pid // DIRECTIONS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    length = sequence_lengths(lengths, b, batch, steps)
    u = tl.arange(0, UNITS)
    u_ok = u < HIDDEN
    unit = (b < batch)[:, None] & u_ok[None, :]
    kind = w_hh.dtype.element_ty
    at = w_hh + d * (GATES * HIDDEN * HIDDEN) + (u * HIDDEN)[:, None] + u[None, :]
    w0, w1, w2, w3 = load_gates(at, u_ok[None, :] & u_ok[:, None], HIDDEN * HIDDEN, GATES)
    final = ((d * batch + b) * HIDDEN)[:, None] + u[None, :]
    dh = initial(grad_hn, d, b, batch, u, unit, HIDDEN)
    dc = tl.zeros((ROWS, UNITS), tl.float32)
    if CELL == "lstm":
        dc = initial(grad_cn, d, b, batch, u, unit, HIDDEN)
    last = tl.max(length, axis=0)
    n_dy, n0, n1, n2, n3, after = _step_reads(
        last, length, grad_y, gates, state, y, h0, c0, d, b, batch, token_t, token_b, u, CELL, GATES, HIDDEN,
        DIRECTIONS, ROWS, UNITS,
    )  # fmt: skip
    n_dy, n0, n1, n2, n3, kept = _step_reads(
        last - 1, length, grad_y, gates, state, y, h0, c0, d, b, batch, token_t, token_b, u, CELL, GATES,
        HIDDEN, DIRECTIONS, ROWS, UNITS,
    )  # fmt: skip
    for walked in range(last):
        s = last - 1 - walked
        ok = (s < length)[:, None] & u_ok[None, :]
        here = (times(s, length, d) * token_t + b * token_b) * DIRECTIONS + d
        target = grads + (here * (SLOTS * HIDDEN))[:, None] + u[None, :]
        total = dh + n_dy
        v0 = n0.to(tl.float32)
        v1 = n1.to(tl.float32)
        v2 = n2.to(tl.float32)
        v3 = n3.to(tl.float32)
        c = after
        after = kept
        n_dy, n0, n1, n2, n3, kept = _step_reads(
            s - 1, length, grad_y, gates, state, y, h0, c0, d, b, batch, token_t, token_b, u, CELL, GATES,
            HIDDEN, DIRECTIONS, ROWS, UNITS,
        )  # fmt: skip
        new = tl.zeros((ROWS, UNITS), tl.float32)
        if CELL == "lstm":
            g0, g1, g2, g3, past = lstm_gradient(total, dc, v0, v1, v2, v3, c, after)
            store_gates(target, ok, g0, g1, g2, g3, HIDDEN)
            dc = tl.where(ok, past, dc)
        elif CELL == "gru":
            g3, g0, g1, g2, new = gru_gradient(total, v0, v1, v2, v3, after)
            store_gates(target, ok, g3, g0, g1, g2, HIDDEN)
        else:
            g0 = activation_gradient(total, after, 0.0, CELL)
            tl.store(target, g0.to(kind), mask=ok)
        new = dot(g0.to(kind), w0, new, PRECISION, WIDEN)
        if GATES > 1:
            new = dot(g1.to(kind), w1, new, PRECISION, WIDEN)
            new = dot(g2.to(kind), w2, new, PRECISION, WIDEN)
        if GATES > 3:
            new = dot(g3.to(kind), w3, new, PRECISION, WIDEN)
        dh = tl.where(ok, new, dh)
    if grad_h0 is not None:
        tl.store(grad_h0 + final, dh.to(kind), mask=unit)
    if grad_c0 is not None:
        tl.store(grad_c0 + final, dc.to(kind), mask=unit)


@triton.jit
def _through_recurrent_weights(
    grads, w_hh, carry, grad_hn, d, b, batch, p, later, going, ends, size, out, out_row,
    CELL: tl.constexpr, GATES: tl.constexpr, DIRECTIONS: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The gradient of the outputs p from the step after (`later`, where `going`), or at a sequence's end."""
    SLOTS: tl.constexpr = 4 if GATES > 1 else 1
    p_ok = p < out
    dh = tl.zeros((ROWS, UNITS), tl.float32)
    if grad_hn is not None:
        dh += initial(grad_hn, d, b, batch, p, ends[:, None] & p_ok[None, :], out)
    if CELL == "gru":
        at = carry + ((b * DIRECTIONS + d) * out)[:, None] + p[None, :]
        dh += tl.load(at, mask=going[:, None] & p_ok[None, :], other=0.0)
    row = later * (SLOTS * size) + (SLOTS - GATES) * size
    for start in range(0, GATES * size, DEPTH):
        k = start + tl.arange(0, DEPTH)
        k_ok = k < GATES * size
        g = tl.load(grads + row[:, None] + k[None, :], mask=going[:, None] & k_ok[None, :], other=0.0)
        w = tl.load(
            w_hh + d * (GATES * size * out_row) + (k * out_row)[:, None] + p[None, :],
            mask=k_ok[:, None] & (p < out_row)[None, :],
            other=0.0,
        )
        dh = dot(g, w, dh, PRECISION, WIDEN)
    return dh


@triton.jit
def _through_cell(
    dh, grads, grad_cn, c0, h0, y, gates, state, carry, d, b, batch, u, here, before, live, going, ends,
    first, size,
    CELL: tl.constexpr, GATES: tl.constexpr, DIRECTIONS: tl.constexpr,
):  # fmt: skip
    """Writes the gradients before the gates of the units u, and what is carried past the gates."""
    SLOTS: tl.constexpr = 4 if GATES > 1 else 1
    u_ok = u < size
    ok = live[:, None] & u_ok[None, :]
    spot = (here * size)[:, None] + u[None, :]
    target = grads + (here * (SLOTS * size))[:, None] + u[None, :]
    if GATES > 1:
        v0, v1, v2, v3 = load_gates(gates + (here * (4 * size))[:, None] + u[None, :], ok, size, 4)
        v0 = v0.to(tl.float32)
        v1 = v1.to(tl.float32)
        v2 = v2.to(tl.float32)
        v3 = v3.to(tl.float32)
        past = carry + ((b * DIRECTIONS + d) * size)[:, None] + u[None, :]
    if CELL == "lstm":
        dc = tl.load(past, mask=going[:, None] & u_ok[None, :], other=0.0)
        if grad_cn is not None:
            dc += initial(grad_cn, d, b, batch, u, ends[:, None] & u_ok[None, :], size)
        c = tl.load(state + spot, mask=ok, other=0.0)
        earlier = state + (before * size)[:, None] + u[None, :]
        c_before = tl.load(earlier, mask=ok & (first == 0)[:, None], other=0.0)
        if c0 is not None:
            c_before += initial(c0, d, b, batch, u, ok & first[:, None], size)
        g0, g1, g2, g3, dc = lstm_gradient(dh, dc, v0, v1, v2, v3, c, c_before)
        store_gates(target, ok, g0, g1, g2, g3, size)
        tl.store(past, dc, mask=ok)
    elif CELL == "gru":
        h = state_before(y, h0, d, b, batch, before, u, ok, first[:, None], size)
        g3, g0, g1, g2, dh = gru_gradient(dh, v0, v1, v2, v3, h)
        store_gates(target, ok, g3, g0, g1, g2, size)
        tl.store(past, dh, mask=ok)
    else:
        g0 = activation_gradient(dh, tl.load(y + spot, mask=ok, other=0.0).to(tl.float32), 0.0, CELL)
        tl.store(target, g0.to(grads.dtype.element_ty), mask=ok)


@triton.jit
def stream_backward(
    grad_y, grad_hn, grad_cn, w_hh, w_hr, h0, c0, lengths, y, gates, state, grads, grad_out, carry, grad_h0,
    grad_c0, batch, steps, token_t, token_b, size, out, size_row, out_row,
    CELL: tl.constexpr, GATES: tl.constexpr, DIRECTIONS: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradients before the gates for any size: they are themselves what a step reads of the one after it.

    `carry` (batch, DIRECTIONS, HIDDEN) in float32 is what goes past the gates: an LSTM's gradient of c, a
    GRU's of h. With a projection `grad_out` (OUT) per token is the gradient of its output.
    """
    pid = tl.program_id(0)
    d = pid % DIRECTIONS
    b = (pid // DIRECTIONS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = b < batch
    length = sequence_lengths(lengths, b, batch, steps)
    kind = w_hh.dtype.element_ty
    onward = tl.where(d == 0, token_t, -token_t)
    last = tl.max(length, axis=0)
    for walked in range(last):
        s = last - 1 - walked
        step = s + tl.zeros((ROWS,), tl.int32)
        live = step < length
        going = step + 1 < length
        ends = step + 1 == length
        first = step == 0
        token = times(step, length, d) * token_t + b * token_b
        here = token * DIRECTIONS + d
        later = (token + onward) * DIRECTIONS + d
        before = (token - onward) * DIRECTIONS + d
        for start in range(0, out, UNITS):
            p = start + tl.arange(0, UNITS)
            dh = _through_recurrent_weights(
                grads, w_hh, carry, grad_hn, d, b, batch, p, later, going, ends, size, out, out_row,
                CELL, GATES, DIRECTIONS, PRECISION, WIDEN, ROWS, UNITS, DEPTH,
            )  # fmt: skip
            ok = live[:, None] & (p < out)[None, :]
            spot = (here * out)[:, None] + p[None, :]
            if grad_y is not None:
                dh += tl.load(grad_y + spot, mask=ok, other=0.0).to(tl.float32)
            if w_hr is None:
                _through_cell(
                    dh, grads, grad_cn, c0, h0, y, gates, state, carry, d, b, batch, p, here, before, live,
                    going, ends, first, size, CELL, GATES, DIRECTIONS,
                )  # fmt: skip
            else:
                tl.store(grad_out + spot, dh.to(kind), mask=ok)
        if w_hr is not None:
            tl.debug_barrier()
            for start in range(0, size, UNITS):
                u = start + tl.arange(0, UNITS)
                dm = tl.zeros((ROWS, UNITS), tl.float32)
                for inner in range(0, out, DEPTH):
                    k = inner + tl.arange(0, DEPTH)
                    k_ok = k < out
                    g = tl.load(
                        grad_out + (here * out)[:, None] + k[None, :],
                        mask=live[:, None] & k_ok[None, :],
                        other=0.0,
                    )
                    w = tl.load(
                        w_hr + d * (out * size_row) + (k * size_row)[:, None] + u[None, :],
                        mask=k_ok[:, None] & (u < size_row)[None, :],
                        other=0.0,
                    )
                    dm = dot(g, w, dm, PRECISION, WIDEN)
                _through_cell(
                    dm, grads, grad_cn, c0, h0, y, gates, state, carry, d, b, batch, u, here, before, live,
                    going, ends, first, size, CELL, GATES, DIRECTIONS,
                )  # fmt: skip
        tl.debug_barrier()
    # The initial states' gradients: one more step back, or a sequence without steps passes them through.
    some = inside & (length > 0)
    none = inside & (length == 0)
    token = times(0, length, d) * token_t + b * token_b
    if grad_h0 is not None:
        for start in range(0, out, UNITS):
            p = start + tl.arange(0, UNITS)
            dh = _through_recurrent_weights(
                grads, w_hh, carry, grad_hn, d, b, batch, p, token * DIRECTIONS + d, some, none, size, out,
                out_row, CELL, GATES, DIRECTIONS, PRECISION, WIDEN, ROWS, UNITS, DEPTH,
            )  # fmt: skip
            at = grad_h0 + ((d * batch + b) * out)[:, None] + p[None, :]
            tl.store(at, dh.to(kind), mask=inside[:, None] & (p < out)[None, :])
    if grad_c0 is not None:
        for start in range(0, size, UNITS):
            u = start + tl.arange(0, UNITS)
            u_ok = u < size
            at = carry + ((b * DIRECTIONS + d) * size)[:, None] + u[None, :]
            dc = tl.load(at, mask=some[:, None] & u_ok[None, :], other=0.0)
            if grad_cn is not None:
                dc += initial(grad_cn, d, b, batch, u, none[:, None] & u_ok[None, :], size)
            at = grad_c0 + ((d * batch + b) * size)[:, None] + u[None, :]
            tl.store(at, dc.to(kind), mask=inside[:, None] & u_ok[None, :])


@triton.jit
def previous_states(
    y, h0, lengths, out, tokens, batch, steps, inner, token_t, token_b,
    OUT: tl.constexpr, DIRECTIONS: tl.constexpr, BATCH_FIRST: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """out (token, direction, OUT) = h before each token, zero past the ends."""
    pid = tl.program_id(0)
    d = pid % DIRECTIONS
    token = (pid // DIRECTIONS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b = token % inner
    t = token // inner
    if BATCH_FIRST:
        b = token // inner
        t = token % inner
    length = sequence_lengths(lengths, b, batch, steps)
    inside = token < tokens
    live = inside & (t < length)
    first = tl.where(d == 0, t, length - 1 - t) == 0
    before = (token - tl.where(d == 0, token_t, -token_t)) * DIRECTIONS + d
    for start in range(0, OUT, COLS):
        u = start + tl.arange(0, COLS)
        u_ok = (u < OUT)[None, :]
        value = state_before(y, h0, d, b, batch, before, u, live[:, None] & u_ok, first[:, None], OUT)
        at = out + ((token * DIRECTIONS + d) * OUT)[:, None] + u[None, :]
        tl.store(at, value.to(out.dtype.element_ty), mask=inside[:, None] & u_ok)


@triton.jit
def dense_inputs(
    x, ids, lengths, out, tokens, batch, steps, inner, x_outer, x_inner, ids_outer, ids_inner, vocabulary,
    INPUT: tl.constexpr, BATCH_FIRST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out (token, INPUT) = the token's input or its row of the table; zero past the ends: 0 * NaN is NaN."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    outer = token // inner
    within = token % inner
    inside = token < tokens
    b = within
    t = outer
    if BATCH_FIRST:
        b = outer
        t = within
    live = inside & (t < sequence_lengths(lengths, b, batch, steps))
    if ids is not None:
        row = tl.load(ids + outer * ids_outer + within * ids_inner, mask=live, other=0)
        live = live & (row >= 0) & (row < vocabulary)
        row = row * INPUT
    else:
        row = outer * x_outer + within * x_inner
    for start in range(0, INPUT, COLS):
        k = start + tl.arange(0, COLS)
        k_ok = (k < INPUT)[None, :]
        value = tl.load(x + row[:, None] + k[None, :], mask=live[:, None] & k_ok, other=0.0)
        tl.store(out + (token * INPUT)[:, None] + k[None, :], value, mask=inside[:, None] & k_ok)
