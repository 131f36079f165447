"""rnn under torch.compile, torch.export, opcheck, autocast and torch.func: one op for each stack."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import rnn_oracle as oracle
import tolerance
import torch
import torch._inductor.config
from cases.rnn import EDGES, MODULES
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.library import opcheck

import interfuse.nn as inn
from interfuse.ops.rnn import rnn

BY_NAME = {case.name: case for case in EDGES}
BOUND = tolerance.recurrent_gradient(9, 2, 40)


def close(ours: torch.Tensor, theirs: torch.Tensor, bound: float = BOUND) -> bool:
    return tolerance.recurrent_error(ours, theirs) <= bound


leaves_of = torch.utils._pytree.tree_leaves


class Net(nn.Module):
    """Recurrent layers with lengths and dropout, and what a model has between and after them."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text = inn.EmbeddingLSTM(11, 6, 8, 2, dropout=dropout, bidirectional=True, batch_first=True)
        self.audio = inn.GRU(5, 7, batch_first=True)
        self.cell = inn.RNNCell(7, 4)
        self.head = nn.Linear(8 + 4, 3)

    def forward(
        self, ids: torch.Tensor, sound: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        _, (h, _) = self.text(ids, lengths=lengths)
        y, _ = self.audio(sound)
        return self.head(torch.cat([h[-1], self.cell(y.mean(1))], 1))


def arguments(batch: int = 3, steps: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(11, (batch, steps), generator=generator)
    lengths = torch.randint(1, steps + 1, (batch,), generator=generator)
    return ids, torch.randn(batch, 2 * steps, 5, generator=generator), lengths


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def assert_compiles(backend: str, dynamic: bool | None) -> None:
    net = Net()
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend=backend, dynamic=dynamic)
    for given in (arguments(), arguments(5, 4), arguments(2, 9)):
        expected, y = net(*given), compiled(*given)
        assert close(y, expected)
        net.zero_grad()
        compiled.zero_grad()
        expected.square().sum().backward()
        y.square().sum().backward()
        for a, b in zip(compiled.parameters(), net.parameters(), strict=True):
            assert close(a.grad, b.grad)
        with torch.no_grad():
            assert close(compiled(*given), expected)


@pytest.mark.parametrize("dynamic", [False, True, None], ids=["static", "dynamic", "automatic"])
def test_compile(dynamic: bool | None) -> None:
    assert_compiles("aot_eager", dynamic)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compile_with_inductor() -> None:
    # A graph cached by an earlier run would know how much an earlier core kept for the backward.
    with torch._inductor.config.patch(force_disable_caches=True):
        assert_compiles("inductor", True)


def test_compiled_dropout_and_autocast() -> None:
    net, given = Net(dropout=0.5), arguments()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    y = compiled(*given)
    assert not torch.equal(y, compiled(*given))
    net.eval()
    assert torch.equal(compiled(*given), net(*given))
    with torch.autocast("cpu"), torch.no_grad():
        assert close(compiled(*given), net(*given), tolerance.BFLOAT16)


def test_the_compiled_graph_calls_the_op() -> None:
    """One op forward and one backward for the stack; no loop over steps."""
    graphs: list[str] = []

    def keep(module: Any, _: Any) -> Any:
        graphs.append(module.code)
        return make_boxed_func(module)

    net = torch.compile(
        inn.LSTM(4, 7, 2, bidirectional=True),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=keep, bw_compiler=keep),
    )
    net(torch.randn(6, 3, 4))[0].sum().backward()
    forward, backward = graphs
    assert forward.count("interfuse.rnn.default") == 1
    assert backward.count("interfuse.rnn_backward.default") == 1
    assert "sigmoid" not in forward + backward


@pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")  # torch's own
def test_export(tmp_path: Any) -> None:
    net = Net().eval()
    batch, steps = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("steps", min=2, max=99)
    shapes = ({0: batch, 1: steps}, {0: batch, 1: 2 * steps}, {0: batch})
    program = torch.export.export(net, arguments(), dynamic_shapes=shapes)
    assert sum("interfuse.rnn" in str(node.target) for node in program.graph.nodes) == 3
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2")
    for given in (arguments(), arguments(7, 11)):
        assert close(program.module()(*given), net(*given))
        assert close(loaded.module()(*given), net(*given))
    program.module()(*arguments()).square().sum().backward()  # an exported program still trains


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_jit_trace() -> None:
    module, x = inn.GRU(4, 7).eval(), torch.randn(5, 3, 4)
    with torch.no_grad():
        traced = torch.jit.trace(module, x)
        assert "interfuse::rnn" in str(traced.graph)
        assert torch.equal(traced(x)[0], module(x)[0])


def op_arguments(name: str, save: bool) -> tuple[Any, ...]:
    g = oracle.given(BY_NAME[name])
    case, states = g.case, (*g.states, None, None)
    return (g.x, g.table, g.lengths, states[0], states[1], list(g.weights.values()), case.cell,
            case.bidirectional, case.batch_first, -1, "", "", save)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ["lstm-deep-both", "gru-ids", "projected-wide", "rnn_relu-no-bias"])
