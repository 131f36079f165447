"""Memory that a training step needs and the next one needs again, kept between them.

malloc gives large blocks back to the system at every free, and each fresh page costs a fault: for the
gradient of a large weight more than its arithmetic. Gradients, and what autograd saves, therefore lie in
blocks that the core keeps for a while (csrc/common/kept.h says for how long and how much; docs/memory.md).
What inference returns is torch's own memory, which can be resized in place; kept memory cannot.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from interfuse import _native
from interfuse.torch_state import DLPACK_EXCHANGE, in_transform, is_watched_by_modes

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Stats", "release", "set_limit", "stats"]

# DLPack's code and bits of the dtypes that the native kernels write.
_DLPACK_TYPES = {
    torch.float32: (2, 32),
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
    torch.float64: (2, 64),
    torch.uint8: (1, 8),
}
KEPT_FROM = _native.kept_from()  # bytes; malloc keeps smaller ones itself
_CPU = torch.device("cpu")


class Stats(NamedTuple):
    live: int  # bytes of tensors that still exist
    idle: int  # bytes kept for the next ones
    limit: int  # the most bytes that may be idle
    fresh: int  # tensors whose memory came from the system
    again: int  # tensors in memory that an earlier one had


def stats() -> Stats:
    """What is kept now, and how often that helped."""
    return Stats(**_native.kept_state())


def release() -> int:
    """Give all idle memory back to the system; its bytes."""
    return _native.release_kept()


def set_limit(limit: int) -> None:
    """The most bytes that may be idle; 0 keeps none."""
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise ValueError(f"The limit of idle memory is a number of bytes, 0 or more; got {limit!r}.")
    _native.set_kept_limit(limit)


def empty(
    shape: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device = _CPU,
    memory_format: torch.memory_format = torch.contiguous_format,
    keep: bool = True,
) -> Tensor:
    """torch.empty for a gradient, or for what autograd saves: on the CPU a large one lies in kept memory,
    unless `keep` is False, as for what inference returns."""
    count = math.prod(shape) if keep else 0
    if type(count) is int and count * dtype.itemsize >= KEPT_FROM:  # a tracer's sizes may be symbols
        kept = _kept(shape, dtype, device, memory_format)
        if kept is not None:
            return kept
    return torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)


def _kept(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, memory_format: torch.memory_format
) -> Tensor | None:
    """None where torch is to make the tensor: on another device, and where a mode or a transform looks on."""
    if device.type != "cpu" or dtype not in _DLPACK_TYPES or is_watched_by_modes() or in_transform():
        return None
    strides = torch.empty(shape, device="meta", memory_format=memory_format).stride()
    made: Tensor = _native.kept_empty(DLPACK_EXCHANGE, shape, strides, *_DLPACK_TYPES[dtype])
    return made


def _limit_from_environment() -> None:
    given = os.environ.get("INTERFUSE_KEPT_MEMORY")
    if given is None:
        return
    if not given.isdecimal():
        raise ValueError(
            f"The environment variable INTERFUSE_KEPT_MEMORY is a number of bytes, 0 for none; got '{given}'."
        )
    set_limit(int(given))


_limit_from_environment()
