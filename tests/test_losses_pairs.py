"""Losses of two tensors: binary cross-entropy, contrastive, InfoNCE, reconstruction of several modalities."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import tolerance
import torch
import torch.nn.functional as F
from losses_oracle import contrastive, draw, gradients, similarities
from tolerance import close

from interfuse import _native
from interfuse.dispatch import BackendError
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

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
REDUCTION = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
# A vector's tails, several blocks of a row, several rows, no elements at all, a number.
SHAPES = [(), (1,), (17,), (3, 33), (2, 3, 16), (5, 5000), (0, 4)]


def compare(
    ours: Callable[..., Tensor],
    right: Callable[..., Tensor],
    tensors: list[Tensor],
    dtype: torch.dtype,
    slack: float = 1.0,
) -> None:
    """Both of the tensors rounded to `dtype`, the second in float64."""
    rounded = [t.to(dtype) for t in tensors]
    leaves = [t.detach().clone().requires_grad_() for t in rounded]
    exact = [t.double().requires_grad_() for t in rounded]
    got, truth = gradients(ours(*leaves), leaves), gradients(right(*exact), exact)
    assert got[0].dtype == dtype
    assert tolerance.error(got[0], truth[0]) <= tolerance.output(dtype)
    for a, b in zip(got[1:], truth[1:], strict=True):
        assert tolerance.error(a, b) <= slack * tolerance.gradient(dtype)


def kernels(dtype: torch.dtype) -> str:
    """What small losses are left to otherwise are torch's own functions."""
    return "reference" if dtype == torch.float64 else "native"


# ---- binary cross-entropy


@DTYPES
@REDUCTION
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_binary_cross_entropy(shape: tuple[int, ...], reduction: str, dtype: torch.dtype) -> None:
    if shape == (0, 4) and reduction == "mean":
        pytest.skip("the mean of nothing is NaN, here as in torch")
    x, target = draw(*shape, scale=4), (draw(*shape, seed=1) > 0).float()
    compare(
        lambda x: binary_cross_entropy_with_logits(
            x, target.to(x.dtype), reduction=reduction, backend=kernels(x.dtype)
        ),
        lambda x: F.binary_cross_entropy_with_logits(x, target.double(), reduction=reduction),
        [x],
        dtype,
    )


WEIGHTS = {
    "columns": (33,),
    "rows": (3, 1),
    "all": (3, 33),
    "number": (),
    "deep": (2, 1, 33),
}


@DTYPES
@REDUCTION
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("positive", ["columns", "rows", None])
def test_weights_of_every_shape(
    weight: str, positive: str | None, reduction: str, dtype: torch.dtype
) -> None:
    shape = (2, 3, 33)
    x, target = draw(*shape), draw(*shape, seed=1).sigmoid().to(dtype)
    w = draw(*WEIGHTS[weight], seed=2).abs()
    p = None if positive is None else draw(*WEIGHTS[positive], seed=3).abs()
    compare(
        lambda x: binary_cross_entropy_with_logits(x, target, w, reduction, p, backend=kernels(x.dtype)),
        lambda x: F.binary_cross_entropy_with_logits(
            x, target.double(), w.double(), reduction=reduction, pos_weight=None if p is None else p.double()
        ),
        [x],
        dtype,
    )


def test_a_target_that_wants_a_gradient_gets_it() -> None:
    x, target = draw(4, 5).requires_grad_(), draw(4, 5, seed=1).sigmoid().requires_grad_()
    ours = torch.autograd.grad(binary_cross_entropy_with_logits(x, target), (x, target))
    right = torch.autograd.grad(F.binary_cross_entropy_with_logits(x, target), (x, target))
    assert all(tolerance.error(a, b) <= tolerance.FLOAT32_GRADIENT for a, b in zip(ours, right, strict=True))


def test_binary_cross_entropy_far_from_zero_and_of_nan() -> None:
    x = torch.tensor([-200.0, 200.0, float("nan"), 0.0, -1e-8, 90.0, float("-inf")])
    target = torch.tensor([0.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0])
    ours = binary_cross_entropy_with_logits(x, target, reduction="none")
    assert tolerance.error(ours, F.binary_cross_entropy_with_logits(x, target, reduction="none")) <= 1e-6
    alone = binary_cross_entropy_with_logits(torch.tensor(-12.0), torch.tensor(0.0))
    right = F.binary_cross_entropy_with_logits(torch.tensor(-12.0).double(), torch.tensor(0.0).double())
    assert tolerance.error(alone, right) <= tolerance.FLOAT32_DEFAULT


