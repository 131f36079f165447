"""The short way of eager calls to the losses of two tensors: the same answers as by the registered ops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import tolerance
import torch
import torch.nn.functional as F
from losses_oracle import contrastive, draw, gradients, similarities
from watch import Calls

from interfuse.ops import _losses_info_nce as few
from interfuse.ops import _losses_pairs_eager as eager
from interfuse.ops.losses import (
    binary_cross_entropy_with_logits,
    contrastive_loss,
    info_nce,
    reconstruction_loss,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("poisoned_outputs")]

REDUCTION = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
TARGET, LABELS = draw(6, 17, seed=5).sigmoid(), torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.0])
ROW = draw(17, seed=6).abs()


def leaves() -> list[Tensor]:
    return [draw(6, 17).requires_grad_(), draw(6, 17, seed=1).requires_grad_()]


def bce(x: Tensor, y: Tensor, reduction: str) -> Tensor:
    return binary_cross_entropy_with_logits(x, TARGET, ROW, reduction, TARGET, backend="native")


def squared(x: Tensor, y: Tensor, reduction: str) -> Tensor:
    short = eager.elementwise("mse", x, TARGET, None, None, reduction, "native")
    if short is not None:
        return short
    return torch.ops.interfuse.elementwise_loss.default(x, TARGET, None, None, "mse", reduction, "")


def pairs(x: Tensor, y: Tensor, reduction: str) -> Tensor:
    return contrastive_loss(x, y, LABELS, 9.0, reduction)


def chosen(x: Tensor, y: Tensor, reduction: str) -> Tensor:
    return info_nce(x, y, 0.5, reduction=reduction)


def right(ours: Callable[..., Tensor], x: Tensor, y: Tensor, reduction: str) -> Tensor:
    """By torch's functions."""
    target = TARGET.to(x.dtype)
    if ours is bce:
        return F.binary_cross_entropy_with_logits(
            x, target, ROW.to(x.dtype), reduction=reduction, pos_weight=target
        )
    if ours is squared:
        return F.mse_loss(x, target, reduction=reduction)
    if ours is pairs:
        return contrastive(x, y, LABELS.to(x.dtype), 9.0, reduction)
    return similarities(x, y, 0.5, True, True, reduction)


LOSSES = pytest.mark.parametrize("loss", [bce, squared, pairs, chosen])


def wanted(loss: Callable[..., Tensor], xs: list[Tensor]) -> list[Tensor]:
    return xs[:1] if loss in (bce, squared) else xs


@LOSSES
@REDUCTION
def test_short_and_long_way_agree(loss: Callable[..., Tensor], reduction: str) -> None:
    """A mode that looks on is what sends a call the long way."""
    xs = leaves()
    with Calls() as calls:
        long = gradients(loss(*xs, reduction), wanted(loss, xs))
    assert any(name.startswith("interfuse.") for name in calls.seen)
    short = gradients(loss(*xs, reduction), wanted(loss, xs))
    exact = [x.double().detach().requires_grad_() for x in xs]
    truth = gradients(right(loss, *exact, reduction), wanted(loss, exact))
    for i, (a, b) in enumerate(zip(short, truth, strict=True)):
        assert tolerance.error(a, b) <= (tolerance.FLOAT32_GRADIENT if i else tolerance.FLOAT32_DEFAULT)
        assert tolerance.error(a, long[i]) <= tolerance.FLOAT32_GRADIENT
    with torch.no_grad():
        assert torch.equal(loss(*xs, reduction), short[0])


@LOSSES
@REDUCTION
def test_saved_tensors_that_come_back_otherwise(loss: Callable[..., Tensor], reduction: str) -> None:
    xs = leaves()
    plain = gradients(loss(*xs, reduction), wanted(loss, xs))

    def strided(t: Tensor) -> Tensor:
        return torch.stack([t, t], -1)[..., 0]

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, strided):
        hooked = gradients(loss(*xs, reduction), wanted(loss, xs))
    for a, b in zip(hooked, plain, strict=True):
        assert tolerance.error(a, b) <= tolerance.FLOAT32_DEFAULT


@LOSSES
@REDUCTION
def test_second_derivatives(loss: Callable[..., Tensor], reduction: str) -> None:
    results = []
    for dtype in (torch.float32, torch.float64):
        xs = [x.detach().to(dtype).requires_grad_() for x in leaves()]
        value = loss(*xs, reduction) if dtype == torch.float32 else right(loss, *xs, reduction)
        grads = torch.autograd.grad(value.square().sum(), wanted(loss, xs), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), wanted(loss, xs)))
    for a, b in zip(*results, strict=True):
        assert tolerance.error(a, b) <= 4 * tolerance.FLOAT32_GRADIENT


