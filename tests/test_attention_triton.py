"""attention's Triton kernels against float64, forward and backward, and attention pooling's.

Compiled on a GPU, interpreted everywhere (triton_runs.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import attention_oracle as oracle
import pytest
import tolerance
import torch
from cases.attention import EDGES
from torch import Tensor
from triton_runs import DEVICE, INTERPRETED, by_host, on_device, run_interpreted

import interfuse
from interfuse.ops._attention_pool import PoolProblem, attention_pool
from interfuse.ops._attention_problem import AttentionParams, AttentionProblem
from interfuse.reference import attention as reference

if TYPE_CHECKING:
    from collections.abc import Iterator

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32

# Relative Frobenius error against float64. The shorter types round the probabilities and the gradients of the
# scores before they are multiplied again, as every flash attention does.
FORWARD = {SINGLE: tolerance.FLOAT32_ATTENTION, BRAIN: 1e-2, HALF: 1.5e-3}
BACKWARD = {SINGLE: tolerance.FLOAT32_ATTENTION_GRADIENT, BRAIN: 3e-2, HALF: 4e-3}
TF32 = 3e-3  # operands of 11 bits

BY_NAME = {case.name: case for case in EDGES}
SHORT = ("tails", "grouped", "everything", "ragged", "empty-rows")  # in the shorter types too
CASES = [(name, SINGLE) for name in BY_NAME] + [(name, dtype) for name in SHORT for dtype in (BRAIN, HALF)]


@pytest.fixture
def kernels() -> Any:
    pytest.importorskip("triton", reason="triton is not installed.")
    from interfuse.kernels import attention

    return attention


@pytest.fixture(autouse=True)
def _switch() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def moved(call: oracle.Call) -> oracle.Call:
    tensors = {name: t for name, t in vars(call).items() if isinstance(t, Tensor)}
    return replace(call, **{name: t.to(DEVICE) for name, t in tensors.items()})


def run(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, the weights and the gradients, on the device."""
    call = moved(oracle.make(BY_NAME[name], dtype))
    with torch.no_grad():
        y, weights = call.run(backend="triton", return_weights=True)
        assert torch.equal(call.run(backend="triton"), y)
    leaves = call.leaves()
    out = call.run(backend="triton")
    assert torch.equal(out, y)
    return y, weights, list(torch.autograd.grad(out, leaves, gradient(out)))


def gradient(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)


def error(ours: Tensor, theirs: Tensor, scale: float = 0.0) -> float:
    """Relative Frobenius error; where the truth is zero, of `scale`."""
    ours = ours.detach().cpu().double()
    assert ours.shape == theirs.shape
    size = max(float(theirs.norm()), scale)
    return float((ours - theirs).norm()) / size if size else float(ours.norm())


@on_device
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_agrees_with_float64(name: str, dtype: torch.dtype) -> None:
    leaves, y, _, weights = oracle.make(BY_NAME[name], dtype).truth()
    ours, ours_weights, grads = run(name, dtype)
    assert ours.dtype == dtype
    assert error(ours, y.detach()) <= FORWARD[dtype]
    assert error(ours_weights, weights.detach()) <= FORWARD[dtype]
    exact = torch.autograd.grad(y, leaves, gradient(y).to(dtype).double())
    # With one key the weights cannot change: then rounding of the output's gradient is all that is left.
    norm = float(gradient(y).norm())
    for mine, truth in zip(grads, exact, strict=True):
        assert error(mine, truth, 0.0 if truth.any() else norm) <= BACKWARD[dtype]


@on_device
def test_two_runs_agree_bit_for_bit() -> None:
    first, second = run("everything", SINGLE), run("everything", SINGLE)
    for a, b in zip([*first[:2], *first[2]], [*second[:2], *second[2]], strict=True):
        assert torch.equal(a, b)


