"""How conv_pool runs: repeatably, on any number of threads, from several at once, after fork, on each ISA."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import conv_pool_oracle as oracle
import pytest
import tolerance
import torch
from cases.conv_pool import EDGES, Case

from interfuse import _native
from interfuse.ops import conv_pool

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

BY_NAME = {case.name: case for case in EDGES}
NAMES = ("relu-max", "block-32", "block-32-padded", "block-3d", "first-rgb", "stem", "pointwise", "depthwise",
         "gelu-avg", "silu-max", "audio", "volume-avg", "grouped")  # fmt: skip


def everything(case: Case, seed: int = 0) -> list[torch.Tensor]:
    """The output and the gradients."""
    leaves = [t.requires_grad_() for t in oracle.tensors(case, seed=seed)]
    y = conv_pool(*leaves, **case.arguments)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_bitwise_repeatable(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    first = everything(BY_NAME[name])
    for _ in range(3):
        assert same(everything(BY_NAME[name]), first)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_threads(name: str, threads: int) -> None:
    case = BY_NAME[name]
    torch.set_num_threads(threads)
    tensors = oracle.tensors(case)
    truth = oracle.truth(*tensors, **case.arguments)
    y, *gradients = everything(case)
    assert tolerance.error(y, truth) <= tolerance.FLOAT32_DEFAULT
    torch.set_num_threads(1)
    for ours, alone in zip(gradients, everything(case)[1:], strict=True):
        assert tolerance.error(ours, alone) <= tolerance.FLOAT32_GRADIENT


def test_several_python_threads_at_once() -> None:
    """Different problems and the same one, all at the same time; each thread gets its own result."""
    jobs = [(BY_NAME[name], seed) for seed in range(4) for name in NAMES]
    alone = [everything(*job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: everything(*job), jobs))
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


FORKED = """
import os, sys
import numpy, torch, interfuse
from interfuse.ops import conv_pool
torch.set_num_threads(2)
x, weight = torch.randn(2, 8, 64, 64, requires_grad=True), torch.randn(16, 8, 3, 3)
def work():
    y = conv_pool(x, weight, activation="relu", pool="max")
    grad = torch.autograd.grad(y, x, torch.ones_like(y))[0]
    return y.detach().numpy(), grad.numpy()  # torch's own large operations hang in a forked child
before = work() if sys.argv[1] == "after" else None
child = os.fork()
if child == 0:
    y, grad = work()
    right = before is None or (numpy.allclose(y, before[0]) and numpy.allclose(grad, before[1], atol=1e-4))
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
    if isas.index(isa) > isas.index(_native.info()["isa"]):
        pytest.skip(f"this processor has no {isa}")
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
               "-m", "not slow and not gpu",
               tests / "test_conv_pool.py", tests / "test_conv_pool_backward.py",
               tests / "test_conv_pool_memory.py", "-k",
               "named_cases or exact or any_strides or nothing_outside or forced"]  # fmt: skip
    environment = {**os.environ, "INTERFUSE_ISA": isa}
    run = subprocess.run(
        command, env=environment, cwd=tests.parent, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:]


@pytest.mark.parametrize("isa", _native.info()["isas"])
def test_the_environment_forces_the_instruction_set(isa: str) -> None:
    isas = _native.info()["isas"]
    code = "import interfuse; from interfuse import _native; print(_native.info()['isa'])"
    environment = {**os.environ, "INTERFUSE_ISA": isa}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    best = isas.index(_native.info()["isa"])
    assert out.stdout.strip() == isas[min(isas.index(isa), best)] or os.environ.get("INTERFUSE_ISA")
