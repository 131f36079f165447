"""The core from NumPy, without torch: relu(W [image; text] + b), the two modalities never concatenated.

cmake -S . -B build && cmake --build build && cmake --install build --prefix PREFIX
python examples/embed/numpy_fusion.py PREFIX/lib/libinterfuse.so
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, byref, c_char_p, c_float, c_int32, c_int64, c_void_p

import numpy as np

RELU = 1


class LinearSpec(ctypes.Structure):
    """interfuse_linear_spec of interfuse.h."""

    _fields_ = [
        ("dtype", c_int32),
        ("weight_dtype", c_int32),
        ("rows", c_int64),
        ("out_features", c_int64),
        ("inputs", c_int32),
        ("widths", POINTER(c_int64)),
        ("row_strides", POINTER(c_int64)),
        ("activation", c_int32),
        ("negative_slope", c_float),
        ("save", c_int32),
    ]


class LinearWeights(ctypes.Structure):
    """interfuse_linear_weights of interfuse.h."""

    _fields_ = [("weight", c_void_p), ("scale", c_void_p), ("bias", c_void_p)]


class Core:
    def __init__(self, library: str) -> None:
        self.c = ctypes.CDLL(library)
        self.c.interfuse_last_error.restype = c_char_p
        self.c.interfuse_isa.restype = c_char_p

    def check(self, status: int) -> None:
        if status:
            raise RuntimeError(self.c.interfuse_last_error().decode())

    def fused_linear(self, inputs: list[np.ndarray], weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """relu(weight [inputs] + bias) of float32 matrices of as many rows."""
        # The core reads addresses: what they point to must be of this type and dense.
        inputs = [np.ascontiguousarray(x, np.float32) for x in inputs]
        weight, bias = np.ascontiguousarray(weight, np.float32), np.ascontiguousarray(bias, np.float32)
        widths = (c_int64 * len(inputs))(*(x.shape[1] for x in inputs))
        if weight.shape != (len(bias), sum(widths)) or len({len(x) for x in inputs}) != 1:
            raise ValueError(f"weight must be {(len(bias), sum(widths))}, and the inputs of as many rows.")

        spec, plan = LinearSpec(), c_void_p()
        self.c.interfuse_linear_defaults(byref(spec))
        spec.rows, spec.out_features, spec.inputs = len(inputs[0]), len(bias), len(inputs)
        spec.widths = spec.row_strides = widths
        spec.activation = RELU
        self.check(self.c.interfuse_linear_create(byref(spec), byref(plan)))
        try:
            y = np.empty((spec.rows, spec.out_features), np.float32)
            places = (c_void_p * len(inputs))(*(x.ctypes.data for x in inputs))
            weights = LinearWeights(weight.ctypes.data, None, bias.ctypes.data)
            out = c_void_p(y.ctypes.data)
            self.check(self.c.interfuse_linear_forward(plan, places, byref(weights), out, None, 0))
        finally:
            self.c.interfuse_linear_destroy(plan)
        return y


def main(library: str) -> str:
    core = Core(library)
    random = np.random.default_rng(0)
    image, text = random.standard_normal((4, 512)), random.standard_normal((4, 128))
    weight, bias = random.standard_normal((64, 640)), random.standard_normal(64)
    y = core.fused_linear([image, text], weight, bias)
    expected = np.maximum(np.concatenate([image, text], 1) @ weight.T + bias, 0)
    error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
    return f"interfuse ({core.c.interfuse_isa().decode()}) from NumPy: relative error {error:.1e}"


if __name__ == "__main__":
    print(main(sys.argv[1]))
