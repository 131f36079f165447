"""linear inside torch: the op registry's checks, autocast, functorch, forward mode, compile and export."""

from __future__ import annotations

import linear_oracle as oracle
import pytest
import tolerance
import torch
import torch.nn.functional as F
from cases.linear import ACTIVATIONS, SMALL, Case
from tolerance import close
from torch import Tensor, nn

from interfuse.nn.linear import DenseChain, FusionLinear
from interfuse.ops.linear import linear, quantize_weight
from interfuse.reference import linear as reference

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

OP = torch.ops.interfuse.linear.default
BACKWARD = torch.ops.interfuse.linear_backward.default
CASE = Case("two", (3,), (6, 4), (5,), ("gelu",))


@pytest.mark.parametrize("name", ["relu", "gelu", "softmax"])
@pytest.mark.parametrize("save", [False, True])
def test_opcheck(name: str, save: bool) -> None:
    inputs, weight, bias = oracle.tensors(CASE)
    torch.library.opcheck(OP, (inputs, weight, bias, None, name, 0.01, "", save))
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(
        OP, (leaves, weight.requires_grad_(), bias.requires_grad_(), None, name, 0.01, "", save)
    )


@pytest.mark.parametrize("mask", [[True] * 4, [False, True, False, True]], ids=str)
@pytest.mark.parametrize("name", ["relu", "gelu", "softmax", "none"])
def test_opcheck_backward(name: str, mask: list[bool]) -> None:
    inputs, weight, bias = oracle.tensors(CASE)
    y, pre = OP(inputs, weight, bias, None, name, 0.01, "", True)
    saved = y if name in ("relu", "softmax") else None
    grad_y = torch.randn(y.shape)
    torch.library.opcheck(BACKWARD, (grad_y, inputs, weight, bias, None, saved, pre, name, 0.01, "", mask))
    leaves = [t.requires_grad_() for t in (grad_y, *inputs, weight, bias)]
    torch.library.opcheck(
        BACKWARD, (leaves[0], leaves[1:3], leaves[3], leaves[4], None, saved, pre, name, 0.01, "", mask)
    )


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_fake_results_look_like_the_real_ones(case: Case) -> None:
    inputs, weight, bias = oracle.tensors(case)
    real = linear(inputs, weight, bias, case.activations[0])
    meta = linear([x.to("meta") for x in inputs], weight.to("meta"),
                  None if bias is None else bias.to("meta"), case.activations[0])  # fmt: skip
    assert (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_autocast_casts_as_torchs_linear(grad: bool) -> None:
    inputs, weight, bias = oracle.tensors(CASE)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        ours = linear(inputs, weight.requires_grad_(grad), bias, "relu")
        theirs = F.relu(F.linear(torch.cat(inputs, -1), weight, bias))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert close(ours, theirs.float(), 2 * tolerance.BFLOAT16)
    if grad:
        ours.sum().backward()
        assert weight.grad.dtype == torch.float32


def test_autocast_leaves_int8_weights_as_they_are() -> None:
    inputs, weight, bias = oracle.tensors(CASE)
    small, scale = quantize_weight(weight)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(inputs, small, bias, scale=scale)
    assert y.dtype == torch.bfloat16
    assert close(y, linear(inputs, small, bias, scale=scale), 3 * tolerance.BFLOAT16)


def loss(x0: Tensor, x1: Tensor, weight: Tensor, bias: Tensor, name: str = "gelu") -> Tensor:
    return linear([x0, x1], weight, bias, name).square().sum()


def true_loss(x0: Tensor, x1: Tensor, weight: Tensor, bias: Tensor, name: str = "gelu") -> Tensor:
    return reference.forward([x0, x1], weight, bias, None, oracle.LinearParams(name)).square().sum()


def flat() -> list[Tensor]:
    inputs, weight, bias = oracle.tensors(CASE)
    return [*inputs, weight, bias]


def test_func_grad_and_vmap_of_it() -> None:
    tensors = flat()
    everything = (0, 1, 2, 3)
    ours = torch.func.grad(loss, everything)(*tensors)
    assert close(ours, torch.func.grad(true_loss, everything)(*tensors))
    batch = [torch.stack([t, 2 * t, -t]) for t in tensors[:2]]
    per_sample = torch.vmap(torch.func.grad(loss, everything), (0, 0, None, None))
    right = torch.vmap(torch.func.grad(true_loss, everything), (0, 0, None, None))
    assert close(per_sample(*batch, *tensors[2:]), right(*batch, *tensors[2:]))
    inputs_alone = torch.vmap(torch.func.grad(loss, (0, 1)), (0, 0, None, None))
    right = torch.vmap(torch.func.grad(true_loss, (0, 1)), (0, 0, None, None))
    assert close(inputs_alone(*batch, *tensors[2:]), right(*batch, *tensors[2:]))


@pytest.mark.parametrize(
    "dims", [(0, 0, None, None), (0, None, None, None), (None, 1, 0, 0), (None, None, None, 0)]
)
def test_vmap(dims: tuple[int | None, ...]) -> None:
    tensors = [t if d is None else torch.stack([t, t + 1], d) for t, d in zip(flat(), dims, strict=True)]
    assert close(torch.vmap(loss, dims)(*tensors), torch.vmap(true_loss, dims)(*tensors))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own use
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_forward_mode_and_double_backward(name: str) -> None:
    tensors = [t.double() for t in flat()]
    tangents = [torch.randn_like(t) for t in tensors]
    ours = torch.func.jvp(lambda *ts: loss(*ts, name), tuple(tensors), tuple(tangents))
    assert close(
        ours, torch.func.jvp(lambda *ts: true_loss(*ts, name), tuple(tensors), tuple(tangents)), 1e-12
    )
    leaves = [t.requires_grad_() for t in tensors]
    seconds = []
    for f in (loss, true_loss):
        grads = torch.autograd.grad(f(*leaves, name), leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    assert close(*seconds, 1e-11)


def test_create_graph_in_float32() -> None:
    leaves = [t.requires_grad_() for t in flat()]
    grads = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    seconds = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    grads = torch.autograd.grad(true_loss(*leaves), leaves, create_graph=True)
    assert close(seconds, torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.joined = FusionLinear([6, 4], 8, activation="gelu")
        self.chain = DenseChain(
            FusionLinear(8, 5, activation="relu"), FusionLinear(5, 3, activation="softmax")
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.chain(self.joined(x, y) * 2)


@pytest.mark.parametrize("dynamic", [False, True, None], ids=["static", "dynamic", "automatic"])
def test_compile(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    net = Net()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3, 5):
        x, y = torch.randn(batch, 6), torch.randn(batch, 4)
        expected = net(x, y)
        right = torch.autograd.grad(expected.square().sum(), list(net.parameters()))
        got = compiled(x, y)
        assert close(got, expected)
        assert close(torch.autograd.grad(got.square().sum(), list(net.parameters())), right)
        with torch.no_grad():
            assert close(compiled(x, y), expected)


def test_export() -> None:
    net, x, y = Net(), torch.randn(3, 6), torch.randn(3, 4)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(net, (x, y), dynamic_shapes=({0: batch}, {0: batch}))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("interfuse.linear.default") == 3
    x, y = torch.randn(7, 6), torch.randn(7, 4)
    assert close(program.module()(x, y), net(x, y))
