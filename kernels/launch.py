"""What launching Triton kernels needs, whatever the op."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """How much of a matrix product one program computes, and how it is compiled."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLS": self.cols, "DEPTH": self.depth}


@dataclass(frozen=True)
class Launch:
    """One kernel with everything that it is called with.

    Built without touching a device (meta tensors will do), so that what is compiled ahead of time and what
    runs are the same.
    """

    kernel: Any
    programs: int
    args: dict[str, Tensor | int | float | None]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 2

    def run(self) -> None:
        if self.programs == 0:
            return
        # Triton 3.9 warns when fusing of multiplications and additions is left to its changing default.
        self.kernel[(self.programs,)](
            **self.args, **self.constants, num_warps=self.warps, num_stages=self.stages, enable_fp_fusion=True
        )


def interpreting() -> bool:
    """TRITON_INTERPRET=1 was set when the kernels were defined: they run on the CPU, slowly."""
    return bool(triton.knobs.runtime.interpret)


def on_device_of(t: Tensor) -> Any:
    """Triton launches on the current device's current stream: make the tensor's device the current one."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once, roughly; a small number where there is no device to ask."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def reach(*tensors: Tensor | None) -> int:
    """The largest offset in elements that any of the tensors is indexed with."""
    return max(
        (
            sum((size - 1) * abs(stride) for size, stride in zip(t.shape, t.stride(), strict=True))
            for t in tensors
            if t is not None and t.numel() > 0
        ),
        default=0,
    )


def allows_tf32() -> bool:
    """torch's switch for TF32 in convolutions, under its new name where that is set, else the old one."""
    precision = getattr(getattr(torch.backends.cudnn, "conv", None), "fp32_precision", "none")
    return precision == "tf32" if precision != "none" else bool(torch.backends.cudnn.allow_tf32)
