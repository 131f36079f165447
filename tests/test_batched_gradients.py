"""Several gradients of one call at once (is_grads_batched, torch.func.vmap of grad), for every op with a
short way through eager calls: no kernel may take a batch of gradients for a single one by its pointer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import tolerance
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from interfuse.nn import LSTM, FusionLinear, MultiheadAttention
from interfuse.ops import attention, conv_pool, linear

if TYPE_CHECKING:
    from collections.abc import Callable

Call = tuple["Callable[[Tensor], Tensor]", tuple[int, ...]]


def _attention() -> Call:
    k, v = torch.randn(2, 1, 2, 5, 4)
    return (lambda x: attention(x, k, v)), (1, 2, 3, 4)


def _multihead() -> Call:
    module = MultiheadAttention(8, 2, batch_first=True)
    return (lambda x: module(x, x, x, need_weights=False)[0]), (1, 3, 8)


def _conv_pool() -> Call:
    weight, bias = torch.randn(3, 2, 3, 3), torch.randn(3)
    return (lambda x: conv_pool(x, weight, bias, padding=1, activation="relu", pool="max", pool_size=2)), (
        1,
        2,
        6,
        6,
    )


def _lstm() -> Call:
    module = LSTM(4, 5, batch_first=True)
    return (lambda x: module(x)[0]), (1, 3, 4)


def _linear() -> Call:
    weight, bias = torch.randn(6, 4), torch.randn(6)
    return (lambda x: linear(x, weight, bias, "tanh")), (3, 4)


def _fusion_linear() -> Call:
    module: nn.Module = FusionLinear(4, 6, activation="gelu")
    return module, (3, 4)


CALLS = {"attention": _attention, "MultiheadAttention": _multihead, "conv_pool": _conv_pool, "LSTM": _lstm,
         "linear": _linear, "FusionLinear": _fusion_linear}  # fmt: skip
by_call = pytest.mark.parametrize("name", CALLS)


def _made(name: str) -> Call:
    torch.manual_seed(0)
    return CALLS[name]()


@by_call
def test_a_vectorized_jacobian_is_its_rows(name: str) -> None:
    call, shape = _made(name)
    x = torch.randn(shape)
    together, apart = (jacobian(call, x, vectorize=vectorize) for vectorize in (True, False))
    assert tolerance.error(together, apart) <= tolerance.FLOAT32_DEFAULT


@by_call
def test_vmap_of_grad_is_each_samples_gradient(name: str) -> None:
    call, shape = _made(name)
    several = torch.randn(4, *shape)

    def loss(x: Tensor) -> Tensor:
        return call(x).square().sum()

    together = torch.func.vmap(torch.func.grad(loss))(several)
    apart = torch.stack([torch.func.grad(loss)(x) for x in several])
    plain = []
    for x in several:
        leaf = x.clone().requires_grad_()
        plain.append(torch.autograd.grad(loss(leaf), leaf)[0])
    assert tolerance.error(together, torch.stack(plain)) <= tolerance.FLOAT32_DEFAULT
    assert tolerance.error(apart, torch.stack(plain)) <= tolerance.FLOAT32_DEFAULT


@by_call
def test_vmap_over_gradients_of_one_call(name: str) -> None:
    call, shape = _made(name)
    x = torch.randn(shape, requires_grad=True)
    y = call(x)
    grads = torch.randn(4, *y.shape)

    def pull(grad: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, grad, retain_graph=True)[0]

    apart = torch.stack([pull(grad) for grad in grads])
    assert tolerance.error(torch.func.vmap(pull)(grads), apart) <= tolerance.FLOAT32_DEFAULT
    together = torch.autograd.grad(y, x, grads, is_grads_batched=True)[0]
    assert tolerance.error(together, apart) <= tolerance.FLOAT32_DEFAULT
