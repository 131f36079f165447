"""optimize() and nn.Linear: tried where there are example inputs, and looked at anew at every call."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import tolerance
import torch
import torch.nn.functional as F
from explained import rows
from torch import Tensor, nn

import interfuse
from interfuse.rewrite.linear import Linear


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 9)
        self.second = nn.Linear(9, 7, bias=False)
        self.last = nn.Sequential(nn.Linear(7, 5), nn.LeakyReLU(0.2), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        return self.last(torch.tanh(self.second(x)))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every site stands, as if it had been measured to pay."""
    match = Linear.match
    monkeypatch.setattr(Linear, "match", lambda *args: match(*args)._replace(enabled=True))


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("shape", [(12,), (4, 12), (2, 3, 12)], ids=str)
@pytest.mark.usefixtures("always")
def test_same_answers_and_gradients(shape: tuple[int, ...]) -> None:
    plain, x = Head(), torch.randn(shape)
    fused = interfuse.optimize(copy.deepcopy(plain))
    fused(x)
    found = rows(fused)
    assert {name: row.calls for name, row in found.items()} == {
        "first": "Linear -> gelu",
        "second": "Linear -> tanh",
        "last.0": "Linear -> LeakyReLU",
        "last.2": "Linear",
    }
    assert all(row.fused for row in found.values())
    with torch.no_grad():
        assert tolerance.error(fused(x), plain.double()(x.double())) <= tolerance.FLOAT32_DEFAULT
    plain.float()
    for ours, theirs in zip(gradients(fused, x), gradients(plain, x), strict=True):
        assert tolerance.error(ours, theirs) <= tolerance.FLOAT32_GRADIENT
    again = pickle.loads(pickle.dumps(fused))
    assert torch.equal(again(x), fused(x))
    assert list(fused.state_dict()) == list(plain.state_dict())


def test_without_example_inputs_it_is_left_alone() -> None:
    model = interfuse.optimize(Head())
    assert not any(row.fused for row in rows(model).values())


def test_with_example_inputs_it_is_measured() -> None:
    model, x = Head(), torch.randn(4, 12)
    expected = model(x)
    interfuse.optimize(model, x, seconds=0.3)
    assert tolerance.error(model(x), expected) <= tolerance.FLOAT32_DEFAULT
    assert all(row.inference is not None for row in rows(model).values())


@pytest.mark.usefixtures("always")
def test_what_changes_later_is_honoured() -> None:
    model, x, seen = interfuse.optimize(Head()), torch.randn(4, 12), []
    before = model(x)
    handle = model.first.register_forward_hook(lambda _m, _a, y: seen.append(y.shape))
    assert tolerance.error(model(x), before) <= tolerance.FLOAT32_DEFAULT
    assert seen == [(4, 9)]
    handle.remove()
    model.last[1] = nn.ReLU()
    assert tolerance.error(model(x), interfuse.restore(copy.deepcopy(model))(x)) <= tolerance.FLOAT32_DEFAULT
    model.double()
    assert model(x.double()).dtype == torch.float64
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        model(torch.randn(4, 11).double())


@pytest.mark.usefixtures("always")
def test_under_autocast() -> None:
    plain, x = Head(), torch.randn(4, 12)
    fused = interfuse.optimize(copy.deepcopy(plain))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fused(x), plain(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert (
        tolerance.error(ours, theirs) <= 8 * tolerance.BFLOAT16
    )  # four layers' roundings in each of the two


class Mine(nn.Linear):
    pass


QCONFIG = torch.ao.quantization.get_default_qat_qconfig("x86")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Mine(4, 3), "its type Mine is not exactly nn.Linear"),
        (lambda: nn.LazyLinear(3), "has no weight yet"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), "it is parametrised"),
        (lambda: nn.Linear(4, 3, dtype=torch.complex64), "its weight is torch.complex64"),
        (lambda: torch.ao.nn.quantized.dynamic.Linear(4, 3), "Linear is a quantised module"),
        (lambda: torch.ao.nn.quantized.dynamic.LSTM(4, 3), "LSTM is a quantised module"),
        (lambda: torch.ao.nn.quantized.Conv2d(4, 3, 3), "Conv2d is a quantised module"),
        (lambda: torch.ao.nn.qat.Conv2d(4, 3, 3, qconfig=QCONFIG), "Conv2d is a quantised module"),
        (lambda: torch.ao.nn.quantizable.MultiheadAttention(4, 2), "Attention is a quantised module"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.usefixtures("always")
def test_refusals(make: Any, reason: str) -> None:
    model = interfuse.optimize(nn.Sequential(make(), nn.ReLU()))
    row = rows(model)["0"]  # a quantised module's parts may have rows of their own
    assert not row.fused
    assert reason in row.reason
