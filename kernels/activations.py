"""Activations and their derivatives for Triton kernels: float32 in, float32 out.

Written from exp, erf and arithmetic only, because those are the functions that the compiler and the
interpreter share (libdevice exists in the compiled form alone).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    # 1 - 2/(e^2x + 1) cancels near zero, so small arguments take Cephes' odd polynomial.
    size = tl.abs(x)
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    small = p * z * x + x
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, slope, NAME: tl.constexpr):
    """The activation by name. Comparisons are written so that NaN passes, as in torch."""
    if NAME == "relu":
        x = tl.where(x <= 0, 0.0, x)
    elif NAME == "leaky_relu":
        x = tl.where(x > 0, x, x * slope)
    elif NAME == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        x = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif NAME == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif NAME == "tanh":
        x = tanh(x)
    elif NAME == "sigmoid":
        x = sigmoid(x)
    return x


@triton.jit
def activation_gradient(grad, saved, slope, NAME: tl.constexpr):
    """The gradient before the activation from the one after it.

    `saved` is the activated value for relu, leaky_relu, tanh and sigmoid, and the value before the
    activation for gelu, gelu_tanh and silu.
    """
    if NAME == "relu":
        grad = tl.where(saved <= 0, 0.0, grad)
    elif NAME == "leaky_relu":
        grad = tl.where(saved > 0, grad, grad * slope)
    elif NAME == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * saved * saved)
        grad = grad * (0.5 * (1.0 + tl.erf(saved * 0.7071067811865476)) + saved * density)
    elif NAME == "gelu_tanh":
        t = tanh(0.7978845608028654 * (saved + 0.044715 * saved * saved * saved))
        inner = 0.7978845608028654 * (1.0 + 0.134145 * saved * saved)
        grad = grad * (0.5 * (1.0 + t) + 0.5 * saved * (1.0 - t * t) * inner)
    elif NAME == "silu":
        s = sigmoid(saved)
        grad = grad * s * (1.0 + saved * (1.0 - s))
    elif NAME == "tanh":
        grad = grad * (1.0 - saved * saved)
    elif NAME == "sigmoid":
        grad = grad * saved * (1.0 - saved)
    return grad
