"""conv_pool's output against float64, over named cases, layouts, strides and special values."""

from __future__ import annotations

import conv_pool_oracle as oracle
import pytest
import tolerance
import torch
from cases.conv_pool import EDGES, FURTHER, Case

import interfuse
from interfuse.ops import conv_pool

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("poisoned_outputs")]

BY_NAME = {case.name: case for case in EDGES}
DTYPES = (torch.float32, torch.bfloat16)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def name_of(case: Case) -> str:
    return case.name


def assert_right(case: Case, *tensors: torch.Tensor | None, precision: str = "default") -> None:
    with interfuse.precision(precision):
        y = conv_pool(*tensors, **case.arguments)
    error = tolerance.error(y, oracle.truth(*tensors, **case.arguments))
    assert y.dtype == tensors[0].dtype
    assert error <= tolerance.output(y.dtype, precision)


@pytest.mark.parametrize("precision", ["default", "highest"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case", EDGES, ids=name_of)
def test_named_cases(case: Case, dtype: torch.dtype, layout: str, precision: str) -> None:
    x, weight, bias = oracle.tensors(case, dtype, layout == "channels_last")
    assert_right(case, x, weight, bias, precision=precision)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", FURTHER, ids=name_of)
def test_bench_cases(case: Case, layout: str) -> None:
    assert_right(case, *oracle.tensors(case, case.dtype, layout == "channels_last"))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", EDGES, ids=name_of)
def test_small_integers_are_exact(case: Case, layout: str) -> None:
    """Sums of products of small integers have no rounding: a wrong index cannot hide in a tolerance."""
    x, weight, bias = oracle.integers(case)
    if layout == "channels_last" and x.dim() > 3:
        x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    arguments = {**case.arguments, "activation": "relu" if case.arguments["activation"] == "relu" else None}
    with interfuse.precision("highest"):
        y = conv_pool(x, weight, bias, **arguments)
    expected = oracle.truth(x, weight, bias, **arguments)
    # An average divides, which rounds once.
    assert torch.equal(y, expected.float())


@pytest.mark.parametrize(
    "case", [c for c in EDGES if c.name.startswith(("block", "first", "stem"))], ids=lambda case: case.name
)
def test_highest_is_as_exact_as_torch(case: Case) -> None:
    x, weight, bias = oracle.tensors(case)
    expected = oracle.truth(x, weight, bias, **case.arguments)
    torchs = tolerance.error(oracle.conv_pool(x, weight, bias, **case.arguments), expected)
    with interfuse.precision("highest"):
        ours = tolerance.error(conv_pool(x, weight, bias, **case.arguments), expected)
    assert ours <= tolerance.beside_torch(torchs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=short)
@pytest.mark.parametrize("name", ["relu-max", "gelu-avg", "audio", "volume", "same-even"])
def test_other_dtypes_go_through_the_reference(name: str, dtype: torch.dtype) -> None:
    assert_right(BY_NAME[name], *oracle.tensors(BY_NAME[name], dtype))


@pytest.mark.parametrize("name", ["relu-max", "stem", "volume", "audio", "block-32", "depthwise"])
def test_the_reference_backend_agrees(name: str) -> None:
    case = BY_NAME[name]
    x, weight, bias = oracle.tensors(case)
    y = conv_pool(x, weight, bias, **case.arguments, backend="reference")
    assert tolerance.error(y, oracle.truth(x, weight, bias, **case.arguments)) <= tolerance.FLOAT32_DEFAULT


def spread(t: torch.Tensor, axis: int) -> torch.Tensor:
    """t with a stride of 2 along the axis, between NaNs."""
    shape = list(t.shape)
    shape[axis] *= 2
    wide = torch.full(shape, float("nan"), dtype=t.dtype)
    view = wide[tuple(slice(None, None, 2) if d == axis % t.dim() else slice(None) for d in range(t.dim()))]
    return view.copy_(t)


def shifted(t: torch.Tensor, by: int = 1) -> torch.Tensor:
    """t on memory that is aligned to its element and no more, between NaNs."""
    room = torch.full((t.numel() + 2 * by + 1,), float("nan"), dtype=t.dtype)
    return room[by : by + t.numel()].view(t.shape).copy_(t)


def window(t: torch.Tensor) -> torch.Tensor:
    """t as the inside of a larger tensor of NaNs."""
    wide = torch.full([size + 3 for size in t.shape], float("nan"), dtype=t.dtype)
    return wide[tuple(slice(1, 1 + size) for size in t.shape)].copy_(t)


STRIDES = {
    "batch": lambda t: spread(t, 0),
    "channels": lambda t: spread(t, 1),
    "rows": lambda t: spread(t, 2),
    "last": lambda t: spread(t, -1),
    "shifted": shifted,
    "window": window,
    "transposed": lambda t: t.transpose(-1, 0).contiguous().transpose(-1, 0),
    "channels between": lambda t: t.movedim(1, 2).contiguous().movedim(2, 1),
    "channels_last window": lambda t: window(t.movedim(1, -1).contiguous()).movedim(-1, 1),
    "channels_last spread": lambda t: spread(t.movedim(1, -1).contiguous(), -2).movedim(-1, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize(
    "name", ["relu-max", "first-rgb", "pointwise", "audio", "volume", "block-32", "block-3d"]
)
def test_any_strides(name: str, strides: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    x, weight, bias = oracle.tensors(case, dtype)
    there = STRIDES[strides](x)
    assert torch.equal(there, x)
    assert_right(case, there, weight, bias)
    assert torch.equal(there, x)


@pytest.mark.parametrize("name", ["relu-max", "block-32", "volume", "depthwise"])
def test_misaligned_and_strided_parameters(name: str) -> None:
    case = BY_NAME[name]
    x, weight, bias = oracle.tensors(case)
    for change in (shifted, window, lambda t: spread(t, 0)):
        assert_right(case, x, change(weight), change(bias))
    if weight.dim() == 4:
        assert_right(case, x, weight.contiguous(memory_format=torch.channels_last), bias)


def test_expanded_input() -> None:
    case = BY_NAME["relu-max"]
    x, weight, bias = oracle.tensors(case)
    assert_right(case, x[:1].expand(4, -1, -1, -1), weight, bias)
    assert_right(case, x[:, :, :, :1].expand(-1, -1, -1, 8), weight, bias)


@pytest.mark.parametrize("name", ["relu-max", "block-32", "volume", "pointwise"])
def test_the_output_follows_the_inputs_memory_format(name: str) -> None:
    case = BY_NAME[name]
    form = torch.channels_last if len(case.input) == 4 else torch.channels_last_3d
    x, weight, bias = oracle.tensors(case)
    assert conv_pool(x, weight, bias, **case.arguments).is_contiguous()
    y = conv_pool(x.contiguous(memory_format=form), weight, bias, **case.arguments)
    assert y.is_contiguous(memory_format=form)


def test_a_channels_last_weight_makes_the_output_channels_last() -> None:
    """As in torch: this is how model.to(memory_format=torch.channels_last) starts a chain of such outputs."""
    case = BY_NAME["relu-max"]
    x, weight, bias = oracle.tensors(case)
    weight = weight.contiguous(memory_format=torch.channels_last)
    assert oracle.conv_pool(x, weight, bias, **case.arguments).is_contiguous(
        memory_format=torch.channels_last
    )
    assert conv_pool(x, weight, bias, **case.arguments).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["audio", "relu-max", "volume", "reflect", "same-even"])
def test_without_a_batch_dimension(name: str) -> None:
    case = BY_NAME[name]
    x, weight, bias = oracle.tensors(case)
    y = conv_pool(x[0], weight, bias, **case.arguments)
    assert torch.equal(y, conv_pool(x[:1], weight, bias, **case.arguments)[0])


@pytest.mark.parametrize("name", ["audio", "relu-max", "gelu-avg", "volume"])
def test_empty_batch(name: str) -> None:
    case = BY_NAME[name]
    x, weight, bias = oracle.tensors(case)
    y = conv_pool(x[:0], weight, bias, **case.arguments)
    assert y.shape == (0, *conv_pool(x, weight, bias, **case.arguments).shape[1:])


SPECIAL = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize(
    "case", [c for c in EDGES if c.name.split("-")[-1] in ("none", "max", "avg")], ids=name_of
)
def test_nan_and_infinity_spread_as_in_torch(case: Case, special: str, layout: str) -> None:
    """At "highest": Winograd's sums turn an infinity into NaN for a whole tile."""
    x, weight, bias = oracle.tensors(case, channels_last=layout == "channels_last")
    x[0, 1 % x.shape[1], ..., 2] = SPECIAL[special]
    with interfuse.precision("highest"):
        y = conv_pool(x, weight, bias, **case.arguments)
    assert tolerance.error(y, oracle.truth(x, weight, bias, **case.arguments)) <= tolerance.FLOAT32_HIGHEST


@pytest.mark.parametrize("name", ["block-32", "block-3d"])
def test_nan_is_not_lost_by_default(name: str) -> None:
    case = BY_NAME[name]
    x, weight, bias = oracle.tensors(case)
    x[0, 3, ..., 2] = float("nan")
    y = conv_pool(x, weight, bias, **case.arguments)
    expected = oracle.truth(x, weight, bias, **case.arguments)
    assert bool(y.isnan()[expected.isnan()].all())


def test_the_highest_values_survive() -> None:
    """Values next to the largest float, and subnormals, pass a pool unchanged."""
    weight = torch.ones(1, 1, 1, 1)
    for value in (3.4e38, -3.4e38, 1e-40, -1e-40, 0.0):
        x = torch.full((1, 1, 4, 4), value)
        y = conv_pool(x, weight, pool="max")
        assert torch.equal(y, torch.full((1, 1, 2, 2), value))
