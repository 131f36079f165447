"""The Triton kernels of the losses of two tensors against float64.

Compiled on a GPU, interpreted everywhere (triton_runs.py). Sizes are tiny because the interpreter takes
milliseconds an operation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import tolerance
import torch
import torch.nn.functional as F
from losses_oracle import contrastive, draw, gradients, similarities
from triton_runs import DEVICE, by_host, on_device, run_interpreted

from interfuse.ops._losses_problem import PairProblem
from interfuse.ops.losses import binary_cross_entropy_with_logits, contrastive_loss, info_nce

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

pytest.importorskip("triton", reason="triton is not installed.")

DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
REDUCTION = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
# A result rounded to 11 bits, and similarities' gradients of 11 bits that a product reads.
FLOAT16, FLOAT16_GRADIENT = 2.0**-11, 8 * 2.0**-11


def compare(
    ours: Callable[..., Tensor],
    right: Callable[..., Tensor],
    tensors: list[Tensor],
    dtype: torch.dtype,
    slack: float = 1.0,
) -> None:
    """Both of the tensors rounded to `dtype`, the second in float64 on the CPU."""
    rounded = [t.to(dtype) for t in tensors]
    leaves = [t.detach().clone().to(DEVICE).requires_grad_() for t in rounded]
    exact = [t.double().requires_grad_() for t in rounded]
    got, truth = gradients(ours(*leaves), leaves), gradients(right(*exact), exact)
    half = dtype == torch.float16
    assert tolerance.error(got[0].cpu(), truth[0]) <= (FLOAT16 if half else tolerance.output(dtype))
    bound = FLOAT16_GRADIENT if half else slack * tolerance.gradient(dtype)
    for a, b in zip(got[1:], truth[1:], strict=True):
        assert tolerance.error(a.cpu(), b) <= bound


# A number, a tail, a row's several blocks and programs, several rows.
@on_device
@DTYPE
@REDUCTION
@pytest.mark.parametrize("shape", [(), (17,), (2, 3, 33), (5, 80)], ids=str)
def test_binary_cross_entropy(shape: tuple[int, ...], reduction: str, dtype: torch.dtype) -> None:
    x, target = draw(*shape, scale=4), draw(*shape, seed=1).sigmoid().to(dtype)
    compare(
        lambda x: binary_cross_entropy_with_logits(
            x, target.to(DEVICE), reduction=reduction, backend="triton"
        ),
        lambda x: F.binary_cross_entropy_with_logits(x, target.double(), reduction=reduction),
        [x],
        dtype,
    )


@on_device
@REDUCTION
@pytest.mark.parametrize(
    ("weight", "positive"),
    [((33,), None), ((3, 1), (33,)), ((3, 33), (3, 1)), ((), (2, 1, 33)), (None, ())],
    ids=str,
)
def test_weights_of_every_shape(
    weight: tuple[int, ...] | None, positive: tuple[int, ...] | None, reduction: str
) -> None:
    x, target = draw(2, 3, 33), draw(2, 3, 33, seed=1).sigmoid()
    w, p = (None if shape is None else draw(*shape, seed=2).abs() for shape in (weight, positive))

    def on(t: Tensor | None, to: str | torch.dtype) -> Tensor | None:
        return None if t is None else t.to(to)

    compare(
        lambda x: binary_cross_entropy_with_logits(
            x, target.to(DEVICE), on(w, DEVICE), reduction, on(p, DEVICE), backend="triton"
        ),
        lambda x: F.binary_cross_entropy_with_logits(
            x, target.double(), on(w, torch.double), reduction=reduction, pos_weight=on(p, torch.double)
        ),
        [x],
        torch.float32,
    )


@on_device
@DTYPE
@REDUCTION
def test_squared_error(reduction: str, dtype: torch.dtype) -> None:
    target = draw(3, 50, seed=1).to(dtype)
    op = torch.ops.interfuse.elementwise_loss.default
    compare(
        lambda x: op(x, target.to(DEVICE), None, None, "mse", reduction, "triton").to(dtype),
        lambda x: F.mse_loss(x, target.double(), reduction=reduction),
        [draw(3, 50)],
        dtype,
    )


@on_device
def test_far_from_zero_and_of_nan_and_of_nothing() -> None:
    x = torch.tensor([-200.0, 200.0, float("nan"), 0.0, -1e-8, 90.0, -12.0])
    target = torch.tensor([0.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0])
    settings = {"reduction": "none", "backend": "triton"}
    ours = binary_cross_entropy_with_logits(x.to(DEVICE), target.to(DEVICE), **settings).cpu()
    right = F.binary_cross_entropy_with_logits(x.double(), target.double(), reduction="none")
    assert tolerance.error(ours, right) <= tolerance.FLOAT32_DEFAULT
    assert tolerance.error(ours[-1:], right[-1:]) <= tolerance.FLOAT32_DEFAULT
    none = torch.empty(0, 4, device=DEVICE)
    for reduction, loss in (("mean", float("nan")), ("sum", 0.0)):
        got = binary_cross_entropy_with_logits(none, none, reduction=reduction, backend="triton")
        assert tolerance.error(got.cpu(), torch.tensor(loss)) == 0


@on_device
@DTYPE
@REDUCTION
@pytest.mark.parametrize("shape", [(1, 1), (7, 17), (2, 3, 33)], ids=str)
def test_contrastive(shape: tuple[int, ...], reduction: str, dtype: torch.dtype) -> None:
    scale = shape[-1] ** -0.5
    target = (draw(*shape[:-1], seed=2) > 0).float()
    compare(
        lambda a, b: contrastive_loss(a, b, target.to(DEVICE), 1.5, reduction, backend="triton"),
        lambda a, b: contrastive(a, b, target.double(), 1.5, reduction),
        [draw(*shape, scale=scale), draw(*shape, seed=1, scale=scale)],
        dtype,
    )


@on_device
def test_rows_that_are_alike_and_rows_of_nan() -> None:
    a = draw(4, 9).to(DEVICE).requires_grad_()
    b = a.detach().clone()
    b[2, 3] = float("nan")
    b.requires_grad_()
    target = torch.tensor([0.0, 1.0, 0.0, 1.0], device=DEVICE)
    loss = contrastive_loss(a, b, target, reduction="none", backend="triton")
    assert loss.isnan().tolist() == [False, False, True, False]
    assert loss[[0, 1, 3]].tolist() == [0.5, 0.0, 0.0]
    for grad in torch.autograd.grad(loss.sum(), (a, b)):
        assert bool((grad[[0, 1, 3]] == 0).all())


# A tile, several tiles of rows and of features, a tail, and no rows at all.
@on_device
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("rows", "features", "reduction", "dtype"),
    [
        (35, 20, "none", torch.float32),
        (35, 20, "mean", torch.float32),
        (16, 33, "sum", torch.float32),
        (1, 5, "mean", torch.float32),
        (0, 5, "sum", torch.float32),
        (20, 20, "mean", torch.bfloat16),
        (20, 20, "none", torch.float16),
    ],
    ids=str,
)
def test_info_nce(rows: int, features: int, reduction: str, dtype: torch.dtype, symmetric: bool) -> None:
    a = draw(rows, features, scale=features**-0.5)
    b = draw(rows, features, seed=1) + a
    settings = {"normalize": False, "symmetric": symmetric, "reduction": reduction}
    compare(
        lambda a, b: info_nce(a, b, 0.5, **settings, backend="triton"),
        lambda a, b: similarities(a, b, 0.5, **settings),
        [a, b],
        dtype,
        slack=2,  # dividing by the temperature rounds once more
    )


@on_device
def test_info_nce_learns_its_temperature_and_takes_any_strides() -> None:
    a, b, temperature = draw(20, 24), draw(20, 24, seed=1), torch.tensor(0.5)
    compare(
        lambda a, b, t: info_nce(a, b.T.contiguous().T, t, backend="triton"),
        lambda a, b, t: similarities(a, b, t, True, True, "mean"),
        [a, a + b, temperature],
        torch.float32,
        slack=4,  # the temperature's gradient is a sum over all pairs, whose terms cancel
    )


@on_device
def test_second_derivatives_of_info_nce() -> None:
    """By the formula, whatever computed the loss."""
    results = []
    for made, to in ((lambda *ts: info_nce(*ts, 0.5, backend="triton"), DEVICE), (None, "cpu")):
        xs = [draw(9, 6, seed=i).to(to).requires_grad_() for i in range(2)]
        loss = made(*xs) if made else similarities(*xs, 0.5, True, True, "mean")
        grads = torch.autograd.grad(loss, xs, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), xs))
    for ours, right in zip(*results, strict=True):
        assert tolerance.error(ours.cpu(), right) <= 4 * tolerance.FLOAT32_GRADIENT


@on_device
def test_bitwise_the_same_again() -> None:
    x, y, target = (draw(40, 33, seed=i).to(DEVICE) for i in range(3))
    results = []
    for _ in range(2):
        ts = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        loss = binary_cross_entropy_with_logits(ts[0], target.sigmoid(), backend="triton")
        loss = loss + info_nce(*ts, backend="triton")
        results.append([loss.detach(), *torch.autograd.grad(loss, ts)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@by_host
def test_why_not() -> None:
    from interfuse.kernels import losses_pairs as kernels

    device = torch.device("cpu")
    assert "the tensors are on the CPU" in kernels.why_not(PairProblem(torch.float32, device))
    assert "the tensors are torch.float64" in kernels.why_not(PairProblem(torch.float64, device))


@by_host
@pytest.mark.slow
def test_the_interpreter_agrees() -> None:
    run_interpreted(__file__, at_least=80)
