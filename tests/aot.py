"""Compiling a Triton launch for a GPU that is not here, and reading what the compiler used."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from interfuse.kernels.launch import Launch

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8"}


def source(launch: Launch) -> ASTSource:
    """The launch as the just-in-time compiler would see it.

    It makes constants of None and of 1, and notes which integers and pointers are multiples of 16
    (torch's allocations on a GPU are).
    """
    names = launch.kernel.arg_names
    signature, constants, attributes = {}, dict(launch.constants), {}
    for place, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = launch.args[name]
        multiple = isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
        if value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = "*" + NAMES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -2**31 <= value < 2**31 else "i64"
        if multiple:
            attributes[(place,)] = [["tt.divisibility", 16]]
    missing = {*launch.args, *launch.constants} ^ set(names)
    if missing:
        raise ValueError(f"{launch.kernel.__name__}: the launch and the kernel disagree about {sorted(missing)}.")
    return ASTSource(launch.kernel, signature, constants, attributes)


def resources(launch: Launch, architecture: int) -> dict[str, int]:
    """Registers and stack bytes a thread, shared bytes a program, and instructions that spill."""
    compiled = triton.compile(source(launch), target=GPUTarget("cuda", architecture, 32), options={
        "num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("--dump-resource-usage", cubin)
        sass = _cuobjdump("--dump-sass", cubin)
    numbers = {name: int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
    return {"registers": numbers["REG"], "stack": numbers["STACK"] + numbers["LOCAL"],
            "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)), "shared": compiled.metadata.shared,
            "matrix": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA)", sass)), "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M)),
            "loads": __import__("collections").Counter(re.findall(r"\b(?:LDG|LDGSTS|STG|UTMALDG|LDS|STS|LDSM|SHFL)\.[A-Z0-9.]*", sass))}


def _cuobjdump(option: str, cubin: Path) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, str(cubin)], check=True, capture_output=True, text=True).stdout
