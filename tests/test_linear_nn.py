"""FusionLinear, CompactLinear and DenseChain: torch.nn.Linear's state, and the short way of eager calls."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import tolerance
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from interfuse.nn.linear import CompactLinear, DenseChain, FusionLinear
from interfuse.ops import _linear_eager as eager

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

OP = torch.ops.interfuse.linear.default
ACTIVATIONS = (None, nn.Identity(), nn.ReLU(), nn.LeakyReLU(0.2), nn.GELU(), nn.GELU("tanh"), nn.SiLU(),
               nn.Tanh(), nn.Sigmoid(), nn.Softmax(-1))  # fmt: skip


def close(a: Tensor, b: Tensor) -> bool:
    return tolerance.error(a, b) <= tolerance.FLOAT32_DEFAULT


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_from_torch_computes_what_torch_computes(activation: nn.Module | None, bias: bool) -> None:
    linear = nn.Linear(10, 7, bias).eval()
    fused = FusionLinear.from_torch(linear, activation, [6, 4])
    assert fused.weight is linear.weight
    assert fused.bias is linear.bias
    assert not fused.training
    x, y = torch.randn(5, 6), torch.randn(5, 4)
    plain = linear(torch.cat([x, y], -1))
    assert close(fused(x, y), plain if activation is None else activation(plain))


def test_state_dicts_move_either_way() -> None:
    torch.manual_seed(3)
    linear = nn.Linear(10, 7)
    torch.manual_seed(3)
    fused = FusionLinear([6, 4], 7)
    assert all(torch.equal(a, b) for a, b in zip(linear.parameters(), fused.parameters(), strict=True))
    fused.reset_parameters()
    linear.load_state_dict(fused.state_dict())
    fused.load_state_dict(nn.Linear(10, 7).state_dict())


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(make: Any) -> None:
    x, y = torch.randn(2, 6), torch.randn(2, 4)
    first = FusionLinear([6, 4], 7, activation="leaky_relu", negative_slope=0.3)
    for module in (first, CompactLinear(first), CompactLinear(first, torch.bfloat16),
                   DenseChain(first, FusionLinear(7, 2))):  # fmt: skip
        assert torch.equal(make(module)(x, y), module(x, y))
        assert repr(make(module)) == repr(module)


def test_it_trains_like_torch() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
    ours = DenseChain.from_torch(copy.deepcopy(plain))
    x, target = torch.randn(20, 12), torch.randn(20, 3)
    for model in (plain, ours):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
    assert all(close(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def test_whatever_writes_to_the_weight_is_seen() -> None:
    module, x = FusionLinear(600, 300), torch.randn(30, 600)
    module(x)
    module.weight.data.mul_(2)
    module.weight.detach().numpy()[:, 0] = 1
    with torch.no_grad():
        assert close(
            module(x), nn.functional.linear(x.double(), module.weight.double(), module.bias.double())
        )


def test_parametrized_weights() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    module, x = FusionLinear(4, 3), torch.randn(2, 4)
    weight = module.weight.detach().clone()
    parametrize.register_parametrization(module, "weight", Doubled())
    assert close(module(x), nn.functional.linear(x, 2 * weight, module.bias))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
def test_compact(dtype: torch.dtype) -> None:
    module = FusionLinear([60, 40], 30, activation="tanh")
    compact = CompactLinear(module, dtype)
    assert compact.weight.dtype == dtype
    assert not list(compact.parameters())
    x, y = torch.randn(3, 60), torch.randn(3, 40)
    # A rounding to 8 bits of a weight's size, averaged over a hundred terms.
    assert tolerance.error(compact(x, y), module(x, y)) <= 2.0**-6
    again = CompactLinear(FusionLinear([60, 40], 30, activation="tanh"), dtype)
    again.load_state_dict(compact.state_dict())
    assert torch.equal(again(x, y), compact(x, y))


# ---- chains


def siamese() -> DenseChain:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1), nn.Sigmoid()]
    return DenseChain.from_torch(layers)


@pytest.mark.parametrize("lead", [(), (1,), (40,), (2, 3), (0,)], ids=str)
def test_a_chain_is_its_layers(lead: tuple[int, ...]) -> None:
    chain, x = siamese(), torch.randn(*lead, 64)
    with torch.no_grad():
        y = x
        for layer in chain:
            y = layer(y)
        assert torch.equal(chain(x), y)
        assert chain(x).shape == (*lead, 1)


def test_a_chain_without_gradients_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    chain, x, calls = siamese(), torch.randn(4, 64), []
    real = eager.linear_chain
    monkeypatch.setattr(eager, "linear_chain", lambda *a: calls.append(len(a[0])) or real(*a))
    with torch.no_grad():
        expected = chain(x)
    assert calls == [3]
    # Whoever needs the values between gets them.
    seen = []
    handle = chain[1].register_forward_hook(lambda _m, _a, y: seen.append(y))
    with torch.no_grad():
        assert torch.equal(chain(x), expected)
    assert len(seen) == 1
    handle.remove()
    chain(x).sum().backward()
    assert all(p.grad is not None for p in chain.parameters())
    assert calls == [3]


def _forward_hook(chain: DenseChain) -> None:
    chain[1].register_forward_hook(lambda _m, _a, y: y + 1)


def _pre_hook(chain: DenseChain) -> None:
    chain[0].register_forward_pre_hook(lambda _m, args: (args[0] + 1,))


def _own_forward(chain: DenseChain) -> None:
    chain[1].forward = lambda x: FusionLinear.forward(chain[1], x) + 1


class _Other(FusionLinear):
    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(*inputs) + 1


def _other_type(chain: DenseChain) -> None:
    chain[1].__class__ = _Other


class _Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _parametrized(chain: DenseChain) -> None:
    parametrize.register_parametrization(chain[1], "weight", _Twice())


def _other_activation(chain: DenseChain) -> None:
    chain[1].activation = "tanh"


def _other_weight(chain: DenseChain) -> None:
    chain[1].weight = nn.Parameter(2 * chain[1].weight.detach())


def _weight_of_columns(chain: DenseChain) -> None:
    chain[1].weight.data = 2 * chain[1].weight.t().contiguous().t()


def _no_bias(chain: DenseChain) -> None:
    chain[1].bias = None


def _other_layer(chain: DenseChain) -> None:
    chain[1] = FusionLinear(32, 16)


def _in_place(chain: DenseChain) -> None:
    chain[1].weight.data.mul_(2)


CHANGES = [
    _forward_hook, _pre_hook, _own_forward, _other_type, _parametrized, _other_activation, _other_weight,
    _weight_of_columns, _no_bias, _other_layer, _in_place,
]  # fmt: skip


def _buffer_in_place(chain: DenseChain) -> None:
    chain[1].weight.copy_(chain[1].weight.flip(0))


def _other_buffer(chain: DenseChain) -> None:
    chain[1].weight = chain[1].weight.flip(0)


def _no_bias_buffer(chain: DenseChain) -> None:
    chain[1]._buffers["bias"] = None


OF_COMPACT = [
    _forward_hook, _own_forward, _other_activation, _buffer_in_place, _other_buffer, _no_bias_buffer,
    _other_layer,
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "change"),
    [(None, change) for change in CHANGES]
    + [(dtype, change) for dtype in (torch.bfloat16, torch.int8) for change in OF_COMPACT],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_chain_called_before_sees_what_has_changed_since(
    kind: torch.dtype | None, change: Callable[[DenseChain], None]
) -> None:
    chain, x = siamese(), torch.randn(4, 64)
    if kind is not None:
        chain = DenseChain(*(CompactLinear(layer, kind) for layer in chain))
    with torch.no_grad():
        before = chain(x)
        assert eager.run_modules((x,), chain._modules) is not None  # the way of a call made before
        change(chain)
        y = x
        for layer in chain:
            y = layer(y)
        assert torch.equal(chain(x), y)
        assert not torch.equal(y, before)


def test_a_chain_called_before_sees_hooks_of_all_modules_and_what_stands_in_for_its_weights() -> None:
    chain, x = siamese(), torch.randn(4, 64)
    doubled = {name: 2 * p.detach() for name, p in chain.named_parameters()}
    other = copy.deepcopy(chain)
    other.load_state_dict(doubled)
    seen: list[nn.Module] = []
    with torch.no_grad():
        expected = [chain(x) for _ in range(3)][-1]
        handle = nn.modules.module.register_module_forward_hook(lambda m, _a, _y: seen.append(m))
        assert torch.equal(chain(x), expected)
        handle.remove()
        assert seen == [*chain, chain]
        assert torch.equal(torch.func.functional_call(chain, doubled, (x,)), other(x))
        assert torch.equal(chain(x), expected)


def test_a_chain_of_mixed_weights_and_several_inputs() -> None:
    first, second = FusionLinear([20, 12], 16, activation="gelu"), FusionLinear(16, 5, activation="softmax")
    chain = DenseChain(CompactLinear(first), second)
    x, y = torch.randn(3, 20), torch.randn(3, 12)
    with torch.no_grad():
        assert torch.equal(chain(x, y), second(CompactLinear(first)(x, y)))
        half = DenseChain(first, second).bfloat16()
        assert torch.equal(half(x.bfloat16(), y.bfloat16()), second(first(x.bfloat16(), y.bfloat16())))


# ---- training a chain


def by_layers(chain: DenseChain, *inputs: Tensor) -> Tensor:
    """Each layer through the registered op."""
    y = inputs
    for layer in chain:
        weight, bias, _, (activation, slope, _) = layer._layer()
        y = (OP(list(y), weight, bias, None, activation or "none", slope, "", False)[0],)
    return y[0]


def gradients(y: Tensor, leaves: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    return torch.autograd.grad((y * weights).sum(), leaves, **options)


@pytest.mark.parametrize("names", [("relu", None), ("gelu", "softmax"), ("softmax", "silu")], ids=str)
@pytest.mark.parametrize("lead", [(), (1,), (25,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_step_of_a_chain_gives_its_layers_gradients(names: Any, lead: Any, bias: bool) -> None:
    torch.manual_seed(0)
    chain = DenseChain(
        FusionLinear([20, 44], 33, bias, names[0]), FusionLinear(33, 17, bias, names[1]),
        FusionLinear(17, 5, True, "tanh"),
    )  # fmt: skip
    leaves = [torch.randn(*lead, 20, requires_grad=True), torch.randn(*lead, 44, requires_grad=True)]
    wanted = [*leaves, *chain.parameters()]
    for _ in range(2):  # made first, and made again
        y = chain(*leaves)
        assert torch.equal(y, by_layers(chain, *leaves))
        pairs = zip(gradients(y, wanted), gradients(by_layers(chain, *leaves), wanted), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_step_of_a_chain_is_one_step_of_autograd() -> None:
    chain, x = siamese(), torch.randn(4, 64)
    assert all(type(node).__name__ == "AccumulateGrad" for node, _ in chain(x).grad_fn.next_functions if node)
    loss = chain(x).square().sum()
    first = torch.autograd.grad(loss, list(chain.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(chain.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_the_gradients_that_are_wanted() -> None:
    chain, x = siamese(), torch.randn(4, 64, requires_grad=True)
    expected = gradients(by_layers(chain, x), [x, *chain.parameters()])
    for wanted in ([0], [1], [4], [6], [3, 0]):
        leaves = [[x, *chain.parameters()][i] for i in wanted]
        for t in (x, *chain.parameters()):
            t.requires_grad_(any(t is leaf for leaf in leaves))
        found = gradients(chain(x), leaves)
        assert all(torch.equal(a, expected[i]) for a, i in zip(found, wanted, strict=True))


def test_layers_that_share_parameters() -> None:
    layer = FusionLinear(8, 8, activation="tanh")
    chain, x = DenseChain(layer, layer), torch.randn(3, 8, requires_grad=True)
    leaves = [x, layer.weight, layer.bias]
    ours, theirs = gradients(chain(x), leaves), gradients(by_layers(chain, x), leaves)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    seconds = [gradients(sum(g.square().sum() for g in gradients(f(x), leaves, create_graph=True)), leaves)
               for f in (chain, lambda x: by_layers(chain, x))]  # fmt: skip
    assert all(close(a, b) for a, b in zip(*seconds, strict=True))


def test_saved_tensors_that_hooks_change() -> None:
    """What does not come back as it was goes through the registered ops."""
    chain, x = siamese(), torch.randn(4, 64, requires_grad=True)
    leaves = [x, *chain.parameters()]
    expected = gradients(chain(x), leaves)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.double(), lambda t: t.float().t().clone().t()):
        y = chain(x)
    assert all(close(a, b) for a, b in zip(gradients(y, leaves), expected, strict=True))


def test_second_derivatives_of_a_chain() -> None:
    chain, x = siamese(), torch.randn(4, 64, requires_grad=True)
    leaves = [x, *chain.parameters()]
    firsts = [gradients(f(x), leaves, create_graph=True) for f in (chain, lambda x: by_layers(chain, x))]
    seconds = [gradients(sum(g.square().sum() for g in first), leaves) for first in firsts]
    assert all(close(a, b) for a, b in zip(*seconds, strict=True))


def test_several_gradients_of_a_chain_at_once() -> None:
    chain, x, batch = siamese(), torch.randn(4, 64, requires_grad=True), torch.randn(3, 4, 1)
    leaves = [x, *chain.parameters()]
    found = torch.autograd.grad(chain(x), leaves, batch, is_grads_batched=True)
    expected = [
        torch.stack(g) for g in zip(*(torch.autograd.grad(chain(x), leaves, b) for b in batch), strict=True)
    ]
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))


# ---- the short way


def test_the_short_way_and_the_long_way_agree() -> None:
    module, x, y = FusionLinear([6, 4], 7, activation="gelu"), torch.randn(5, 6), torch.randn(5, 4)
    short = module(x, y)
    with torch.profiler.profile() as profile:
        long = module(x, y)
    assert any("interfuse::linear" in event.key for event in profile.key_averages())
    assert torch.equal(short, long)
    assert torch.equal(torch.autograd.grad(short.sum(), module.weight)[0],
                       torch.autograd.grad(long.sum(), module.weight)[0])  # fmt: skip


def test_what_the_short_way_must_not_take() -> None:
    module, x = FusionLinear(4, 3), torch.randn(2, 4)

    class Mine(Tensor):
        pass

    assert type(module(x.as_subclass(Mine))) is Mine
    flipped = torch.complex(x, x).conj().imag
    assert flipped.is_neg()
    assert close(module(flipped), module(-x))
