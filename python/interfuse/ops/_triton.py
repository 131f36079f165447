"""What every op asks before it imports its Triton kernels."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def why_not(device: torch.device) -> str | None:
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton kernels run on a GPU (or under TRITON_INTERPRET=1); the tensors are on the CPU."
    if find_spec("triton") is None:
        return "the package triton is not installed."
    return None
