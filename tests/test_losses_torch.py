"""linear_cross_entropy inside torch: opcheck, autocast, functorch, forward mode, compile and export."""

from __future__ import annotations

import losses_oracle as oracle
import pytest
import tolerance
import torch
import torch.nn.functional as F
from cases.losses import REDUCTIONS, Case
from tolerance import close
from torch import Tensor, nn

from interfuse.nn.losses import LinearCrossEntropyLoss
from interfuse.ops.losses import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

OP = torch.ops.interfuse.linear_cross_entropy.default
BACKWARD = torch.ops.interfuse.linear_cross_entropy_backward.default
CASE = Case("torch", 5, 6, 9, label_smoothing=0.1, weighted=True, ignored=1)
DRAWN = oracle.tensors(CASE)


def op_tensors() -> tuple[Tensor, ...]:
    x, linear_weight, linear_bias, target, weight = oracle.tensors(CASE)
    return x, linear_weight, target, linear_bias, weight


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mask", [[], [True] * 3, [False, True, False]], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(reduction: str, mask: list[bool], grad: bool) -> None:
    x, linear_weight, target, linear_bias, weight = op_tensors()
    leaves = [t.requires_grad_(grad) for t in (x, linear_weight, linear_bias)]
    torch.library.opcheck(
        OP, (leaves[0], leaves[1], target, leaves[2], weight, reduction, -100, 0.1, "", mask)
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mask", [[True] * 3, [False, True, False]], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_backward(reduction: str, mask: list[bool], grad: bool) -> None:
    x, linear_weight, target, linear_bias, weight = op_tensors()
    loss, lse, *_ = OP(x, linear_weight, target, linear_bias, weight, reduction, -100, 0.1, "", [True] * 3)
    leaves = [t.requires_grad_(grad) for t in (torch.randn(loss.shape), x, linear_weight, linear_bias)]
    arguments = (*leaves[:3], target, leaves[3], weight, lse, reduction, -100, 0.1, "", mask)
    torch.library.opcheck(BACKWARD, arguments)


def test_gradients_with_the_loss_are_those_of_backward() -> None:
    arguments = (*op_tensors(), "mean", -100, 0.1, "", [True] * 3)
    _, lse, *with_loss = OP(*arguments)
    after = BACKWARD(torch.ones(()), *op_tensors(), lse, *arguments[5:])
    assert close(with_loss, list(after))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_autocast_gives_a_loss_in_float32(grad: bool) -> None:
    drawn = oracle.tensors(CASE)
    if grad:
        drawn = drawn.training()
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        ours, theirs = oracle.run(CASE, drawn), oracle.torchs(CASE, drawn)
    assert ours.dtype == theirs.dtype == torch.float32
    assert close(ours, theirs, 2 * tolerance.BFLOAT16)
    if grad:
        ours.backward()
        assert drawn.linear_weight.grad.dtype == torch.float32


def loss(x: Tensor, linear_weight: Tensor, linear_bias: Tensor, reduction: str = "mean") -> Tensor:
    return linear_cross_entropy(
        x, linear_weight, DRAWN.target, linear_bias=linear_bias, weight=DRAWN.weight.to(x.dtype),
        label_smoothing=0.1, reduction=reduction,
    ).square().sum()  # fmt: skip


def true_loss(x: Tensor, linear_weight: Tensor, linear_bias: Tensor, reduction: str = "mean") -> Tensor:
    logits = F.linear(x, linear_weight, linear_bias)
    return F.cross_entropy(
        logits, DRAWN.target, DRAWN.weight.to(x.dtype), label_smoothing=0.1, reduction=reduction
    ).square().sum()  # fmt: skip


def flat() -> list[Tensor]:
    return oracle.tensors(CASE).leaves()


def test_func_grad_and_vmap_of_it() -> None:
    tensors, everything = flat(), (0, 1, 2)
    assert close(
        torch.func.grad(loss, everything)(*tensors), torch.func.grad(true_loss, everything)(*tensors)
    )
    batch = torch.stack([tensors[0], 2 * tensors[0], -tensors[0]])
    per_sample = [torch.vmap(torch.func.grad(f, everything), (0, None, None)) for f in (loss, true_loss)]
    assert close(per_sample[0](batch, *tensors[1:]), per_sample[1](batch, *tensors[1:]))


@pytest.mark.parametrize("dims", [(0, None, None), (None, 1, 0), (0, 0, 0), (None, None, 0)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_vmap(dims: tuple[int | None, ...], reduction: str) -> None:
    tensors = [t if d is None else torch.stack([t, t + 1], d) for t, d in zip(flat(), dims, strict=True)]
    ours, theirs = (torch.vmap(lambda *ts, f=f: f(*ts, reduction), dims)(*tensors) for f in (loss, true_loss))
    assert close(ours, theirs)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own use
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_forward_mode_and_double_backward(reduction: str) -> None:
    tensors = [t.double() for t in flat()]
    tangents = [torch.randn_like(t) for t in tensors]
    ours, theirs = (
        torch.func.jvp(lambda *ts, f=f: f(*ts, reduction), tuple(tensors), tuple(tangents))
        for f in (loss, true_loss)
    )
    assert close(ours, theirs, 1e-12)
    leaves = [t.requires_grad_() for t in tensors]
    seconds = []
    for f in (loss, true_loss):
        grads = torch.autograd.grad(f(*leaves, reduction), leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    assert close(*seconds, 1e-11)


def test_create_graph_in_float32() -> None:
    leaves, seconds = [t.requires_grad_() for t in flat()], []
    for f in (loss, true_loss):
        grads = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    assert close(*seconds)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 8)
        self.loss = LinearCrossEntropyLoss(8, 20, bias=True)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.body(x).relu(), target) * 2


@pytest.mark.parametrize("dynamic", [False, True, None], ids=["static", "dynamic", "automatic"])
def test_compile(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    net = Net()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3, 5):
        x, target = torch.randn(batch, 6), torch.randint(20, (batch,))
        expected = net(x, target)
        right = torch.autograd.grad(expected, list(net.parameters()))
        got = compiled(x, target)
        assert close(got, expected)
        assert close(torch.autograd.grad(got, list(net.parameters())), right)
        with torch.no_grad():
            assert close(compiled(x, target), expected)


def test_export() -> None:
    net, x, target = Net(), torch.randn(3, 6), torch.randint(20, (3,))
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(net, (x, target), dynamic_shapes=({0: batch}, {0: batch}))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("interfuse.linear_cross_entropy.default") == 1
    x, target = torch.randn(7, 6), torch.randint(20, (7,))
    assert close(program.module()(x, target), net(x, target))
