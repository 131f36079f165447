"""conv_pool inside torch: the op registry's own checks, autocast, functorch, forward mode."""

from __future__ import annotations

from typing import Any

import conv_pool_oracle as oracle
import pytest
import tolerance
import torch
from cases.conv_pool import EDGES, Case
from tolerance import close

from interfuse.ops import conv_pool

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

OP = torch.ops.interfuse.conv_pool.default
BACKWARD = torch.ops.interfuse.conv_pool_backward.default
BY_NAME = {case.name: case for case in EDGES}


OPCHECKED = ("relu-max", "gelu-max", "silu-avg", "tanh-none", "audio", "volume")


# ---- the registered ops


@pytest.mark.parametrize(
    "name", ["relu-max", "gelu-max", "silu-avg", "tanh-none", "audio", "volume", "same-even"]
)
@pytest.mark.parametrize("save", [False, True])
def test_opcheck(name: str, save: bool) -> None:
    case = BY_NAME[name]
    x, weight, bias = (t.requires_grad_() for t in oracle.tensors(case))
    torch.library.opcheck(OP, (x, weight, bias, *oracle.params(case).as_args(), save))
    detached = [t.detach() for t in (x, weight, bias)]
    torch.library.opcheck(OP, (*detached, *oracle.params(case).as_args(), save))


@pytest.mark.parametrize("mask", [[True, True, True], [False, True, False]], ids=str)
@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck_backward(name: str, mask: list[bool]) -> None:
    case = BY_NAME[name]
    x, weight, bias = oracle.tensors(case)
    params = oracle.params(case)
    y, index, pre = OP(x, weight, bias, *params.as_args(), True)
    saved = y if params.backward_needs_y else None
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    torch.library.opcheck(BACKWARD, (grad_y, x, weight, bias, saved, index, pre, *params.as_args(), mask))
    last = weight.clone(memory_format=torch.channels_last) if weight.dim() == 4 else weight
    for some_weight in (weight, last):
        leaves = [t.detach().requires_grad_() for t in (grad_y, x, some_weight, bias)]
        arguments = (*leaves, saved, index, pre, *params.as_args(), mask)
        torch.library.opcheck(BACKWARD, arguments)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [c for c in EDGES if "-" in c.name], ids=lambda case: case.name)
