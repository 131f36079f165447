"""The products of whole matrices around an attention, into memory that is there.

On matrix units, float32 products of many rows are faster in our core than in torch's; elsewhere torch's are
as fast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from interfuse import _native
from interfuse.bounded_cache import BoundedCache

_MATRIX_UNITS = bool(_native.info()["matrix_units"])
_LEAST_ROWS = 128  # with fewer the core uses the vector units too

_descs: BoundedCache[_native.LinearDesc] = BoundedCache(256)


def _desc(x: Tensor, outputs: int, save: bool) -> _native.LinearDesc:
    key = (x.shape, x.stride(0), outputs, save)
    found = _descs.get(key)
    if found is not None:
        return found
    return _descs.put(
        key,
        _native.LinearDesc(
            dtype="float32",
            weight_dtype="float32",
            rows=x.shape[0],
            out_features=outputs,
            widths=[x.shape[1]],
            row_strides=[x.stride(0)],
            activation="none",
            negative_slope=0.0,
            save=save,
        ),
    )


def project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x weight^T + bias, of float32; out is dense."""
    readable = x.stride(1) == 1 and weight.is_contiguous() and (bias is None or bias.is_contiguous())
    if _MATRIX_UNITS and x.shape[0] >= _LEAST_ROWS and readable:
        _native.linear_forward(
            _desc(x, weight.shape[0], False),
            [x.data_ptr()],
            weight.data_ptr(),
            0,
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            0,
            torch.get_num_threads(),
        )
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


class Gradients(NamedTuple):
    """Where those of a projection are written; None: nobody asks."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def gradients(grad: Tensor, x: Tensor, weight: Tensor, to: Gradients) -> None:
    """Of x weight^T + bias, whose gradient is dense; so are the tensors in `to`."""
    readable = x.stride(1) == 1 and weight.is_contiguous()
    if _MATRIX_UNITS and x.shape[0] >= _LEAST_ROWS and readable:
        _native.linear_backward(
            _desc(x, weight.shape[0], True),
            grad.data_ptr(),
            [x.data_ptr()],
            weight.data_ptr(),
            0,
            0,
            [0 if to.x is None else to.x.data_ptr()],
            0 if to.weight is None else to.weight.data_ptr(),
            0 if to.bias is None else to.bias.data_ptr(),
            torch.get_num_threads(),
        )
        return
    if to.x is not None:
        torch.mm(grad, weight, out=to.x)
    if to.weight is not None:
        torch.mm(grad.t(), x, out=to.weight)
    if to.bias is not None:
        torch.sum(grad, 0, out=to.bias)
