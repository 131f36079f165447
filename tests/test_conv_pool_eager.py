"""The short eager way: taken where it may be, not where it may not, and its caches are bounded."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import conv_pool_oracle as oracle
import pytest
import torch
from cases.conv_pool import EDGES
from watch import Calls, Wrapped

import interfuse
from interfuse.bounded_cache import BoundedCache
from interfuse.nn import ConvPool2d
from interfuse.ops import _conv_pool_checks, _conv_pool_eager, _conv_pool_native, conv_pool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

CASE = next(case for case in EDGES if case.name == "relu-max")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """For each call of conv_pool, whether it took the short way."""
    taken: list[bool] = []
    run = _conv_pool_eager.run

    def noted(*arguments: Any) -> Tensor | None:
        y = run(*arguments)
        taken.append(y is not None)
        return y

    monkeypatch.setattr(_conv_pool_eager, "run", noted)
    return taken


def test_taken_in_inference_and_training(short: list[bool]) -> None:
    tensors = oracle.tensors(CASE)
    conv_pool(*tensors, **CASE.arguments)
    with torch.inference_mode():
        conv_pool(*oracle.tensors(CASE), **CASE.arguments)
    with torch.no_grad():
        conv_pool(*(t.requires_grad_() for t in tensors), **CASE.arguments)
    conv_pool(*tensors, **CASE.arguments).sum().backward()
    module = ConvPool2d(5, 7, 3, activation="relu", pool="max")
    module(tensors[0]).sum().backward()
    conv_pool(tensors[0][0].detach(), *(t.detach() for t in tensors[1:]), **CASE.arguments)
    assert short == [True] * 6


def test_taken_for_channels_last_weights(short: list[bool]) -> None:
    """What model.to(memory_format=torch.channels_last) makes is read as it lies; NumPy may write to it."""
    x, weight, bias = oracle.tensors(CASE, channels_last=True)
    last = weight.clone(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(2):
            y = conv_pool(x, last, bias, **CASE.arguments)
            assert torch.equal(y, conv_pool(x, weight, bias, **CASE.arguments))
            weight.mul_(2)
            last.numpy()[:] *= 2
    last.requires_grad_()
    conv_pool(x, last, bias, **CASE.arguments).sum().backward()
    assert last.grad is not None
    assert last.grad.stride() == last.stride()
    assert short == [True] * 5


def test_gives_what_the_op_gives() -> None:
    for case in EDGES:
        x, weight, bias = oracle.tensors(case)
        y = conv_pool(x, weight, bias, **case.arguments)
        with Calls() as calls:
            through_op = conv_pool(x, weight, bias, **case.arguments)
        assert "interfuse.conv_pool.default" in calls.seen
        assert torch.equal(y, through_op)
        assert y.stride() == through_op.stride()


def test_not_taken_where_something_looks_on(short: list[bool]) -> None:
    x, weight, bias = oracle.tensors(CASE)

    def call(*tensors: Tensor | None) -> Tensor:
        return conv_pool(*(tensors or (x, weight, bias)), **CASE.arguments)

    with torch.autocast("cpu"):
        call()
    with Calls():
        call()
    with torch.overrides.BaseTorchFunctionMode():
        call()
    with torch.device("cpu"):
        call()
    with torch.autograd.forward_ad.dual_level():
        call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    assert any(event.name == "interfuse::conv_pool" for event in profile.events())
    torch.vmap(lambda x: call(x, weight, bias))(x[None])
    torch.func.grad(lambda x: call(x, weight, bias).sum())(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated
        torch.jit.trace(lambda x: call(x, weight, bias), x, check_trace=False)
    with torch._subclasses.FakeTensorMode() as mode:
        call(*(mode.from_tensor(t) for t in (x, weight, bias)))
    assert not any(short)


def test_not_taken_for_tensors_that_are_not_plain(short: list[bool]) -> None:
    x, weight, bias = oracle.tensors(CASE)
    y = conv_pool(x, weight, bias, **CASE.arguments)
    assert short == [True]
    negative = torch.complex(x, -x).conj().imag  # x, as a view that is negated when it is read
    assert negative.is_neg()
    assert torch.equal(conv_pool(negative, weight, bias, **CASE.arguments), y)
    assert torch.equal(conv_pool(x.as_subclass(Wrapped), weight, bias, **CASE.arguments), y)
    assert any("conv_pool" in name for name in Wrapped.seen)
    assert torch.equal(
        conv_pool(
            x, weight.contiguous(memory_format=torch.channels_last).contiguous(), bias, **CASE.arguments
        ),
        y,
    )
    conv_pool(x.double(), weight.double(), bias.double(), **CASE.arguments)
    conv_pool(x[:0], weight, bias, **CASE.arguments)
    conv_pool(x, weight, bias, **CASE.arguments, backend="reference")
    assert short[1:] == [False, False, True, False, False, False]


@torch.no_grad()
def test_a_recent_call_is_not_taken_for_another() -> None:
    """Each change keeps the weight's identity and x's shape, by which recent calls are found."""
    x, weight, bias = (t.clone() for t in oracle.tensors(CASE))
    # A weight whose strides alone decide the layout of the output.
    weight = torch.nn.Parameter(weight[:5, :, :1, :1].clone())
    bias = torch.nn.Parameter(bias[:5].clone())

    def check(x: Tensor = x) -> None:
        for _ in range(2):
            y = conv_pool(x, weight, bias, padding=1, activation="relu", pool="max")
        with Calls():
            through_op = conv_pool(x, weight, bias, padding=1, activation="relu", pool="max")
        assert torch.equal(y, through_op)
        assert y.stride() == through_op.stride()

    check()
    weight.data = torch.randn(5, 5, 1, 1)  # another address
    check()
    weight.data = weight.data.transpose(0, 1)  # the same address
    check()
    weight.data = weight.data.as_strided((5, 5, 1, 1), (5, 1, 5, 5))  # channels_last, as torch sees it
    check()
    weight.data = weight.data[:3]
    bias.data = bias.data[:3]
    check()
    bias.data = torch.randn(6)[::2]
    check()
    check(x.contiguous(memory_format=torch.channels_last))
    check(x.flip(3).as_strided(x.shape, x.stride()))
    check(torch._neg_view(x))
    weight.data, bias.data = weight.data.bfloat16(), bias.data.bfloat16()
    with pytest.raises(ValueError, match="must have one dtype"):
        check()
    check(x.bfloat16())
    with pytest.raises(ValueError, match="dense tensor"):
        check(x.bfloat16().to_sparse())


@torch.no_grad()
def test_a_recent_call_does_not_hold_the_weight() -> None:
    x, weight, bias = oracle.tensors(CASE)
    conv_pool(x, weight, bias, **CASE.arguments)
    other = torch.randn_like(weight)
    torch.utils.swap_tensors(weight, other)  # refuses tensors that something refers to weakly
    gone = weakref.ref(weight)
    del weight
    assert gone() is None


def test_lists_as_arguments(short: list[bool]) -> None:
    x, weight, bias = oracle.tensors(CASE)
    y = conv_pool(x, weight, bias, stride=[1, 2], padding=[1, 1], pool="max", pool_size=[2, 1])
    assert torch.equal(y, conv_pool(x, weight, bias, stride=(1, 2), padding=1, pool="max", pool_size=(2, 1)))


def test_the_precision_is_part_of_the_key() -> None:
    case = next(case for case in EDGES if case.name == "block-32")
    x, weight, bias = oracle.tensors(case)
    default = conv_pool(x, weight, bias, **case.arguments)
    with interfuse.precision("highest"):
        highest = conv_pool(x, weight, bias, **case.arguments)
    again = conv_pool(x, weight, bias, **case.arguments)
    assert torch.equal(default, again)
    truth = oracle.truth(x, weight, bias, **case.arguments)
    assert (highest - truth).norm() <= (default - truth).norm() * 1.5


def test_every_cache_keyed_by_shape_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = {
        (_conv_pool_eager, "_plans"): 5,
        (_conv_pool_eager, "_recent"): 4,
        (_conv_pool_checks, "_problems"): 6,
        (_conv_pool_native, "_descs"): 7,
    }
    for (module, name), capacity in caches.items():
        assert isinstance(getattr(module, name), BoundedCache)
        monkeypatch.setattr(module, name, BoundedCache(capacity))
    weight = torch.randn(2, 1, 3, requires_grad=True)
    for size in range(3, 40):
        x = torch.randn(1, 1, size)
        assert torch.equal(conv_pool(x, weight), conv_pool(x, weight))
        with torch.no_grad():
            conv_pool(x, weight)
        with Calls():
            conv_pool(x, weight)
    for (module, name), capacity in caches.items():
        assert len(getattr(module, name)) == capacity


def test_bounded_cache_forgets_the_oldest() -> None:
    cache: BoundedCache[int] = BoundedCache(2)
    for key in "abc":
        cache.put(key, ord(key))
    assert (cache.get("a"), cache.get("b"), cache.get("c"), len(cache)) == (None, 98, 99, 2)


def test_saved_tensor_hooks_are_called_and_may_change_the_memory() -> None:
    """What comes back from the hooks is checked before its pointer is used."""
    leaves = [t.requires_grad_() for t in oracle.tensors(CASE)]
    expected = torch.autograd.grad(conv_pool(*leaves, **CASE.arguments).sum(), leaves)
    packed: list[torch.Size] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t.shape)
        return t.clone(memory_format=torch.channels_last) if t.dim() == 4 else t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = conv_pool(*leaves, **CASE.arguments)
    for ours, plain in zip(torch.autograd.grad(y.sum(), leaves), expected, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5)
    assert len(packed) == 5
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.double(), lambda t: t):
        y = conv_pool(*leaves, **CASE.arguments)
    with pytest.raises(ValueError, match="the backward op's"):
        y.sum().backward()