@pytest.mark.parametrize("loss", [binary_cross_entropy_with_logits, F.mse_loss])
def test_error_is_at_most_twice_torchs(loss: Callable[..., Tensor]) -> None:
    kind = "mse" if loss is F.mse_loss else "bce_with_logits"
    x, target = draw(300, 3000), draw(300, 3000, seed=1).sigmoid()
    torchs = F.mse_loss if kind == "mse" else F.binary_cross_entropy_with_logits
    truth = torchs(x.double(), target.double())
    ours = reconstruction_loss([x], [target], kind)
    assert tolerance.error(ours, truth) <= tolerance.beside_torch(tolerance.error(torchs(x, target), truth))


# ---- contrastive


@DTYPES
@REDUCTION
@pytest.mark.parametrize("shape", [(1, 1), (7, 17), (2, 3, 33), (3, 5000), (100, 64)], ids=str)
def test_contrastive(shape: tuple[int, ...], reduction: str, dtype: torch.dtype) -> None:
    scale = shape[-1] ** -0.5
    target = (draw(*shape[:-1], seed=2) > 0).float()
    compare(
        lambda a, b: contrastive_loss(a, b, target, 1.5, reduction),
        lambda a, b: contrastive(a, b, target.double(), 1.5, reduction),
        [draw(*shape, scale=scale), draw(*shape, seed=1, scale=scale)],
        dtype,
    )


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_rows_that_are_alike_have_a_gradient_of_zero(backend: str) -> None:
    a = draw(4, 9).requires_grad_()
    b = a.detach().clone().requires_grad_()
    target = torch.tensor([0.0, 1.0, 0.0, 1.0])
    loss = contrastive_loss(a, b, target, reduction="none", backend=backend)
    assert loss.tolist() == [0.5, 0.0, 0.5, 0.0]
    for grad in torch.autograd.grad(loss.sum(), (a, b)):
        assert bool((grad == 0).all())


def test_beyond_the_margin_nothing_is_to_do() -> None:
    a, b = draw(4, 9).requires_grad_(), draw(4, 9, seed=1) + 5
    loss = contrastive_loss(a, b, torch.zeros(4))
    assert float(loss.detach()) == 0
    assert bool((torch.autograd.grad(loss, a)[0] == 0).all())


def test_a_nan_stays() -> None:
    a, b = draw(3, 9), draw(3, 9, seed=1)
    a[1, 2] = float("nan")
    losses = contrastive_loss(a, b, torch.tensor([0.0, 0.0, 1.0]), reduction="none")
    assert losses.isnan().tolist() == [False, True, False]


# ---- InfoNCE


@REDUCTION
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_info_nce(normalize: bool, symmetric: bool, reduction: str, dtype: torch.dtype) -> None:
    settings = {"normalize": normalize, "symmetric": symmetric, "reduction": reduction}
    a, temperature = draw(70, 24), torch.tensor(0.5)
    compare(
        lambda *ts: info_nce(*ts, **settings),
        lambda *ts: similarities(*ts, **settings),
        [a, a + draw(70, 24, seed=1), temperature],
        dtype,
        slack=4,  # the temperature's gradient is a sum over all pairs, whose terms cancel
    )


def test_info_nce_takes_a_number_as_temperature() -> None:
    a, b = draw(9, 6), draw(9, 6, seed=1)
    right = similarities(a.double(), b.double(), 0.07, True, True, "mean")
    assert tolerance.error(info_nce(a, b), right) <= tolerance.FLOAT32_DEFAULT


def test_info_nce_keeps_no_matrix_of_similarities() -> None:
    rows = 1500
    a, b = draw(rows, 8).requires_grad_(), draw(rows, 8, seed=1).requires_grad_()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        info_nce(a, b).backward()
    assert max(event.cpu_memory_usage for event in seen.events()) < rows * rows * 4 / 4


# ---- reconstruction


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reconstruction_of_several_modalities(reduction: str) -> None:
    image, mask, words = draw(4, 3, 20), draw(4, 30, seed=1), draw(4, 7, 50, seed=2)
    targets = [draw(4, 3, 20, seed=3), (draw(4, 30, seed=4) > 0).float(), torch.arange(28).view(4, 7)]
    kinds, weights = ["mse", "bce_with_logits", "cross_entropy"], [1.0, 0.5, 2.0]

    def right(image: Tensor, mask: Tensor, words: Tensor) -> Tensor:
        return (
            F.mse_loss(image, targets[0].double(), reduction=reduction)
            + 0.5 * F.binary_cross_entropy_with_logits(mask, targets[1].double(), reduction=reduction)
            + 2 * F.cross_entropy(words.flatten(0, 1), targets[2].flatten(), reduction=reduction)
        )

    compare(
        lambda *xs: reconstruction_loss(xs, targets, kinds, weights, reduction=reduction),
        right,
        [image, mask, words],
        torch.float32,
    )
    alike = reconstruction_loss([image, image], [targets[0]] * 2)
    assert tolerance.error(alike, 2 * F.mse_loss(image, targets[0])) <= tolerance.FLOAT32_DEFAULT


