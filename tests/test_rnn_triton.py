"""rnn's Triton kernels, and the CUDA kernel in their midst, against torch.nn in float64.

Compiled on a GPU; everywhere else interpreted (triton_runs.py) and, the CUDA kernel, emulated by the library
that csrc/tests/emulated_rnn.cpp becomes. Sizes are tiny because the interpreter takes
milliseconds an operation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import rnn_gpu
import torch
from rnn_gpu import (
    BACKWARD,
    BRAIN,
    FORWARD,
    HALF,
    SINGLE,
    TF32,
    Case,
    bounds,
    check_agreement,
    error,
    given,
    ours,
    prepare,
    problem_of,
    truth,
)
from torch import Tensor
from triton_runs import DEVICE, INTERPRETED, by_host, on_device, run_interpreted

import interfuse
from interfuse.ops.rnn import rnn

if TYPE_CHECKING:
    from collections.abc import Iterator

RAGGED = (4, 1, 0)
CASES = {
    "lstm": Case(),
    "lstm-resident": Case(resident=True),
    "lstm-two-blocks": Case(hidden=33, input=18),
    "lstm-ragged": Case(lengths=RAGGED, directions=2, batch_first=True),
    "lstm-ragged-resident": Case(lengths=(2, 0, 4), directions=2, resident=True, states=False),
    "lstm-deep": Case(layers=3, hidden=5, steps=3, states=False, batch_first=True),
    "lstm-deep-ragged-ids": Case(layers=2, directions=2, hidden=6, steps=3, lengths=(2, 3, 0), vocabulary=7,
                                 resident=True),
    "lstm-projection": Case(proj=7, hidden=19, bias=False),
    "lstm-projection-ragged": Case(proj=3, hidden=6, layers=2, directions=2, lengths=RAGGED,
                                   batch_first=True),
    "lstm-bf16": Case(dtype=BRAIN, resident=True, lengths=RAGGED),
    "lstm-bf16-streamed": Case(dtype=BRAIN, vocabulary=9),
    "lstm-projection-f16": Case(dtype=HALF, proj=4, layers=2),
    "lstm-17-sequences": Case(batch=17, steps=2, hidden=4, lengths=(0, 1, 2) * 5 + (2, 1), resident=True),
    "gru": Case("gru"),
    "gru-resident": Case("gru", resident=True, batch_first=True),
    "gru-two-blocks": Case("gru", hidden=33, bias=False, states=False),
    "gru-ragged": Case("gru", lengths=RAGGED, directions=2, layers=2, hidden=6),
    "gru-ragged-resident": Case("gru", lengths=(0, 4, 2), directions=2, resident=True, vocabulary=5),
    "gru-bf16": Case("gru", dtype=BRAIN, resident=True, directions=2),
    "gru-f16-streamed": Case("gru", dtype=HALF, batch_first=True, lengths=RAGGED),
    "tanh": Case("rnn_tanh", directions=2, batch_first=True),
    "tanh-resident-ragged": Case("rnn_tanh", resident=True, lengths=RAGGED, directions=2, layers=2),
    "relu": Case("rnn_relu", lengths=RAGGED, bias=False, vocabulary=4),
    "relu-resident-f16": Case("rnn_relu", resident=True, dtype=HALF),
    "one-step": Case(steps=1, batch=1, resident=True),
    "one-step-streamed": Case("gru", steps=1, batch=1, directions=2),
    "no-step-anywhere": Case(lengths=(0, 0, 0), directions=2),
}  # fmt: skip


@pytest.fixture
def kernels() -> Any:
    return rnn_gpu.triton_kernels()


@pytest.fixture
def cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    return rnn_gpu.cuda_kernels(monkeypatch)


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Any]:
    """The name of a back end, and what the op calls of it."""
    found = rnn_gpu.triton_kernels() if request.param == "triton" else rnn_gpu.cuda_kernels(monkeypatch)
    return request.param, found


@pytest.fixture(autouse=True)
def _poisoned(poisoned_outputs: None) -> None:
    """Memory that nobody wrote holds NaN."""


@pytest.fixture(autouse=True)
def _switch() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    yield
    cudnn.allow_tf32 = before


@on_device
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torch(kernels: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case = CASES[name]
    check_agreement(kernels, case, *prepare(monkeypatch, case), bounds(case))


@on_device
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.proj])
def test_the_cuda_kernel_agrees_with_torch(
    cuda_kernels: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case = CASES[name]
    problem, g = prepare(monkeypatch, case)
    assert cuda_kernels.why_not(problem) is None
    check_agreement(cuda_kernels, case, problem, g, bounds(case, interpreted=False))


@on_device
def test_any_strides_are_read(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice with steps in every dimension, and ids of another layout, none of them copied before."""
    problem, g = prepare(monkeypatch, Case(hidden=5, directions=2))
    want, want_grads, _ = ours(kernels, problem, g)
    for inner in (1, 2):
        wide = torch.zeros(8, 9, inner * problem.input_size, device=DEVICE)
        x = wide[::2, 1::3, ::inner].copy_(g.x)
        got, grads, _ = ours(kernels, problem, g._replace(x=x))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(grads, want_grads, strict=True))
    problem, g = prepare(monkeypatch, Case("rnn_tanh", hidden=5, vocabulary=6, states=False))
    other = g._replace(x=g.x.t().contiguous().t())
    assert other.x.stride() != g.x.stride()
    for a, b in zip(ours(kernels, problem, other)[1], ours(kernels, problem, g)[1], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@on_device
@pytest.mark.parametrize("name", ["lstm-projection-ragged", "gru-ragged-resident", "tanh"])
def test_gradients_repeat_bit_for_bit_and_leave_what_was_saved(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    problem, g = prepare(monkeypatch, CASES[name])
    y, _, _, reserve = kernels.run(problem, *g[:6])
    arguments = (g.grad_y, g.grad_hn, g.grad_cn, *g[:6], y, reserve, [True] * (3 + len(g.weights)))
    flat = [t for t in (*arguments[:8], *g.weights, y, reserve) if isinstance(t, Tensor)]
    before = [t.clone() for t in flat]
    first, second = kernels.run_backward(problem, *arguments), kernels.run_backward(problem, *arguments)
    for a, b in zip(flat, before, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or (torch.equal(a, b) and a is not b)


@on_device
def test_the_mask_chooses_the_gradients_and_absent_ones_count_as_zero(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, g = prepare(monkeypatch, Case(hidden=4, layers=2))
    y, _, _, reserve = kernels.run(problem, *g[:6])
    every = [True] * (3 + len(g.weights))
    zeros = (torch.zeros_like(g.grad_y), torch.zeros_like(g.grad_hn), torch.zeros_like(g.grad_hn))
    with_zeros = kernels.run_backward(problem, zeros[0], g.grad_hn, zeros[2], *g[:6], y, reserve, every)
    absent = kernels.run_backward(problem, None, g.grad_hn, None, *g[:6], y, reserve, every)
    assert all(torch.equal(a, b) for a, b in zip(with_zeros, absent, strict=True))
    with_zeros = kernels.run_backward(problem, g.grad_y, *zeros[1:], *g[:6], y, reserve, every)
    for one in (0, 1, 2, 4, 8):
        mask = [i == one for i in range(len(every))]
        found = kernels.run_backward(problem, g.grad_y, None, None, *g[:6], y, reserve, mask)
        assert torch.equal(found[one], with_zeros[one])
        assert sum(t is not None for t in found) == 1


@on_device
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter is NumPy
@pytest.mark.parametrize("resident", [True, False])
def test_what_is_wrong_in_one_sequence_stays_in_it(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, resident: bool
) -> None:
    """A NaN, and an id outside the table, which a kernel has no other way to tell of."""
    problem, g = prepare(monkeypatch, Case("gru", hidden=5, resident=resident, states=False))
    g.x[1, 1, 2] = float("nan")
    outside = replace(problem, vocabulary=6)
    table, ids = torch.ones(6, problem.input_size, device=DEVICE), torch.ones(4, 3, device=DEVICE).long()
    ids[1, 1] = 6
    for p, x, rows in ((problem, g.x, None), (outside, ids, table)):
        y, hn, _, _ = kernels.run(p, x, rows, *g[2:6])
        assert y[1:, 1].isnan().all()
        assert hn[0, 1].isnan().all()
        assert not y[0].isnan().any()
        assert not y[:, ::2].isnan().any()


@on_device
def test_more_sequences_than_multiprocessors_take_larger_blocks(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from interfuse.kernels import rnn_launches as plan

    monkeypatch.setattr(plan, "multiprocessors", lambda device: 1)
    case = Case(dtype=BRAIN, batch=17, steps=2, hidden=16, bias=False)
    problem, g = prepare(monkeypatch, case)
    assert plan.recurrence(problem).forward.rows == 32
    want, want_grads = truth(problem, g)
    got, grads, _ = ours(kernels, problem, g)
    assert all(error(a, b) <= FORWARD[BRAIN] for a, b in zip(got, want, strict=True))
    assert all(error(a, b) <= BACKWARD[BRAIN] for a, b in zip(grads, want_grads, strict=True))


@on_device
def test_no_sequences(kernels: Any) -> None:
    problem = problem_of(Case("gru", batch=0, hidden=4))
    weights = [torch.ones(shape, device=DEVICE) for shape in problem.weight_shapes()]
    x, h0 = torch.ones(4, 0, 5, device=DEVICE), torch.ones(1, 0, 4, device=DEVICE)
    y, hn, _, reserve = kernels.run(problem, x, None, None, h0, None, weights)
    assert (y.shape, hn.shape) == ((4, 0, 4), (1, 0, 4))
    mask = [True, True, False, *(True for _ in weights)]
    grads = kernels.run_backward(problem, y, hn, None, x, None, None, h0, None, weights, y, reserve, mask)
    for grad, weight in zip(grads[3:], weights, strict=True):
        assert torch.equal(grad, torch.zeros_like(weight))


@on_device
@pytest.mark.parametrize("name", ["lstm-deep-ragged-ids", "gru-bf16", "relu"])
def test_through_the_public_function_and_autograd(
    backend: tuple[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case = CASES[name]
    problem, g = prepare(monkeypatch, case)
    floats = [t for t in (g.x if g.table is None else g.table, g.h0, g.c0) if t is not None]
    leaves = [t.requires_grad_() for t in (*floats, *g.weights)]
    states = g.h0 if g.c0 is None else (g.h0, g.c0)
    options = {"bidirectional": case.directions == 2, "batch_first": case.batch_first, "lengths": g.lengths}
    y, last = rnn(g.x, g.weights, states, cell=case.cell, table=g.table, backend=backend[0], **options)
    outputs, incoming = [y, *(last if case.cell == "lstm" else (last,))], [g.grad_y, g.grad_hn]
    found = torch.autograd.grad(outputs, leaves, [*incoming, *([] if g.grad_cn is None else [g.grad_cn])])
    want, want_grads = truth(problem, g)
    rows = want_grads[0]
    if g.table is not None and rows is not None:  # beyond the ends they are zero
        table = torch.zeros(g.table.shape).double()
        want_grads[0] = table.index_add_(0, g.x.cpu().flatten(), rows.flatten(0, 1))
    forward, backward = bounds(case, interpreted=INTERPRETED and backend[0] == "triton")
    assert all(error(a, b) <= forward for a, b in zip(outputs, want, strict=True))
    expected = [t for t in want_grads if t is not None]
    assert all(error(a, b) <= backward for a, b in zip(found, expected, strict=True))


@on_device
@pytest.mark.skipif(INTERPRETED, reason="The interpreter has no streams.")
@pytest.mark.parametrize("name", ["lstm-deep-ragged-ids", "gru-ragged", "lstm-deep"])
def test_nothing_waits_for_the_device(
    backend: tuple[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    problem, g = prepare(monkeypatch, CASES[name])
    monkeypatch.undo()  # poisoning is slow, not a wait, but is none of the op's
    _, kernels = backend
    want = ours(kernels, problem, g)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            got = ours(kernels, problem, g)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got[0], want[0], strict=True))


@on_device
@pytest.mark.skipif(INTERPRETED, reason="TF32 is a matter of the matrix unit.")
def test_tf32_follows_torchs_switch_and_precision(kernels: Any) -> None:
    problem = problem_of(Case(hidden=64, input=64))
    g = given(problem, Case(hidden=64, input=64))
    want = truth(problem, g)[0][0]
    torch.backends.cudnn.allow_tf32 = True
    short = error(kernels.run(problem, *g[:6])[0], want)
    with interfuse.precision("highest"):
        highest = error(kernels.run(problem, *g[:6])[0], want)
    torch.backends.cudnn.allow_tf32 = False
    off = error(kernels.run(problem, *g[:6])[0], want)
    assert highest <= FORWARD[SINGLE] < short <= TF32
    assert off == highest


@by_host
@pytest.mark.slow
def test_the_interpreter_agrees() -> None:
    run_interpreted(__file__, at_least=2 * len(CASES) + 9)


@by_host
def test_why_not_says_what_is_missing(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(Case(), "cuda")
    assert "the tensors are on the CPU" in kernels.why_not(problem_of(Case(), "cpu"))
    assert "the tensors are torch.float64" in kernels.why_not(replace(problem, dtype=torch.float64))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert all(kernels.why_not(replace(problem, dtype=dtype)) is None for dtype in FORWARD)
    assert "which allows 2130706432 elements" in kernels.why_not(replace(problem, hidden_size=32768))
    with pytest.raises(RuntimeError, match="the tensors are on the CPU"):
        rnn(torch.zeros(2, 1, 3), [torch.zeros(2, 3), torch.zeros(2, 2)], cell="rnn_tanh", backend="triton")


@by_host
def test_which_kernel_walks_through_time(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident are weights that fit beside the rest, and that the matrix unit multiplies."""
    from interfuse.kernels import rnn_launches as plan

    def resident(hidden: int, **changes: Any) -> bool:
        return plan.recurrence(problem_of(Case(hidden=hidden)._replace(**changes), "meta")).resident

    torch.backends.cudnn.allow_tf32 = True
    assert [h for h in (16, 64, 65, 128, 129, 256, 257) if resident(h)] == [16, 64]
    assert [h for h in (64, 128, 129, 256) if resident(h, dtype=BRAIN)] == [64, 128]
    assert [h for h in (128, 256, 257) if resident(h, dtype=HALF, cell="rnn_relu")] == [128, 256]
    assert resident(128, cell="rnn_tanh")
    assert not resident(64, proj=8)
    with interfuse.precision("highest"):
        assert not resident(16)
        assert resident(16, dtype=BRAIN)
    torch.backends.cudnn.allow_tf32 = False
    assert not resident(16)
    monkeypatch.setattr(plan, "shared_bytes", lambda device: 99 * 1024)
    assert [h for h in (64, 65, 128) if resident(h, dtype=BRAIN)] == [64]


@by_host
@pytest.mark.parametrize(
    ("old", "new", "arithmetic"),
    [(True, "none", "tf32"), (False, "none", "ieee"), (False, "tf32", "tf32"), (True, "ieee", "ieee")],
)
def test_tf32_needs_torchs_permission_for_recurrent_layers(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, old: bool, new: str, arithmetic: str
) -> None:
    from interfuse.kernels import rnn_launches as plan

    class Switches:
        allow_tf32 = old

        class rnn:  # noqa: N801
            fp32_precision = new

        class conv:  # noqa: N801
            fp32_precision = "tf32"

    monkeypatch.setattr(torch.backends, "cudnn", Switches)
    assert plan.arithmetic(problem_of(Case(), "meta")) == arithmetic
    assert plan.arithmetic(problem_of(Case(dtype=BRAIN), "meta")) == "ieee"
