"""What the ops ask about autocast."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from interfuse.torch_state import is_autocast_active

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast, if it is on for this kind of device, wants for matrix products."""
    if not is_autocast_active():
        return None
    kind = device.type  # some, as "meta", know nothing of autocast
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast does to an operand: lower-precision floats, float64 left alone."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
