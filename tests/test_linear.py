"""linear's values and gradients against float64, exact where arithmetic allows, in every memory layout."""

from __future__ import annotations

import linear_oracle as oracle
import pytest
import tolerance
import torch
from cases.linear import ACTIVATIONS, SMALL, Case
from torch import Tensor

from interfuse.ops._linear_problem import LinearParams
from interfuse.ops.linear import linear, quantize_weight

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("poisoned_outputs")]

named_cases = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)


def run(case: Case, inputs: list[Tensor], weight: Tensor, bias: Tensor | None, **arguments: object) -> Tensor:
    return linear(inputs, weight, bias, case.activations[0], **arguments)


@named_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_named_cases(case: Case, dtype: torch.dtype) -> None:
    tensors = oracle.tensors(case, dtype=dtype)
    y = run(case, *tensors)
    assert y.dtype == dtype
    assert tolerance.error(y, oracle.truth(*tensors, oracle.params(case))) <= tolerance.output(
        dtype, "highest"
    )


@named_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_named_cases_backward(case: Case, dtype: torch.dtype) -> None:
    tensors = oracle.tensors(case, dtype=dtype)
    flat = oracle.leaves(*tensors)
    y = run(case, *oracle.parts(flat, len(case.widths)))
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    truth = oracle.true_gradients(*tensors, oracle.params(case), grad_y)
    for ours, right in zip(torch.autograd.grad(y, flat, grad_y), truth, strict=True):
        assert ours.is_contiguous()
        assert tolerance.error(ours, right) <= tolerance.gradient(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 11, 13, 97, 200])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 47, 64, 131])
def test_exact_on_small_integers(rows: int, width: int, dtype: torch.dtype) -> None:
    """Every tail of rows, columns and outputs; bfloat16 rounds once what float32 has exactly."""
    for out in (1, 3, 4, 9, 21):
        case = Case("exact", (rows,), (width, 2), (out,), ("relu",))
        inputs, weight, bias = oracle.tensors(case, integers=True)
        truth = oracle.truth(inputs, weight, bias, oracle.params(case))
        y = run(case, [x.to(dtype) for x in inputs], weight.to(dtype), bias.to(dtype))
        assert torch.equal(y, truth.to(dtype))


@pytest.mark.parametrize("rows", [1, 5, 30, 130, 200])
@pytest.mark.parametrize("widths", [(1,), (17, 3), (64,), (300,)], ids=str)
def test_gradients_are_exact_on_small_integers(rows: int, widths: tuple[int, ...]) -> None:
    for out in (1, 7, 33, 150):
        case = Case("exact", (rows,), widths, (out,), ("relu",))
        tensors = oracle.tensors(case, integers=True)
        flat = oracle.leaves(*tensors)
        y = run(case, *oracle.parts(flat, len(widths)))
        grad_y = torch.randint(-2, 3, y.shape, generator=torch.Generator().manual_seed(1)).float()
        truth = oracle.true_gradients(*tensors, oracle.params(case), grad_y)
        for ours, right in zip(torch.autograd.grad(y, flat, grad_y), truth, strict=True):
            assert torch.equal(ours.double(), right)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_error_is_at_most_twice_torchs(name: str) -> None:
    case = Case("error", (64,), (700, 324), (96,), (name,))
    inputs, weight, bias = oracle.tensors(case)
    truth = oracle.truth(inputs, weight, bias, oracle.params(case))
    torchs = linear(inputs, weight, bias, name, backend="reference")
    ours = linear(inputs, weight, bias, name, backend="native")
    assert tolerance.error(ours, truth) <= tolerance.beside_torch(tolerance.error(torchs, truth))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("rows", [3, 97])
