"""What the native kernels take, whatever the op: tensors on the CPU, of two dtypes."""

from __future__ import annotations

import torch

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # as the binding calls them


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The sentence that says why no native kernel runs on such tensors, or None."""
    reason = why_not_on(device)
    if reason is None and dtype not in DTYPE_NAMES:
        return f"the native kernels compute in float32 and bfloat16; the tensors are {dtype}."
    return reason


def why_not_on(device: torch.device) -> str | None:
    """The same of their device alone."""
    if device.type != "cpu":
        return f"the native kernels run on the CPU; the tensors are on {device}."
    return None
