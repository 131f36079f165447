"""How linear runs: repeatably, on any number of threads, from several at once, after fork, on each ISA."""

from __future__ import annotations

import linear_oracle as oracle
import pytest
import torch
from cases.linear import Case
from processes import check_forked_child, check_instruction_set
from threads import check_threads_at_once, same
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
    check_threads_at_once(everything, [(case, seed) for seed in range(3) for case in CASES])


WORK = """
from interfuse.ops.linear import linear
x, weight = torch.randn(64, 600, requires_grad=True), torch.randn(300, 600)
def work():
    y = linear(x, weight, None, "relu")
    return y.detach().numpy(), torch.autograd.grad(y, x, torch.ones_like(y))[0].numpy()
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forked_child_computes(when: str) -> None:
    check_forked_child(WORK, when, atol=0)


@pytest.mark.parametrize("isa", _native.info()["isas"])
def test_every_instruction_set(isa: str) -> None:
    """The tests of values, in a process whose kernels were forced to a lower instruction set."""
    check_instruction_set(isa, "tests/test_linear.py")
