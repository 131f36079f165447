"""What launching Triton kernels needs, whatever the op."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

# Oldest GPU generation with the asynchronous copies and bfloat16 units that the tiles are sized for.
OLDEST_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    registers: int | None = None  # that a thread may have; None: as many as the assembler finds best

    def options(self) -> dict[str, Any]:
        """The compiler's. Triton 3.9 warns when fusing of multiplications and additions is not chosen."""
        chosen = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return chosen if self.registers is None else {**chosen, "maxnreg": self.registers}

    def run(self) -> None:
        if self.programs > 0:
            self.kernel[(self.programs,)](**self.args, **self.constants, **self.options())


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


def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may have; an A100's where there is no device to ask."""
    if device.type != "cuda":
        return 163 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


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


def power_of_two(value: int, least: int, most: int) -> int:
    """The smallest power of two that holds `value`, between two of them."""
    return min(most, max(least, 1 << (max(value, 1) - 1).bit_length()))


def allows_tf32(of: str = "conv") -> bool:
    """torch's switch for TF32 in cuDNN's "conv" or "rnn", under the new name where that is set."""
    precision = getattr(getattr(torch.backends.cudnn, of, None), "fp32_precision", "none")
    return precision == "tf32" if precision != "none" else bool(torch.backends.cudnn.allow_tf32)


def device_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The sentence that says why no kernel here runs on such tensors, or None."""
    if dtype not in DTYPES:
        return f"the Triton kernels compute in float32, bfloat16 and float16; the tensors are {dtype}."
    if device.type == "cpu":
        if interpreting():
            return None
        return "Triton kernels run on a CUDA device; the tensors are on the CPU."
    if device.type != "cuda":
        return f"Triton kernels run on a CUDA device; the tensors are on {device}."
    if torch.version.hip is not None:
        return "the Triton kernels are written and tuned for NVIDIA GPUs; this is a ROCm build of torch."
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return (
            f"the Triton kernels need a GPU of compute capability 8.0 (Ampere) or newer; "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}."
        )
    return None
