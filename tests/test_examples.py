"""The programs of examples/ run and print what they promise. Those of examples/embed, which need the
installed core, run in test_packaging.py, and ddp.py in test_distributed.py."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def printed_by(name: str) -> str:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()


def error_in(line: str) -> float:
    found = re.search(r"off by ([\d.e+-]+)$", line)
    assert found is not None, line
    return float(found[1])


# Inductor imports what torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torch_compile() -> None:
    line = printed_by("torch_compile")
    assert "4 fused sites" in line
    assert error_in(line) < 1e-5  # of logits below one; both round in float32


def test_torch_export() -> None:
    line = printed_by("torch_export")
    assert "2 kinds of fused ops" in line
    assert error_in(line) < 1e-5


def test_lightning_style() -> None:
    line = printed_by("lightning_style")
    found = re.match(r"validation accuracy ([\d.]+)%", line)
    assert found is not None, line
    assert float(found[1]) >= 95


def test_every_example_is_run() -> None:
    run = {"torch_compile.py", "torch_export.py", "lightning_style.py", "ddp.py"}
    run |= {"embed/embed.c", "embed/numpy_fusion.py"}
    found = {
        path.relative_to(EXAMPLES).as_posix() for kind in ("*.py", "*.c") for path in EXAMPLES.rglob(kind)
    }
    assert found == run
