"""Two processes on halves of every batch end where one process ends on whole ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)

ROOT = Path(__file__).resolve().parent.parent


def torchrun(script: str, *arguments: str) -> str:
    """What a script prints that torchrun starts in two processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_weights_are_those_of_one_process() -> None:
    rows = [line.split() for line in torchrun("tests/distributed_training.py", "ddp", "fsdp").splitlines()]
    assert [row[0] for row in rows] == ["ddp", "fsdp"]
    for _, fused, moved, error in rows:
        assert int(fused) == 4
        # The sums of the gradients round in another order: 1e-7 of weights below one, after three steps.
        assert float(error) < 1e-6 < 1e-2 < float(moved)


def test_the_example() -> None:
    words = torchrun("examples/ddp.py").split()
    assert words[:5] == ["2", "processes,", "4", "fused", "sites,"]
    assert float(words[-1]) < 0.4  # at first log(2)
