"""What the tests of rnn's GPU kernels share: cases, their inputs, and torch.nn in float64 to compare with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from triton_runs import DEVICE, INTERPRETED

from interfuse.ops._rnn_problem import RnnProblem

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


def triton_kernels() -> Any:
    return pytest.importorskip("interfuse.kernels.rnn", reason="triton is not installed.")


def cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The implementation on the CUDA kernel; without a GPU, on its emulation."""
    from interfuse.ops import _rnn_cuda

    triton_kernels()
    if INTERPRETED:
        monkeypatch.setattr(_rnn_cuda, "LIBRARY", EMULATED)
    if not _rnn_cuda.LIBRARY.exists():
        pytest.skip(f"this build has no {_rnn_cuda.LIBRARY.name}.")
    return _rnn_cuda


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
