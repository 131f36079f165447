"""How rnn runs: repeatably, on any number of threads, from several at once, after fork, on each ISA."""

from __future__ import annotations

import pytest
import rnn_oracle as oracle
import torch
from cases.rnn import EDGES, MODULES, Case
from processes import check_forked_child, check_instruction_set
from threads import check_threads_at_once, same

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


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_repeatable_and_right_on_any_number_of_threads(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    first = everything(BY_NAME[name])
    for _ in range(2):
        assert same(everything(BY_NAME[name]).values(), first.values())
    oracle.assert_right(BY_NAME[name])


def test_several_python_threads_at_once() -> None:
    """Different problems and the same one, all at the same time; each thread gets its own result."""
    # Drawn beforehand: the weights of torch's modules come from the one generator of the process.
    jobs = [(oracle.given(BY_NAME[name], seed=seed),) for seed in range(3) for name in NAMES]
    check_threads_at_once(lambda given: results_of(given).values(), jobs)


WORK = """
module = interfuse.nn.LSTM(8, 64, 2, bidirectional=True)
x = torch.randn(30, 4, 8, requires_grad=True)
def work():
    y, _ = module(x)
    return y.detach().numpy(), torch.autograd.grad(y, x, torch.ones_like(y))[0].numpy()
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forked_child_computes(when: str) -> None:
    check_forked_child(WORK, when, atol=1e-4)


@pytest.mark.parametrize("isa", _native.info()["isas"])
def test_every_instruction_set(isa: str) -> None:
    """The tests of values, in a process whose kernels were forced to a lower instruction set."""
    check_instruction_set(isa, "tests/test_rnn.py", "-k", "named_cases or rounded")


@pytest.mark.parametrize("cell", MODULES)
def test_threads_do_not_change_much(cell: str) -> None:
    """Another number of threads may add in another order, and no more than that."""
    case = BY_NAME[f"{cell}-deep-both"]
    torch.set_num_threads(1)
    alone = everything(case)
    torch.set_num_threads(2)
    oracle.assert_close(everything(case), alone, oracle.bounds(case)[1])
