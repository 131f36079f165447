"""What the compiler gave the CUDA library's kernels: registers, stack and spills, from its binaries.

`python tests/cuda_resources.py` writes the record anew.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from interfuse import _native

LIBRARY = Path(_native.__file__).parent / "libinterfuse_cuda.so"
RECORD = Path(__file__).resolve().parent.parent / "bench" / "results" / "cuda_resources.json"
ARITHMETIC = ("bfloat16", "float16", "tf32", "float32")
SECTION = re.compile(
    r"arch = (sm_\w+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
)
RNN = re.compile(
    r"rnn_(forward|backward|pack)INS0_9FragmentsI\w*?LNS0_10ArithmeticE(\d)EEE(?:Li(\d)ELi(\d)E)?"
)


def cuobjdump() -> str | None:
    """The one that triton brings along, or the toolkit's."""
    try:
        from triton import knobs

        return str(knobs.nvidia.cuobjdump.path)
    except (ImportError, RuntimeError, AttributeError):
        return shutil.which("cuobjdump")


def label(mangled: str) -> str:
    """As 'rnn_forward bfloat16 4 gates 1 tiles'; other kernels keep what the compiler calls them."""
    found = RNN.search(mangled)
    if found is None:
        return mangled
    kernel, arithmetic, gates, tiles = found.groups()
    sizes = f" {gates} gates {tiles} tiles" if gates else ""
    return f"rnn_{kernel} {ARITHMETIC[int(arithmetic)]}{sizes}"


def resources(tool: str, library: Path = LIBRARY) -> dict[str, dict[str, dict[str, int]]]:
    """{architecture: {kernel: {registers, stack, local}}}"""
    text = subprocess.run(
        [tool, "-res-usage", str(library)], check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, dict[str, dict[str, int]]] = {}
    architecture = ""
    for match in SECTION.finditer(text):
        if match[1]:
            architecture = match[1]
        else:
            sizes = {"registers": int(match[3]), "stack": int(match[4]), "local": int(match[6])}
            found.setdefault(architecture, {})[label(match[2])] = sizes
    return {name: dict(sorted(kernels.items())) for name, kernels in sorted(found.items())}


if __name__ == "__main__":
    tool = cuobjdump()
    if tool is None or not LIBRARY.exists():
        sys.exit("The record needs cuobjdump (of triton or the CUDA toolkit) and a build with nvcc.")
    RECORD.write_text(json.dumps(resources(tool), indent=1) + "\n")
