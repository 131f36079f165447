"""What this machine can do at best, and what share of it a measured time is."""

from __future__ import annotations

import platform
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Cost:
    """Operations of the direct algorithm (a multiply-add is two) and the bytes that must move at least once.

    Winograd and sparse backward passes need fewer operations than this, so their share can exceed 1.
    """

    operations: int
    bytes: int


@dataclass(frozen=True)
class Peak:
    """Floating-point operations and bytes a second, with the given number of threads, and how measured."""

    threads: int
    operations: float
    bytes: float
    method: str

    def roofline(self, cost: Cost, seconds: float) -> dict[str, Any]:
        compute, memory = cost.operations / self.operations, cost.bytes / self.bytes
        return {
            **asdict(cost),
            "operations_per_second": cost.operations / seconds,
            "bytes_per_second": cost.bytes / seconds,
            "share_of_peak_operations": compute / seconds,
            "share_of_peak_bandwidth": memory / seconds,
            "bound": "operations" if compute >= memory else "bytes",
            "share_of_bound": max(compute, memory) / seconds,
        }


def measure(threads: int) -> Peak:
    """Multiply-adds that wait for nothing, and a sum over 256 MiB, in interfuse's instruction set."""
    from interfuse import _native

    peak = _native.machine_peak(threads)
    return Peak(
        threads,
        peak["operations"],
        peak["bytes"],
        "float32 multiply-adds in registers; reading 256 MiB from memory",
    )


def machine() -> dict[str, Any]:
    """The machine by what it can do. No host name, no user, no path."""
    model, flags, cores = platform.processor() or platform.machine(), set(), set()
    try:
        with open("/proc/cpuinfo") as info:
            package = ""
            for line in info:
                key, _, value = (part.strip() for part in line.partition(":"))
                if key == "model name":
                    model = value
                elif key in ("flags", "Features"):
                    flags = set(value.split())
                elif key == "physical id":
                    package = value
                elif key == "core id":
                    cores.add((package, value))
    except OSError:
        pass  # not Linux: torch's count of threads stands for the cores
    wanted = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve")
    return {
        "processor": model,
        "cores": len(cores) or torch.get_num_threads(),
        "flags": [flag for flag in wanted if flag in flags],
        "system": platform.system(),
        "architecture": platform.machine(),
    }


def spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "rounds": values}
