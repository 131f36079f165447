"""conv_pool's Triton kernels against the float64 reference.

Compiled on a GPU, interpreted everywhere (triton_runs.py). Sizes are tiny because the interpreter takes
milliseconds an operation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor
from triton_runs import DEVICE, INTERPRETED, by_host, on_device, run_interpreted

from interfuse.ops import conv_pool
from interfuse.ops._conv_pool_checks import Options, check, resolve
from interfuse.reference import conv_pool as reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from interfuse.ops._conv_pool_problem import ConvPoolParams, ConvPoolProblem

# Relative Frobenius error against float64. float32 sums at most some hundred products here: a few
# units of 2**-24. The shorter types round what they store once (2**-9, 2**-12), and their saved values and
# gradients again on the way back.
FORWARD = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
BACKWARD = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


DEFAULTS = Options(1, 0, 1, 1, "zeros", None, 0.25, None, 2, None, 0, False, True, None)


class Case(NamedTuple):
    input: tuple[int, ...]
    weight: tuple[int, ...]
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    bias: bool = True


BLOCK: dict[str, Any] = {"activation": "relu", "pool": "max", "pool_size": 2}
STEM = {"stride": 2, "padding": 3, "activation": "relu", "pool": "max", "pool_size": 3, "pool_stride": 2,
        "pool_padding": 1}  # fmt: skip
HALF, BRAIN = torch.float16, torch.bfloat16

CASES = {
    "1d": Case((2, 20, 23), (18, 20, 3), {**BLOCK, "padding": 1}),
    "block": Case((2, 17, 7, 9), (20, 17, 3, 3), BLOCK),
    "block-channels-last-bf16": Case((1, 33, 9, 11), (20, 33, 3, 3), BLOCK, BRAIN, True),
    "block-f16": Case((2, 3, 9, 11), (20, 3, 3, 3), BLOCK, HALF),
    "3d": Case((2, 3, 3, 5, 6), (17, 3, 2, 3, 3), BLOCK),
    "3d-channels-last-avg": Case(
        (1, 16, 4, 5, 6), (17, 16, 2, 2, 3), {"activation": "relu", "pool": "avg"}, channels_last=True
    ),
    "stem": Case((1, 3, 13, 11), (20, 3, 7, 7), STEM),
    "stem-channels-last-bf16": Case((1, 3, 13, 11), (20, 3, 7, 7), STEM, BRAIN, True),
    "pointwise": Case((2, 40, 6, 6), (24, 40, 1, 1), {"activation": "leaky_relu", "pool": "max"}),
    "depthwise": Case(
        (2, 3, 8, 8), (3, 1, 3, 3), {**BLOCK, "activation": "leaky_relu", "groups": 3, "padding": 1}
    ),
    "grouped": Case(
        (1, 32, 9, 9), (6, 16, 3, 3),
        {"groups": 2, "dilation": 2, "stride": 2, "padding": 2, "activation": "gelu", "pool": "max",
         "pool_size": 3, "pool_stride": 2, "pool_padding": 1, "ceil_mode": True},
    ),
    "same-even": Case((2, 4, 7, 8), (5, 4, 2, 4), {"padding": "same", "activation": "silu"}, bias=False),
    "gelu-max-bf16": Case((2, 4, 9, 9), (5, 4, 3, 3), {"activation": "gelu_tanh", "pool": "max"}, BRAIN),
    "avg-ceil": Case(
        (2, 4, 9, 10), (5, 4, 3, 3),
        {"activation": "tanh", "pool": "avg", "pool_size": (3, 2), "pool_padding": 1, "ceil_mode": True,
         "count_include_pad": False},
    ),
    "avg-overlap": Case(
        (2, 4, 9, 10), (5, 4, 3, 3),
        {"activation": "gelu", "pool": "avg", "pool_size": 3, "pool_stride": 2, "pool_padding": 1},
        channels_last=True,
    ),
    "avg-gaps": Case(
        (2, 4, 11, 10), (5, 4, 3, 3), {"activation": "sigmoid", "pool": "avg", "pool_stride": 3}
    ),
    "avg-plain": Case((1, 4, 9, 10), (5, 4, 3, 3), {"pool": "avg", "pool_size": 3, "ceil_mode": True}),
    "max-gaps": Case((2, 4, 11, 10), (5, 4, 3, 3), {**BLOCK, "pool_stride": 3, "pool_padding": 1}),
    "window-of-12": Case(
        (1, 4, 14, 18), (5, 4, 3, 3), {"activation": "sigmoid", "pool": "max", "pool_size": (3, 4)}
    ),
    "window-of-255": Case((1, 1, 257), (2, 1, 3), {**BLOCK, "pool_size": 255}),
    "slope-zero": Case(
        (2, 4, 9, 9), (5, 4, 3, 3), {"activation": "leaky_relu", "negative_slope": 0.0, "pool": "max"}
    ),
    "tanh": Case((2, 4, 6, 6), (5, 4, 3, 3), {"activation": "tanh", "pool": "max"}),
    "sigmoid": Case((2, 4, 6, 6), (5, 4, 3, 3), {"activation": "sigmoid"}, HALF),
    "relu-alone": Case((2, 4, 6, 6), (5, 4, 3, 3), {"activation": "relu"}),
    "plain": Case((2, 17, 6, 6), (5, 17, 3, 3), {}, BRAIN, True),
    # Strides and dilations whose residues modulo the stride meet every kind of tap set: all, some, none.
    "stride-3-dilation-2": Case((1, 4, 17), (5, 4, 4), {"stride": 3, "dilation": 2, "padding": 2}),
    "stride-4-dilation-2": Case((1, 4, 19), (5, 4, 3), {"stride": 4, "dilation": 2, "padding": 3}),
    "stride-2-dilation-2": Case(
        (2, 4, 12, 9), (5, 4, 3, 2), {**BLOCK, "stride": (2, 3), "dilation": (2, 1), "padding": (1, 0)}
    ),
    "no-images": Case((0, 4, 9, 9), (5, 4, 3, 3), BLOCK),
}  # fmt: skip


@pytest.fixture
def kernels() -> Any:
    return pytest.importorskip("interfuse.kernels.conv_pool", reason="triton is not installed.")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote holds NaN, or 0xAB in bytes."""
    empty = torch.empty

    def fill(*args: Any, **options: Any) -> Tensor:
        t = empty(*args, **options)
        return t if t.is_meta else t.fill_(float("nan") if t.is_floating_point() else 0xAB)

    monkeypatch.setattr(torch, "empty", fill)


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    yield
    cudnn.allow_tf32 = before


