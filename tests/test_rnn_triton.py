"""rnn's Triton kernels, and the CUDA kernel in their midst, against torch.nn in float64.

Compiled on a GPU; everywhere else interpreted (triton_runs.py) and, the CUDA kernel, emulated by the library
that csrc/tests/emulated_rnn.cpp becomes. Sizes are tiny because the interpreter takes
milliseconds an operation.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from triton_runs import DEVICE, INTERPRETED, by_host, on_device, run_interpreted

import interfuse
from interfuse.ops._rnn_problem import RnnProblem
from interfuse.ops.rnn import rnn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32

# Relative Frobenius error against float64. float32 sums some dozens of products a step here, over at most six
# steps; the kernels' tanh and sigmoid are good to two units. The shorter types round h at every step, and
# what is saved of the gates on the way back.
FORWARD = {SINGLE: 1e-6, BRAIN: 1.5e-2, HALF: 2e-3}
BACKWARD = {SINGLE: 3e-6, BRAIN: 4e-2, HALF: 5e-3}
TF32 = 3e-3  # operands of 11 bits, where a compiled kernel multiplies float32 so


class Case(NamedTuple):
    cell: str = "lstm"
    batch: int = 3
    steps: int = 4
    input: int = 5
    hidden: int = 17
    layers: int = 1
    directions: int = 1
    proj: int = 0
    bias: bool = True
    batch_first: bool = False
    dtype: torch.dtype = SINGLE
    lengths: tuple[int, ...] | None = None
    states: bool = True
    vocabulary: int = 0
    resident: bool = False


# The CUDA kernel executed on the CPU, beside the C++ tests.
EMULATED = Path(__file__).resolve().parent.parent / "build" / "native" / "libinterfuse_cuda_emulated.so"

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
    return pytest.importorskip("interfuse.kernels.rnn", reason="triton is not installed.")


@pytest.fixture
def cuda_kernels(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    from interfuse.ops import _rnn_cuda

    if INTERPRETED:
        monkeypatch.setattr(_rnn_cuda, "LIBRARY", EMULATED)
    if not _rnn_cuda.LIBRARY.exists():
        pytest.skip(f"this build has no {_rnn_cuda.LIBRARY.name}.")
    return _rnn_cuda


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """The name of a back end, and what the op calls of it."""
    fixture = "kernels" if request.param == "triton" else "cuda_kernels"
    return request.param, request.getfixturevalue(fixture)


@pytest.fixture(autouse=True)
def _poisoned(poisoned_outputs: None) -> None:
    """Memory that nobody wrote holds NaN."""


@pytest.fixture(autouse=True)
def _switch() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    yield
    cudnn.allow_tf32 = before


def problem_of(case: Case, device: str = DEVICE) -> RnnProblem:
    return RnnProblem(
        cell=case.cell, layers=case.layers, directions=case.directions, bias=case.bias,
        batch_first=case.batch_first, batch=case.batch, steps=case.steps, input_size=case.input,
        hidden_size=case.hidden, proj_size=case.proj, vocabulary=case.vocabulary, dtype=case.dtype,
        device=torch.device(device), ragged=case.lengths is not None, states=case.states, weight_dtype=None,
        save=True,
    )  # fmt: skip


class Given(NamedTuple):
    """What the op hands to an implementation, and the gradients of what comes back."""

    x: Tensor
    table: Tensor | None
    lengths: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    weights: list[Tensor]
    grad_y: Tensor
    grad_hn: Tensor
    grad_cn: Tensor | None


def given(problem: RnnProblem, case: Case) -> Given:
    p, generator = problem, torch.Generator().manual_seed(1)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        t = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return t.to(DEVICE, p.dtype)

    lengths = None if case.lengths is None else torch.tensor(case.lengths, device=DEVICE)
    x = draw(*p.sequence_shape(p.input_size))
    table = None
    if p.vocabulary:
        table = draw(p.vocabulary, p.input_size)
        x = torch.randint(0, p.vocabulary, p.sequence_shape(1)[:2], generator=generator).to(DEVICE)
    elif lengths is not None:
        rows = x if p.batch_first else x.transpose(0, 1)
        for row, length in zip(rows, case.lengths or (), strict=True):
            row[length:] = float("nan")
    lstm = p.cell == "lstm"
    state, cell = (p.runs, p.batch, p.output_size), (p.runs, p.batch, p.hidden_size)
    return Given(
        x, table, lengths,
        draw(*state) if p.states else None,
        draw(*cell) if p.states and lstm else None,
        [draw(*shape, scale=0.5) for shape in p.weight_shapes()],
        draw(*p.sequence_shape(p.directions * p.output_size)),
        draw(*state),
        draw(*cell) if lstm else None,
    )  # fmt: skip


def truth(problem: RnnProblem, g: Given) -> tuple[list[Tensor], list[Tensor | None]]:
    """(y, hn, cn) and the gradients of x or its rows, h0, c0 and the weights, in float64 on the CPU."""
    p = problem
    options = {"num_layers": p.layers, "bias": p.bias, "bidirectional": p.directions == 2}
    module: nn.RNNBase
    if p.cell == "lstm":
        module = nn.LSTM(p.input_size, p.hidden_size, proj_size=p.proj_size, **options)
    elif p.cell == "gru":
        module = nn.GRU(p.input_size, p.hidden_size, **options)
    else:
        module = nn.RNN(p.input_size, p.hidden_size, nonlinearity=p.cell[4:], **options)
    module = module.double()
    for parameter, weight in zip(module.parameters(), g.weights, strict=True):
        parameter.data = weight.cpu().double()

    def wide(t: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        return (torch.zeros(shape) if t is None else t.cpu()).double().requires_grad_()

    x = g.x.cpu() if g.table is None else g.table.cpu()[g.x.cpu()]
    x = x.detach().double().nan_to_num().requires_grad_()
    h0 = wide(g.h0, (p.runs, p.batch, p.output_size))
    c0 = wide(g.c0, (p.runs, p.batch, p.hidden_size))
    ys, hs, cs = [], [], []
    for b in range(p.batch):
        length = p.steps if g.lengths is None else int(g.lengths[b])
        row = (x[b] if p.batch_first else x[:, b])[:length]
        h, c = h0[:, b], c0[:, b]
        y = x.new_zeros(p.steps, p.directions * p.output_size)
        if length:
            out, last = module(row, (h, c) if p.cell == "lstm" else h)
            y = torch.cat([out, y[length:]])
            h, c = last if p.cell == "lstm" else (last, c)
        ys.append(y)
        hs.append(h)
        cs.append(c)
    y, hn, cn = torch.stack(ys, 0 if p.batch_first else 1), torch.stack(hs, 1), torch.stack(cs, 1)
    outputs, grads = [y, hn], [g.grad_y, g.grad_hn]
    if g.grad_cn is not None:
        outputs.append(cn)
        grads.append(g.grad_cn)
    leaves = [x, h0, c0, *module.parameters()]
    pairs = [(t, grad.cpu().double()) for t, grad in zip(outputs, grads, strict=True) if t.requires_grad]
    found = torch.autograd.grad([t for t, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    found = [torch.zeros_like(leaf) if t is None else t for t, leaf in zip(found, leaves, strict=True)]
    h, c = found[1] if g.h0 is not None else None, found[2] if g.c0 is not None else None
    return [t.detach() for t in outputs], [found[0], h, c, *found[3:]]


def ours(kernels: Any, p: RnnProblem, g: Given) -> tuple[list[Tensor], list[Tensor | None], Tensor]:
    y, hn, cn, reserve = kernels.run(p, *g[:6])
    mask = [True] * (3 + len(g.weights))
    grads = kernels.run_backward(p, g.grad_y, g.grad_hn, g.grad_cn, *g[:6], y, reserve, mask)
    return [y, hn, cn] if p.cell == "lstm" else [y, hn], grads, reserve


def error(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error; NaN where only one of them has a NaN."""
    got = got.detach().cpu().double()
    assert got.shape == want.shape
    return float((got - want).norm() / want.norm().clamp_min(1e-30)) if want.numel() else 0.0


