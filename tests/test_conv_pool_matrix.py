"""First layers on the matrix units: which they take, tails, float32's error, special values."""

from __future__ import annotations

from typing import Any

import conv_pool_oracle as oracle
import pytest
import tolerance
import torch
from cases.conv_pool import BLOCK, Case
from test_conv_pool_preference import problem_of

import interfuse
from interfuse import _native
from interfuse.ops import _conv_pool_native as native
from interfuse.ops import conv_pool

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not _native.info()["matrix_units"], reason="this processor has no matrix units"),
]


def _case(name: str, shape: tuple[int, ...], weight: tuple[int, ...], **arguments: Any) -> Case:
    return Case(name, shape, weight, {**BLOCK, **arguments})


CASES = [
    _case("rgb", (2, 3, 17, 38), (32, 3, 3, 3)),
    _case("rgb-many-strips", (1, 3, 260, 250), (33, 3, 3, 3), padding=1),
    _case("two-channels", (3, 2, 19, 45), (40, 2, 3, 3), padding=2, activation="tanh"),
    _case("even-channels", (2, 4, 9, 34), (31, 4, 3, 3), activation=None),
    _case("five", (2, 3, 13, 50), (35, 3, 5, 5), padding=(1, 2)),
    _case("wide-kernel", (1, 2, 8, 48), (64, 2, 3, 7), padding=(0, 5)),
    _case("unpooled-odd-rows", (2, 3, 8, 35), (34, 3, 3, 3), padding=(0, 1), pool=None),
    _case("video", (2, 3, 9, 12, 36), (32, 3, 3, 3, 3)),
    _case("video-padded", (1, 3, 8, 9, 34), (50, 3, 3, 3, 3), padding=1),
    _case("video-dilated-in-time", (1, 3, 11, 12, 36), (32, 3, 3, 3, 3), dilation=(2, 1, 1)),
    _case("video-flat-windows", (1, 2, 5, 14, 34), (32, 2, 2, 3, 3), pool_size=(1, 2, 2)),
    _case("video-unpooled", (1, 5, 5, 8, 33), (62, 5, 3, 3, 3), padding=1, pool=None),
]
NAMED = {case.name: case for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_they_have_float32s_error_and_the_direct_sums_winners(case: Case) -> None:
    assert native.describe(problem_of(case, save=True))[0] == "matrix"
    x, weight, bias = oracle.tensors(case)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = conv_pool(*leaves, **case.arguments)
    truth = oracle.truth(x, weight, bias, **case.arguments)
    for result in (y, conv_pool(x, weight, bias, **case.arguments)):
        assert tolerance.error(result, truth) <= tolerance.FLOAT32_HIGHEST
    ours = torch.autograd.grad(y, leaves, torch.ones_like(y))
    with interfuse.precision("highest"):
        theirs = torch.autograd.grad(conv_pool(*leaves, **case.arguments), leaves, torch.ones_like(y))
    for a, b in zip(ours, theirs, strict=True):
        assert tolerance.error(a, b) <= tolerance.FLOAT32_GRADIENT


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    case = NAMED["video"]
    x, weight, bias = oracle.tensors(case)
    y = conv_pool(x, weight, bias, **case.arguments)
    torch.set_num_threads(threads)
    assert torch.equal(conv_pool(x, weight, bias, **case.arguments), y)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38], ids=str)
@pytest.mark.parametrize("name", ["rgb", "video"])
def test_what_is_not_finite_stays_in_its_image(name: str, value: float) -> None:
    case = NAMED[name]
    x, weight, bias = oracle.tensors(case)
    clean = conv_pool(x, weight, bias, **case.arguments)
    x.view(2, -1)[1, 77] = value
    y = conv_pool(x, weight, bias, **case.arguments)
    with interfuse.precision("highest"):
        sums = conv_pool(x, weight, bias, **case.arguments)
    assert torch.equal(y[0], clean[0])
    assert torch.equal(y[1].nan_to_num(7.0), sums[1].nan_to_num(7.0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "highest"}, "precision"),
        ({"dtype": torch.bfloat16}, "float32"),
        ({"last": True}, "contiguous"),
        ({"stride": 2}, "stride"),
        ({"activation": "gelu"}, "before the activation"),
        ({"pool": "avg", "activation": None}, "not a maximum"),
        ({"pool_size": 3}, "not a maximum"),
        ({"ceil_mode": True}, "reaches beyond"),
    ],
    ids=str,
)
def test_they_say_why_not(changes: dict[str, Any], words: str) -> None:
    name, why = native.describe(problem_of(NAMED["rgb"], save=True, **changes))
    assert name != "matrix"
    assert words in why


def test_few_filters_or_columns_are_left_to_the_vector_units() -> None:
    for shape, weight in (
        ((1, 3, 20, 40), (6, 3, 3, 3)),
        ((1, 3, 60, 6), (32, 3, 3, 3)),
        ((1, 9, 20, 40), (32, 9, 3, 3)),
    ):
        assert native.describe(problem_of(_case("few", shape, weight), save=False))[0] != "matrix"
