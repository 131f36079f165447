"""The products of whole matrices around an attention, into memory that is there.

On matrix units, float32 products of many rows are faster in our core than in torch's; elsewhere torch's are
as fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from interfuse import _native
from interfuse.bounded_cache import BoundedCache

_MATRIX_UNITS = bool(_native.info()["matrix_units"])
_LEAST_ROWS = 128  # with fewer the core uses the vector units too

_descs: BoundedCache[_native.LinearDesc] = BoundedCache(256)


def _desc(x: Tensor, outputs: int) -> _native.LinearDesc:
    key = (x.shape, x.stride(0), outputs)
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
            save=False,
        ),
    )


def project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x weight^T + bias, of float32; out is dense."""
    readable = x.stride(1) == 1 and weight.is_contiguous() and (bias is None or bias.is_contiguous())
    if _MATRIX_UNITS and x.shape[0] >= _LEAST_ROWS and readable:
        _native.linear_forward(
            _desc(x, weight.shape[0]),
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


def product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x weight, of float32; out is dense."""
    if _MATRIX_UNITS and x.shape[0] >= _LEAST_ROWS:
        project(x, weight.t().contiguous(), None, out)
    else:
        torch.mm(x, weight, out=out)
