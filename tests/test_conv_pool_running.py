"""How conv_pool runs: repeatably, on any number of threads, from several at once, after fork, on each ISA."""

from __future__ import annotations

import os
import subprocess
import sys

import conv_pool_oracle as oracle
import pytest
import tolerance
import torch
from cases.conv_pool import EDGES, Case
from processes import check_forked_child, check_instruction_set
from threads import check_threads_at_once, same

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
    check_threads_at_once(everything, [(BY_NAME[name], seed) for seed in range(4) for name in NAMES])


WORK = """
from interfuse.ops import conv_pool
x, weight = torch.randn(2, 8, 64, 64, requires_grad=True), torch.randn(16, 8, 3, 3)
def work():
    y = conv_pool(x, weight, activation="relu", pool="max")
    return y.detach().numpy(), torch.autograd.grad(y, x, torch.ones_like(y))[0].numpy()
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forked_child_computes(when: str) -> None:
    check_forked_child(WORK, when, atol=1e-4)


@pytest.mark.parametrize("isa", _native.info()["isas"])
def test_every_instruction_set(isa: str) -> None:
    """The tests of values, in a process whose kernels were forced to a lower instruction set."""
    check_instruction_set(
        isa, "-m", "not slow and not gpu", "tests/test_conv_pool.py", "tests/test_conv_pool_backward.py",
        "tests/test_conv_pool_memory.py", "-k",
        "named_cases or exact or any_strides or nothing_outside or forced",
    )  # fmt: skip


@pytest.mark.parametrize("isa", _native.info()["isas"])
def test_the_environment_forces_the_instruction_set(isa: str) -> None:
    if os.environ.get("INTERFUSE_ISA"):
        pytest.skip("this run is itself forced to an instruction set")
    isas = _native.info()["isas"]
    code = "import interfuse; from interfuse import _native; print(_native.info()['isa'])"
    environment = {**os.environ, "INTERFUSE_ISA": isa}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    best = isas.index(_native.info()["isa"])
    assert out.stdout.strip() == isas[min(isas.index(isa), best)]
