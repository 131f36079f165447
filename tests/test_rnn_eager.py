"""The short eager way of rnn: taken where it may be, not where it may not, and its caches are bounded."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import rnn_oracle as oracle
import tolerance
import torch
from cases.rnn import EDGES
from watch import Calls, Wrapped

import interfuse.nn as inn
from interfuse.bounded_cache import BoundedCache
from interfuse.ops import _rnn_checks, _rnn_eager, _rnn_native

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

BY_NAME = {case.name: case for case in EDGES}
CASE = BY_NAME["lstm-plain"]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """For each call of rnn, whether it took the short way."""
    taken: list[bool] = []
    run = _rnn_eager.run

    def noted(*arguments: Any) -> Any:
        result = run(*arguments)
        taken.append(result is not None)
        return result

    monkeypatch.setattr(_rnn_eager, "run", noted)
    return taken


def test_taken_in_inference_and_training(short: list[bool]) -> None:
    for name in ("lstm-plain", "gru-ids", "lstm-ids", "projected"):
        g = oracle.given(BY_NAME[name])
        oracle.gradients(oracle.ours(g), g.leaves())
        with torch.inference_mode():
            oracle.ours(oracle.given(BY_NAME[name]))
        with torch.no_grad():
            oracle.ours(g)
    module, x = inn.LSTM(4, 7, 2, dropout=0.5).eval(), torch.randn(5, 3, 4)
    module(x)[0].sum().backward()
    inn.GRUCell(4, 7)(x[0])
    with torch.no_grad():
        module(x[:, 0])
        inn.EmbeddingRNN(5, 4, 7)(torch.zeros(5, 3, dtype=torch.int64))
    assert short == [True] * 16


@pytest.mark.parametrize("case", EDGES, ids=lambda case: case.name)
def test_gives_what_the_op_gives(case: Any) -> None:
    g = oracle.given(case)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found = oracle.ours(g)
            with Calls() as calls:
                through_op = oracle.ours(g)
        assert "interfuse.rnn.default" in calls.seen
        assert all(
            torch.equal(found[n], t) and found[n].stride() == t.stride() for n, t in through_op.items()
        )
    first, second = (oracle.gradients(r, g.leaves()) for r in (found, through_op))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_not_taken_where_something_looks_on(short: list[bool]) -> None:
    g = oracle.given(CASE)
    with torch.autocast("cpu"):
        oracle.ours(g)
    with Calls():
        oracle.ours(g)
    with torch.overrides.BaseTorchFunctionMode():
        oracle.ours(g)
    with torch.autograd.forward_ad.dual_level():
        oracle.ours(g)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        oracle.ours(g)
    assert any(event.name == "interfuse::rnn" for event in profile.events())
    torch.vmap(lambda x: oracle.ours(replace(g, x=x))["y"])(g.x[None])
    torch.func.grad(lambda x: oracle.ours(replace(g, x=x))["y"].sum())(g.x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated
        plain = replace(g, weights={n: t.detach() for n, t in g.weights.items()}, states=())
        torch.jit.trace(lambda x: oracle.ours(replace(plain, x=x))["y"], g.x.detach(), check_trace=False)
    assert len(short) >= 8
    assert not any(short)


def test_not_taken_for_tensors_that_are_not_plain(short: list[bool]) -> None:
    g = oracle.given(CASE)
    with torch.no_grad():
        y = oracle.ours(g)["y"]
        negative = torch.complex(g.x, -g.x).conj().imag  # x, as a view that is negated when it is read
        assert negative.is_neg()
        assert torch.equal(oracle.ours(replace(g, x=negative))["y"], y)
        assert torch.equal(oracle.ours(replace(g, x=g.x.as_subclass(Wrapped)))["y"], y)
        assert any("rnn" in name for name in Wrapped.seen)
        weights = {n: t.detach().t().contiguous().t() for n, t in g.weights.items()}
        assert torch.equal(oracle.ours(replace(g, weights=weights))["y"], y)
        weights = {n: t.as_subclass(Wrapped) for n, t in g.weights.items()}
        assert torch.equal(oracle.ours(replace(g, weights=weights))["y"], y)
        states = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in g.states)
        assert torch.equal(oracle.ours(replace(g, states=states))["y"], y)
        oracle.ours(oracle.given(CASE, torch.float64))
        oracle.ours(oracle.given(replace(CASE, batch=0)))
        oracle.ours(g, backend="reference")
    assert short == [True] + [False] * 8


def test_weights_are_checked_on_every_call() -> None:
    """A plan remembers shapes, not tensors: another dtype, shape or layout under the same name is seen."""
    module, x = inn.LSTM(4, 7), torch.randn(5, 3, 4)
    with torch.no_grad():
        y = module(x)[0]
        module.weight_hh_l0.data = module.weight_hh_l0.data.double()
        with pytest.raises(ValueError, match=r"weight_hh_l0 is torch.float64"):
            module(x)
        module.weight_hh_l0.data = module.weight_hh_l0.data.float()
        assert torch.equal(module(x)[0], y)
        module.bias_hh_l0.data = module.bias_hh_l0.data[:21]
        with pytest.raises(ValueError, match=r"bias_hh_l0 must have shape \(28,\)"):
            module(x)
        module.bias_hh_l0.data = torch.zeros(28)
        module.weight_ih_l0.data = module.weight_ih_l0.data.t().contiguous().t()
        assert module(x)[0].shape == (5, 3, 7)


def test_every_cache_keyed_by_shape_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = {
        (_rnn_eager, "_plans"): 5,
        (_rnn_checks, "_problems"): 6,
        (_rnn_native, "_descs"): 7,
        (_rnn_native, "_rows"): 4,
        (_rnn_eager, "_recent"): 3,
    }
    for (module, name), capacity in caches.items():
        assert isinstance(getattr(module, name), BoundedCache)
        monkeypatch.setattr(module, name, BoundedCache(capacity))
    for size in range(1, 20):
        g = oracle.given(replace(CASE, hidden=size))
        oracle.gradients(oracle.ours(g), g.leaves())
        with Calls():
            oracle.ours(g)
        with torch.no_grad():
            oracle.ours(g)
    for (module, name), capacity in caches.items():
        assert len(getattr(module, name)) == capacity


def test_saved_tensor_hooks_are_called_and_may_change_the_memory() -> None:
    """What comes back from the hooks is checked before its pointer is used."""
    g = oracle.given(CASE)
    expected = oracle.gradients(oracle.ours(g), g.leaves())
    packed: list[torch.Size] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        packed.append(t.shape)
        return t.clone() if t.dim() < 2 else t.transpose(-1, -2).contiguous().transpose(-1, -2)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        found = oracle.ours(g)
    for name, grad in oracle.gradients(found, g.leaves()).items():
        assert torch.equal(grad, expected[name])
    assert len(packed) == 8  # x, h0, c0, four weights and the reserve
    for change in (lambda t: t.double(), lambda t: t[..., :1]):
        with torch.autograd.graph.saved_tensors_hooks(change, lambda t: t):
            y = oracle.ours(g)["y"]
        with pytest.raises(ValueError, match="rnn: "):
            y.sum().backward()


def test_an_input_changed_before_the_backward_is_noticed() -> None:
    g = oracle.given(CASE)
    y = oracle.ours(g)["y"]
    with torch.no_grad():
        g.weights["weight_hh_l0"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_output_may_be_changed_before_the_backward() -> None:
    """The kernels keep their own states: nothing reads y again."""
    g = oracle.given(CASE)
    y = oracle.ours(g)["y"]
    kept = torch.autograd.grad(y.sum(), g.x, retain_graph=True)[0]
    with torch.no_grad():
        y.zero_()
    assert torch.equal(torch.autograd.grad(y.sum(), g.x)[0], kept)


def test_the_call_before_is_no_shortcut_past_a_check() -> None:
    """An inference call compares its tensors with the call before; what differs goes the long way."""
    module, x = inn.LSTM(4, 7, 2), torch.randn(5, 3, 4)
    state = (torch.randn(2, 3, 7), torch.randn(2, 3, 7))
    lengths = torch.tensor([5, 2, 0])
    with torch.no_grad():
        plain = module(x)[0]
        given = {"state": (state,), "lengths": (None, lengths), "both": (state, lengths)}
        expected = {name: module(x, *more)[0] for name, more in given.items()}
        for _ in range(2):
            assert torch.equal(module(x)[0], plain)
            assert torch.equal(module(x, state)[0], expected["state"])
            assert torch.equal(module(x, None, lengths)[0], expected["lengths"])
            assert torch.equal(module(x, state, lengths)[0], expected["both"])
            assert torch.equal(module(x, list(state))[0], expected["state"])
        with pytest.raises(ValueError, match="length of sequence 1 is 9"):
            module(x, None, torch.tensor([5, 9, 0]))
        with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
            module(x, (state[0][:, :2], state[1]))
        with torch.autocast("cpu"):
            assert module(x)[0].dtype == torch.bfloat16
        module.weight_hh_l1.data = module.weight_hh_l1.data.clone().zero_()
        assert not torch.equal(module(x)[0], plain)
        module.weight_hh_l1.data = torch.randn(28, 8)[:, :7]
        again = module(x)[0]
    assert tolerance.error(again, module(x)[0]) == 0.0  # in training
