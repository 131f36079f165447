"""The dtypes of tensors that ops take, and those that their kernels compute in."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Anything else is for the reference, and torch's own modules are faster than that.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU_KERNEL_DTYPES = (torch.float32, torch.bfloat16)
