"""attention inside torch: the op registry's checks, autocast, functorch, compile, export, and errors."""

from __future__ import annotations

from typing import Any

import attention_oracle as oracle
import pytest
import tolerance
import torch
from cases.attention import EDGES, Case
from torch import nn

from interfuse.dispatch import BackendError
from interfuse.nn import AttentionPool, CrossAttention, MultiheadAttention
from interfuse.ops import _attention_pool as pool_op  # noqa: F401  (registers)
from interfuse.ops._attention_pool import attention_pool
from interfuse.ops.attention import attention
from interfuse.reference.attention import attend

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

BY_NAME = {case.name: case for case in EDGES}
OP = torch.ops.interfuse.attention.default
BACKWARD = torch.ops.interfuse.attention_backward.default
POOL = torch.ops.interfuse.attention_pool.default
POOL_BACKWARD = torch.ops.interfuse.attention_pool_backward.default
OPCHECKED = ("plain", "tails", "grouped", "causal", "boolean", "additive", "everything")


def close(ours: Any, theirs: Any, bound: float = tolerance.FLOAT32_ATTENTION_GRADIENT) -> bool:
    return tolerance.close(ours, theirs, bound)


def arguments(case: Case) -> tuple[Any, ...]:
    call = oracle.make(case)
    scale = call.q.shape[-1] ** -0.5
    return (call.q, call.k, call.v, call.mask, call.q_lengths, call.kv_lengths), (call.causal, scale, "")  # type: ignore[return-value]


@pytest.mark.parametrize("weights", [False, True], ids=["alone", "weights"])
@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck(name: str, weights: bool) -> None:
    tensors, params = arguments(BY_NAME[name])
    for save in (False, True):
        torch.library.opcheck(OP, (*tensors, *params, weights, save))
    leaves = [t.requires_grad_() for t in tensors[:3]]
    torch.library.opcheck(OP, (*leaves, *tensors[3:], *params, weights, False))


@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck_backward(name: str) -> None:
    tensors, params = arguments(BY_NAME[name])
    y, lse, _ = OP(*tensors, *params, False, True)
    grad = torch.randn(y.shape)
    torch.library.opcheck(BACKWARD, (grad, None, *tensors, y, lse, *params, [True] * 3))
    leaves = [t.requires_grad_() for t in (grad, *tensors[:3])]
    torch.library.opcheck(BACKWARD, (leaves[0], None, *leaves[1:], *tensors[3:], y, lse, *params, [True] * 3))


def test_opcheck_pool() -> None:
    x, hidden, context = torch.randn(3, 7, 5), torch.randn(3, 7, 9), torch.randn(9)
    lengths = torch.tensor([7, 0, 3])
    torch.library.opcheck(POOL, (x, hidden, context, lengths, ""))
    leaves = [t.requires_grad_() for t in (x, hidden, context)]
    torch.library.opcheck(POOL, (*leaves, lengths, ""))
    torch.library.opcheck(POOL_BACKWARD, (torch.randn(3, 5), torch.randn(3, 7), *leaves, lengths, ""))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_autocast_gives_its_dtype(grad: bool) -> None:
    call = oracle.make(BY_NAME["additive"])
    leaves = [t.requires_grad_(grad) for t in (call.q, call.k, call.v)]
    with torch.autocast("cpu", torch.bfloat16):
        y = call.run()
    assert y.dtype == torch.bfloat16
    call.q, call.k, call.v, call.mask = (t.detach().bfloat16() for t in (*leaves, call.mask))
    assert torch.equal(y, call.run())
    if grad:
        assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), leaves))


def test_func_grad_and_vmap_and_jacobians() -> None:
    call = oracle.make(BY_NAME["causal"])

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, causal=True).square().sum()

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, None, None, None, True, q.shape[-1] ** -0.5)[0].square().sum()

    tensors = (call.q, call.k, call.v)
    assert close(torch.func.grad(loss, (0, 1, 2))(*tensors), torch.func.grad(plain, (0, 1, 2))(*tensors))
    stacked = [torch.stack([t, 2 * t, -t], 1) for t in tensors]
    for dims in ((1, 1, 1), (None, 1, 1), (1, None, None)):
        given = [s if d == 1 else t for s, t, d in zip(stacked, tensors, dims, strict=True)]
        ours = torch.func.vmap(loss, dims)(*given)
        assert close(ours, torch.func.vmap(plain, dims)(*given))
        grads = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), dims)(*given)
        assert close(grads, torch.func.vmap(torch.func.grad(plain, (0, 1, 2)), dims)(*given))


