"""Where torch's own functions are faster they run, with their own gradients, and explain says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from cases.conv_pool import BARS, FURTHER, SWEEP, Case
from torch import nn

import interfuse
from interfuse.dispatch import Implementation, choose, refusals
from interfuse.nn import ConvPool2d
from interfuse.ops import _conv_pool_eager, _conv_pool_native, _conv_pool_preference, conv_pool
from interfuse.ops._conv_pool_checks import Options, check, resolve
from interfuse.ops.conv_pool import IMPLEMENTATIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from interfuse.ops._conv_pool_problem import ConvPoolProblem

OPTIONS: dict[str, Any] = {
    "stride": 1, "padding": 0, "dilation": 1, "groups": 1, "padding_mode": "zeros", "activation": None,
    "negative_slope": 0.01, "pool": None, "pool_size": 2, "pool_stride": None, "pool_padding": 0,
    "ceil_mode": False, "count_include_pad": True, "backend": None}  # fmt: skip


@pytest.fixture(autouse=True)
def no_memory_of_other_machines() -> Iterator[None]:
    """Some tests say what kind of machine this is."""
    _conv_pool_preference.rather_not.cache_clear()
    yield
    _conv_pool_preference.rather_not.cache_clear()


def problem_of(case: Case, save: bool, precision: str = "default", last: bool = False, **changes: Any) -> Any:
    """What an implementation is asked about, without the memory."""
    dtype = changes.pop("dtype", case.dtype)
    x, weight = (torch.empty(size, dtype=dtype, device="meta") for size in (case.input, case.weight))
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    params = resolve(tuple(case.weight[2:]), Options(**{**OPTIONS, **case.arguments, **changes}), precision)
    problem: ConvPoolProblem = check(x, weight, None, params, save)
    object.__setattr__(problem, "device", torch.device("cpu"))
    return problem


def named(name: str) -> Case:
    return next(case for case in SWEEP if case.name == name)


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("case", [case for case in BARS + FURTHER if case.dtype == torch.float32], ids=str)
def test_what_the_benchmark_promises_stays_native(case: Case, save: bool) -> None:
    assert _conv_pool_preference.rather_not(problem_of(case, save=False)) is None
    if case in BARS:
        assert _conv_pool_preference.rather_not(problem_of(case, save, "highest")) is None


@pytest.mark.parametrize(
    ("name", "last", "save", "words"),
    [
        ("depthwise-56x56-128-k3", True, False, None),
        ("depthwise-56x56-128-k3", True, True, "the gradients of depthwise"),
        ("depthwise-56x56-128-k3", False, True, None),
        ("depthwise-56x56-128-k3-s2", True, False, "strided depthwise"),
        ("depthwise-14x14-384-k7", False, False, "depthwise kernels of 7x7"),
        ("pointwise-14x14-512-512", False, False, None),
        ("pointwise-14x14-512-512", False, True, "no max pool thins out"),
        ("dense-56x56-64-64-k3", True, True, None),
        ("dense-14x14-256-256-k3", False, True, "no max pool thins out"),
        ("dense-28x28-64-64-k5", True, False, "unpooled sums over many channels"),
        ("groups-56x56-128-of-4", True, False, "groups of less than 16 channels"),
        ("groups-14x14-512-of-16", False, False, "grouped convolutions of images"),
        ("groups-56x56-128-of-16", True, True, None),
        ("patches-16x16", False, False, "patches"),
        ("patches-4x4", True, False, None),
        ("dense-7x7-512-512-k3", False, False, None),
        ("1d-512-512-s2", False, False, "1-d convolutions"),
        ("3d-16-32", False, True, None),
    ],
)  # fmt: skip
def test_the_classes_measured(name: str, last: bool, save: bool, words: str | None) -> None:
    sentence = _conv_pool_preference.rather_not(problem_of(named(name), save, last=last))
    if words is None:
        assert sentence is None
    else:
        assert sentence is not None
        assert words in sentence
        assert sentence.startswith("torch's own functions are faster for ")
        assert "measured" in sentence
        assert sentence.endswith(".")


def test_small_problems_stay_native() -> None:
    case = Case("small", (1, 32, 9, 9), (32, 1, 3, 3), {"groups": 32})
    assert _conv_pool_preference.rather_not(problem_of(case, save=True, last=True)) is None


def test_bfloat16_goes_to_matrix_units_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(named("pointwise-28x28-256-128"), save=False, dtype=torch.bfloat16)
    for units in (False, True):
        monkeypatch.setattr(_conv_pool_preference, "has_bfloat16_matrix_units", lambda units=units: units)
        _conv_pool_preference.rather_not.cache_clear()
        sentence = _conv_pool_preference.rather_not(problem)
        assert (sentence is not None and "AMX" in sentence) is units


def test_few_tiles_and_many_weights_are_no_case_for_winograd() -> None:
    case = named("dense-7x7-512-512-k3")
    kernel, why = _conv_pool_native.describe(problem_of(case, save=False))
    assert kernel == "winograd"
    one = Case("one", (1, *case.input[1:]), case.weight, case.arguments)
    kernel, why = _conv_pool_native.describe(problem_of(one, save=False))
    assert kernel == "direct"
    assert "4 tiles of results" in why


def test_an_implementation_that_would_rather_not_is_passed_over_but_runs_when_named() -> None:
    def run(*_: Any) -> None: ...

    first = Implementation("first", lambda p: None, run, run, rather_not=lambda p: "The last is faster.")
    last = Implementation("last", lambda p: None, run, run)
    assert choose((first, last), None) is last
    assert choose((first, last), None, "first") is first
    assert [(r.name, r.reason) for r in refusals((first, last), None)] == [("first", "The last is faster.")]


# A depthwise convolution of a channels-last image with stride 2: torch's in inference and in training.
WEIGHT = (144, 1, 3, 3)
ARGUMENTS: dict[str, Any] = {"stride": 2, "padding": 1, "groups": 144, "activation": "relu"}


def tensors(grad: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 144, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(WEIGHT, generator=generator), torch.randn(WEIGHT[0], generator=generator)
    return [t.requires_grad_(grad) for t in (x, weight, bias)]


def plainly(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.relu(F.conv2d(x, weight, bias, stride=2, padding=1, groups=144))


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """The ops below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(function))
        return function(*args, **(kwargs or {}))


