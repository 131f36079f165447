"""How linear_cross_entropy runs: repeatably, on any number of threads, after fork, on each ISA."""

from __future__ import annotations

import losses_oracle as oracle
import pytest
import tolerance
import torch
from cases.losses import Case
from processes import check_forked_child, check_instruction_set
from threads import check_threads_at_once, same
from torch import Tensor

from interfuse import _native

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

# Several blocks of classes for each thread, several chunks of rows, too few classes for three threads.
CASES = (
    Case("wide", 40, 70, 3000, label_smoothing=0.1),
    Case("high", 1100, 30, 200),
    Case("each", 300, 40, 500, reduction="none"),
    Case("few", 700, 90, 7, weighted=True),
)
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def everything(case: Case, seed: int = 0) -> list[Tensor]:
    drawn = oracle.tensors(case, seed=seed).training()
    return oracle.with_gradients(oracle.run(case, drawn), drawn)


@by_case
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_bitwise_the_same_again(case: Case, threads: int) -> None:
    torch.set_num_threads(threads)
    first = everything(case)
    assert all(same(everything(case), first) for _ in range(3))
    truth = oracle.truth(case, oracle.tensors(case))
    for ours, right in zip(first, truth, strict=True):
        assert tolerance.error(ours, right) <= tolerance.FLOAT32_GRADIENT


def test_several_python_threads_at_once() -> None:
    check_threads_at_once(everything, [(case, seed) for seed in range(3) for case in CASES])


WORK = """
x, weight = torch.randn(64, 60, requires_grad=True), torch.randn(3000, 60)
target = torch.arange(64)
op = torch.ops.interfuse.linear_cross_entropy.default
def work():  # the op itself: its autograd makes a large operation of torch's
    with torch.no_grad():
        loss, lse, grad, *_ = op(x, weight, target, None, None, "mean", -100, 0.0, "", [True, False, False])
    return loss.numpy(), grad.numpy()
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forked_child_computes(when: str) -> None:
    check_forked_child(WORK, when, atol=1e-6)


@pytest.mark.parametrize("isa", _native.info()["isas"])
def test_every_instruction_set(isa: str) -> None:
    """The tests of values, in a process whose kernels were forced to a lower instruction set."""
    check_instruction_set(isa, "tests/test_losses.py")