@pytest.mark.parametrize("mask_dim", [None, 0, 1])
def test_vmap_over_masks_and_lengths(mask_dim: int | None) -> None:
    call = oracle.make(BY_NAME["plain"])
    masks = torch.rand(13, 4, 21) < 0.6 if mask_dim == 1 else torch.rand(4, 13, 21) < 0.6
    mask = masks[0] if mask_dim is None else masks
    lengths = torch.tensor([[21, 3], [0, 21], [7, 8], [1, 1]])

    def one(mask: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return attention(call.q, call.k, call.v, mask, kv_lengths=lengths)

    ours = torch.func.vmap(one, (mask_dim, 0))(mask, lengths)
    for i in range(4):
        here = mask if mask_dim is None else mask.select(mask_dim, i)
        assert close(ours[i], one(here, lengths[i]))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own use
def test_forward_mode() -> None:
    call = oracle.make(BY_NAME["additive"])
    tangents = tuple(torch.randn_like(t) for t in (call.q, call.k, call.v))
    y, tangent = torch.func.jvp(lambda *t: attention(*t, call.mask), (call.q, call.k, call.v), tangents)
    leaves = [t.double() for t in (call.q, call.k, call.v)]
    scale = call.q.shape[-1] ** -0.5
    expected, exact = torch.func.jvp(
        lambda *t: attend(*t, call.mask.double(), None, None, False, scale)[0], tuple(leaves),
        tuple(t.double() for t in tangents))  # fmt: skip
    assert close((y, tangent), (expected, exact))


@pytest.mark.parametrize("name", ["plain", "grouped", "everything", "empty-rows"])
def test_second_derivatives(name: str) -> None:
    call = oracle.make(BY_NAME[name])
    leaves = call.leaves()
    first = torch.autograd.grad(call.run().square().sum(), leaves, create_graph=True)
    ours = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    exact, y, _, _ = call.truth()
    first = torch.autograd.grad(y.square().sum(), exact, create_graph=True)
    assert close(ours, torch.autograd.grad(sum(g.square().sum() for g in first), exact), 1e-4)


def test_a_second_backward_gives_the_same() -> None:
    call = oracle.make(BY_NAME["everything"])
    leaves = call.leaves()
    y = call.run()
    first = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(y.sum(), leaves), strict=True))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own use