def params_of(case: Case) -> ConvPoolParams:
    return resolve(case.weight[2:], DEFAULTS._replace(**case.options), "default")


def tensors(case: Case, integers: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, weight, bias: small integers, which every dtype and sum here holds exactly, or normal numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...], scale: float) -> Tensor:
        if integers:
            t = torch.randint(-2, 3, shape, generator=generator).double()
        else:
            t = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return t.to(DEVICE, case.dtype)

    products = case.weight[1] * torch.Size(case.weight[2:]).numel()
    x, weight = draw(case.input, 1.0), draw(case.weight, products**-0.5)
    if case.channels_last:
        x = x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return x, weight, draw(case.weight[:1], 1.0) if case.bias else None


def wide(t: Tensor | None) -> Any:
    return None if t is None else t.detach().cpu().double()


class Results(NamedTuple):
    y: Tensor
    index: Tensor
    pre: Tensor
    grad_x: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


def ours(kernels: Any, x: Tensor, weight: Tensor, bias: Tensor | None, params: ConvPoolParams,
         grad_y: Tensor) -> Results:  # fmt: skip
    y, index, pre = kernels.forward(x, weight, bias, params, True)
    y_saved = y if params.backward_needs_y else None
    return Results(y, index, pre, *kernels.backward(
        grad_y, x, weight, y_saved, index, pre, bias is not None, params, (True, True, True)))  # fmt: skip


