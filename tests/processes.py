"""Tests that need a process of their own: a forked child, and kernels forced to a lower instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from interfuse import _native

ROOT = Path(__file__).parent.parent

FORKING = """
import os, pickle, sys
import numpy, torch, interfuse
torch.set_num_threads(2)
{work}
if sys.argv[1] == "after":
    work()
from_child, to_parent = os.pipe()
child = os.fork()
if child == 0:
    with os.fdopen(to_parent, "wb") as file:
        pickle.dump(work(), file)
    os._exit(0)
os.close(to_parent)
with os.fdopen(from_child, "rb") as file:
    found = pickle.load(file)
status = os.waitpid(child, 0)[1]
pairs = zip(found, work(), strict=True)
right = all(numpy.allclose(a, b, rtol=1e-5, atol={atol}) for a, b in pairs)
sys.exit(os.waitstatus_to_exitcode(status) if right else 3)
"""


def check_forked_child(work: str, when: str, atol: float) -> None:
    """A child forked `when` the parent has computed ("after") or not yet ("before") computes the same arrays.

    The code `work` defines work(), which returns them. GNU OpenMP hangs a child that starts a team after its
    parent did, and so do torch's own large operations: `work` makes none.
    """
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    code = FORKING.format(work=work, atol=atol)
    child = subprocess.run([sys.executable, "-W", "ignore", "-c", code, when], timeout=120, check=False)
    assert child.returncode == 0


def check_instruction_set(isa: str, *arguments: str) -> None:
    """pytest's `arguments` pass in a process whose kernels are forced to `isa`."""
    isas = _native.info()["isas"]
    if os.environ.get("INTERFUSE_ISA"):
        pytest.skip("this run is itself forced to an instruction set")
    if isas.index(isa) >= isas.index(_native.info()["isa"]):
        pytest.skip(f"this processor has no {isa}, or the tests run on it anyway")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "INTERFUSE_ISA": isa}
    run = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:]