def test_what_is_not_finite_passes_to_the_gradients_as_in_torch(rows: int, value: float) -> None:
    inputs, weight, _ = oracle.tensors(Case("not finite", (rows,), (40, 33), (50,), ("none",)))
    grad_y = torch.randn(rows, 50, generator=torch.Generator().manual_seed(1))
    inputs[1][2, 5], weight[7, 9], grad_y[1, 3] = value, value, value
    leaves = [t.requires_grad_() for t in (*inputs, weight)]
    ours = torch.autograd.grad(linear(inputs, weight), leaves, grad_y)
    theirs = torch.autograd.grad(torch.cat(inputs, -1) @ weight.t(), leaves, grad_y)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a[b.isinf()], b[b.isinf()])


def test_masks_ask_for_some_gradients_alone() -> None:
    case = Case("mask", (9,), (20, 5), (12,), ("gelu",))
    tensors = oracle.tensors(case)
    grad_y = torch.randn(9, 12)
    truth = oracle.true_gradients(*tensors, oracle.params(case), grad_y)
    for wanted in range(4):
        flat = [t.requires_grad_(i == wanted) for i, t in enumerate(oracle.leaves(*tensors))]
        y = run(case, *oracle.parts(flat, 2))
        (ours,) = torch.autograd.grad(y, [flat[wanted]], grad_y)
        assert tolerance.error(ours, truth[wanted]) <= tolerance.FLOAT32_GRADIENT


