"""rnn against torch.nn in float64: every cell, forward and backward, lengths, token ids, half precision."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import rnn_oracle as oracle
import tolerance
import torch
import torch.nn.functional as F
from cases.rnn import CASES, EDGES, MODULES, Case

from interfuse.dispatch import BackendError
from interfuse.ops.rnn import rnn

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

BY_NAME = {case.name: case for case in (*EDGES, *CASES)}


@pytest.mark.parametrize("case", EDGES, ids=lambda case: case.name)
def test_named_cases(case: Case) -> None:
    oracle.assert_right(case)


@pytest.mark.parametrize("case", [c for c in EDGES if c.steps < 20], ids=lambda case: case.name)
def test_reference_in_float64(case: Case) -> None:
    oracle.assert_right(case, torch.float64)


@pytest.mark.parametrize("cell", MODULES)
def test_reference_in_float32(cell: str) -> None:
    oracle.assert_right(BY_NAME[f"{cell}-deep-both"], backend="reference")


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", MODULES)
def test_half_precision_rounds_once(cell: str, dtype: torch.dtype, backend: str | None) -> None:
    """Both compute in float32, whatever the layers: better than torch, which rounds every step."""
    oracle.assert_right(BY_NAME[f"{cell}-deep-both"], dtype, backend=backend)
    oracle.assert_right(BY_NAME[f"{cell}-ids"], dtype, backend=backend)


@pytest.mark.parametrize("case", [c for c in CASES if c.hidden < 500], ids=lambda case: case.name)
def test_benchmark_rows_forward(case: Case) -> None:
    case = replace(case, steps=min(case.steps, 12), batch=min(case.batch, 9))
    g = oracle.given(case)
    with torch.no_grad():
        oracle.assert_close(oracle.ours(g), oracle.truth(g)[0], oracle.bounds(case)[0])


@pytest.mark.parametrize("cell", MODULES)
def test_two_thousand_steps(cell: str) -> None:
    case = Case("long", cell, 2, 2000, 3, 21, ragged=True, states=True)
    g = oracle.given(case)
    true, true_leaves = oracle.truth(g)
    found = oracle.ours(g)
    oracle.assert_close(found, true, oracle.bounds(case)[0])
    oracle.assert_close(
        oracle.gradients(found, g.leaves()), oracle.gradients(true, true_leaves), oracle.bounds(case)[1]
    )


@pytest.mark.parametrize("cell", MODULES)
def test_error_at_most_twice_torchs(cell: str) -> None:
    case = Case("error", cell, 7, 60, 31, 57, 2, bidirectional=True)
    g = oracle.given(case)
    true, _ = oracle.truth(g)
    torchs, _ = oracle.truth(g, torch.float32)
    found = oracle.ours(g)
    for name, t in true.items():
        limit = tolerance.TIMES_TORCH * tolerance.error(torchs[name], t)
        assert tolerance.error(found[name], t) <= max(limit, 2.0**-23)


@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("save", [False, True])
def test_no_sequences(cell: str, save: bool) -> None:
    """torch allows an empty batch, and gives its weights gradients of zero."""
    g = oracle.given(replace(BY_NAME[f"{cell}-plain"], batch=0))
    with torch.set_grad_enabled(save):
        found = oracle.ours(g)
    assert found["y"].shape == (0, 9, 20)
    if save:
        for name, grad in oracle.gradients(found, g.leaves()).items():
            assert torch.equal(grad, torch.zeros_like(g.leaves()[name]))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("cell", MODULES)
def test_sequences_of_no_steps_keep_their_state(cell: str, backend: str | None) -> None:
    case = replace(BY_NAME[f"{cell}-plain"], batch=4)
    g = oracle.given(case)
    g.lengths = torch.tensor([0, 9, 3, 0])
    found = oracle.ours(g, backend=backend)
    assert not found["y"][[0, 3]].any()
    assert not found["y"][2, 3:].any()
    assert torch.equal(found["hn"][:, [0, 3]], g.states[0][:, [0, 3]])
    weight = torch.randn(found["hn"].shape)
    (found["hn"] * weight).sum().backward()
    assert torch.equal(g.states[0].grad[:, [0, 3]], weight[:, [0, 3]])
    assert not g.x.grad[[0, 3]].any()
    assert not g.x.grad[2, 3:].any()


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("cell", MODULES)
def test_what_stands_beyond_the_end_is_not_read(cell: str, backend: str | None) -> None:
    g = oracle.given(BY_NAME[f"{cell}-deep-both"])
    found = oracle.ours(g, backend=backend)
    expected = oracle.gradients(found, g.leaves())
    with torch.no_grad():
        for row, length in enumerate(g.lengths.tolist()):
            g.x[row, length:] = float("nan")
    again = oracle.ours(g, backend=backend)
    assert all(torch.equal(again[name], found[name]) for name in found)
    for name, grad in oracle.gradients(again, g.leaves()).items():
        assert torch.equal(grad, expected[name])


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("cell", [cell for cell in MODULES if cell != "gru"])
def test_ids_beyond_the_end_may_be_anything(cell: str, backend: str | None) -> None:
    g = oracle.given(BY_NAME[f"{cell}-ids"])
    expected = oracle.gradients(oracle.ours(g, backend=backend), g.leaves())
    for row, length in enumerate(g.lengths.tolist()):
        g.x[row, length:] = -7 if row % 2 else 10**12
    for name, grad in oracle.gradients(oracle.ours(g, backend=backend), g.leaves()).items():
        assert torch.equal(grad, expected[name])


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("cell", MODULES)
def test_nan_and_inf_stay_in_their_row(cell: str, backend: str | None) -> None:
    case = replace(BY_NAME[f"{cell}-plain"], layers=2, states=False)
    g = oracle.given(case)
    clean = oracle.ours(g, backend=backend)["y"]
    with torch.no_grad():
        g.x[1, 4, 2], g.x[3, 0, 0] = float("nan"), float("inf")
    y = oracle.ours(g, backend=backend)["y"]
    true = oracle.truth(g)[0]["y"]
    assert torch.equal(y.isnan(), true.isnan())
    assert y[1, 4:].isnan().all()
    assert torch.equal(y[[0, 2, 4]], clean[[0, 2, 4]])


# Enough sequences for the matrix units of processors that have them, which cannot multiply what is infinite.
LARGE = Case("large", "lstm", 40, 9, 24, 32, 2)


@pytest.mark.parametrize("cell", MODULES)
def test_nan_and_inf_in_large_batches(cell: str) -> None:
    g = oracle.given(replace(LARGE, cell=cell))
    clean = oracle.ours(g)
    clean_grad = oracle.gradients(clean, g.leaves())["x"]
    with torch.no_grad():
        g.x[1, 4, 2], g.x[23, 0, 0] = float("nan"), float("inf")
    found, (true, true_leaves) = oracle.ours(g), oracle.truth(g)
    assert torch.equal(found["y"].isnan(), true["y"].isnan())
    rest = [row for row in range(LARGE.batch) if row not in (1, 23)]
    assert torch.equal(found["y"][rest], clean["y"][rest])
    found_grads, true_grads = oracle.gradients(found, g.leaves()), oracle.gradients(true, true_leaves)
    assert torch.equal(found_grads["x"][rest], clean_grad[rest])
    for name, grad in found_grads.items():
        assert torch.equal(grad.isnan(), true_grads[name].isnan()), name


@pytest.mark.parametrize("cell", [cell for cell in MODULES if cell != "rnn_relu"])
def test_infinite_weights_saturate_large_batches(cell: str) -> None:
    """An infinite sum is a gate that is open or shut, and gives a finite state."""
    case = replace(LARGE, cell=cell, layers=1)
    g = oracle.given(case)
    with torch.no_grad():
        g.weights["weight_ih_l0"][5, 3] = float("inf")
    true, _ = oracle.truth(g)
    assert true["y"].isfinite().all()
    oracle.assert_close(oracle.ours(g), true, oracle.bounds(case)[0])


@pytest.mark.parametrize("name", ["lstm-deep-both", "gru-deep-both", "rnn_tanh-ids", "projected"])
def test_second_backward_and_unwanted_gradients(name: str) -> None:
    g = oracle.given(BY_NAME[name])
    leaves = g.leaves()
    total = sum(t.sin().sum() for t in oracle.ours(g).values())
    first = torch.autograd.grad(total, list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(total, list(leaves.values()), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for (name, leaf), grad in zip(leaves.items(), first, strict=True):
        for other in leaves.values():
            other.requires_grad_(other is leaf)
        alone = sum(t.sin().sum() for t in oracle.ours(g).values())
        assert torch.equal(torch.autograd.grad(alone, leaf)[0], grad), name


@pytest.mark.parametrize("name", ["lstm-deep-both", "gru-deep-both", "projected"])
def test_gradients_of_some_results_alone(name: str) -> None:
    case = BY_NAME[name]
    g = oracle.given(case)
    found, (true, true_leaves) = oracle.ours(g), oracle.truth(g)
    for result in found:
        ones = torch.autograd.grad(found[result].sum(), list(g.leaves().values()), retain_graph=True)
        theirs = torch.autograd.grad(
            true[result].sum(), list(true_leaves.values()), retain_graph=True, allow_unused=True
        )
        for leaf, a, b in zip(true_leaves, ones, theirs, strict=True):
            error = tolerance.recurrent_error(a, torch.zeros_like(a) if b is None else b)
            assert error <= oracle.bounds(case)[1], (result, leaf)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # forward mode's own
@pytest.mark.parametrize("name", ["lstm-plain", "gru-plain", "rnn_tanh-plain", "projected", "lstm-ids"])
def test_second_derivatives(name: str) -> None:
    case = replace(
        BY_NAME[name], batch=2, steps=3, inputs=2, hidden=3, projection=min(BY_NAME[name].projection, 2)
    )
    g = oracle.given(case, torch.float64)
    g.lengths = torch.tensor([3, 1]) if case.ragged else None
    leaves = g.leaves()

    def results(*values: Tensor) -> tuple[Tensor, ...]:
        at = dict(zip(leaves, values, strict=True))
        states = tuple(at[n] for n in ("h0", "c0") if n in at)
        weights = {n: at[n] for n in g.weights}
        again = replace(g, x=at.get("x", g.x), table=at.get("table"), states=states, weights=weights)
        return tuple(oracle.ours(again).values())

    values = tuple(leaves.values())
    assert torch.autograd.gradcheck(results, values, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(results, values, fast_mode=True)


def test_second_derivatives_of_the_kernels_are_the_references() -> None:
    g = oracle.given(BY_NAME["lstm-plain"])
    for backend in (None, "reference"):
        y = oracle.ours(g, backend=backend)["y"]
        (first,) = torch.autograd.grad(y.square().sum(), g.x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), [g.x, g.weights["weight_hh_l0"]])
        if backend is None:
            kept = second
    for a, b in zip(kept, second, strict=True):
        assert tolerance.error(a, b) <= tolerance.recurrent_gradient(9, 1, 40)


@pytest.mark.parametrize("strange", ["transposed", "sliced", "expanded", "padded-row"])
def test_any_strides(strange: str) -> None:
    case = BY_NAME["lstm-plain"]
    g = oracle.given(case)
    x = g.x.detach()
    made = {
        "transposed": x.transpose(0, 2).contiguous().transpose(0, 2),
        "sliced": torch.cat([x, x], 2)[..., :6],
        "expanded": x[:1].expand(5, 9, 6),
        "padded-row": torch.cat([x, x], 1)[:, :9],
    }[strange]
    strided = replace(g, x=made.requires_grad_() if made.is_leaf else made)
    strided.weights = {n: t.detach().t().contiguous().t() for n, t in g.weights.items()}
    strided.states = tuple(t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in g.states)
    dense = replace(g, x=made.detach().contiguous())
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(
            oracle.ours(strided).values(), oracle.ours(dense).values(), strict=True))  # fmt: skip
    weights = {n: t.detach().requires_grad_() for n, t in strided.weights.items()}
    found = oracle.gradients(oracle.ours(replace(strided, weights=weights)), weights)
    expected = oracle.gradients(oracle.ours(dense), dense.weights)
    assert all(torch.equal(found[n], expected[n]) for n in found)


def test_ids_with_strides_and_int32() -> None:
    g = oracle.given(BY_NAME["lstm-ids"])
    y = oracle.ours(g)["y"]
    assert torch.equal(oracle.ours(replace(g, x=g.x.t().contiguous().t()))["y"], y)
    assert torch.equal(oracle.ours(replace(g, x=g.x.int()))["y"], y)


def test_the_padding_row_gets_no_gradient() -> None:
    g = oracle.given(replace(BY_NAME["gru-ids"], vocabulary=4))
    found = oracle.gradients(oracle.ours(g, padding_idx=2), g.leaves())["table"]
    expected = oracle.gradients(oracle.ours(g), g.leaves())["table"]
    assert not found[2].any()
    assert expected[2].any()
    rest = [0, 1, 3]
    assert torch.equal(found[rest], expected[rest])
    negative = oracle.gradients(oracle.ours(g, padding_idx=-2), g.leaves())["table"]
    assert torch.equal(negative, found)


@pytest.mark.parametrize("cell", MODULES)
def test_without_a_batch(cell: str) -> None:
    g = oracle.given(replace(BY_NAME[f"{cell}-plain"], batch=1))
    batched = oracle.ours(g)
    single = replace(g, x=g.x.squeeze(0), states=tuple(t.squeeze(1) for t in g.states))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = oracle.ours(single)
        assert torch.equal(found["y"], batched["y"].squeeze(0))
        assert torch.equal(found["hn"], batched["hn"].squeeze(1))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_rounded_recurrent_weights(backend: str | None) -> None:
    g = oracle.given(BY_NAME["lstm-one"])
    with torch.no_grad():
        rounded = oracle.ours(g, weight_dtype=torch.bfloat16, backend=backend)
        exact = oracle.ours(g)["y"]
        g.weights = {
            n: t.bfloat16().float() if "hh" in n and t.dim() == 2 else t for n, t in g.weights.items()
        }
        oracle.assert_close(rounded, oracle.truth(g)[0], oracle.bounds(g.case)[0])
    assert not torch.equal(rounded["y"], exact)
    with pytest.raises(ValueError, match="are for inference"):
        oracle.ours(oracle.given(BY_NAME["lstm-one"]), weight_dtype=torch.bfloat16)


def test_dropout_between_layers() -> None:
    """As torch's: the same share of zeros, scaled, before every layer but the first, in training alone."""
    torch.manual_seed(0)
    ones = [torch.eye(40), torch.zeros(40, 40)]  # rnn_relu: each layer hands on its input
    x = torch.ones(50, 20, 40)
    kwargs = {"cell": "rnn_relu", "dropout": 0.25}
    y, hn = rnn(x, ones * 2, **kwargs, training=True)
    share = float((y == 0).float().mean())
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / y.numel()) ** 0.5  # five standard deviations
    assert torch.equal(y[y != 0], torch.full_like(y[y != 0], 1 / 0.75))
    assert torch.equal(hn[0], torch.ones(20, 40))
    assert torch.equal(rnn(x, ones * 2, **kwargs)[0], x)
    assert not rnn(x, ones * 2, cell="rnn_relu", dropout=1.0, training=True)[0].any()


