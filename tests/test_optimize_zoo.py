"""optimize() on public architectures, written as their authors write them (tests/cases/zoo)."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from interfuse.cases.zoo import ENTRIES, Entry
from tolerance import MODEL, MODEL_GRADIENT, TIMES_TORCH
from torch import Tensor, nn

import interfuse
from interfuse.rewrite import measure

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("any_size")
BY_NAME = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES.keys())

# A gradient of which cancelling terms leave next to nothing (a bias before a normalisation, a key's bias
# before softmax) is measured against this part of the gradient of all parameters.
LEAST = 1e-4


def built(entry: Entry, training: bool) -> tuple[nn.Module, tuple[Any, ...]]:
    """Without dropout, which draws in another order in float64."""
    model, inputs = entry.build()
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
        elif isinstance(module, nn.RNNBase):
            module.dropout = 0.0
    return model.train(training), inputs


def step(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The output, and the gradients of everything that can have one; those of inputs are named by number."""
    dtype = next(model.parameters()).dtype
    given = [x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in map(torch.clone, inputs)]
    leaves = {str(i): x for i, x in enumerate(given) if x.requires_grad}
    leaves |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    y = model(*given)
    weight = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64).to(dtype).view_as(y)
    grads = torch.autograd.grad((y * weight).sum(), list(leaves.values()), allow_unused=True)
    return y.detach(), dict(zip(leaves, grads, strict=True))


def distance(got: Tensor, truth: Tensor, least: float = 0.0) -> float:
    got, size = got.double(), max(float(truth.norm()), least)
    return float((got - truth).norm()) / size if got.shape == truth.shape and size else float("inf")


def assert_as_good(
    ours: tuple[Tensor, dict[str, Tensor | None]],
    own: tuple[Tensor, dict[str, Tensor | None]],
    truth: tuple[Tensor, dict[str, Tensor | None]],
) -> None:
    """Ours and the model's own against float64."""
    assert ours[0].stride() == own[0].stride()
    assert distance(ours[0], truth[0]) <= max(MODEL, TIMES_TORCH * distance(own[0], truth[0]))
    whole = float(torch.cat([g.flatten() for g in truth[1].values() if g is not None]).norm())
    for name, exact in truth[1].items():
        mine, theirs = ours[1][name], own[1][name]
        assert (mine is None) == (theirs is None) == (exact is None), name
        if mine is None or theirs is None or exact is None:
            continue
        allowed = max(MODEL_GRADIENT, TIMES_TORCH * distance(theirs, exact, LEAST * whole))
        assert distance(mine, exact, LEAST * whole) <= allowed, name


def everything(model: nn.Module) -> list[tuple[type, dict[str, int]]]:
    """Types, and which objects every module's __dict__ and its inner dictionaries hold."""
    return [
        (type(m), {k: id(v) for k, v in m.__dict__.items()} | {f"state.{k}": id(v) for k, v in _held(m)})
        for m in model.modules()
    ]


def _held(module: nn.Module) -> list[tuple[str, object]]:
    return [item for inner in module.__dict__.values() if isinstance(inner, dict) for item in inner.items()]


@BY_NAME
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_same_answers_gradients_and_model(entry: Entry, training: bool) -> None:
    model, inputs = built(entry, training)
    truth = step(copy.deepcopy(model).double(), inputs)
    state = copy.deepcopy(model.state_dict())
    own = step(model, inputs)
    own_state = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)  # running statistics moved
    before = everything(model)

    interfuse.optimize(model)
    explanation = interfuse.explain(model)
    assert sorted(row.site for row in explanation.fused) == sorted(
        entry.fused + entry.idle + entry.in_inference
    ), explanation
    left = {row.site: row.reason for row in explanation.rows if not row.fused}
    for site, reason in entry.left.items():
        assert reason in left[site]
    assert list(model.state_dict()) == list(state)
    assert_as_good(step(model, inputs), own, truth)
    rows, unpaid = interfuse.explain(model).rows, set(entry.own_in_training)
    assert {row.site for row in rows if row.kernel.startswith("native")} == set(entry.fused) - unpaid
    for row in rows:
        assert row.site not in unpaid or "torch's own functions are faster" in "".join(row.why_not)
    for key, value in model.state_dict().items():  # running statistics, above all
        torch.testing.assert_close(value, own_state[key], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model(*inputs)
    served = {row.site for row in interfuse.explain(model).rows if row.kernel.startswith("native")}
    assert served >= {*entry.fused, *entry.in_inference}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.load_state_dict(state)
        found = [row.site for row in interfuse.explain(other).fused]
        assert sorted(found) == sorted(row.site for row in interfuse.explain(model).fused)
        assert_as_good(step(other, inputs), own, truth)

    interfuse.restore(model)
    model.load_state_dict(state)
    assert everything(model) == before
    again = step(model, inputs)
    assert torch.equal(again[0], own[0])
    for name, grad in own[1].items():
        assert grad is None or torch.equal(grad, again[1][name]), name


@BY_NAME
def test_with_example_inputs(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every site is verified and stands, as if it had been measured to pay; linear layers too."""

    def in_turns(plain: Callable[[], object], fused: Callable[[], object], *rest: Any) -> tuple[float, float]:
        plain()
        fused()
        return 2.0, 1.0

    monkeypatch.setattr(measure, "in_turns", in_turns)
    model, inputs = built(entry, training=True)
    truth = step(copy.deepcopy(model).double(), inputs)
    state = copy.deepcopy(model.state_dict())
    own = step(model, inputs)
    model.load_state_dict(state)
    before = everything(model)
    interfuse.optimize(model, inputs, seconds=0)
    rows = interfuse.explain(model).rows
    fused = [row for row in rows if row.fused]
    assert {row.site for row in fused} >= set(entry.fused)
    for row in rows:
        if not row.fused:
            assert row.inference is None, row  # what was timed stands
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    assert_as_good(step(model, inputs), own, truth)
    interfuse.restore(model)
    assert everything(model) == before


def test_there_are_enough_of_them() -> None:
    assert len(ENTRIES) >= 20
    assert len({entry.model for entry in ENTRIES.values()}) == len(ENTRIES)