@on_device
def test_padding_is_never_read_and_nothing_attended_to_gives_zeros() -> None:
    call = moved(oracle.make(BY_NAME["ragged-grouped"]))
    clean = moved(oracle.make(BY_NAME["ragged-grouped"]))
    for b in range(4):
        call.q[b, :, int(call.q_lengths[b]) :] = float("nan")
        call.k[b, :, int(call.kv_lengths[b]) :] = float("nan")
        call.v[b, :, int(call.kv_lengths[b]) :] = float("inf")
    found = []
    for one in (call, clean):
        leaves = one.leaves()
        y = one.run(backend="triton")
        found.append([y, *torch.autograd.grad(y, leaves, gradient(y))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    lengths = [int(n) for n in clean.kv_lengths]
    assert 0 in lengths
    for t in found[0]:
        assert t.isfinite().all()
        assert not t[lengths.index(0)].any()


@on_device
@pytest.mark.parametrize("layout", ["heads-first", "strided", "expanded"])
def test_any_strides(layout: str) -> None:
    call = moved(oracle.make(BY_NAME["grouped"]))
    expected = call.run(backend="triton")
    if layout == "heads-first":
        call.q, call.k, call.v = (t.contiguous() for t in (call.q, call.k, call.v))
    elif layout == "strided":
        call.q, call.k, call.v = (
            torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0] for t in (call.q, call.k, call.v)
        )
    else:
        call.k, call.v = (t[:1].expand(t.shape) for t in (call.k, call.v))
        expected = replace(call, k=call.k.contiguous(), v=call.v.contiguous()).run(backend="triton")
    torch.testing.assert_close(call.run(backend="triton"), expected, rtol=0, atol=0)


@on_device
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN, HALF], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_pooling_agrees_with_float64(dtype: torch.dtype, ragged: bool) -> None:
    random = torch.Generator().manual_seed(0)
    x, hidden, context = (torch.randn(s, generator=random) for s in ((4, 37, 70), (4, 37, 19), (19,)))
    lengths = torch.tensor([37, 0, 1, 33]) if ragged else None
    grad_y = torch.randn(4, 70, generator=random).to(dtype)
    grad_weights = torch.randn(4, 37, generator=random).to(dtype)
    given = [t.to(dtype) for t in (x, hidden, context)]
    exact = [t.double().requires_grad_() for t in given]
    outputs = reference.pool(*exact, lengths)
    wanted = torch.autograd.grad(outputs, exact, (grad_y.double(), grad_weights.double()))
    if lengths is not None:
        for b, n in enumerate(lengths):
            given[0][b, n:] = given[1][b, n:] = float("nan")
    leaves = [t.to(DEVICE).requires_grad_() for t in given]
    on = None if lengths is None else lengths.to(DEVICE)
    y, weights = torch.ops.interfuse.attention_pool(*leaves, on, "triton")
    grads = torch.autograd.grad((y, weights), leaves, (grad_y.to(DEVICE), grad_weights.to(DEVICE)))
    for ours, theirs in zip((y, weights), outputs, strict=True):
        assert error(ours, theirs.detach()) <= FORWARD[dtype]
    for ours, theirs in zip(grads, wanted, strict=True):
        assert error(ours, theirs) <= BACKWARD[dtype]


@on_device
@pytest.mark.skipif(INTERPRETED, reason="TF32 is a matter of the matrix unit.")
def test_tf32_follows_torchs_switch_and_precision() -> None:
    call = moved(oracle.make(BY_NAME["bar-like"]))
    y = oracle.make(BY_NAME["bar-like"]).truth()[1].detach()
    torch.backends.cuda.matmul.allow_tf32 = True
    short = error(call.run(backend="triton"), y)
    with interfuse.precision("highest"):
        highest = error(call.run(backend="triton"), y)
    assert highest <= FORWARD[SINGLE] < short <= TF32


@by_host
@pytest.mark.slow
def test_the_interpreter_agrees() -> None:
    run_interpreted(__file__, at_least=len(CASES) + 11)


def problem(**changes: Any) -> AttentionProblem:
    plain = {
        "params": AttentionParams(False, 0.2), "batch": 2, "heads": 4, "kv_heads": 2, "queries": 64,
        "keys": 196, "head_dim": 32, "value_dim": 32, "dtype": BRAIN, "device": torch.device("cuda"),
        "mask": "none", "weights": False, "save": True,
    }  # fmt: skip
    return AttentionProblem(**{**plain, **changes})


@by_host
def test_why_not_says_what_is_missing(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the tensors are on the CPU" in kernels.why_not(problem(device=torch.device("cpu")))
    assert "the tensors are torch.float64" in kernels.why_not(problem(dtype=torch.float64))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert all(kernels.why_not(problem(dtype=dtype)) is None for dtype in FORWARD)
    assert "at most 256 elements; here they have 300" in kernels.why_not(problem(value_dim=300))
    assert "no gradient of the returned weights" in kernels.why_not(problem(grad_weights=True))
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(RuntimeError, match="the tensors are on the CPU"):
        interfuse.ops.attention(q, q, q, backend="triton")
    with pytest.raises(RuntimeError, match="the tensors are on the CPU"):
        attention_pool(q[0], torch.zeros(3, 4), None, torch.zeros(3), backend="triton")


@by_host
def test_pooling_on_a_gpu_has_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from interfuse.ops._attention_pool import POOL_IMPLEMENTATIONS

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    pooled = PoolProblem(2, 5, 7, 3, BRAIN, torch.device("cuda"))
    first = next(i for i in POOL_IMPLEMENTATIONS if i.why_not(pooled) is None)
    assert first.name == "triton"
