"""One set of tests for Triton kernels, run in two ways.

Compiled, on a CUDA device: `pytest -m gpu`. Interpreted, on every machine: `run_interpreted` runs a test file
again in a process of its own with TRITON_INTERPRET=1, which has to be set before triton is imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def on_device(test: Callable[..., None]) -> Callable[..., None]:
    """A test of kernels that run: interpreted here, or compiled under the marker gpu."""
    if INTERPRETED:
        return test
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device.")
    return pytest.mark.gpu(missing(test))


def by_host(test: Callable[..., None]) -> Callable[..., None]:
    """A test that needs triton, but runs no kernel."""
    reason = "The compiler is not there when kernels are interpreted."
    return pytest.mark.skipif(INTERPRETED, reason=reason)(test)


def run_interpreted(file: str, at_least: int) -> None:
    """Runs the tests of `file` under the interpreter; fewer than `at_least` that pass are a failure too."""
    # The interpreter of 3.6 takes arrays of one element for loop bounds, which NumPy forbids since 2.4.
    pytest.importorskip("triton", minversion="3.7")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    flags = ("-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib")
    command = [sys.executable, "-m", "pytest", *flags, file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert passed is not None
    assert int(passed[1]) >= at_least, done.stdout[-500:]
