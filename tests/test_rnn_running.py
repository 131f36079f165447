"""How rnn runs: repeatably, on any number of threads, from several at once, after fork, on each ISA."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import rnn_oracle as oracle
import torch
from cases.rnn import EDGES, MODULES, Case

from interfuse import _native

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

BY_NAME = {case.name: case for case in EDGES}
NAMES = ("lstm-deep-both", "gru-deep-both", "rnn_tanh-one", "lstm-ids", "projected", "lstm-least", "batch-33")


def everything(case: Case) -> dict[str, torch.Tensor]:
    return results_of(oracle.given(case))


def results_of(g: oracle.Given) -> dict[str, torch.Tensor]:
    """Results and gradients."""
    found = oracle.ours(g)
    gradients = oracle.gradients(found, g.leaves())
    return {**{n: t.detach() for n, t in found.items()}, **{f"grad of {n}": t for n, t in gradients.items()}}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_repeatable_and_right_on_any_number_of_threads(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    first = everything(BY_NAME[name])
    for _ in range(2):
        assert same(everything(BY_NAME[name]), first)
    oracle.assert_right(BY_NAME[name])


def test_several_python_threads_at_once() -> None:
    """Different problems and the same one, all at the same time; each thread gets its own result."""
    jobs = [oracle.given(BY_NAME[name], seed=seed) for seed in range(3) for name in NAMES]
    alone = [results_of(job) for job in jobs]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(results_of, jobs))
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


FORKED = """
import os, sys
import numpy, torch, interfuse
torch.set_num_threads(2)
module = interfuse.nn.LSTM(8, 64, 2, bidirectional=True)
x = torch.randn(30, 4, 8, requires_grad=True)
def work():
    y, _ = module(x)
    grad = torch.autograd.grad(y, x, torch.ones_like(y))[0]
    return y.detach().numpy(), grad.numpy()
before = work() if sys.argv[1] == "after" else None
child = os.fork()
if child == 0:
    y, grad = work()
    right = before is None or all(numpy.allclose(a, b, atol=1e-4) for a, b in zip((y, grad), before))
    os._exit(0 if right else 3)
status = os.waitpid(child, 0)[1]
work()
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forked_child_computes(when: str) -> None:
    """Before and after the parent used its threads: GNU OpenMP hangs a child that starts a team then."""
    child = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED, when], timeout=120, check=False)
    assert child.returncode == 0


@pytest.mark.parametrize("isa", _native.info()["isas"])
def test_every_instruction_set(isa: str) -> None:
    """The tests of values, in a process whose kernels were forced to a lower instruction set."""
    isas = _native.info()["isas"]
    if os.environ.get("INTERFUSE_ISA"):
        pytest.skip("this run is itself forced to an instruction set")
    if isas.index(isa) >= isas.index(_native.info()["isa"]):
        pytest.skip(f"this processor has no {isa}, or the tests run on it anyway")
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests / "test_rnn.py",
               "-k", "named_cases or rounded"]  # fmt: skip
    environment = {**os.environ, "INTERFUSE_ISA": isa}
    run = subprocess.run(
        command, env=environment, cwd=tests.parent, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:]


@pytest.mark.parametrize("cell", MODULES)
def test_threads_do_not_change_much(cell: str) -> None:
    """Another number of threads may add in another order, and no more than that."""
    case = BY_NAME[f"{cell}-deep-both"]
    torch.set_num_threads(1)
    alone = everything(case)
    torch.set_num_threads(2)
    oracle.assert_close(everything(case), alone, oracle.bounds(case)[1])
