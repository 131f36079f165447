"""Compiling a Triton launch for a GPU that is not here, and reading what the compiler used."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

if TYPE_CHECKING:
    from interfuse.kernels.launch import Launch

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8"}
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
        options={"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True},
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
