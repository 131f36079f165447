"""Layers of rnn's CUDA kernel at work beside each other, and its launches in a CUDA graph.

On a GPU with streams; everywhere else emulated, in orders that the streams and events would allow.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import rnn_gpu
import torch
from rnn_gpu import BRAIN, Case, bounds, check_agreement, error, ours, prepare
from triton_runs import INTERPRETED, by_host, on_device, run_interpreted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from interfuse.ops._rnn_problem import RnnProblem


@pytest.fixture
def cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    return rnn_gpu.cuda_kernels(monkeypatch)


@pytest.fixture(autouse=True)
def _poisoned(poisoned_outputs: None) -> None:
    """Memory that nobody wrote holds NaN."""


@pytest.fixture(autouse=True)
def _switch() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = before


# At least two layers in one direction: they overlap where there is a GPU with room for both.
DEEP = {
    "lstm-ragged": Case(layers=3, steps=5, batch=4, lengths=(5, 2, 0, 4), batch_first=True),
    "lstm-bf16-ids": Case(layers=2, steps=4, hidden=33, dtype=BRAIN, vocabulary=7, resident=True),
    "gru-ragged": Case("gru", layers=2, steps=5, lengths=(3, 1, 5), states=False),
    "gru-bf16": Case("gru", layers=4, steps=3, dtype=BRAIN, batch_first=True, resident=True),
    "relu": Case("rnn_relu", layers=2, steps=5, hidden=9),
}


def overlap(cuda_kernels: Any, monkeypatch: pytest.MonkeyPatch, problem: RnnProblem, parts: int = 3) -> None:
    monkeypatch.setattr(cuda_kernels, "LEAST_STEPS", 1)
    monkeypatch.setattr(cuda_kernels, "MOST_PARTS", parts)
    monkeypatch.setattr(cuda_kernels, "_multiprocessors", lambda device: 132)
    for backward in (False, True):
        assert len(cuda_kernels.CudaWalks().parts(problem, backward)) == parts


def shuffled(seed: int, needs: bool = True) -> Any:
    """Runs tasks in an order that their streams and, if asked for, their other needs allow."""
    choose = random.Random(seed)

    def run(tasks: Sequence[Any], device: torch.device) -> None:
        left, done = list(range(len(tasks))), set[int]()
        while left:
            streams = {tasks[n].stream: n for n in reversed(left)}  # the first of each
            ready = [n for n in streams.values() if not needs or done.issuperset(tasks[n].after)]
            number = choose.choice(ready)
            tasks[number].run()
            done.add(number)
            left.remove(number)

    return run


@on_device
@pytest.mark.parametrize("name", DEEP)
def test_overlapped_layers_agree_with_torch(
    cuda_kernels: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case = DEEP[name]
    problem, g = prepare(monkeypatch, case)
    want, want_grads, _ = ours(cuda_kernels, problem, g)
    overlap(cuda_kernels, monkeypatch, problem)
    for seed in range(4):
        if INTERPRETED:
            monkeypatch.setattr("interfuse.kernels.rnn_overlap.run", shuffled(seed))
        outputs, grads, _ = ours(cuda_kernels, problem, g)
        # Parts of the steps change nothing; products over other numbers of rows may add up otherwise.
        for a, b in zip([*outputs, *grads], [*want, *want_grads], strict=True):
            assert (a is None) == (b is None)
            assert a is None or error(a, b.cpu().double()) <= bounds(case)[0] / 2
    check_agreement(cuda_kernels, case, problem, g, bounds(case, interpreted=False))


@on_device
def test_what_tasks_wait_for_is_needed(cuda_kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRETED:
        pytest.skip("a device that does not wait need not go wrong")
    problem, g = prepare(monkeypatch, DEEP["gru-ragged"])
    want, _, _ = ours(cuda_kernels, problem, g)
    overlap(cuda_kernels, monkeypatch, problem)
    monkeypatch.setattr("interfuse.kernels.rnn_overlap.run", shuffled(1, needs=False))
    outputs, _, _ = ours(cuda_kernels, problem, g)
    assert not torch.equal(outputs[0], want[0])


@on_device
@pytest.mark.skipif(INTERPRETED, reason="The interpreter has no graphs.")
@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("overlapped", [False, True])
def test_a_graph_replays_it(
    cuda_kernels: Any, monkeypatch: pytest.MonkeyPatch, name: str, overlapped: bool
) -> None:
    """Forward and backward, also on streams of their own."""
    problem, g = prepare(monkeypatch, DEEP[name])
    if overlapped:
        overlap(cuda_kernels, monkeypatch, problem)
    beside = torch.cuda.Stream()
    with torch.cuda.stream(beside):
        ours(cuda_kernels, problem, g)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs, grads, _ = ours(cuda_kernels, problem, g)
    if g.table is None:
        g.x.copy_(torch.randn_like(g.x))
    want, want_grads, _ = ours(cuda_kernels, problem, g)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip([*outputs, *grads], [*want, *want_grads], strict=True):
        assert a is None or torch.equal(a, b)


@by_host
@pytest.mark.slow
def test_the_emulation_agrees() -> None:
    run_interpreted(__file__, at_least=len(DEEP) + 1)
