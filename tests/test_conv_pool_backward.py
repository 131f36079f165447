"""conv_pool's gradients against float64, and what training saves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import conv_pool_oracle as oracle
import pytest
import tolerance
import torch
from cases.conv_pool import EDGES, FURTHER, Case

import interfuse
from interfuse.ops import conv_pool
from interfuse.ops._conv_pool_checks import check
from interfuse.reference import conv_pool as reference

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("poisoned_outputs")]

BLOCK = {"activation": "relu", "pool": "max", "pool_size": 2}
# Enough tiles for Winograd's gradients, and tails in every direction.
TILES = tuple(
    Case(name, shape, weight, {**BLOCK, **arguments})
    for name, shape, weight, arguments in (
        ("tiles", (8, 33, 13, 15), (47, 33, 3, 3), {}),
        ("tiles-strips", (3, 96, 39, 43), (65, 96, 3, 3), {"padding": 2, "activation": "gelu"}),
        ("tiles-grouped", (9, 36, 9, 14), (34, 18, 3, 3), {"groups": 2, "padding": 1, "ceil_mode": True}),
        ("tiles-unpooled", (5, 35, 15, 14), (33, 35, 3, 3), {"pool": None, "activation": "tanh"}),
        ("tiles-3d", (5, 17, 10, 11, 17), (19, 17, 3, 3, 3), {}),
        ("tiles-3d-two", (3, 16, 8, 13, 21), (20, 16, 3, 3, 3), {}),
        ("tiles-3d-flat-pool", (8, 16, 8, 13, 9), (17, 16, 3, 3, 3),
         {"padding": (1, 0, 1), "pool_size": (1, 2, 2)}),
        ("tiles-3d-unpooled", (16, 18, 9, 8, 10), (16, 18, 3, 3, 3), {"pool": None, "padding": (0, 1, 0)}),
    )
)  # fmt: skip
BY_NAME = {case.name: case for case in (*EDGES, *TILES)}
DTYPES = (torch.float32, torch.bfloat16)
NOISE = 1e-4  # far above what float32 loses, far below the values

OP = torch.ops.interfuse.conv_pool.default
BACKWARD = torch.ops.interfuse.conv_pool_backward.default


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def name_of(case: Case) -> str:
    return case.name


def gradients(
    case: Case, *tensors: torch.Tensor | None, grad_y: torch.Tensor, **more: Any
) -> list[torch.Tensor]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = conv_pool(*leaves, **case.arguments, **more)
    return list(torch.autograd.grad(y, [t for t in leaves if t is not None], grad_y))


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.mark.parametrize(
    "case", [c for c in BY_NAME.values() if len(c.weight) > 3 and c.name != "pool-256"], ids=name_of
)
def test_a_channels_last_weight_gives_the_same_bits(case: Case) -> None:
    """And its gradient lies as it does: autograd would copy any other to that."""
    x, weight, bias = oracle.tensors(case, channels_last=True)
    params = replace(oracle.params(case), backend="native").as_args()
    last = weight.contiguous(memory_format=CHANNELS_LAST[weight.dim()])
    y, index, pre = OP(x, weight, bias, *params, True)
    y_last = OP(x, last, bias, *params, True)[0]
    assert torch.equal(y, y_last)
    mask = (True, True, bias is not None)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    grads, grads_last = (BACKWARD(grad_y, x, w, bias, y, index, pre, *params, mask) for w in (weight, last))
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_last, strict=True))
    assert grads[1].stride() == weight.stride()
    assert grads_last[1].stride() == last.stride()


def assert_gradients_right(case: Case, *tensors: torch.Tensor | None, **more: Any) -> None:
    grad_y = oracle.clear_gradient(case, *tensors, noise=NOISE)
    expected = oracle.gradients(*tensors, grad_y, case.arguments)
    for ours, truth in zip(gradients(case, *tensors, grad_y=grad_y, **more), expected, strict=True):
        assert ours.dtype == tensors[0].dtype
        assert tolerance.error(ours, truth) <= tolerance.gradient(ours.dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case", [*EDGES, *TILES], ids=name_of)
def test_named_cases(case: Case, dtype: torch.dtype, layout: str) -> None:
    # TILES are of sizes at which torch's own functions may be preferred, for their speed.
    named = {"backend": "native"} if case in TILES else {}
    assert_gradients_right(case, *oracle.tensors(case, dtype, layout == "channels_last"), **named)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [c for c in FURTHER if c.name in ("gray-64", "small-32", "deep-14", "third-54-b1")], ids=name_of
)
def test_bench_cases(case: Case) -> None:
    assert_gradients_right(case, *oracle.tensors(case, case.dtype))


@pytest.mark.parametrize("pool", ["none", "max", "avg"])
@pytest.mark.parametrize(("activation", "shift"), [("tanh", 4.0), ("tanh", 7.0), ("sigmoid", 8.0)])
def test_saturated_slopes_are_as_good_as_torchs(activation: str, shift: float, pool: str) -> None:
    """Close to 1 the saved value has few bits of the slope left (docs/numerics.md), in torch as well."""
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 8, 16, 16, generator=random), torch.randn(16, 8, 3, 3, generator=random)
    weight, bias = weight / 72**0.5, torch.randn(16, generator=random) + shift
    arguments = {"activation": activation, "pool": pool, "pool_size": 1 if pool == "none" else 2}
    grad_y = torch.randn(oracle.conv_pool(x, weight, bias, **arguments).shape, generator=random)
    truth = oracle.gradients(x, weight, bias, grad_y, arguments)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torchs = torch.autograd.grad(oracle.conv_pool(*leaves, **arguments), leaves, grad_y)
    with interfuse.precision("highest"):
        ours = torch.autograd.grad(conv_pool(*leaves, **arguments, backend="native"), leaves, grad_y)
    for our, their, true in zip(ours, torchs, truth, strict=True):
        assert tolerance.error(our, true) <= tolerance.TIMES_TORCH * tolerance.error(their, true)


@pytest.mark.parametrize(
    "case",
    # An average divides: its sums are not exact.
    [c for c in EDGES if c.arguments["activation"] in ("none", "relu") and c.arguments["pool"] != "avg"],
    ids=name_of,
)
def test_small_integers_are_exact(case: Case) -> None:
    """Ties are everywhere: the first maximum of a window takes the gradient, and relu passes none at 0."""
    x, weight, bias = oracle.integers(case)
    y = oracle.conv_pool(x, weight, bias, **case.arguments)
    random = torch.Generator().manual_seed(1)
    grad_y = torch.randint(-2, 3, y.shape, generator=random).float()
    with interfuse.precision("highest"):
        ours = gradients(case, x, weight, bias, grad_y=grad_y)
    for gradient, truth in zip(ours, oracle.gradients(x, weight, bias, grad_y, case.arguments), strict=True):
        assert torch.equal(gradient, truth.float())


@pytest.mark.parametrize("name", ["relu-max", "gelu-max", "tanh-avg", "relu-none", "stem", "audio", "volume",
                                  "same-even", "pool-256"])  # fmt: skip
def test_the_reference_in_float64(name: str) -> None:
    case = BY_NAME[name]
    assert_gradients_right(case, *oracle.tensors(case, torch.float64))


def test_gradcheck_in_float64() -> None:
    case = Case("tiny", (1, 2, 4, 3), (2, 2, 2, 2), {"activation": "gelu", "pool": "max"})
    tensors = [t.requires_grad_() for t in oracle.tensors(case, torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: conv_pool(*t, **case.arguments), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: conv_pool(*t, **case.arguments), tensors)


@pytest.mark.parametrize("strides", ["expanded", "spread", "channels_last", "transposed"])
def test_any_strides_of_the_output_gradient(strides: str) -> None:
    case = BY_NAME["silu-max"]
    x, weight, bias = oracle.tensors(case)
    grad_y = oracle.clear_gradient(case, x, weight, bias, NOISE)
    if strides == "expanded":
        grad_y = grad_y[:1, :1].expand_as(grad_y)
        x = x[:1].expand_as(x)
    elif strides == "spread":
        wide = torch.full((*grad_y.shape[:3], 2 * grad_y.shape[3]), float("nan"))
        grad_y = wide[..., ::2].copy_(grad_y)
    elif strides == "channels_last":
        grad_y = grad_y.contiguous(memory_format=torch.channels_last)
    else:
        grad_y = grad_y.transpose(0, 3).contiguous().transpose(0, 3)
    if strides == "expanded":  # the same gradient everywhere is not clear of near ties any more
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = conv_pool(*leaves, **case.arguments)
        ours = torch.autograd.grad(y, leaves, grad_y)
        again = torch.autograd.grad(conv_pool(*leaves, **case.arguments), leaves, grad_y.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
        return
    expected = oracle.gradients(x, weight, bias, grad_y, case.arguments)
    for ours, truth in zip(gradients(case, x, weight, bias, grad_y=grad_y), expected, strict=True):
        assert tolerance.error(ours, truth) <= tolerance.FLOAT32_GRADIENT


@pytest.mark.parametrize("name", ["relu-max", "block-3d", "tiles", "tiles-3d", "audio"])
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)], ids=str)
def test_only_the_gradients_asked_for(name: str, wanted: tuple[int, ...]) -> None:
    case = BY_NAME[name]
    tensors = oracle.tensors(case)
    grad_y = torch.ones_like(conv_pool(*tensors, **case.arguments))
    every = gradients(case, *tensors, grad_y=grad_y)
    leaves = [t.detach().requires_grad_(bool(want)) for t, want in zip(tensors, wanted, strict=True)]
    conv_pool(*leaves, **case.arguments).backward(grad_y)
    for leaf, want, expected in zip(leaves, wanted, every, strict=True):
        assert torch.equal(leaf.grad, expected) if want else leaf.grad is None


@pytest.mark.parametrize(
    "case", [*TILES, *(c for c in EDGES if c.name.split("-")[-1] in ("none", "max", "avg"))], ids=name_of
)
def test_a_second_backward_gives_the_same(case: Case) -> None:
    leaves = [t.requires_grad_() for t in oracle.tensors(case)]
    y = conv_pool(*leaves, **case.arguments)
    grad_y = torch.ones_like(y)
    first = torch.autograd.grad(y, leaves, grad_y, retain_graph=True)
    assert bool((grad_y == 1).all())
    second = torch.autograd.grad(y, leaves, grad_y)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "name", ["gelu-max", "silu-avg", "tanh-none", "relu-max", "audio-avg", "volume-dilated"]
)
def test_create_graph(name: str) -> None:
    """The gradient of a gradient, which goes through the reference, against float64."""
    case = BY_NAME[name]
    tensors = oracle.tensors(case)
    grad_y = oracle.clear_gradient(case, *tensors, noise=NOISE)

    def second(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        first = torch.autograd.grad(
            function(*leaves, **case.arguments), leaves, grad_y.to(dtype), create_graph=True
        )
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    for ours, truth in zip(
        second(conv_pool, torch.float32), second(oracle.conv_pool, torch.float64), strict=True
    ):
        assert (
            tolerance.error(ours, truth) <= 10 * tolerance.FLOAT32_GRADIENT
        )  # two gradients' errors, squared values


def test_create_graph_gives_the_kernels_gradients_first() -> None:
    case = BY_NAME["block-32"]
    leaves = [t.requires_grad_() for t in oracle.tensors(case)]
    y = conv_pool(*leaves, **case.arguments)
    grad_y = torch.ones_like(y)
    plain = torch.autograd.grad(y, leaves, grad_y, retain_graph=True)
    graph = torch.autograd.grad(y, leaves, grad_y, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, graph, strict=True))


@pytest.mark.parametrize("where", ["x", "weight", "grad_y"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38], ids=str)
@pytest.mark.parametrize("name", ["tiles", "tiles-3d", "tiles-unpooled"])
def test_what_is_not_finite_stays_where_it_is(name: str, value: float, where: str) -> None:
    """Winograd would spread it over a tile, or overflow near the largest float: both precisions agree."""
    case = BY_NAME[name]
    x, weight, bias = oracle.tensors(case)
    params = oracle.params(case, "highest")
    y, index, pre = OP(x, weight, bias, *params.as_args(), True)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    {"x": x, "weight": weight, "grad_y": grad_y}[where].view(-1)[7] = value
    saved = (x, weight, bias, y, index, pre)
    exact, default = (
        BACKWARD(grad_y, *saved, *oracle.params(case, precision).as_args(), [True, True, True])
        for precision in ("highest", "default")
    )
    assert all(torch.equal(a.isfinite(), b.isfinite()) for a, b in zip(exact, default, strict=True))
    if value != 1e38:
        assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(exact, default, strict=True))


@pytest.mark.parametrize("name", ["relu-max", "audio", "volume", "gelu-avg"])
def test_empty_batch(name: str) -> None:
    case = BY_NAME[name]
    x, weight, bias = oracle.tensors(case)
    leaves = [t.detach().requires_grad_() for t in (x[:0], weight, bias)]
    conv_pool(*leaves, **case.arguments).sum().backward()
    assert leaves[0].grad.shape == leaves[0].shape
    assert not leaves[1].grad.any()
    assert not leaves[2].grad.any()


def test_without_a_batch_dimension() -> None:
    case = BY_NAME["relu-max"]
    x, weight, bias = oracle.tensors(case)
    grad_y = torch.ones_like(conv_pool(x[:1], weight, bias, **case.arguments))
    batched = gradients(case, x[:1], weight, bias, grad_y=grad_y)
    single = gradients(case, x[0], weight, bias, grad_y=grad_y[0])
    assert torch.equal(single[0], batched[0][0])
    assert torch.equal(single[1], batched[1])


def test_writing_to_an_input_before_backward_is_an_error() -> None:
    case = BY_NAME["relu-max"]
    x, weight, bias = oracle.tensors(case)
    y = conv_pool(x, weight.requires_grad_(), bias, **case.arguments)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    "name",
    ["relu-max", "gelu-max", "gelu-avg", "relu-avg", "tanh-avg", "silu-none", "relu-none", "stem", "audio",
     "volume", "pool-gaps", "pool-255"],
)  # fmt: skip
def test_what_the_forward_saves_is_the_references(name: str) -> None:
    case = BY_NAME[name]
    x, weight, bias = oracle.tensors(case)
    params = oracle.params(case, "highest")
    y, index, pre = OP(x, weight, bias, *params.as_args(), True)
    doubles = [None if t is None else t.double() for t in (x, weight, bias)]
    _, true_index, true_pre = reference.run(check(*doubles, params, save=True), *doubles)
    assert torch.equal(index, true_index)
    assert pre.shape == true_pre.shape
    if params.saves_pre == "conv":  # what no window covers is not written, and not read
        leaf = torch.zeros_like(true_pre, requires_grad=True)
        covered = torch.autograd.grad(oracle.pool(leaf, leaf.dim() - 2, **case.arguments).sum(), leaf)[0] != 0
        pre, true_pre = pre[covered], true_pre[covered]
    if pre.numel():
        assert tolerance.error(pre, true_pre) <= tolerance.FLOAT32_HIGHEST
    assert torch.equal(y, OP(x, weight, bias, *params.as_args(), False)[0])


def test_training_saves_a_byte_for_each_output() -> None:
    """Under the block conv + relu + max pool: the inputs, and the winners' positions; no feature map."""
    saved: list[torch.Tensor] = []
    case = BY_NAME["block-32"]
    leaves = [t.requires_grad_() for t in oracle.tensors(case)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = conv_pool(*leaves, **case.arguments)
    inputs = {t.data_ptr() for t in leaves}
    extra = sum(t.numel() * t.element_size() for t in saved if t.data_ptr() not in inputs)
    assert extra == y.numel()
