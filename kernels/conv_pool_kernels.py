"""Triton kernels of conv_pool: one body for 1-D, 2-D and 3-D, for any strides, forward and backward.

Everything is three-dimensional here: the tuples KERNEL, STRIDE, PAD (low side), DILATION, WINDOW, WSTRIDE
and WPAD hold (d, h, w), and a missing dimension has size 1. Tensors are reached through strides alone, so
a contiguous and a channels_last tensor differ only in which stride is 1.

The three large kernels are implicit matrix products whose operands are gathered tiles:

    forward          y[filter, pixel]     = sum over (channel, tap)   weight * x
    input_gradient   gx[channel, pixel]   = sum over (filter, tap)    weight * g
    weight_gradient  gw[filter, (c, tap)] = sum over pixels           g * x

where g is the gradient before bias and activation. After a max pool of disjoint windows g is never formed
at the convolution's resolution: it stays at the pooled one, and a byte per element names its place.

Compiled and interpreted Triton differ in places that these kernels stay clear of: `//` and `%` of negative
numbers are used only where the division is exact or the result is masked; the interpreter multiplies
bfloat16 as raw integers, hence WIDEN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, activation_gradient
from .products import dot


@triton.jit
def _place(flat, size_d, size_h, size_w):
    """(n, d, h, w) of a row-major position."""
    w = flat % size_w
    flat = flat // size_w
    h = flat % size_h
    flat = flat // size_h
    return flat // size_d, flat % size_d, h, w


@triton.jit
def _within(d, h, w, size_d, size_h, size_w):
    return (d >= 0) & (d < size_d) & (h >= 0) & (h < size_h) & (w >= 0) & (w < size_w)


@triton.jit
def _later_wins(value, index, saved, value2, index2, saved2):
    """The maximum of two candidates, of which the second comes later in its window.

    torch's rules: a later one must be larger or NaN, and anything beats a place outside (index -1).
    """
    take = (value2 > value) | (value2 != value2) | ((index < 0) & (index2 >= 0))
    return tl.where(take, value2, value), tl.where(take, index2, index), tl.where(take, saved2, saved)


@triton.jit
def _window_argmax(value, index, saved, ROWS: tl.constexpr, COLS: tl.constexpr, PER: tl.constexpr):
    """Reduce groups of PER neighbouring columns to their first maximum, halving in order."""
    for level in tl.static_range(8):
        if (PER >> level) > 1:
            v, v2 = tl.split(tl.reshape(value, (ROWS, COLS, PER >> (level + 1), 2)))
            i, i2 = tl.split(tl.reshape(index, (ROWS, COLS, PER >> (level + 1), 2)))
            s, s2 = tl.split(tl.reshape(saved, (ROWS, COLS, PER >> (level + 1), 2)))
            value, index, saved = _later_wins(v, i, s, v2, i2, s2)
    return tl.reshape(value, (ROWS, COLS)), tl.reshape(index, (ROWS, COLS)), tl.reshape(saved, (ROWS, COLS))


@triton.jit
def _window_max(value, ROWS: tl.constexpr, COLS: tl.constexpr, PER: tl.constexpr):
    for level in tl.static_range(8):
        if (PER >> level) > 1:
            v, v2 = tl.split(tl.reshape(value, (ROWS, COLS, PER >> (level + 1), 2)))
            value = tl.maximum(v, v2, propagate_nan=tl.PropagateNan.ALL)
    return tl.reshape(value, (ROWS, COLS))


@triton.jit
def _window_sum(value, ROWS: tl.constexpr, COLS: tl.constexpr, PER: tl.constexpr):
    for level in tl.static_range(8):
        if (PER >> level) > 1:
            v, v2 = tl.split(tl.reshape(value, (ROWS, COLS, PER >> (level + 1), 2)))
            value = v + v2
    return tl.reshape(value, (ROWS, COLS))


@triton.jit
def _span(start, SIZE: tl.constexpr, PAD: tl.constexpr, extent, COUNT_PAD: tl.constexpr):
    """How many places of one dimension of a window count in an average that starts at `start`."""
    stop = tl.minimum(start + SIZE, extent + PAD)
    if not COUNT_PAD:
        start = tl.maximum(start, 0)
        stop = tl.minimum(stop, extent)
    return stop - start


@triton.jit
def _divisor(
    d,
    h,
    w,
    size_d,
    size_h,
    size_w,
    WINDOW: tl.constexpr,
    WSTRIDE: tl.constexpr,
    WPAD: tl.constexpr,
    COUNT_PAD: tl.constexpr,
):
    count = _span(d * WSTRIDE[0] - WPAD[0], WINDOW[0], WPAD[0], size_d, COUNT_PAD)
    count *= _span(h * WSTRIDE[1] - WPAD[1], WINDOW[1], WPAD[1], size_h, COUNT_PAD)
    count *= _span(w * WSTRIDE[2] - WPAD[2], WINDOW[2], WPAD[2], size_w, COUNT_PAD)
    return tl.maximum(count, 1).to(tl.float32)  # below 1 only at places that the caller masks


@triton.jit
def forward(
    x, weight, bias, y, index, pre, pooled, in_d, in_h, in_w, conv_d, conv_h, conv_w, out_d, out_h, out_w,
    x_n, x_c, x_d, x_h, x_w, weight_k, weight_c, weight_t, y_n, y_k, y_p, pre_n, pre_k, pre_p, slope,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, FILTERS: tl.constexpr, KERNEL: tl.constexpr,
    STRIDE: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr, WINDOW: tl.constexpr,
    WSTRIDE: tl.constexpr, WPAD: tl.constexpr, ACTIVATION: tl.constexpr, POOL: tl.constexpr,
    POOL_FIRST: tl.constexpr, COUNT_PAD: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr,
    WIDE: tl.constexpr, WIDEN: tl.constexpr, PER: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """pool(act(conv(x, weight) + bias)) for ROWS filters of a group and COLS pooled pixels.

    The tile's columns are pooled pixels times PER window places (PER is the largest power of two that
    divides the window, so a 2x2 window is one product); what is left of the window is a loop around the
    product with the running maximum or sum in registers. `pooled` counts pooled pixels of all images.
    FLAT: (channel, tap) is one reduction index, for groups of few channels. Otherwise the reduction goes
    tap by tap, whose coordinates are then scalars. WIDE: 64-bit offsets.
    """
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    PLACES: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    BLOCKS: tl.constexpr = (CHANNELS + DEPTH - 1) // DEPTH
    ROW_TILES: tl.constexpr = (FILTERS + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    rows = (pid % ROW_TILES) * ROWS + tl.arange(0, ROWS)
    pid = pid // ROW_TILES
    group = pid % GROUPS
    first = pid // GROUPS
    if WIDE:
        first = first.to(tl.int64)
        group = group.to(tl.int64)
    first = first * COLS
    filters = group * FILTERS + rows
    row_ok = rows < FILTERS
    shift = tl.zeros((ROWS,), tl.float32)
    if bias is not None:
        shift = tl.load(bias + filters, mask=row_ok, other=0.0).to(tl.float32)
    lane = tl.arange(0, COLS * PER)
    n, pd, ph, pw = _place(first + lane // PER, out_d, out_h, out_w)
    inside = first + lane // PER < pooled
    best = tl.full((ROWS, COLS), float("-inf") if POOL == "max" else 0.0, tl.float32)
    where = tl.full((ROWS, COLS), -1, tl.int32)
    kept = tl.zeros((ROWS, COLS), tl.float32)
    for chunk in range(PLACES // PER):
        q = chunk * PER + lane % PER
        od = pd * WSTRIDE[0] - WPAD[0] + q // (WINDOW[1] * WINDOW[2])
        oh = ph * WSTRIDE[1] - WPAD[1] + q // WINDOW[2] % WINDOW[1]
        ow = pw * WSTRIDE[2] - WPAD[2] + q % WINDOW[2]
        live = inside & _within(od, oh, ow, conv_d, conv_h, conv_w)
        xd = od * STRIDE[0] - PAD[0]
        xh = oh * STRIDE[1] - PAD[1]
        xw = ow * STRIDE[2] - PAD[2]
        image = n * x_n + group * CHANNELS * x_c
        acc = tl.zeros((ROWS, COLS * PER), tl.float32)
        if FLAT:
            for start in range(0, CHANNELS * TAPS, DEPTH):
                r = start + tl.arange(0, DEPTH)
                if WIDE:
                    r = r.to(tl.int64)
                c = r // TAPS
                td = r // (KERNEL[1] * KERNEL[2]) % KERNEL[0] * DILATION[0]
                th = r // KERNEL[2] % KERNEL[1] * DILATION[1]
                tw = r % KERNEL[2] * DILATION[2]
                ok = live[None, :] & (c < CHANNELS)[:, None]
                ok = ok & _within(
                    xd[None, :] + td[:, None],
                    xh[None, :] + th[:, None],
                    xw[None, :] + tw[:, None],
                    in_d,
                    in_h,
                    in_w,
                )
                at = (image + xd * x_d + xh * x_h + xw * x_w)[None, :]
                at = at + (c * x_c + td * x_d + th * x_h + tw * x_w)[:, None]
                b = tl.load(x + at, mask=ok, other=0.0)
                a = tl.load(
                    weight + filters[:, None] * weight_k + r[None, :],
                    mask=row_ok[:, None] & (c < CHANNELS)[None, :],
                    other=0.0,
                )
                acc = dot(a, b, acc, PRECISION, WIDEN)
        else:
            for step in range(TAPS * BLOCKS):
                tap = step // BLOCKS
                c = step % BLOCKS * DEPTH + tl.arange(0, DEPTH)
                if WIDE:
                    c = c.to(tl.int64)
                td = tap // (KERNEL[1] * KERNEL[2]) * DILATION[0]
                th = tap // KERNEL[2] % KERNEL[1] * DILATION[1]
                tw = tap % KERNEL[2] * DILATION[2]
                ok = live & _within(xd + td, xh + th, xw + tw, in_d, in_h, in_w)
                at = image + (xd + td) * x_d + (xh + th) * x_h + (xw + tw) * x_w
                b = tl.load(
                    x + at[None, :] + (c * x_c)[:, None],
                    mask=ok[None, :] & (c < CHANNELS)[:, None],
                    other=0.0,
                )
                a = tl.load(
                    weight + filters[:, None] * weight_k + (c * weight_c + tap * weight_t)[None, :],
                    mask=row_ok[:, None] & (c < CHANNELS)[None, :],
                    other=0.0,
                )
                acc = dot(a, b, acc, PRECISION, WIDEN)
        acc += shift[:, None]
        value = acc
        if not POOL_FIRST:
            value = activate(acc, slope, ACTIVATION)
        if POOL == "max":
            value = tl.where(live[None, :], value, float("-inf"))
            if index is not None:
                q_or_none = tl.broadcast_to(tl.where(live, q, -1)[None, :], (ROWS, COLS * PER))
                v, i, s = _window_argmax(value, q_or_none, acc, ROWS, COLS, PER)
                best, where, kept = _later_wins(best, where, kept, v, i, s)
            else:
                best = tl.maximum(
                    best, _window_max(value, ROWS, COLS, PER), propagate_nan=tl.PropagateNan.ALL
                )
        elif POOL == "avg":
            if pre is not None:
                # What the activation's gradient needs: its value, or for the gelus and silu its argument.
                saved = value
                if ACTIVATION == "gelu" or ACTIVATION == "gelu_tanh" or ACTIVATION == "silu":
                    saved = acc
                spot = n * pre_n + ((od * conv_h + oh) * conv_w + ow) * pre_p
                tl.store(
                    pre + spot[None, :] + filters[:, None] * pre_k,
                    saved.to(pre.dtype.element_ty),
                    mask=row_ok[:, None] & live[None, :],
                )
            best += _window_sum(tl.where(live[None, :], value, 0.0), ROWS, COLS, PER)
        else:
            best = value
            kept = acc
    if POOL_FIRST:
        best = activate(best, slope, ACTIVATION)
    p = first + tl.arange(0, COLS)
    n, pd, ph, pw = _place(p, out_d, out_h, out_w)
    if POOL == "avg":
        best = best / _divisor(pd, ph, pw, conv_d, conv_h, conv_w, WINDOW, WSTRIDE, WPAD, COUNT_PAD)[None, :]
    spot = (n * y_n + ((pd * out_h + ph) * out_w + pw) * y_p)[None, :] + filters[:, None] * y_k
    ok = row_ok[:, None] & (p < pooled)[None, :]
    tl.store(y + spot, best.to(y.dtype.element_ty), mask=ok)
    if index is not None:
        if ACTIVATION == "relu":
            where = tl.where(best <= 0, 255, where)
        tl.store(index + spot, where.to(tl.uint8), mask=ok)
    if POOL != "avg" and pre is not None:
        tl.store(pre + spot, kept.to(pre.dtype.element_ty), mask=ok)


@triton.jit
def spread_gradient(
    grad, index, saved, out, total, conv_d, conv_h, conv_w, out_d, out_h, out_w, slope,
    FILTERS: tl.constexpr, WINDOW: tl.constexpr, WSTRIDE: tl.constexpr, WPAD: tl.constexpr,
    ACTIVATION: tl.constexpr, POOL: tl.constexpr, COUNT_PAD: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient before bias and activation, from that of the output.

    POOL "none": element by element (`out` and `grad` have one shape; the activation's part alone).
    "max", "avg": `out` has the convolution's resolution, and every place gathers from the windows that
    cover it, in a fixed order.
    """
    COVER_D: tl.constexpr = (WINDOW[0] + WSTRIDE[0] - 1) // WSTRIDE[0]
    COVER_H: tl.constexpr = (WINDOW[1] + WSTRIDE[1] - 1) // WSTRIDE[1]
    COVER_W: tl.constexpr = (WINDOW[2] + WSTRIDE[2] - 1) // WSTRIDE[2]
    first = tl.program_id(0)
    if WIDE:
        first = first.to(tl.int64)
    e = first * BLOCK + tl.arange(0, BLOCK)
    inside = e < total
    if POOL == "none":
        value = tl.load(grad + e, mask=inside, other=0.0).to(tl.float32)
        value = activation_gradient(
            value, tl.load(saved + e, mask=inside, other=0.0).to(tl.float32), slope, ACTIVATION
        )
    else:
        value = tl.zeros((BLOCK,), tl.float32)
        if CHANNELS_LAST:
            k = e % FILTERS
            n, od, oh, ow = _place(e // FILTERS, conv_d, conv_h, conv_w)
        else:
            n, od, oh, ow = _place(e, conv_d, conv_h, conv_w)
            k = n % FILTERS
            n = n // FILTERS
        for j in range(COVER_D * COVER_H * COVER_W):
            # Counted from the last window that covers the place: j windows before it, in each dimension.
            pd = (od + WPAD[0]) // WSTRIDE[0] - j // (COVER_H * COVER_W)
            ph = (oh + WPAD[1]) // WSTRIDE[1] - j // COVER_W % COVER_H
            pw = (ow + WPAD[2]) // WSTRIDE[2] - j % COVER_W
            qd = od + WPAD[0] - pd * WSTRIDE[0]
            qh = oh + WPAD[1] - ph * WSTRIDE[1]
            qw = ow + WPAD[2] - pw * WSTRIDE[2]
            ok = inside & _within(pd, ph, pw, out_d, out_h, out_w)
            ok = ok & (qd < WINDOW[0]) & (qh < WINDOW[1]) & (qw < WINDOW[2])
            if CHANNELS_LAST:
                at = (((n * out_d + pd) * out_h + ph) * out_w + pw) * FILTERS + k
            else:
                at = (((n * FILTERS + k) * out_d + pd) * out_h + ph) * out_w + pw
            if POOL == "max":
                q = (qd * WINDOW[1] + qh) * WINDOW[2] + qw
                ok = ok & (tl.load(index + at, mask=ok, other=255).to(tl.int32) == q)
            part = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
            if POOL == "avg":
                part = part / _divisor(pd, ph, pw, conv_d, conv_h, conv_w, WINDOW, WSTRIDE, WPAD, COUNT_PAD)
            elif saved is not None:
                part = activation_gradient(
                    part, tl.load(saved + at, mask=ok, other=0.0).to(tl.float32), slope, ACTIVATION
                )
            value += tl.where(ok, part, 0.0)
        if POOL == "avg" and saved is not None:
            value = activation_gradient(
                value, tl.load(saved + e, mask=inside, other=0.0).to(tl.float32), slope, ACTIVATION
            )
    tl.store(out + e, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def input_gradient(
    grad, index, weight, out, pixels, in_d, in_h, in_w, step_d, step_h, step_w, conv_d, conv_h, conv_w,
    out_d, out_h, out_w, grad_n, grad_k, grad_p, weight_k, weight_c, weight_t, x_n, x_c, x_p,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, FILTERS: tl.constexpr, KERNEL: tl.constexpr,
    STRIDE: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr, COMMON: tl.constexpr,
    INVERSE: tl.constexpr, WINDOW: tl.constexpr, WSTRIDE: tl.constexpr, WPAD: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The gradient of x for ROWS channels of a group and COLS input pixels, gathered from grad.

    With a stride the pixels are taken by residue: those with equal (position mod stride) meet the same
    taps, so a program visits only taps that reach its pixels. Per dimension, tap t reaches position i when
    t * dilation = i + pad modulo stride: none when i + pad is no multiple of COMMON = gcd(stride, dilation),
    else t = t0 modulo stride / COMMON, where t0 comes from INVERSE, the inverse of dilation / COMMON.
    `step_*` are the positions of one residue, `pixels` their product with the batch.

    `index` is the winners' positions when grad is at the pooled resolution of disjoint windows; else grad
    is at the convolution's, with WINDOW and WSTRIDE of 1.
    """
    T_STEP_D: tl.constexpr = STRIDE[0] // COMMON[0]
    T_STEP_H: tl.constexpr = STRIDE[1] // COMMON[1]
    T_STEP_W: tl.constexpr = STRIDE[2] // COMMON[2]
    TAPS_D: tl.constexpr = (KERNEL[0] + T_STEP_D - 1) // T_STEP_D
    TAPS_H: tl.constexpr = (KERNEL[1] + T_STEP_H - 1) // T_STEP_H
    TAPS_W: tl.constexpr = (KERNEL[2] + T_STEP_W - 1) // T_STEP_W
    BLOCKS: tl.constexpr = (FILTERS + DEPTH - 1) // DEPTH
    ROW_TILES: tl.constexpr = (CHANNELS + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    rows = (pid % ROW_TILES) * ROWS + tl.arange(0, ROWS)
    pid = pid // ROW_TILES
    group = pid % GROUPS
    pid = pid // GROUPS
    residue_w = pid % STRIDE[2]
    residue_h = pid // STRIDE[2] % STRIDE[1]
    residue_d = pid // (STRIDE[2] * STRIDE[1]) % STRIDE[0]
    first = pid // (STRIDE[2] * STRIDE[1] * STRIDE[0])
    if WIDE:
        first = first.to(tl.int64)
        group = group.to(tl.int64)
    p = first * COLS + tl.arange(0, COLS)
    n, xd, xh, xw = _place(p, step_d, step_h, step_w)
    xd = xd * STRIDE[0] + residue_d
    xh = xh * STRIDE[1] + residue_h
    xw = xw * STRIDE[2] + residue_w
    inside = (p < pixels) & (xd < in_d) & (xh < in_h) & (xw < in_w)
    row_ok = rows < CHANNELS
    live = inside & ((xd + PAD[0]) % COMMON[0] == 0) & ((xh + PAD[1]) % COMMON[1] == 0)
    live = live & ((xw + PAD[2]) % COMMON[2] == 0)
    first_d = (residue_d + PAD[0]) // COMMON[0] * INVERSE[0] % T_STEP_D
    first_h = (residue_h + PAD[1]) // COMMON[1] * INVERSE[1] % T_STEP_H
    first_w = (residue_w + PAD[2]) // COMMON[2] * INVERSE[2] % T_STEP_W
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for step in range(TAPS_D * TAPS_H * TAPS_W * BLOCKS):
        t = step // BLOCKS
        k = step % BLOCKS * DEPTH + tl.arange(0, DEPTH)
        td = first_d + t // (TAPS_H * TAPS_W) * T_STEP_D
        th = first_h + t // TAPS_W % TAPS_H * T_STEP_H
        tw = first_w + t % TAPS_W * T_STEP_W
        od = (xd + PAD[0] - td * DILATION[0]) // STRIDE[0]
        oh = (xh + PAD[1] - th * DILATION[1]) // STRIDE[1]
        ow = (xw + PAD[2] - tw * DILATION[2]) // STRIDE[2]
        ok = live & _within(od, oh, ow, conv_d, conv_h, conv_w)
        pd = (od + WPAD[0]) // WSTRIDE[0]
        ph = (oh + WPAD[1]) // WSTRIDE[1]
        pw = (ow + WPAD[2]) // WSTRIDE[2]
        qd = od + WPAD[0] - pd * WSTRIDE[0]
        qh = oh + WPAD[1] - ph * WSTRIDE[1]
        qw = ow + WPAD[2] - pw * WSTRIDE[2]
        ok = ok & (pd < out_d) & (ph < out_h) & (pw < out_w)
        ok = ok & (qd < WINDOW[0]) & (qh < WINDOW[1]) & (qw < WINDOW[2])
        # A residue may have fewer taps than another: then no filter counts.
        limit = tl.where((td < KERNEL[0]) & (th < KERNEL[1]) & (tw < KERNEL[2]), FILTERS, 0)
        filters = group * FILTERS + k
        at = n * grad_n + ((pd * out_h + ph) * out_w + pw) * grad_p
        at = at[None, :] + (filters * grad_k)[:, None]
        ok_tile = ok[None, :] & (k < limit)[:, None]
        b = tl.load(grad + at, mask=ok_tile, other=0.0)
        if index is not None:
            q = (qd * WINDOW[1] + qh) * WINDOW[2] + qw
            winner = tl.load(index + at, mask=ok_tile, other=255)
            b = tl.where(winner == q[None, :].to(tl.uint8), b, 0.0)
        tap = (td * KERNEL[1] + th) * KERNEL[2] + tw
        a = tl.load(
            weight + (rows * weight_c)[:, None] + (filters * weight_k + tap * weight_t)[None, :],
            mask=row_ok[:, None] & (k < limit)[None, :],
            other=0.0,
        )
        acc = dot(a, b, acc, PRECISION, WIDEN)
    spot = n * x_n + ((xd * in_h + xh) * in_w + xw) * x_p
    spot = spot[None, :] + ((group * CHANNELS + rows) * x_c)[:, None]
    tl.store(out + spot, acc.to(out.dtype.element_ty), mask=row_ok[:, None] & inside[None, :])


@triton.jit
def weight_gradient(
    grad, index, x, out, places, per_split, in_d, in_h, in_w, conv_d, conv_h, conv_w, out_d, out_h, out_w,
    grad_n, grad_k, grad_p, x_n, x_c, x_d, x_h, x_w,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, FILTERS: tl.constexpr, KERNEL: tl.constexpr,
    STRIDE: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr, WINDOW: tl.constexpr,
    WSTRIDE: tl.constexpr, WPAD: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr,
    WIDE: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Partial gradients of the weight: ROWS filters by COLS weights of each, over one split of the places.

    A place is a pixel of the convolution, numbered by window and position in the window, so that the
    places of one window lie together. Splits are summed afterwards in a fixed order. FLAT as in forward;
    otherwise the COLS weights are channels of one tap.
    """
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    PER: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    BLOCKS: tl.constexpr = (CHANNELS + COLS - 1) // COLS
    COL_TILES: tl.constexpr = (CHANNELS * TAPS + COLS - 1) // COLS if FLAT else TAPS * BLOCKS
    ROW_TILES: tl.constexpr = (FILTERS + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    rows = (pid % ROW_TILES) * ROWS + tl.arange(0, ROWS)
    pid = pid // ROW_TILES
    col_tile = pid % COL_TILES
    pid = pid // COL_TILES
    group = pid % GROUPS
    split = pid // GROUPS
    lane = tl.arange(0, COLS)
    if WIDE:
        group = group.to(tl.int64)
        split = split.to(tl.int64)
        lane = lane.to(tl.int64)
    if FLAT:
        r = col_tile * COLS + lane
        c = r // TAPS
        tap = r % TAPS
    else:
        c = col_tile % BLOCKS * COLS + lane
        tap = col_tile // BLOCKS
        r = c * TAPS + tap
    td = tap // (KERNEL[1] * KERNEL[2]) * DILATION[0]
    th = tap // KERNEL[2] % KERNEL[1] * DILATION[1]
    tw = tap % KERNEL[2] * DILATION[2]
    col_ok = c < CHANNELS
    row_ok = rows < FILTERS
    filters = group * FILTERS + rows
    start = split * per_split
    stop = tl.minimum(start + per_split, places)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for block in range(start, stop, DEPTH):
        j = block + tl.arange(0, DEPTH)
        q = j % PER
        n, pd, ph, pw = _place(j // PER, out_d, out_h, out_w)
        od = pd * WSTRIDE[0] - WPAD[0] + q // (WINDOW[1] * WINDOW[2])
        oh = ph * WSTRIDE[1] - WPAD[1] + q // WINDOW[2] % WINDOW[1]
        ow = pw * WSTRIDE[2] - WPAD[2] + q % WINDOW[2]
        live = (j < stop) & _within(od, oh, ow, conv_d, conv_h, conv_w)
        at = n * grad_n + ((pd * out_h + ph) * out_w + pw) * grad_p
        at = at[None, :] + (filters * grad_k)[:, None]
        ok_tile = live[None, :] & row_ok[:, None]
        a = tl.load(grad + at, mask=ok_tile, other=0.0)
        if index is not None:
            winner = tl.load(index + at, mask=ok_tile, other=255)
            a = tl.where(winner == q[None, :].to(tl.uint8), a, 0.0)
        xd = od * STRIDE[0] - PAD[0]
        xh = oh * STRIDE[1] - PAD[1]
        xw = ow * STRIDE[2] - PAD[2]
        if FLAT:
            ok = _within(
                xd[:, None] + td[None, :],
                xh[:, None] + th[None, :],
                xw[:, None] + tw[None, :],
                in_d,
                in_h,
                in_w,
            )
            ok = ok & live[:, None]
            at = (n * x_n + xd * x_d + xh * x_h + xw * x_w)[:, None]
            at = at + (td * x_d + th * x_h + tw * x_w)[None, :]
        else:
            ok = (live & _within(xd + td, xh + th, xw + tw, in_d, in_h, in_w))[:, None]
            at = (n * x_n + (xd + td) * x_d + (xh + th) * x_h + (xw + tw) * x_w)[:, None]
        b = tl.load(x + at + ((group * CHANNELS + c) * x_c)[None, :], mask=ok & col_ok[None, :], other=0.0)
        acc = dot(a, b, acc, PRECISION, WIDEN)
    spot = ((split * GROUPS * FILTERS + filters) * (CHANNELS * TAPS))[:, None] + r[None, :]
    tl.store(out + spot, acc.to(out.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])


@triton.jit
def bias_gradient(
    grad, index, out, pixels, per_split, size, grad_n, grad_k, grad_p,
    FILTERS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Partial sums of grad over one split of the pixels; 255 in index marks 'no gradient'."""
    ROW_TILES: tl.constexpr = (FILTERS + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    filters = (pid % ROW_TILES) * ROWS + tl.arange(0, ROWS)
    split = pid // ROW_TILES
    if WIDE:
        split = split.to(tl.int64)
        filters = filters.to(tl.int64)
    row_ok = filters < FILTERS
    start = split * per_split
    stop = tl.minimum(start + per_split, pixels)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for block in range(start, stop, COLS):
        p = block + tl.arange(0, COLS)
        ok = row_ok[:, None] & (p < stop)[None, :]
        at = (p // size * grad_n + p % size * grad_p)[None, :] + (filters * grad_k)[:, None]
        part = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
        if index is not None:
            part = tl.where(tl.load(index + at, mask=ok, other=255) == 255, 0.0, part)
        acc += part
    tl.store(out + split * FILTERS + filters, tl.sum(acc, axis=1).to(out.dtype.element_ty), mask=row_ok)


@triton.jit
def sum_splits(parts, out, total, splits, BLOCK: tl.constexpr):
    """out = the sum of the splits' partial gradients, in the order of the splits."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = e < total
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        acc += tl.load(parts + e, mask=inside, other=0.0)
        parts += total
    tl.store(out + e, acc.to(out.dtype.element_ty), mask=inside)