def test_the_case_is_one_for_torch() -> None:
    case = Case("case", (2, 144, 32, 32), WEIGHT, ARGUMENTS)
    for save in (False, True):
        assert choose(IMPLEMENTATIONS, problem_of(case, save, last=True)).name == "reference"


def test_eager_calls_give_what_torch_gives_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the native kernel ran")

    monkeypatch.setattr(_conv_pool_eager, "conv_pool_forward", never)
    monkeypatch.setattr(_conv_pool_native, "run", never)
    for grad in (False, True):
        given = tensors(grad)
        before = [t.detach().clone() for t in given]
        y, expected = conv_pool(*given, **ARGUMENTS), plainly(*given)
        assert torch.equal(y, expected)
        assert y.stride() == expected.stride()
        assert all(torch.equal(t, b) for t, b in zip(given, before, strict=True))
        module = ConvPool2d(144, 144, 3, 2, 1, groups=144, activation="relu")
        module.weight, module.bias = nn.Parameter(given[1].detach()), nn.Parameter(given[2].detach())
        assert torch.equal(module(given[0]), expected)
    with torch.no_grad():
        assert torch.equal(conv_pool(*tensors(), **ARGUMENTS), plainly(*tensors()))
    image = tensors()[0][0].contiguous()
    with pytest.raises(AssertionError, match="the native kernel ran"):
        conv_pool(image, *tensors()[1:], **ARGUMENTS)


def test_gradients_are_torchs_and_so_is_what_is_kept_for_them() -> None:
    kept: list[int] = []

    def gradients(function: Any) -> Any:
        given, sizes = tensors(grad=True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t):
            y = function(given)
        kept.append(sum(sizes))
        first = torch.autograd.grad(y.sin().sum(), given, create_graph=True)
        return (*first, *torch.autograd.grad(sum(g.square().sum() for g in first), given))

    ours = gradients(lambda given: conv_pool(*given, **ARGUMENTS))
    theirs = gradients(lambda given: plainly(*given))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert kept[0] <= kept[1]


def test_through_the_op_the_gradients_are_torchs_too() -> None:
    with Seen() as seen:
        given = tensors(grad=True)
        y = conv_pool(*given, **ARGUMENTS)
        ours = torch.autograd.grad(y.sum(), given)
    assert not any("interfuse" in op for op in seen.ops)
    assert all(map(torch.equal, ours, torch.autograd.grad(plainly(*given).sum(), given)))
    given = tensors(grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv_pool(*given, **ARGUMENTS)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, plainly(*given))


def test_asked_for_by_name_the_native_kernel_runs() -> None:
    given = tensors(grad=True)
    with Seen() as seen:
        conv_pool(*given, **ARGUMENTS, backend="native").sum().backward()
    assert "interfuse.conv_pool_backward.default" in seen.ops
    y = conv_pool(*given, **ARGUMENTS, backend="native")
    assert "Forward" in type(y.grad_fn).__name__
    torch.testing.assert_close(y, plainly(*given), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(y, conv_pool(*given, **ARGUMENTS, backend="native"))


def test_optimize_leaves_it_alone_and_explain_says_why() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(144, 144, 3, 2, 1, groups=144), nn.ReLU())
    x = tensors()[0]
    expected = model(x)
    interfuse.optimize(model)
    assert torch.equal(model(x), expected)
    [row] = interfuse.explain(model).rows
    assert not row.fused
    assert any(reason.startswith("native: torch's own functions are faster for") for reason in row.why_not)