# ---- inside torch


BOTH = ((6, 17), (6, 17))


def bce(x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    return (
        binary_cross_entropy_with_logits(x, TARGET.to(x.dtype), reduction=reduction).square().sum()
        + 0 * y.square().sum()
    )


def pairs(x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    return contrastive_loss(x, y, LABELS, 9.0, reduction).square().sum()


def true_bce(x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    target = TARGET.to(x.dtype)
    return (
        F.binary_cross_entropy_with_logits(x, target, reduction=reduction).square().sum()
        + 0 * y.square().sum()
    )


def true_pairs(x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    return contrastive(x, y, LABELS.to(x.dtype), 9.0, reduction).square().sum()


def chosen(x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    return info_nce(x, y, 0.5, reduction=reduction).square().sum()


def true_chosen(x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    return similarities(x, y, 0.5, True, True, reduction).square().sum()


TARGET, LABELS = draw(6, 17, seed=5).sigmoid(), torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.0])
EACH = pytest.mark.parametrize(
    ("ours", "right"), [(bce, true_bce), (pairs, true_pairs), (chosen, true_chosen)]
)


def leaves(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [draw(6, 17).to(dtype).requires_grad_(), draw(6, 17, seed=1).to(dtype).requires_grad_()]


@EACH
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_second_derivatives(ours: Any, right: Any, reduction: str) -> None:
    results = []
    for loss in (ours, right):
        xs = leaves(torch.float64)
        grads = torch.autograd.grad(loss(*xs, reduction), xs, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), xs))
    assert close(*results, 1e-11)


@EACH
def test_func_grad_vmap_and_compile(ours: Any, right: Any) -> None:
    xs = [x.detach() for x in leaves()]
    bound = tolerance.FLOAT32_GRADIENT
    assert close(torch.func.grad(ours, (0, 1))(*xs), torch.func.grad(right, (0, 1))(*xs), bound)
    batch = torch.stack([xs[0], -xs[0]])
    mapped = [torch.vmap(torch.func.grad(f, (0, 1)), (0, None))(batch, xs[1]) for f in (ours, right)]
    assert close(*mapped, bound)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for reduction in ("none", "mean"):
        results = []
        for f in (compiled, right):
            ts = leaves()
            results.append(torch.autograd.grad(f(*ts, reduction), ts))
        assert close(*results, bound)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own use
@EACH
def test_forward_mode(ours: Any, right: Any) -> None:
    x, y = (t.detach() for t in leaves())
    results = [torch.func.jvp(f, (x, y), (y, x)) for f in (ours, right)]
    assert close(*results, tolerance.FLOAT32_GRADIENT)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(reduction: str, grad: bool) -> None:
    x, y = (t.detach().requires_grad_(grad) for t in leaves())
    ops = torch.ops.interfuse
    for kind in ("bce_with_logits", "mse"):
        arguments = (TARGET, None, TARGET[0].clone(), kind, reduction, "")
        torch.library.opcheck(ops.elementwise_loss.default, (x, *arguments))
        grad_loss = draw(*(x.shape if reduction == "none" else ()))
        torch.library.opcheck(ops.elementwise_loss_backward.default, (grad_loss, x.detach(), *arguments))
    torch.library.opcheck(ops.contrastive_loss.default, (x, y, LABELS, 1.0, ""))
    slope = draw(6)
    torch.library.opcheck(ops.contrastive_loss_backward.default, (slope, x.detach(), y.detach(), slope, ""))
    for symmetric in (False, True):
        torch.library.opcheck(ops.info_nce.default, (x, y, symmetric, ""))
        arguments = (slope, x.detach(), y.detach(), slope, slope if symmetric else slope[:0], symmetric, "")
        torch.library.opcheck(ops.info_nce_backward.default, arguments)


def test_autocast_gives_losses_in_float32() -> None:
    x, y = (t.detach().bfloat16() for t in leaves())
    with torch.autocast("cpu", torch.bfloat16):
        for loss in (
            binary_cross_entropy_with_logits(x, TARGET.bfloat16()),
            contrastive_loss(x, y, LABELS),
            info_nce(x, y),
        ):
            assert loss.dtype == torch.float32


def test_a_second_backward_gives_the_same() -> None:
    x, y = leaves()
    loss = bce(x, y) + pairs(x, y)
    loss.backward(retain_graph=True)
    first = x.grad.clone(), y.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * first[0])
    assert torch.equal(y.grad, 2 * first[1])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bitwise_the_same_again(threads: int) -> None:
    torch.set_num_threads(threads)
    x, y = (draw(700, 300, seed=i) for i in range(2))
    results = []
    for _ in range(3):
        ts = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        loss = binary_cross_entropy_with_logits(ts[0], y.sigmoid()) + contrastive_loss(*ts, torch.ones(700))
        results.append([loss.detach(), *torch.autograd.grad(loss, ts)])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_any_strides() -> None:
    x, y = draw(40, 30).T, draw(30, 80, seed=1)[:, ::2]
    target = torch.ones(30)
    assert torch.equal(
        contrastive_loss(x, y, target), contrastive_loss(x.contiguous(), y.contiguous(), target)
    )
    ours = binary_cross_entropy_with_logits(x, y.sigmoid())
    assert torch.equal(ours, binary_cross_entropy_with_logits(x.contiguous(), y.sigmoid().contiguous()))


# ---- errors

X, Y = draw(3, 4), draw(3, 4, seed=1)
WRONG: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = {
    "shapes": (contrastive_loss, (X, Y[:2], X[:, 0]), {}, "input1 and input2 must have one shape; got"),
    "dtypes": (info_nce, (X, Y.double()), {}, "input1 and input2 must have one dtype"),
    "labels": (contrastive_loss, (X, Y, X), {}, "must be a tensor of shape (3,); got (3, 4)"),
    "labels' gradient": (contrastive_loss, (X, Y, torch.ones(3, requires_grad=True)), {}, "target.detach()"),
    "margin": (contrastive_loss, (X, Y, X[:, 0], -1.0), {}, "margin must be a finite number"),
    "reduction": (contrastive_loss, (X, Y, X[:, 0]), {"reduction": "max"}, "mean, sum; got 'max'"),
    "temperature": (info_nce, (X, Y, 0.0), {}, "temperature must be a finite number above 0; got 0.0"),
    "temperatures": (info_nce, (X, Y, X), {}, "the temperature must have one element; got (3, 4)"),
    "three dimensions": (info_nce, (X[None], Y[None]), {}, "must have two dimensions, (rows, features)"),
    "integers": (binary_cross_entropy_with_logits, (X.int(), Y.int()), {}, "input has torch.int32"),
    "weights": (binary_cross_entropy_with_logits, (X, Y, X[:, :3]), {}, "broadcast"),
    "larger weights": (binary_cross_entropy_with_logits, (X, Y, X[None]), {}, "weight must broadcast"),
    "sparse": (binary_cross_entropy_with_logits, (X.to_sparse(), Y), {}, "input must be a dense tensor"),
    "kind": (reconstruction_loss, ([X], [Y], "mae"), {}, "mse, cross_entropy; got 'mae'"),
    "counts": (reconstruction_loss, ([X], [Y, Y]), {}, "got 1 inputs, 2 targets"),
    "no reduction": (reconstruction_loss, ([X], [Y]), {"reduction": "none"}, "one of mean, sum; got 'none'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_sentences(name: str) -> None:
    function, arguments, keywords, sentence = WRONG[name]
    with pytest.raises((ValueError, RuntimeError), match=re.escape(sentence)):
        function(*arguments, **keywords)


def test_types_and_backends() -> None:
    with pytest.raises(TypeError, match="input2 must be a torch tensor; got list"):
        info_nce(X, [1.0])  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=r"the tensors are torch\.float64"):
        contrastive_loss(X.double(), Y.double(), X[:, 0], backend="native")


def test_the_core_says_what_it_takes() -> None:
    with pytest.raises(ValueError, match="kind is 'mae'; allowed are"):
        _native.elementwise_loss("mae", "float32", "sum", 1, 1, [0, 0], [0, 0], [0] * 7, 1)
    with pytest.raises(ValueError, match="the column stride of a weight is 2; allowed is 0 to 1"):
        _native.elementwise_loss("mse", "float32", "sum", 1, 1, [0, 2], [0, 0], [0] * 7, 1)
    with pytest.raises(ValueError, match="null pointer for a, b, target or loss"):
        _native.contrastive_loss("float32", 1, 1, 1.0, [0] * 5, 1)
    with pytest.raises(ValueError, match="rows is -1; allowed is 0 to"):
        _native.contrastive_loss_backward("float32", -1, 1, [0] * 6, 1)