def test_a_second_backward_gives_the_same() -> None:
    flat = oracle.leaves(*oracle.tensors(SMALL[3]))
    y = run(SMALL[3], *oracle.parts(flat, 2))
    first, second = (torch.autograd.grad(y.sum(), flat, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- memory


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values elsewhere in memory."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
    wide[..., :-3] = x
    strided = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    strided[..., ::2] = x
    room = torch.full((x.numel() + 1,), float("nan"))
    room[1:] = x.flatten()
    return {
        "rows apart": wide[..., :-3],
        "columns apart": strided[..., ::2],
        "misaligned": room[1:].view(x.shape),
        "turned": x.transpose(0, 1).contiguous().transpose(0, 1),
    }


@pytest.mark.parametrize("layout", ["rows apart", "columns apart", "misaligned", "turned"])
@pytest.mark.parametrize("rows", [1, 40])
def test_any_strides(layout: str, rows: int) -> None:
    case = Case("strides", (rows, 3), (21, 6), (11,), ("tanh",))
    inputs, weight, bias = oracle.tensors(case)
    grad_y = torch.randn(rows, 3, 11)
    other = [layouts(x)[layout] for x in inputs]
    assert torch.equal(run(case, other, weight, bias), run(case, inputs, weight, bias))
    elsewhere = layouts(weight)[layout]
    assert torch.equal(run(case, inputs, elsewhere, bias), run(case, inputs, weight, bias))
    results = []
    for xs, w in ((inputs, weight), (other, elsewhere)):
        flat = [t.detach().requires_grad_() for t in (*xs, w, bias)]
        results.append(torch.autograd.grad(run(case, *oracle.parts(flat, 2)), flat, grad_y))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_repeated_rows_and_gradients_without_memory_of_their_own() -> None:
    x = torch.randn(1, 30).expand(7, 30).requires_grad_()
    weight = torch.randn(5, 30, requires_grad=True)
    y = linear(x, weight, None, "relu")
    assert torch.equal(y, y[:1].expand(7, 5))
    y.sum().backward()  # an expanded gradient
    plain = torch.relu(x.detach().double() @ weight.detach().double().T) > 0
    assert tolerance.error(weight.grad, plain.double().T @ x.detach().double()) <= tolerance.FLOAT32_GRADIENT


def test_nothing_outside_is_written() -> None:
    """The core writes through the pointers of dense outputs; here they are the middle of larger memory."""
    from interfuse import _native

    rows, out, width = 7, 13, 37
    x, weight = torch.randn(rows, width), torch.randn(out, width)
    room = torch.full((rows * out + 32,), 7.0)
    desc = _native.LinearDesc("float32", "float32", rows, out, [width], [width], "relu", 0.01, False)
    y = room[16:-16]
    _native.linear_forward(desc, [x.data_ptr()], weight.data_ptr(), 0, 0, y.data_ptr(), 0, 2)
    assert torch.equal(y.view(rows, out), linear(x, weight, None, "relu"))
    assert bool((room[:16] == 7).all())
    assert bool((room[-16:] == 7).all())


# ---- NaN and infinities


@pytest.mark.parametrize(
    "name", [name for name in ACTIVATIONS if name != "gelu"]
)  # torch's of infinity is NaN
@pytest.mark.parametrize(("rows", "width", "out"), [(5, 20, 6), (150, 40, 20)])
def test_nan_and_infinity_pass_as_in_torch(name: str, rows: int, width: int, out: int) -> None:
    x, weight = torch.randn(rows, width), torch.randn(out, width)
    x[1, 3], x[2, 19], x[3, 0] = float("nan"), float("inf"), -float("inf")
    x[4, 5] = torch.finfo(torch.float32).max
    ours = linear(x, weight, None, name, backend="native")
    torchs = linear(x, weight, None, name, backend="reference")
    assert torch.equal(ours.isnan(), torchs.isnan())
    assert torch.equal(ours.isinf(), torchs.isinf())


# ---- weights in fewer bits


@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@pytest.mark.parametrize("widths", [(1,), (33, 4), (5000,)], ids=str)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_int8_weights_are_what_they_stand_for(rows: int, widths: tuple[int, ...], backend: str) -> None:
    inputs, weight, bias = oracle.tensors(Case("int8", (rows,), widths, (19,), ("none",)))
    small, scale = quantize_weight(weight)
    assert small.dtype == torch.int8
    assert float((small * scale.unsqueeze(1) - weight).abs().max()) <= float(scale.max()) * 0.501
    truth = oracle.truth(inputs, small.double() * scale.double().unsqueeze(1), bias, LinearParams("silu"))
    y = linear(inputs, small, bias, "silu", scale=scale, backend=backend)
    assert tolerance.error(y, truth) <= tolerance.FLOAT32_HIGHEST


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bfloat16_weights_are_what_they_stand_for(backend: str) -> None:
    inputs, weight, bias = oracle.tensors(Case("bf16", (3,), (65, 20), (19,), ("none",)))
    half = weight.bfloat16()
    truth = oracle.truth(inputs, half, bias, LinearParams("gelu"))
    y = linear(inputs, half, bias, "gelu", backend=backend)
    assert y.dtype == torch.float32
    assert tolerance.error(y, truth) <= tolerance.FLOAT32_HIGHEST


def test_int8_weights_and_bfloat16_inputs() -> None:
    inputs, weight, bias = oracle.tensors(Case("mixed", (4,), (70,), (9,), ("none",)), dtype=torch.bfloat16)
    small, scale = quantize_weight(weight)
    truth = oracle.truth(inputs, small.double() * scale.double().unsqueeze(1), bias, LinearParams("relu"))
    y = linear(inputs, small, bias, "relu", scale=scale, backend="native")
    assert tolerance.error(y, truth) <= tolerance.BFLOAT16


def test_inputs_still_have_gradients_before_a_compact_weight() -> None:
    """By the reference: the kernels train weights of the inputs' dtype."""
    x, weight = torch.randn(4, 12, requires_grad=True), torch.randn(5, 12)
    small, scale = quantize_weight(weight)
    linear(x, small, None, scale=scale).sum().backward()
    whole = (small * scale.unsqueeze(1)).double().sum(0).expand(4, 12)
    assert tolerance.error(x.grad, whole) <= tolerance.FLOAT32_GRADIENT


def test_a_row_of_zeros_has_a_scale() -> None:
    small, scale = quantize_weight(torch.zeros(2, 3))
    assert bool((small == 0).all())
    assert bool((scale == 1).all())