def test_opcheck(name: str) -> None:
    opcheck(torch.ops.interfuse.rnn.default, op_arguments(name, save=False))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ["gru-ids", "projected-wide", "rnn_relu-no-bias"])
def test_opcheck_backward(name: str) -> None:
    """Without lengths: what is kept of the steps beyond an end is never written, and opcheck compares it."""
    given = op_arguments(name, save=True)
    opcheck(torch.ops.interfuse.rnn.default, given)
    plain = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, given)
    y, _, cn, reserve = torch.ops.interfuse.rnn.default(*plain)
    grads = (torch.randn_like(y), None, torch.randn_like(cn) if cn.dim() > 1 else None)
    mask = [True] * (3 + len(plain[5]))
    arguments = (*grads, *plain[:6], None, reserve, *plain[6:-1], mask)
    opcheck(torch.ops.interfuse.rnn_backward.default, arguments)


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", MODULES)
def test_autocast_is_the_same_for_every_cell(cell: str, dtype: torch.dtype) -> None:
    """The autocast dtype out, as torch's LSTM has it; torch leaves GRU and RNN in float32."""
    for name in (f"{cell}-deep-both", f"{cell}-ids"):
        g = oracle.given(BY_NAME[name])
        plain, gradients = oracle.ours(g), oracle.gradients(oracle.ours(g), g.leaves())
        with torch.autocast("cpu", dtype=dtype):
            found = oracle.ours(g)
        assert {t.dtype for t in found.values()} == {dtype}
        rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
        # Inputs and weights are rounded first: several roundings' worth, amplified over layers and steps.
        for n, t in plain.items():
            assert tolerance.recurrent_error(found[n], t) <= 8 * rounding
        for n, t in oracle.gradients(found, g.leaves()).items():
            assert t.dtype == torch.float32
            assert tolerance.recurrent_error(t, gradients[n]) <= 16 * rounding


def test_autocast_leaves_float64_alone() -> None:
    g = oracle.given(BY_NAME["lstm-plain"], torch.float64)
    with torch.autocast("cpu"):
        assert oracle.ours(g)["y"].dtype == torch.float64


# torch.func


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_vmap(cell: str, batch_first: bool) -> None:
    module = {"lstm": nn.LSTM, "gru": nn.GRU}[cell](4, 7, 2, batch_first=batch_first, bidirectional=True)
    weights = [p.detach() for p in module.parameters()]
    xs, lengths = torch.randn(3, 5, 6, 4), torch.randint(1, 6, (3, 5 if batch_first else 6))
    h = torch.randn(4, 5 if batch_first else 6, 7, 3)

    def run(x: Any, h: Any, lengths: Any, *weights: Any) -> Any:
        hx = (h, h) if cell == "lstm" else h
        return rnn(
            x, list(weights), hx, cell=cell, bidirectional=True, batch_first=batch_first, lengths=lengths
        )

    many = [torch.stack([w, 2 * w, -w], 1) for w in weights]
    lengths = lengths.clamp(max=xs.shape[2 if batch_first else 1])
    for dims in ((0, 3, 0), (0, None, None), (None, 3, 0)):
        given = [
            t if dim is not None else t.select(at, 0)
            for t, dim, at in zip((xs, h, lengths), dims, (0, 3, 0), strict=True)
        ]
        found = torch.vmap(run, in_dims=(*dims, *(None for _ in weights)))(*given, *weights)
        for i in range(3):
            one = [t if dim is None else t.select(dim, i) for t, dim in zip(given, dims, strict=True)]
            for a, b in zip(leaves_of(found), leaves_of(run(*one, *weights)), strict=True):
                assert close(a[i], b)
    found = torch.vmap(run, in_dims=(None, None, None, *(1 for _ in weights)))(
        xs[0], h[..., 0], lengths[0], *many
    )
    assert close(found[0][1], run(xs[0], h[..., 0], lengths[0], *(2 * w for w in weights))[0])


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # forward mode's own
def test_per_sample_gradients_and_jacobians() -> None:
    module = nn.LSTM(4, 5, 2, bidirectional=True)
    weights = [p.detach() for p in module.parameters()]
    xs = torch.randn(3, 6, 2, 4)

    def loss(weights: Any, x: Any) -> Any:
        return rnn(x, weights, cell="lstm", bidirectional=True)[0].square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, xs)
    for i in range(3):
        for a, b in zip(together, torch.func.grad(loss)(weights, xs[i]), strict=True):
            assert close(a[i], b)

    def last(x: Any) -> Any:
        return rnn(x, weights, cell="lstm", bidirectional=True)[1][0]

    backward, forward = torch.func.jacrev(last)(xs[0]), torch.func.jacfwd(last)(xs[0])
    assert close(backward, forward)
