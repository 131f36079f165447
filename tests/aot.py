"""Compiling Triton launches for GPUs that are not here, and the record of what the compiler used."""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from interfuse.kernels.launch import Launch

ARCHITECTURES = (80, 90, 100)
SHARED = 99 * 1024  # bytes that a program gets on every GPU since Ampere
RECORDS = Path(__file__).resolve().parent.parent / "bench" / "results"

NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int64: "i64",
}
MATRIX_UNITS = r"\b(?:HMMA|HGMMA|UTC[A-Z]*MMA)\b"


def source(launch: Launch) -> ASTSource:
    """The launch as the just-in-time compiler would see it.

    It makes constants of None and of 1, and notes which integers and pointers are multiples of 16
    (torch's allocations on a GPU are).
    """
    names = launch.kernel.arg_names
    disagreed = {*launch.args, *launch.constants} ^ set(names)
    if disagreed:
        raise ValueError(f"{launch.kernel.__name__}: launch and kernel disagree about {sorted(disagreed)}.")
    signature, constants, attributes = {}, dict(launch.constants), {}
    for place, name in enumerate(names):
        value = launch.args.get(name)
        if name in constants:
            signature[name] = "constexpr"
        elif value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + NAMES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def resources(launch: Launch, architecture: int) -> dict[str, int]:
    """What one kernel takes on one architecture (80, 90, 100), by the disassembler's account.

    Registers and stack bytes of a thread, shared bytes of a program, and the number of instructions that
    spill to local memory and that use the matrix unit.
    """
    compiled = triton.compile(
        source(launch),
        target=GPUTarget("cuda", architecture, 32),
        options=launch.options(),
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage, assembly = _disassemble("--dump-resource-usage", cubin), _disassemble("--dump-sass", cubin)

    def used(name: str) -> int:
        found = re.search(rf"\b{name}:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump --dump-resource-usage names no {name}: {usage}")
        return int(found[1])

    return {
        "registers": used("REG"),
        "stack": used("STACK") + used("LOCAL"),
        "shared": compiled.metadata.shared,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
        "matrix": len(re.findall(MATRIX_UNITS, assembly)),
    }


def _disassemble(option: str, cubin: Path) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, str(cubin)], check=True, capture_output=True, text=True).stdout


def used(launch: Launch, architecture: int) -> dict[str, int]:
    """What the record says of a kernel: its blocks, and its resources."""
    blocks = ("ROWS", "COLS", "UNITS", "DEPTH")
    tile = {name.lower(): launch.constants[name] for name in blocks if name in launch.constants}
    return {**tile, "warps": launch.warps, "stages": launch.stages, **resources(launch, architecture)}


def rows_of(steps: Iterable[Any]) -> dict[str, tuple[Any, str, int]]:
    """{name: (step, kernel, architecture)} of every kernel that a step names, on every architecture."""
    return {
        f"{kernel} | {step} | sm_{architecture}": (step, kernel, architecture)
        for step in steps
        for kernel in step.kernels
        for architecture in ARCHITECTURES
    }


def compile_all(
    rows: Iterable[str], compile_row: Callable[[str], dict[str, int]], processes: int = 2
) -> dict[str, dict[str, int]]:
    """{row: what it uses} of every row, in their order."""
    rows = list(rows)
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(processes, spawn) as pool:
        return dict(zip(rows, pool.map(compile_row, rows), strict=True))


def write_record(path: Path, compiled: dict[str, dict[str, int]]) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = [f"    {json.dumps(row)}: {json.dumps(found)}" for row, found in compiled.items()]
    path.write_text(
        f'{{\n  "triton": "{triton.__version__}",\n  "rows": {{\n' + ",\n".join(lines) + "\n  }\n}\n"
    )
    print(f"{len(lines)} kernels -> {path}")
