"""linear_cross_entropy's values and gradients against float64, in every memory layout."""

from __future__ import annotations

from dataclasses import replace

import losses_oracle as oracle
import pytest
import tolerance
import torch
import torch.nn.functional as F
from cases.losses import REDUCTIONS, SMALL, Case
from torch import Tensor

from interfuse.ops.losses import linear_cross_entropy

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("poisoned_outputs")]

named_cases = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
# With one class, loss and gradients are zero, and rounding is all that there is to see.
VISIBLE = [case for case in SMALL if case.classes > 1]


@pytest.mark.parametrize("case", VISIBLE, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_named_cases(case: Case, dtype: torch.dtype) -> None:
    drawn = oracle.tensors(case, dtype=dtype)
    training = drawn.training()
    loss = oracle.run(case, training)
    assert loss.dtype == dtype
    value, *grads = oracle.with_gradients(loss, training)
    truth, *true_grads = oracle.truth(case, drawn)
    assert tolerance.error(value, truth) <= tolerance.output(dtype)
    with torch.no_grad():
        assert torch.equal(oracle.run(case, drawn), value)
    for ours, right in zip(grads, true_grads, strict=True):
        assert ours.is_contiguous()
        assert tolerance.error(ours, right) <= tolerance.gradient(dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_class_is_certain(reduction: str) -> None:
    drawn = oracle.tensors(Case("one", 6, 8, 1)).training()
    loss = oracle.run(Case("one", 6, 8, 1, reduction=reduction), drawn)
    grads = torch.autograd.grad(loss.sum(), drawn.leaves())
    assert all(float(t.detach().abs().max()) < 1e-5 for t in (loss, *grads))


@pytest.mark.parametrize(
    "case",
    [Case("deep", 300, 512, 4000), Case("wide", 64, 64, 30_000), Case("high", 3000, 32, 100)],
    ids=lambda case: case.name,
)
def test_error_is_at_most_twice_torchs(case: Case) -> None:
    drawn = oracle.tensors(case)
    truth = oracle.truth(case, drawn)
    errors = []
    for run in (oracle.run, oracle.torchs):
        training = drawn.training()
        results = oracle.with_gradients(run(case, training), training)
        errors.append([tolerance.error(a, b) for a, b in zip(results, truth, strict=True)])
    for ours, torchs in zip(*errors, strict=True):
        assert ours <= tolerance.beside_torch(torchs, least=2.0**-23)


def test_logits_far_apart() -> None:
    """Exponentials that vanish or would overflow, in the first classes and in the last."""
    weight = torch.zeros(400, 4)
    weight[3, 0], weight[399, 1], weight[200, 2] = 500.0, 400.0, -1000.0
    x = torch.eye(4)[:3].contiguous().requires_grad_()
    weight.requires_grad_()
    target = torch.tensor([3, 0, 200])
    loss = linear_cross_entropy(x, weight, target, reduction="none")
    right = F.cross_entropy(x.double() @ weight.double().T, target, reduction="none")
    assert tolerance.error(loss, right) <= tolerance.FLOAT32_DEFAULT
    ours = torch.autograd.grad(loss.sum(), (x, weight))
    for got, truth in zip(ours, torch.autograd.grad(right.sum(), (x, weight)), strict=True):
        assert tolerance.error(got, truth) <= tolerance.FLOAT32_GRADIENT


@pytest.mark.parametrize("wanted", range(3))
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_some_gradients_alone(wanted: int, reduction: str) -> None:
    case = Case("some", 40, 20, 150, reduction=reduction)
    drawn = oracle.tensors(case)
    truth = oracle.truth(case, drawn)
    leaf = drawn.leaves()[wanted].requires_grad_()
    loss = oracle.run(case, drawn)
    (ours,) = torch.autograd.grad(loss, [leaf], oracle.grad_loss(loss))
    assert tolerance.error(ours, truth[1 + wanted]) <= tolerance.FLOAT32_GRADIENT


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_second_backward_gives_the_same(reduction: str) -> None:
    case = Case("second", 40, 20, 150, reduction=reduction)
    drawn = oracle.tensors(case).training()
    loss = oracle.run(case, drawn).sum()
    loss.backward(retain_graph=True)
    first = [t.grad.clone() for t in drawn.leaves()]
    loss.backward()  # adds to .grad in place
    assert all(torch.equal(t.grad, 2 * g) for t, g in zip(drawn.leaves(), first, strict=True))


def test_leading_dimensions() -> None:
    drawn = oracle.tensors(Case("leading", 24, 10, 30))
    x, target = drawn.input.view(2, 3, 4, 10), drawn.target.view(2, 3, 4)
    settings = {"linear_bias": drawn.linear_bias, "reduction": "none"}
    flat = linear_cross_entropy(drawn.input, drawn.linear_weight, drawn.target, **settings)
    assert torch.equal(linear_cross_entropy(x, drawn.linear_weight, target, **settings).flatten(), flat)
    one = linear_cross_entropy(x[0, 0, 0], drawn.linear_weight, target[0, 0, 0], **settings)
    assert torch.equal(one, flat[0])


# ---- labels


def test_all_kinds_of_integers() -> None:
    drawn = oracle.tensors(Case("integers", 8, 10, 30))
    losses = [
        linear_cross_entropy(drawn.input, drawn.linear_weight, drawn.target.to(dtype))
        for dtype in (torch.int64, torch.int32, torch.uint8)
    ]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("ignore_index", [-100, 4])
def test_a_mean_of_nothing_is_nan_and_its_gradients_are_zero(ignore_index: int) -> None:
    drawn = oracle.tensors(Case("nothing", 6, 10, 30)).training()
    target = torch.full((6,), ignore_index)
    loss = linear_cross_entropy(drawn.input, drawn.linear_weight, target, ignore_index=ignore_index)
    assert bool(loss.isnan())
    for backend in ("native", "reference"):
        loss = linear_cross_entropy(
            drawn.input, drawn.linear_weight, target, ignore_index=ignore_index, backend=backend
        )
        grads = torch.autograd.grad(loss, (drawn.input, drawn.linear_weight))
        assert all(bool((g == 0).all()) for g in grads)


def test_rows_that_do_not_count_have_no_gradient() -> None:
    case = Case("ignored", 20, 10, 30, label_smoothing=0.1, ignored=7)
    drawn = oracle.tensors(case).training()
    (grad,) = torch.autograd.grad(oracle.run(case, drawn), [drawn.input])
    assert bool((grad[:7] == 0).all())
    assert bool((grad[7:] != 0).any(1).all())


# ---- memory


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values elsewhere in memory."""
    wide = torch.full((x.shape[0], x.shape[1] + 3), float("nan"))
    wide[:, :-3] = x
    strided = torch.full((x.shape[0], 2 * x.shape[1]), float("nan"))
    strided[:, ::2] = x
    room = torch.full((x.numel() + 1,), float("nan"))
    room[1:] = x.flatten()
    return {
        "rows apart": wide[:, :-3],
        "columns apart": strided[:, ::2],
        "misaligned": room[1:].view(x.shape),
        "turned": x.T.contiguous().T,
    }


@pytest.mark.parametrize("layout", ["rows apart", "columns apart", "misaligned", "turned"])
@pytest.mark.parametrize("which", ["input", "linear_weight"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_any_strides(layout: str, which: str, reduction: str) -> None:
    case = Case("strides", 35, 21, 140, reduction=reduction)
    drawn = oracle.tensors(case)
    other = drawn._replace(**{which: layouts(getattr(drawn, which))[layout]})
    results = []
    for t in (drawn, other):
        leaves = [leaf.detach().requires_grad_() for leaf in t.leaves()]
        given = t._replace(input=leaves[0], linear_weight=leaves[1], linear_bias=leaves[2])
        results.append(oracle.with_gradients(oracle.run(case, given), given))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_repeated_rows() -> None:
    x, weight = torch.randn(1, 30).expand(7, 30), torch.randn(50, 30)
    loss = linear_cross_entropy(x, weight, torch.full((7,), 3), reduction="none")
    assert torch.equal(loss, loss[:1].expand(7))


def test_no_logits_in_memory() -> None:
    """What a training step allocates through torch is as large as its gradients."""
    case = Case("memory", 200, 16, 5000)
    drawn = oracle.tensors(case).training()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        oracle.run(case, drawn).backward()
    largest = max(event.cpu_memory_usage for event in seen.events())
    gradients = 4 * (drawn.input.numel() + drawn.linear_weight.numel() + 5000)
    assert largest < 2.5 * gradients < 4 * case.rows * case.classes


# ---- NaN and infinities


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("where", ["input", "linear_weight", "linear_bias"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("sizes", [(9, 20, 150), (130, 70, 4001)], ids=["few", "units"])
def test_nan_and_infinity_pass_as_in_torch(
    value: float, where: str, reduction: str, sizes: tuple[int, int, int]
) -> None:
    case = Case("special", *sizes, reduction=reduction)
    drawn = oracle.tensors(case)
    getattr(drawn, where).view(-1)[5] = value
    results = []
    for backend in ("native", "reference"):
        training = drawn.training()
        results.append(oracle.with_gradients(oracle.run(case, training, backend=backend), training))
    for ours, torchs in zip(*results, strict=True):
        assert torch.equal(ours.isfinite(), torchs.isfinite())


def test_a_class_that_is_ruled_out() -> None:
    """A bias of minus infinity, for the first classes too."""
    drawn = oracle.tensors(Case("masked", 9, 20, 300))
    drawn.linear_bias[:140] = -float("inf")
    drawn = drawn._replace(target=drawn.target.clamp(min=140))
    truth = oracle.truth(Case("masked", 9, 20, 300), drawn)
    training = drawn.training()
    ours = oracle.with_gradients(oracle.run(Case("masked", 9, 20, 300), training), training)
    assert tolerance.error(ours[0], truth[0]) <= tolerance.FLOAT32_DEFAULT
    for got, right in zip(ours[1:], truth[1:], strict=True):
        assert tolerance.error(got, right) <= tolerance.FLOAT32_GRADIENT


def test_integers_are_exact() -> None:
    """Logits that are all alike: every probability is the same power of two."""
    classes = 256
    weight = torch.zeros(classes, 8, requires_grad=True)
    x = torch.randint(-3, 4, (64, 8)).float()
    target = torch.arange(64)
    linear_cross_entropy(x, weight, target, reduction="sum").backward()
    expected = x.sum(0).div(classes).expand(classes, 8).clone()
    expected[:64] -= x
    assert torch.allclose(weight.grad, expected, rtol=1e-6, atol=1e-6)


@named_cases
def test_fake_results_look_like_the_real_ones(case: Case) -> None:
    drawn = oracle.tensors(case)
    real = oracle.run(case, drawn)
    meta = oracle.Drawn(*(None if t is None else t.to("meta") for t in drawn))
    made = oracle.run(replace(case), meta)
    assert (made.shape, made.stride(), made.dtype) == (real.shape, real.stride(), real.dtype)