def test_pool_transforms() -> None:
    x, weight, bias, context = torch.randn(3, 7, 5), torch.randn(9, 5), torch.randn(9), torch.randn(9)

    def loss(x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return attention_pool(x, weight, bias, context).square().sum()

    def plain(x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(torch.tanh(x @ weight.T + bias) @ context, -1)
        return (weights.unsqueeze(-1) * x).sum(1).square().sum()

    many = torch.randn(4, 3, 7, 5), torch.randn(4, 9)
    ours = torch.func.vmap(torch.func.grad(loss, (0, 1)))(*many)
    assert close(ours, torch.func.vmap(torch.func.grad(plain, (0, 1)))(*many))
    assert close(
        torch.func.jvp(loss, (x, context), (x, context)), torch.func.jvp(plain, (x, context), (x, context))
    )
    leaves = [x.requires_grad_(), context.requires_grad_()]
    seconds = []
    for function in (loss, plain):
        first = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    assert close(seconds[0], seconds[1], 1e-4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = MultiheadAttention(24, 4, kdim=10, vdim=10, batch_first=True)
        self.second = CrossAttention(24, 10, heads=4, kv_heads=2)
        self.pool = AttentionPool(24, 6)

    def forward(self, x: torch.Tensor, context: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        x = self.first(x, context, context, need_weights=False)[0] + x
        x = self.second(x, context, context_lengths=lengths)
        return self.pool(x)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic: bool) -> None:
    torch._dynamo.reset()
    net = Net()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch, queries, keys in ((2, 6, 9), (3, 5, 11)):
        x, context = torch.randn(batch, queries, 24), torch.randn(batch, keys, 10)
        lengths = torch.randint(1, keys, (batch,))
        results = []
        for module in (net, compiled):
            net.zero_grad()
            y = module(x, context, lengths)
            y.square().sum().backward()
            results.append([y, *(p.grad for p in net.parameters())])
        assert close(*results)
        with torch.no_grad():
            assert close(compiled(x, context, lengths), net(x, context, lengths))


def test_export() -> None:
    net = Net().eval()
    inputs = (torch.randn(2, 6, 24), torch.randn(2, 9, 10), torch.tensor([9, 4]))
    exported = torch.export.export(net, inputs, strict=False)
    calls = [str(n.target) for n in exported.graph.nodes if "interfuse" in str(n.target)]
    assert [c.split(".")[1] for c in calls] == ["attention", "attention", "attention_pool"]
    assert close(exported.module()(*inputs), net(*inputs))


# ---- errors

Q, K = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
ERRORS = {
    "q must have 4 dimensions": lambda: attention(Q[0], K, K),
    "one dtype; got torch.float32 and torch.float64": lambda: attention(Q, K.double(), K),
    "one device": lambda: attention(Q, K.to("meta"), K),
    "float32, bfloat16, float16 or float64": lambda: attention(Q.int(), K.int(), K.int()),
    "one batch size; got 2, 1 and 1": lambda: attention(Q, K[:1], K[:1]),
    "same heads and length": lambda: attention(Q, K, K[:, :, :3]),
    "one head_dim; got 8 and 4": lambda: attention(Q, K[..., :4], K),
    "must be a multiple": lambda: attention(Q[:, :3], K, K),
    "must not be 0": lambda: attention(Q[..., :0], K[..., :0], K),
    "scale must be a finite": lambda: attention(Q, K, K, scale=float("nan")),
    "scale must be a number": lambda: attention(Q, K, K, scale="1"),
    "backend must be a name": lambda: attention(Q, K, K, backend=1),
    "backend must be one of": lambda: attention(Q, K, K, backend="metal"),
    "dropout_p must be a probability": lambda: attention(Q, K, K, dropout_p=2),
    "mask must be boolean": lambda: attention(Q, K, K, torch.ones(5, 7, dtype=torch.int32)),
    "mask must broadcast": lambda: attention(Q, K, K, torch.ones(5, 6, dtype=torch.bool)),
    "q_lengths must be int64": lambda: attention(Q, K, K, q_lengths=torch.ones(2)),
    "kv_lengths must have shape": lambda: attention(Q, K, K, kv_lengths=torch.ones(3, dtype=torch.int64)),
    "kv_lengths of batch entry 1 is 8; allowed is 0 to 7": lambda: attention(
        Q, K, K, kv_lengths=torch.tensor([7, 8])),
    "q_lengths of batch entry 0 is -1": lambda: attention(Q, K, K, q_lengths=torch.tensor([-1, 5])),
    "kv_lengths must be from 0 to 7": lambda: attention(
        Q, K, K, kv_lengths=torch.tensor([7, 8]), backend="reference"),
    "x must be (batch, steps, width)": lambda: attention_pool(Q, Q, None, Q),
    "context must have shape (6,)": lambda: attention_pool(Q[0], torch.ones(6, 8), None, torch.ones(5)),
    "lengths must be int64": lambda: attention_pool(
        Q[0], torch.ones(6, 8), None, torch.ones(6), lengths=torch.ones(4)),
    "lengths of batch entry 0 is 9": lambda: attention_pool(
        Q[0], torch.ones(6, 8), None, torch.ones(6), lengths=torch.tensor([9, 0, 0, 0])),
    "heads must be a multiple of kv_heads": lambda: CrossAttention(8, heads=4, kv_heads=3),
    "query_dim must be a multiple": lambda: CrossAttention(9, heads=4),
    "context must have shape": lambda: CrossAttention(8)(Q[0], Q[0][..., :4]),
    "context_lengths must be an int64 tensor or a list": lambda: CrossAttention(8)(
        Q[0], Q[0], context_lengths=[1.5] * 4),
}  # fmt: skip


@pytest.mark.parametrize("sentence", ERRORS)
def test_errors_are_full_sentences(sentence: str) -> None:
    with pytest.raises(ValueError) as raised:
        ERRORS[sentence]()
    text = str(raised.value)
    assert sentence in text
    assert text.endswith(".")


def test_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="mask must be a torch tensor; got bool"):
        attention(Q, K, K, True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="context must be a torch tensor; got int"):
        attention_pool(Q[0], torch.ones(6, 8), None, 3)  # type: ignore[arg-type]


def test_a_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(BackendError, match=r"float32 and bfloat16; the tensors are torch\.float64"):
        attention(Q.double(), K.double(), K.double(), backend="native")
    with pytest.raises(BackendError, match="run on a GPU"):
        attention(Q, K, K, backend="triton")


def test_a_mask_with_a_gradient_is_refused_by_the_registered_op() -> None:
    mask = torch.zeros(5, 7, requires_grad=True)
    with pytest.raises(RuntimeError, match="gives no gradient of the mask"):
        OP(Q, K, K, mask, None, None, False, 1.0, "", False, False)