def test_fake_results_look_like_the_real_ones(case: Case, layout: str) -> None:
    x, weight, bias = oracle.tensors(case, channels_last=layout == "channels_last")
    real = conv_pool(x, weight, bias, **case.arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = conv_pool(
            *(None if t is None else mode.from_tensor(t) for t in (x, weight, bias)), **case.arguments
        )
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    meta = conv_pool(*(None if t is None else t.to("meta") for t in (x, weight, bias)), **case.arguments)
    assert (meta.shape, meta.stride()) == (real.shape, real.stride())


# ---- autocast


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_autocast_casts_as_torchs_convolution(grad: bool) -> None:
    case = BY_NAME["block-32"]
    x, weight, bias = (t.requires_grad_(grad) for t in oracle.tensors(case))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv_pool(x, weight, bias, **case.arguments)
        expected = oracle.conv_pool(x, weight, bias, **case.arguments)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert tolerance.error(y, oracle.truth(x, weight, bias, **case.arguments)) <= 4 * tolerance.BFLOAT16
    if grad:
        y.sum().backward()
        assert all(t.grad.dtype == torch.float32 for t in (x, weight, bias))


def test_autocast_leaves_float64_alone() -> None:
    case = BY_NAME["relu-max"]
    with torch.autocast("cpu"):
        assert conv_pool(*oracle.tensors(case, torch.float64), **case.arguments).dtype == torch.float64
        assert conv_pool(*oracle.tensors(case), **case.arguments, backend="reference").dtype == torch.bfloat16
        x, weight, bias = oracle.tensors(case)
        assert OP(x, weight, bias, *oracle.params(case).as_args(), False)[0].dtype == torch.float32


# ---- functorch and forward mode


def pair(case: Case) -> tuple[Any, Any]:
    return (lambda *t: conv_pool(*t, **case.arguments)), (lambda *t: oracle.conv_pool(*t, **case.arguments))


def scalar(function: Any) -> Any:
    return lambda *t: function(*t).square().sum()


FUNCTORCH = ("gelu-max", "tanh-avg", "relu-none", "grouped", "audio", "volume")


@pytest.mark.parametrize("name", FUNCTORCH)
def test_func_grad(name: str) -> None:
    ours, theirs = pair(BY_NAME[name])
    tensors = oracle.tensors(BY_NAME[name])
    assert close(
        torch.func.grad(scalar(ours), (0, 1, 2))(*tensors),
        torch.func.grad(scalar(theirs), (0, 1, 2))(*tensors),
    )


def nested(function: Any) -> Any:
    """The gradient of the gradient's square, with respect to the input."""
    inner = torch.func.grad(scalar(function))
    return torch.func.grad(lambda *t: inner(*t).square().sum())


@pytest.mark.parametrize("name", ["gelu-max", "tanh-avg"])
def test_func_grad_of_grad(name: str) -> None:
    ours, theirs = pair(BY_NAME[name])
    tensors = oracle.tensors(BY_NAME[name])
    assert close(nested(ours)(*tensors), nested(theirs)(*tensors), 10 * tolerance.FLOAT32_GRADIENT)


IN_DIMS = [
    (0, None, None),
    (2, None, None),
    (None, 0, None),
    (None, None, 0),
    (0, 1, None),
    (0, 0, 0),
    (1, 2, 1),
]


def mapped(case: Case, in_dims: tuple[int | None, ...]) -> list[torch.Tensor]:
    """Each tensor three times, the third negated, along its mapped dimension."""
    tensors = oracle.tensors(case)
    return [t if d is None else torch.stack([t, t / 2, -t], d) for t, d in zip(tensors, in_dims, strict=True)]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("name", FUNCTORCH)
def test_vmap(name: str, in_dims: tuple[int | None, ...]) -> None:
    ours, theirs = pair(BY_NAME[name])
    tensors = mapped(BY_NAME[name], in_dims)
    assert close(torch.vmap(ours, in_dims)(*tensors), torch.vmap(theirs, in_dims)(*tensors))


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("name", ["gelu-max", "tanh-avg", "grouped"])
def test_gradients_for_each_sample(name: str, in_dims: tuple[int | None, ...]) -> None:
    """vmap of grad, and grad of vmap."""
    ours, theirs = pair(BY_NAME[name])
    tensors = mapped(BY_NAME[name], in_dims)

    def of_each(function: Any) -> Any:
        return torch.vmap(torch.func.grad(scalar(function), (0, 1, 2)), in_dims)(*tensors)

    def of_all(function: Any) -> Any:
        return torch.func.grad(lambda *t: torch.vmap(scalar(function), in_dims)(*t).sum(), (0, 1, 2))(
            *tensors
        )

    assert close(of_each(ours), of_each(theirs))
    assert close(of_all(ours), of_all(theirs))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own use
@pytest.mark.parametrize("name", ["gelu-max", "tanh-avg", "relu-none", "grouped"])
def test_forward_mode(name: str) -> None:
    """Through the reference: a registered op would drop the tangents in silence."""
    ours, theirs = pair(BY_NAME[name])
    tensors = oracle.tensors(BY_NAME[name])
    tangents = oracle.tensors(BY_NAME[name], seed=1)
    for which in range(3):
        one = [t if i == which else torch.zeros_like(t) for i, t in enumerate(tangents)]
        assert close(torch.func.jvp(ours, tensors, tuple(one)), torch.func.jvp(theirs, tensors, tuple(one)))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[0], tangents[0])
        y = torch.autograd.forward_ad.unpack_dual(ours(dual, *tensors[1:]))
        direct = OP(dual, *tensors[1:], *oracle.params(BY_NAME[name]).as_args(), False)[0]
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(direct).tangent, y.tangent)
        assert ours(*tensors).shape == y.primal.shape  # a call without tangents, inside the level
    assert close(y.tangent, torch.func.jvp(lambda x: theirs(x, *tensors[1:]), tensors[:1], tangents[:1])[1])


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_jacobians() -> None:
    case = Case("tiny", (1, 2, 4, 4), (2, 2, 3, 3), {"activation": "tanh", "pool": "max"})
    ours, theirs = pair(case)
    tensors = oracle.tensors(case)
    expected = torch.func.jacrev(theirs)(*tensors)
    assert close(torch.func.jacrev(ours)(*tensors), expected)
    assert close(torch.func.jacfwd(ours)(*tensors), expected)
    hessian = torch.func.hessian(scalar(theirs), 1)(*tensors)
    assert close(torch.func.hessian(scalar(ours), 1)(*tensors), hessian, 10 * tolerance.FLOAT32_GRADIENT)
