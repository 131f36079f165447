"""conv_pool under torch.compile, torch.export and torch.jit.trace: whole graphs, one op for each block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tolerance
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from interfuse.nn import ConvPool2d


def close(ours: torch.Tensor, theirs: torch.Tensor, bound: float = tolerance.FLOAT32_GRADIENT) -> bool:
    return tolerance.error(ours, theirs) <= bound


class Net(nn.Module):
    """Two fused blocks and what a model has between and after them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = ConvPool2d(3, 8, 3, padding="same", activation="relu", pool="max")
        self.second = ConvPool2d(8, 6, 3, activation="gelu", pool="avg", padding=1, padding_mode="reflect")
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x) * 2.0).mean((2, 3)))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def assert_compiles(backend: str, dynamic: bool | None) -> None:
    net = Net()
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend=backend, dynamic=dynamic)
    for shape in ((2, 3, 16, 20), (3, 3, 18, 14), (5, 3, 21, 17)):
        x = torch.randn(shape)
        expected, y = net(x), compiled(x)
        assert close(y, expected)
        net.zero_grad()
        compiled.zero_grad()
        expected.square().sum().backward()
        y.square().sum().backward()
        for a, b in zip(compiled.parameters(), net.parameters(), strict=True):
            assert close(a.grad, b.grad)
        with torch.no_grad():
            assert close(compiled(x), expected)


@pytest.mark.parametrize("dynamic", [False, True, None], ids=["static", "dynamic", "automatic"])
def test_compile(dynamic: bool | None) -> None:
    assert_compiles("aot_eager", dynamic)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compile_with_inductor() -> None:
    assert_compiles("inductor", True)


def test_compiled_channels_last_and_autocast() -> None:
    net = Net().to(memory_format=torch.channels_last).eval()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 16, 20).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert close(compiled(x), net(x))
        with torch.autocast("cpu"):
            assert close(compiled(x), net(x), tolerance.BFLOAT16)


def test_the_compiled_graph_calls_the_op_and_saves_its_byte() -> None:
    """One op forward and one backward for each block; no reference in between."""
    graphs: list[str] = []

    def keep(module: Any, _: Any) -> Any:
        graphs.append(module.code)
        return make_boxed_func(module)

    net = torch.compile(
        ConvPool2d(3, 8, 3, activation="relu", pool="max"),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=keep, bw_compiler=keep),
    )
    net(torch.randn(2, 3, 9, 9)).sum().backward()
    forward, backward = graphs
    assert forward.count("interfuse.conv_pool.default") == 1
    assert backward.count("interfuse.conv_pool_backward.default") == 1
    assert "convolution" not in forward + backward


@pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")  # torch's own
def test_export() -> None:
    net, x = Net().eval(), torch.randn(2, 3, 16, 20)
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(net, (x,), dynamic_shapes=(sizes,))
    assert sum("interfuse.conv_pool" in str(node.target) for node in program.graph.nodes) == 2
    for shape in ((2, 3, 16, 20), (7, 3, 25, 18)):
        x = torch.randn(shape)
        assert close(program.module()(x), net(x))
    decomposed = program.run_decompositions()
    assert close(decomposed.module()(x), net(x))
    loss = program.module()(x).square().sum()
    loss.backward()  # an exported program still trains


@pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")
def test_export_survives_a_file(tmp_path: Any) -> None:
    net, x = Net().eval(), torch.randn(2, 3, 16, 20)
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(net, (x,)), path)
    assert close(torch.export.load(path).module()(x), net(x))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_jit_trace() -> None:
    module, x = ConvPool2d(3, 8, 3, activation="relu", pool="max").eval(), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        traced = torch.jit.trace(module, x)
        assert "interfuse::conv_pool" in str(traced.graph)
        assert torch.equal(traced(x), module(x))