def truth(x: Tensor, weight: Tensor, bias: Tensor | None, params: ConvPoolParams, grad_y: Tensor) -> Results:
    x, weight, bias, grad_y = wide(x), wide(weight), wide(bias), wide(grad_y)
    problem = check(x, weight, bias, params, True)
    nothing = torch.zeros(0)
    grads = reference.run_backward(
        problem, grad_y, x, weight, bias, None, nothing, nothing, (True, True, bias is not None)
    )
    return Results(*reference.run(problem, x, weight, bias), *grads)


def error(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error; NaN where only one of them has a NaN."""
    got, want = wide(got), wide(want)
    assert got.shape == want.shape
    return float((got - want).norm() / want.norm().clamp_min(1e-30)) if want.numel() else 0.0


def exact(params: ConvPoolParams) -> bool:
    """From small integers, every step of the problem gives numbers that all dtypes hold."""
    kinked = params.activation in ("none", "relu", "leaky_relu")
    return kinked and (params.pool != "avg" or params.pool_size in ((2,), (2, 2), (2, 2, 2)))


def gradient_for(y: Tensor, integers: bool) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    if integers:
        return (torch.randint(-2, 3, y.shape, generator=generator)).to(y.device, y.dtype)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)


@on_device
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(kernels: Any, name: str) -> None:
    case = CASES[name]
    params = params_of(case)
    x, weight, bias = tensors(case, exact(params))
    problem = check(x, weight, bias, params, True)
    grad_y = gradient_for(torch.zeros(problem.batch, problem.out_channels, *problem.out_sizes, dtype=x.dtype,
                                      device=x.device), exact(params))  # fmt: skip
    got, want = ours(kernels, x, weight, bias, params, grad_y), truth(x, weight, bias, params, grad_y)
    if params.saves_pre == "conv":  # places that no window reads are saved as zeros
        want = want._replace(pre=torch.where(wide(got.pre) == 0, 0, want.pre))
    if exact(params):
        for field, a, b in zip(Results._fields, got, want, strict=True):
            assert a.dtype == (torch.uint8 if field == "index" else x.dtype)
            assert torch.equal(a.cpu(), b.to(a.dtype)), f"{field} differs"
    else:
        assert torch.equal(got.index.cpu(), want.index)
        bounds = (FORWARD,) * 3 + (BACKWARD,) * 3
        errors = {f: error(a, b) for f, a, b in zip(Results._fields, got, want, strict=True)}
        late = {f: e for (f, e), b in zip(errors.items(), bounds, strict=True) if not e <= b[case.dtype]}
        assert not late, f"relative errors {errors}"
    inferred = kernels.forward(x, weight, bias, params, False)
    assert torch.equal(inferred[0], got.y), "inference and training give different outputs"
    assert inferred[1].numel() == inferred[2].numel() == 0
    assert got.y.is_contiguous(memory_format=memory_format(case))
    assert got.grad_x.is_contiguous(memory_format=memory_format(case))


def memory_format(case: Case) -> torch.memory_format:
    if not case.channels_last:
        return torch.contiguous_format
    return torch.channels_last if len(case.input) == 4 else torch.channels_last_3d


@on_device
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter is NumPy
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_nan_and_infinity_pass_as_in_torch(kernels: Any, activation: str, pool: str) -> None:
    case = Case((1, 1, 6, 8), (1, 1, 1, 1), {"activation": activation, "pool": pool}, bias=False)
    params = params_of(case)
    x, weight, _ = tensors(case, False)
    weight.fill_(1)
    nan, inf = float("nan"), float("inf")
    x[0, 0, :2, :6] = torch.tensor([[nan, 1, 1, nan, -inf, -inf], [nan, 2, 3, nan, -inf, -inf]])
    x[0, 0, 2:4, :6] = torch.tensor([[inf, 1, -inf, 4, inf, nan], [1, -inf, 2, 3, inf, 1]])
    y, index, _ = kernels.forward(x, weight, None, params, True)
    problem = check(wide(x), wide(weight), None, params, True)
    want, want_index, _ = reference.run(problem, wide(x), wide(weight), None)
    assert torch.allclose(wide(y), want, rtol=1e-5, atol=1e-7, equal_nan=True), (y, want)
    if pool == "max":
        assert torch.equal(index.cpu(), want_index)
    assert torch.equal(kernels.forward(x, weight, None, params, False)[0].nan_to_num(7), y.nan_to_num(7))


@on_device
def test_any_strides_are_read(kernels: Any) -> None:
    """A slice with steps, an expanded batch and a channels_last weight, none of them copied by the caller."""
    case = Case((3, 32, 5, 12), (20, 16, 3, 3), {**BLOCK, "groups": 2})
    x, weight, bias = tensors(case, True)
    x = x[:1, :, :, ::2].expand(3, -1, -1, -1)
    weight = weight.to(memory_format=torch.channels_last)
    params = params_of(case)
    grad_y = gradient_for(kernels.forward(x, weight, bias, params, False)[0], True)
    want = truth(x.contiguous(), weight.contiguous(), bias, params, grad_y)
    grad_y = grad_y.transpose(2, 3).contiguous().transpose(2, 3)
    got = ours(kernels, x, weight, bias, params, grad_y)
    for field, a, b in zip(Results._fields, got, want, strict=True):
        assert torch.equal(a.cpu(), b.to(a.dtype)), f"{field} differs"
    assert got.grad_weight.is_contiguous(memory_format=torch.channels_last)


@on_device
@pytest.mark.parametrize("name", ["block", "block-f16", "avg-overlap"])
def test_64_bit_offsets_give_the_same(kernels: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case = CASES[name]
    params = params_of(case)
    x, weight, bias = tensors(case, False)
    grad_y = gradient_for(kernels.forward(x, weight, bias, params, False)[0], False)
    narrow = ours(kernels, x, weight, bias, params, grad_y)
    monkeypatch.setattr("interfuse.kernels.conv_pool_launches.LARGEST_32_BIT", -1)
    for a, b in zip(narrow, ours(kernels, x, weight, bias, params, grad_y), strict=True):
        assert torch.equal(a, b)


@on_device
def test_inputs_beyond_2_to_the_31_elements(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images 2**31 elements apart in memory that is reserved, but touched at its two ends alone."""
    monkeypatch.undo()  # poisoning would touch all of it
    case = Case((2, 4, 9, 9), (5, 4, 3, 3), BLOCK, HALF)
    near, weight, bias = tensors(case, True)
    apart = 2**31 + 64
    x = torch.empty(apart + near[0].numel(), dtype=case.dtype, device=DEVICE).as_strided(
        near.shape, (apart, *near.stride()[1:])
    )
    x.copy_(near)
    params = params_of(case)
    grad_y = gradient_for(kernels.forward(near, weight, bias, params, False)[0], True)
    want = ours(kernels, near, weight, bias, params, grad_y)
    for a, b in zip(ours(kernels, x, weight, bias, params, grad_y), want, strict=True):
        assert torch.equal(a, b)


@on_device
def test_gradients_repeat_bit_for_bit_and_leave_what_was_saved(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from interfuse.kernels import conv_pool_launches as plan

    monkeypatch.setattr(plan, "STEPS_OF_A_SPLIT", 1)
    case = Case((2, 5, 300), (3, 5, 3), {"activation": "relu"})
    params = params_of(case)
    x, weight, bias = tensors(case, False)
    y, index, pre = kernels.forward(x, weight, bias, params, True)
    grad_y = gradient_for(y, False)
    problem = check(x, weight, bias, params, True)
    grads = [torch.empty_like(t) for t in (x, weight, bias)]
    listed = plan.backward_launches(problem, grad_y, x, weight, y, index, pre, grads)
    assert [launch.kernel.__name__ for launch in listed].count("sum_splits") == 2
    before = [t.clone() for t in (grad_y, x, weight, y, index, pre)]
    first = kernels.backward(grad_y, x, weight, y, index, pre, True, params, (True, True, True))
    assert all(torch.equal(a, b) for a, b in zip(before, (grad_y, x, weight, y, index, pre), strict=True))
    second = kernels.backward(grad_y, x, weight, y, index, pre, True, params, (True, True, True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for got, want in zip(first, truth(x, weight, bias, params, grad_y)[3:], strict=True):
        assert error(got, want) <= BACKWARD[case.dtype]


@on_device
def test_the_mask_chooses_the_gradients(kernels: Any) -> None:
    case = CASES["block"]
    params = params_of(case)
    x, weight, bias = tensors(case, True)
    y, index, pre = kernels.forward(x, weight, bias, params, True)
    grad_y = gradient_for(y, True)
    every = kernels.backward(grad_y, x, weight, None, index, pre, True, params, (True, True, True))
    for one in range(3):
        mask = tuple(i == one for i in range(3))
        for i, grad in enumerate(kernels.backward(grad_y, x, weight, None, index, pre, True, params, mask)):
            assert torch.equal(grad, every[i]) if mask[i] else grad.numel() == 0


@on_device
@pytest.mark.parametrize("name", ["block", "gelu-max-bf16", "avg-overlap", "tanh"])
def test_through_the_public_function_and_autograd(name: str) -> None:
    case = CASES[name]
    leaves = [t.requires_grad_() for t in tensors(case, False) if t is not None]
    y = conv_pool(*leaves, **{"negative_slope": 0.25, **case.options}, backend="triton")
    grad_y = gradient_for(y, False)
    grads = torch.autograd.grad(y, leaves, grad_y)
    x, weight, bias = (*leaves, None)[:3]
    want = truth(x, weight, bias, params_of(case), grad_y)
    assert error(y, want.y) <= FORWARD[case.dtype]
    for got, grad in zip(grads, want[3:], strict=True):
        assert error(got, grad) <= BACKWARD[case.dtype]


@on_device
def test_tune_keeps_the_fastest_tile(kernels: Any) -> None:
    """With a stopwatch that likes one tile best: the tile is found, used, and gives the same answer."""
    from interfuse.kernels import conv_pool_launches as plan

    case = Case((1, 17, 4, 9), (17, 17, 1, 2), BLOCK)
    params = params_of(case)
    x, weight, bias = tensors(case, True)
    problem = check(x, weight, bias, params, True)
    products = [product(problem, plan.Geometry.of(problem)) for product in (
        plan.forward_product, plan.input_gradient_product, plan.weight_gradient_product)]  # fmt: skip
    assert all(1 < len(plan.candidates(product)) <= 4 for product in products)
    best = {product.kernel: plan.candidates(product)[-1] for product in products}
    before = kernels.forward(x, weight, bias, params, True)

    def stopwatch(step: Callable[[], object]) -> float:
        step()
        return sum(plan.choose_tile(product) != best[product.kernel] for product in products)

    try:
        assert kernels.tune(x, weight, bias, params, stopwatch) == best
        assert all(plan.choose_tile(product) == best[product.kernel] for product in products)
        after = kernels.forward(x, weight, bias, params, True)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    finally:
        plan.tuned.clear()


@on_device
@pytest.mark.skipif(INTERPRETED, reason="TF32 is a matter of the matrix unit.")
def test_tf32_follows_torchs_switch_and_precision(kernels: Any) -> None:
    case = Case((2, 64, 20, 20), (64, 64, 3, 3), BLOCK)
    x, weight, bias = tensors(case, False)
    params = params_of(case)
    want = truth(
        x, weight, bias, params, gradient_for(kernels.forward(x, weight, bias, params, False)[0], False)
    )
    torch.backends.cudnn.allow_tf32 = True
    short = error(kernels.forward(x, weight, bias, params, False)[0], want.y)
    highest = error(kernels.forward(x, weight, bias, replace(params, precision="highest"), False)[0], want.y)
    assert highest <= FORWARD[torch.float32] < short <= 2e-3


@on_device
@pytest.mark.skipif(INTERPRETED, reason="The interpreter has no streams.")
def test_launches_on_the_current_stream_of_the_tensors_device(kernels: Any) -> None:
    case = CASES["block"]
    params = params_of(case)
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    x, weight, bias = (t.to(last) for t in tensors(case, True))
    want = kernels.forward(x, weight, bias, params, False)[0]
    stream = torch.cuda.Stream(last)
    torch.cuda.synchronize(last)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        later = x.clone()
        got = kernels.forward(later, weight, bias, params, False)[0]
    stream.synchronize()
    assert torch.equal(got, want)
    assert torch.cuda.current_device() == 0


@by_host
@pytest.mark.slow
def test_the_interpreter_agrees() -> None:
    run_interpreted(__file__, at_least=len(CASES) + 20)


def problem_on(device: str, dtype: torch.dtype = torch.float32) -> ConvPoolProblem:
    x, weight = torch.zeros(1, 4, 8, 8), torch.zeros(4, 4, 3, 3)
    problem = check(x, weight, None, params_of(CASES["block"]), False)
    return replace(problem, device=torch.device(device), dtype=dtype)


@by_host
def test_why_not_says_what_is_missing(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        kernels.why_not(problem_on("cpu"))
        == "Triton kernels run on a CUDA device; the tensors are on the CPU."
    )
    assert "the tensors are torch.float64" in kernels.why_not(problem_on("cuda", torch.float64))
    assert "the tensors are on xpu" in kernels.why_not(problem_on("xpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert kernels.why_not(problem_on("cuda")).endswith("8.0 (Ampere) or newer; Tesla T4 has 7.5.")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert all(kernels.why_not(problem_on("cuda", dtype)) is None for dtype in FORWARD)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "ROCm" in kernels.why_not(problem_on("cuda"))


@by_host
def test_asked_for_by_name_on_the_cpu_it_raises_its_reason() -> None:
    with pytest.raises(RuntimeError, match="the tensors are on the CPU"):
        conv_pool(torch.zeros(1, 4, 8, 8), torch.zeros(4, 4, 3, 3), backend="triton")


@by_host
@pytest.mark.parametrize(
    ("old", "new", "precision", "arithmetic"),
    [
        (True, "none", "default", "tf32"),
        (True, "none", "highest", "ieee"),
        (False, "none", "default", "ieee"),
        (False, "tf32", "default", "tf32"),
        (True, "ieee", "default", "ieee"),
    ],
)
def test_tf32_needs_torchs_permission(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, old: bool, new: str, precision: str, arithmetic: str
) -> None:
    """torch has an old switch and a new one that overrides it where it is set."""
    from interfuse.kernels import conv_pool_launches as plan

    class Switches:
        allow_tf32 = old

        class conv:  # noqa: N801
            fp32_precision = new

    problem = problem_on("cuda")
    problem = replace(problem, params=replace(problem.params, precision=precision))
    monkeypatch.setattr(torch.backends, "cudnn", Switches)
    geometry = plan.Geometry.of(problem)
    assert plan.forward_product(problem, geometry).arithmetic == arithmetic
    short = replace(problem, dtype=torch.bfloat16)
    assert plan.forward_product(short, geometry).arithmetic == "ieee"