@pytest.mark.parametrize("name", ["lstm-deep-both", "gru-ids", "rnn_tanh-no-bias", "projected"])
def test_layer_by_layer_is_the_same(name: str) -> None:
    """Dropout splits the stack; with a probability of almost nothing the result is the whole's."""
    g = oracle.given(BY_NAME[name])
    whole, split = oracle.ours(g), oracle.ours(g, dropout=1e-30, training=True)
    assert all(torch.equal(whole[n], split[n]) for n in whole)
    a, b = (oracle.gradients(r, g.leaves()) for r in (whole, split))
    bound = oracle.bounds(g.case)[1]
    assert all(tolerance.recurrent_error(b[n], a[n]) <= bound for n in a)


def test_backends_by_name() -> None:
    g = oracle.given(BY_NAME["lstm-plain"])
    y = oracle.ours(g, backend="native")["y"]
    assert tolerance.error(oracle.ours(g, backend="reference")["y"], y) <= tolerance.recurrent(9, 1, 26)
    with pytest.raises(BackendError, match="compute in float32"):
        oracle.ours(oracle.given(BY_NAME["lstm-plain"], torch.float64), backend="native")
    with pytest.raises(ValueError, match="backend must be one of native, cuda, triton, reference"):
        oracle.ours(g, backend="cudnn")


def test_embedding_is_the_gathered_rows() -> None:
    g = oracle.given(BY_NAME["gru-ids"])
    rows = replace(g, x=F.embedding(g.x, g.table), table=None)
    assert torch.equal(oracle.ours(g)["y"], oracle.ours(rows)["y"])
