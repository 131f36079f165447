"""interfuse.nn.LinearCrossEntropyLoss beside torch's, and optimize() with it."""

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
from interfuse.nn.losses import (
    BCEWithLogitsLoss,
    ContrastiveLoss,
    InfoNCELoss,
    LinearCrossEntropyLoss,
    ReconstructionLoss,
)
from interfuse.ops.losses import contrastive_loss, info_nce

needs_torchs = pytest.mark.skipif(
    not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch has LinearCrossEntropyLoss since 2.13"
)


def drawn() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 6, generator=generator), torch.randint(0, 20, (12,), generator=generator)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"bias": True, "reduction": "none", "label_smoothing": 0.1},
    {"weight": torch.rand(20) + 0.1, "ignore_index": 3, "reduction": "sum"},
]


@needs_torchs
@pytest.mark.parametrize("settings", SETTINGS)
def test_as_torchs_module(settings: dict[str, Any]) -> None:
    x, target = drawn()
    theirs = nn.LinearCrossEntropyLoss(6, 20, **settings)
    ours = LinearCrossEntropyLoss(6, 20, **settings)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    shared = LinearCrossEntropyLoss.from_torch(theirs)
    assert shared.linear.weight is theirs.linear.weight
    right = theirs(x, target)
    truth = torch.autograd.grad(right.sum(), list(theirs.parameters()))
    for module in (ours, shared):
        loss = module(x, target)
        assert tolerance.error(loss, right) <= tolerance.FLOAT32_DEFAULT
        grads = torch.autograd.grad(loss.sum(), list(module.parameters()))
        for got, exact in zip(grads, truth, strict=True):
            assert tolerance.error(got, exact) <= tolerance.FLOAT32_GRADIENT


def test_of_a_linear_layer_and_a_loss() -> None:
    x, target = drawn()
    linear, loss = nn.Linear(6, 20), nn.CrossEntropyLoss(label_smoothing=0.2, ignore_index=2)
    joined = LinearCrossEntropyLoss.from_torch(linear, loss)
    assert joined.linear.weight is linear.weight
    assert tolerance.error(joined(x, target), loss(linear(x), target)) <= tolerance.FLOAT32_DEFAULT
    plain = LinearCrossEntropyLoss.from_torch(linear)
    assert tolerance.error(plain(x, target), F.cross_entropy(linear(x), target)) <= tolerance.FLOAT32_DEFAULT


def test_copies_and_words() -> None:
    module = LinearCrossEntropyLoss(6, 20, weight=torch.ones(20), label_smoothing=0.1)
    x, target = drawn()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x, target), module(x, target))
    assert "reduction='mean', ignore_index=-100, label_smoothing=0.1" in repr(module)


def test_it_trains() -> None:
    torch.manual_seed(0)
    x, target = drawn()
    module = LinearCrossEntropyLoss(6, 20, bias=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    first = float(module(x, target).detach())
    for _ in range(50):
        optimizer.zero_grad()
        module(x, target).backward()
        optimizer.step()
    assert float(module(x, target).detach()) < first / 4


# ---- optimize


class Tagger(nn.Module):
    """A model that computes its own loss."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 8)
        self.loss = nn.LinearCrossEntropyLoss(8, 20, **settings)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(torch.tanh(self.body(x)), target)


def row(model: nn.Module) -> Any:
    return rows(model)["loss"]


@needs_torchs
@pytest.mark.parametrize("settings", SETTINGS)
def test_optimize_replaces_torchs_module(settings: dict[str, Any]) -> None:
    x, target = drawn()
    model = Tagger(**settings)
    fused = interfuse.optimize(copy.deepcopy(model))
    assert tolerance.error(fused(x, target), model(x, target)) <= tolerance.FLOAT32_DEFAULT
    grads = [torch.autograd.grad(m(x, target).sum(), list(m.parameters())) for m in (fused, model)]
    for ours, theirs in zip(*grads, strict=True):
        assert tolerance.error(ours, theirs) <= tolerance.FLOAT32_GRADIENT
    assert row(fused).fused
    assert row(fused).kernel == "native"
    assert interfuse.restore(fused)(x, target).equal(model(x, target))


@needs_torchs
def test_what_the_op_does_not_take_goes_to_torch() -> None:
    x, _ = drawn()
    probabilities = torch.rand(12, 20).softmax(1)
    model = Tagger()
    fused = interfuse.optimize(copy.deepcopy(model))
    assert torch.equal(fused(x, probabilities), model(x, probabilities))
    double = fused.double()
    assert torch.equal(
        double(x.double(), probabilities.double()), model.double()(x.double(), probabilities.double())
    )


@needs_torchs
def test_refusals_say_why() -> None:
    class Mine(nn.LinearCrossEntropyLoss):
        pass

    wide = nn.Sequential(nn.LinearCrossEntropyLoss(6, 20, out_features=(2,)), Mine(6, 20))
    reasons = [row.reason for row in interfuse.explain(wide).rows]
    assert any("its out_features are (2,)" in reason for reason in reasons)
    assert any("not exactly nn.LinearCrossEntropyLoss" in reason for reason in reasons)


# ---- the other losses


def test_the_other_modules_are_their_functions() -> None:
    x, y = torch.randn(6, 5), torch.randn(6, 5)
    target, weight, positive = (y > 0).float(), torch.rand(5), torch.rand(5)
    theirs = nn.BCEWithLogitsLoss(weight, pos_weight=positive)
    ours = BCEWithLogitsLoss(weight, pos_weight=positive)
    ours.load_state_dict(theirs.state_dict())
    assert tolerance.error(ours(x, target), theirs(x, target)) <= tolerance.FLOAT32_DEFAULT
    labels = torch.ones(6)
    assert torch.equal(ContrastiveLoss(2.0, "sum")(x, y, labels), contrastive_loss(x, y, labels, 2.0, "sum"))
    assert torch.equal(InfoNCELoss(0.3, symmetric=False)(x, y), info_nce(x, y, 0.3, symmetric=False))
    both = ReconstructionLoss(["mse", "bce_with_logits"], [1.0, 2.0])
    right = F.mse_loss(x, y) + 2 * F.binary_cross_entropy_with_logits(x, target)
    assert tolerance.error(both([x, x], [y, target]), right) <= tolerance.FLOAT32_DEFAULT


def test_a_learned_temperature() -> None:
    x, y = torch.randn(6, 5), torch.randn(6, 5)
    module = InfoNCELoss(0.3, learned=True)
    assert tolerance.error(module(x, y), info_nce(x, y, 0.3)) <= tolerance.FLOAT32_DEFAULT
    module(x, y).backward()
    assert module.log_temperature.grad is not None
    assert list(module.state_dict()) == ["log_temperature"]
    assert "temperature=0.3, learned=True" in repr(module)