def prepare(monkeypatch: pytest.MonkeyPatch, case: Case) -> tuple[RnnProblem, Given]:
    """The problem, set up so that the kernel which the case names is the one that runs."""
    from interfuse.kernels import rnn_launches as plan

    torch.backends.cudnn.allow_tf32 = case.resident
    if not case.resident:
        monkeypatch.setattr(plan, "RESIDENT_BYTES", 0)
    problem = problem_of(case)
    assert plan.recurrence(problem).resident == case.resident
    return problem, given(problem, case)


def bounds(case: Case, interpreted: bool = INTERPRETED) -> tuple[float, float]:
    if case.dtype == SINGLE and case.resident and not interpreted:
        return TF32, 3 * TF32
    return FORWARD[case.dtype], BACKWARD[case.dtype]


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


def check_agreement(
    kernels: Any, case: Case, problem: RnnProblem, g: Given, tolerances: tuple[float, float]
) -> None:
    (outputs, grads, reserve), (want, want_grads) = ours(kernels, problem, g), truth(problem, g)
    assert reserve.numel() == case.batch * case.steps * kernels.reserve_row(problem)
    forward, backward = tolerances
    for field, a, b in zip(("y", "hn", "cn"), outputs, want, strict=False):
        assert a.dtype == case.dtype
        assert error(a, b) <= forward, (field, a, b)
    errors = []
    for a, b in zip(grads, want_grads, strict=True):
        assert (a is None) == (b is None)
        errors.append(0.0 if a is None or b is None else error(a, b))
    assert max(errors) <= backward, errors
    if case.lengths is not None:
        rows = outputs[0] if case.batch_first else outputs[0].transpose(0, 1)
        assert all(not row[length:].any() for row, length in zip(rows, case.lengths, strict=True))
    inferred = kernels.run(replace(problem, save=False), *g[:6])
    assert inferred[3].numel() == 0
    for a, b in zip(inferred, outputs, strict=False):
        assert torch.equal(a, b), "inference and training give different outputs"


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
@pytest.mark.skipif(INTERPRETED, reason="The interpreter has no graphs.")
@pytest.mark.parametrize("name", DEEP)
def test_a_graph_replays_it(backend: tuple[str, Any], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Forward and backward in a CUDA graph, also where layers overlap on streams of their own."""
    called, kernels = backend
    problem, g = prepare(monkeypatch, DEEP[name])
    if called == "cuda":
        overlap(kernels, monkeypatch, problem)
    beside = torch.cuda.Stream()
    with torch.cuda.stream(beside):
        ours(kernels, problem, g)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs, grads, _ = ours(kernels, problem, g)
    if g.table is None:
        g.x.copy_(torch.randn_like(g.x))
    want, want_grads, _ = ours(kernels, problem, g)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip([*outputs, *grads], [*want, *want_grads], strict=True):
        assert a is None or torch.equal(a, b)


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
    run_interpreted(__file__, at_least=2 * len(CASES) + len(DEEP) + 9)


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
