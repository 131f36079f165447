"""How linear runs: repeatably, on any number of threads, from several at once, after fork, on each ISA."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import linear_oracle as oracle
import pytest
import torch
from cases.linear import Case
from torch import Tensor

from interfuse import _native
from interfuse.ops.linear import linear

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

# Large enough for a team: by outputs, by rows, by columns, and too few of any for three threads.
CASES = (
    Case("wide", (3,), (700, 300), (530,), ("gelu",)),
    Case("high", (500,), (300,), (6,), ("softmax",)),
    Case("both", (130,), (257, 31), (95,), ("tanh",)),
    Case("softmax by outputs", (40,), (500,), (100,), ("softmax",)),
    Case("narrow", (3000,), (40,), (30,), ("relu",)),
    Case("long", (2,), (9001,), (21,), ("none",)),
)
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def everything(case: Case, seed: int = 0) -> list[Tensor]:
    """The output and the gradients."""
    flat = oracle.leaves(*oracle.tensors(case, seed=seed))
    y = linear(*oracle.parts(flat, len(case.widths)), case.activations[0])
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    return [y.detach(), *torch.autograd.grad(y, flat, grad_y)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@by_case
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_bitwise_the_same_again_and_on_any_number_of_threads(case: Case, threads: int) -> None:
    """Each result is one thread's sum, in one order."""
    torch.set_num_threads(1)
    alone = everything(case)
    torch.set_num_threads(threads)
    for _ in range(2):
        assert same(everything(case), alone)


def test_several_python_threads_at_once() -> None:
    jobs = [(case, seed) for seed in range(3) for case in CASES]
    alone = [everything(*job) for job in jobs]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda job: everything(*job), jobs))
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


FORKED = """
import os, sys
import numpy, torch, interfuse
from interfuse.ops.linear import linear
torch.set_num_threads(2)
x, weight = torch.randn(64, 600, requires_grad=True), torch.randn(300, 600)
def work():
    y = linear(x, weight, None, "relu")
    grad = torch.autograd.grad(y, x, torch.ones_like(y))[0]
    return y.detach().numpy(), grad.numpy()  # torch's own large operations hang in a forked child
before = work() if sys.argv[1] == "after" else None
child = os.fork()
if child == 0:
    y, grad = work()
    right = before is None or (numpy.array_equal(y, before[0]) and numpy.array_equal(grad, before[1]))
    os._exit(0 if right else 3)
status = os.waitpid(child, 0)[1]
work()
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forked_child_computes(when: str) -> None:
    child = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED, when], timeout=120, check=False)
    assert child.returncode == 0


@pytest.mark.parametrize("isa", _native.info()["isas"])
def test_every_instruction_set(isa: str) -> None:
    """The tests of values, in a process whose kernels were forced to a lower instruction set."""
    isas = _native.info()["isas"]
    if os.environ.get("INTERFUSE_ISA"):
        pytest.skip("this run is itself forced to an instruction set")
    if isas.index(isa) > isas.index(_native.info()["isa"]):
        pytest.skip(f"this processor has no {isa}")
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests / "test_linear.py"]
    environment = {**os.environ, "INTERFUSE_ISA": isa}
    run = subprocess.run(
        command, env=environment, cwd=tests.parent, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:]