@LOSSES
def test_several_gradients_at_once_and_again(loss: Callable[..., Tensor]) -> None:
    xs = leaves()
    value, each = loss(*xs, "none"), torch.eye(6)
    if loss in (bce, squared):
        each = torch.stack([draw(6, 17, seed=i) for i in range(3)])
    one = [torch.autograd.grad(value, wanted(loss, xs), g, retain_graph=True) for g in each]
    together = torch.autograd.grad(value, wanted(loss, xs), each, is_grads_batched=True, retain_graph=True)
    for i, found in enumerate(together):
        assert tolerance.error(found, torch.stack([g[i] for g in one])) <= tolerance.FLOAT32_GRADIENT
    again = torch.autograd.grad(value, wanted(loss, xs), each[0])
    assert all(torch.equal(a, b) for a, b in zip(again, one[0], strict=True))


@pytest.mark.parametrize("kind", ["bce_with_logits", "mse"])
def test_a_small_training_step_is_torchs(kind: str) -> None:
    """And one of enough elements is not."""
    function = F.mse_loss if kind == "mse" else F.binary_cross_entropy_with_logits
    for count, alike in ((64, True), (eager.LEAST_TRAINED[kind], False)):
        x, target = draw(count).requires_grad_(), draw(count, seed=1).sigmoid()
        ours, torchs = reconstruction_loss([x], [target], kind), function(x, target)
        assert tolerance.error(ours, torchs.double()) <= tolerance.FLOAT32_DEFAULT
        assert ("_Elementwise" in str(graph_of(ours))) is not alike


def graph_of(loss: Tensor) -> list[str]:
    """Names of the steps of autograd behind it."""
    found, left = [], [loss.grad_fn]
    while left:
        step = left.pop()
        if step is not None:
            found.append(step.name())
            left += [before for before, _ in step.next_functions]
    return found


@pytest.mark.parametrize("normalize", [False, True])
def test_info_nce_of_few_rows_with_one_gradient_wanted_and_a_row_of_zeros(normalize: bool) -> None:
    a, b = draw(5, 7), draw(5, 7, seed=1)
    a[2] = 0
    for which in range(2):
        xs = [a.clone().requires_grad_(which == 0), b.clone().requires_grad_(which == 1)]
        exact = [x.detach().double().requires_grad_(x.requires_grad) for x in xs]
        found = gradients(info_nce(*xs, 0.5, normalize=normalize), [xs[which]])
        truth = gradients(similarities(*exact, 0.5, normalize, True, "mean"), [exact[which]])
        if normalize and which == 0:  # the length of a row of zeros has no direction
            found[1][2] = truth[1][2] = 0
        for ours, theirs in zip(found, truth, strict=True):
            assert tolerance.error(ours, theirs) <= tolerance.FLOAT32_GRADIENT


@pytest.mark.parametrize("temperature", [0.07, 0.02])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("apart", [0.0, 1.0])
def test_info_nce_where_exponentials_are_summed_as_they_are_and_where_not(
    temperature: float, symmetric: bool, apart: float
) -> None:
    """Rows alike, whose loss is next to nothing, and rows that have nothing to do with each other."""
    a = draw(40, 64)
    xs = [a.requires_grad_(), (a.detach() + apart * draw(40, 64, seed=1)).requires_grad_()]
    learned = torch.tensor(temperature).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (*xs, learned)]
    found = gradients(info_nce(*xs, learned, symmetric=symmetric), [*xs, learned])
    truth = gradients(similarities(*exact[:2], exact[2], True, symmetric, "mean"), exact)
    torchs = gradients(similarities(*xs, learned, True, symmetric, "mean"), [*xs, learned])
    for ours, theirs, right in zip(found, torchs, truth, strict=True):
        bound = max(tolerance.TIMES_TORCH * tolerance.error(theirs, right), 4 * tolerance.FLOAT32_GRADIENT)
        assert tolerance.error(ours, right) <= bound


@pytest.mark.parametrize("normalize", [False, True])
def test_info_nce_of_no_rows(normalize: bool) -> None:
    none = torch.zeros(0, 4, requires_grad=True)
    loss = info_nce(none, none.detach(), normalize=normalize, reduction="sum")
    assert float(loss.detach()) == 0
    assert torch.autograd.grad(loss, none)[0].shape == (0, 4)


def test_info_nce_of_many_rows_keeps_no_matrix() -> None:
    for rows, matrix in ((few.MOST_KEPT, True), (few.MOST_KEPT + 1, False)):
        saved: list[int] = []

        def see(t: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
            info_nce(*(draw(rows, 4, seed=i).requires_grad_() for i in range(2)))
        assert (max(saved) >= rows * rows) is matrix


@pytest.mark.parametrize("temperature", [-0.5, 1e-35])
def test_info_nce_of_a_temperature_that_is_not_for_the_core(temperature: float) -> None:
    """A learned one may go anywhere; the loss is then torch's."""
    x, y = leaves()
    t = torch.tensor(temperature, dtype=torch.float32)
    right = similarities(x.double(), y.double(), t.double(), True, True, "mean")
    assert tolerance.error(info_nce(x, y, t), right) <= tolerance.FLOAT32_DEFAULT
