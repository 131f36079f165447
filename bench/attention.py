"""attention against its peers: cross-attention of two modalities with projections, dense and ragged.

Everybody computes what torch.nn.MultiheadAttention does without its weights: three projections, the
attention, the output's projection; torch runs it by scaled_dot_product_attention. Where contexts have
lengths, all get them as the mask that they take. `interfuse bench attention` prints the peer table;
`pytest bench/attention.py --benchmark-enable` runs each case under pytest-benchmark.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from interfuse.bench.pytest_rows import pytest_generate_tests, test_inference, test_training  # noqa: F401
from interfuse.bench.report import Bar, of_both, speedup
from interfuse.bench.roofline import Cost
from interfuse.bench.rows import names_of, workload_of
from interfuse.bench.workers import between
from interfuse.cases import attention as cases
from torch import Tensor, nn

import interfuse

if TYPE_CHECKING:
    from interfuse.cases.attention import ModuleCase

# Of bench/peers.py, those that can run this op.
PROVIDERS = ("interfuse", "interfuse_padded", "eager", "compile", "onnxruntime", "openvino")
BENCHMARKED = ["interfuse", "eager"]  # by pytest-benchmark


def names(further: bool, quick: bool) -> list[str]:
    return names_of(cases.CASES, quick, ("bar", "further") if further else ("bar",))


def workload(name: str) -> AttentionWorkload:
    """By name; 'NAME@tiny' is the same case with few queries and keys."""
    return workload_of(name, cases.CASES, "in the list of attention's cases", AttentionWorkload)


class Cross(nn.Module):
    """Queries that attend to a context, by a torch.nn.MultiheadAttention or ours."""

    def __init__(self, attention: nn.MultiheadAttention, padding: Tensor | None) -> None:
        super().__init__()
        self.attention = attention
        self.register_buffer("padding", padding)

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        y, _ = self.attention(query, context, context, key_padding_mask=self.padding, need_weights=False)
        return y


class Graph:
    """An ONNX graph from query and context to one output, as it grows."""

    def __init__(self) -> None:
        self.constants: list[Any] = []
        self.nodes: list[Any] = []

    def constant(self, name: str, value: Tensor) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(value.detach().contiguous().numpy(), name))
        return name

    def node(self, kind: str, *inputs: str, **settings: Any) -> str:
        from onnx import helper

        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **settings))
        return name

    def product(self, x: str, name: str, weight: Tensor, bias: Tensor | None) -> str:
        y = self.node("MatMul", x, self.constant(f"weight_{name}", weight.t()))
        return y if bias is None else self.node("Add", y, self.constant(f"bias_{name}", bias))

    def bytes(self, name: str, inputs: list[Tensor], output: str) -> bytes:
        import onnx
        from onnx import TensorProto, helper

        given = [
            helper.make_tensor_value_info(x, TensorProto.FLOAT, t.shape)
            for x, t in zip(("query", "context"), inputs, strict=True)
        ]
        made = [helper.make_tensor_value_info(output, TensorProto.FLOAT, inputs[0].shape)]
        graph = helper.make_graph(self.nodes, name, given, made, self.constants)
        sets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=sets, ir_version=9)
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString())


class AttentionWorkload:
    """One case as plain torch, as interfuse's module, and as an ONNX graph."""

    channels_last = None
    mask = None
    gradients = ("query", "context", "in_weight", "in_bias", "out_weight", "out_bias")

    def __init__(self, case: ModuleCase) -> None:
        self.case = case
        self.name = case.name
        self.dtype = case.dtype
        self.padding = None
        if case.lengths:
            self.padding = torch.arange(case.keys) >= torch.tensor(case.lengths)[:, None]

    def why_not(self, provider: str) -> str | None:
        if provider == "interfuse_padded" and self.padding is None:
            return "all contexts of this case have the same length."
        return None

    def describe(self) -> dict[str, Any]:
        described = dataclasses.asdict(self.case) | {"dtype": str(self.dtype).removeprefix("torch.")}
        return {"kernel": "native", **described, "bar": self.case.bench == "bar"}

    def tiny(self) -> AttentionWorkload:
        case = self.case
        lengths = tuple(min(length, 20 + i) for i, length in enumerate(case.lengths))
        few = {"queries": min(case.queries, 8), "keys": min(case.keys, 24), "batch": min(case.batch, 2)}
        return AttentionWorkload(dataclasses.replace(case, **few, lengths=lengths))

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(self.case.width, self.case.heads, batch_first=True)
        nn.init.normal_(attention.in_proj_bias, std=0.1)
        nn.init.normal_(attention.out_proj.bias, std=0.1)
        return Cross(attention.to(self.dtype), self.padding)

    def inputs(self) -> list[Tensor]:
        case, random = self.case, torch.Generator().manual_seed(2)
        shapes = [(case.batch, length, case.width) for length in (case.queries, case.keys)]
        return [torch.randn(shape, generator=random).to(self.dtype) for shape in shapes]

    def ours(self, module: nn.Module) -> nn.Module:
        """The parameters of a `Cross`, shared."""
        return Cross(interfuse.nn.MultiheadAttention.from_torch(module.attention), module.padding)

    def ours_padded(self, module: nn.Module) -> nn.Module:
        """As if every context were as long as the longest: what lengths save is the difference."""
        made = self.ours(module)
        made.padding = None
        return made

    def cost(self, training: bool) -> Cost:
        """Projections and both products over the keys that exist, and every tensor once. Training: three
        times the projections, and five more products of attention, one of which forward made before."""
        case = self.case
        keys = sum(case.lengths) if case.lengths else case.batch * case.keys
        queries = case.batch * case.queries
        projections = 2 * case.width * case.width * (2 * queries + 2 * keys)
        product = 2 * case.width * case.queries * keys
        operations = 3 * projections + 7 * product if training else projections + 2 * product
        elements = 2 * queries * case.width + keys * case.width + 4 * case.width * (case.width + 1)
        return Cost(operations, (3 if training else 1) * elements * self.dtype.itemsize)

    def onnx(self, module: nn.Module) -> bytes:
        """Of ONNX's operators alone."""
        case, graph = self.case, Graph()
        attention: Any = module.attention
        split = graph.constant("split", torch.tensor([0, 0, case.heads, case.width // case.heads]))
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        heads = []
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            scale = (case.width // case.heads) ** -0.5 if name == "q" else 1.0
            x = graph.product("query" if name == "q" else "context", name, weight * scale, bias * scale)
            order = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
            heads.append(graph.node("Transpose", graph.node("Reshape", x, split), perm=order))
        scores = graph.node("MatMul", heads[0], heads[1])
        if self.padding is not None:
            added = torch.zeros(self.padding.shape).masked_fill(self.padding, float("-inf"))
            scores = graph.node("Add", scores, graph.constant("padding", added[:, None, None]))
        y = graph.node("MatMul", graph.node("Softmax", scores, axis=-1), heads[2])
        joined = graph.constant("joined", torch.tensor([0, 0, case.width]))
        y = graph.node("Reshape", graph.node("Transpose", y, perm=[0, 2, 1, 3]), joined)
        y = graph.product(y, "o", attention.out_proj.weight, attention.out_proj.bias)
        return graph.bytes(self.name, self.inputs(), y)

    def onnx_with_own_operators(self, module: nn.Module) -> bytes:
        """With ONNX Runtime's own MultiHeadAttention, which adds the projections' biases too."""
        graph = Graph()
        attention: Any = module.attention
        projected = [
            graph.product("query" if name == "q" else "context", name, weight, None)
            for name, weight in zip("qkv", attention.in_proj_weight.chunk(3), strict=True)
        ]
        given = [*projected, graph.constant("bias", attention.in_proj_bias)]
        if self.padding is not None:
            given.append(graph.constant("real", (~self.padding).to(torch.int32)))
        y = graph.node("MultiHeadAttention", *given, num_heads=self.case.heads, domain="com.microsoft")
        y = graph.product(y, "o", attention.out_proj.weight, attention.out_proj.bias)
        return graph.bytes(self.name, self.inputs(), y)

    def overhead(self, seconds: float, threads: int) -> dict[str, float]:
        """One call of the op against the same call of the binding, with everything prepared, in turn."""
        from interfuse import _native
        from interfuse.ops import attention

        case = self.case
        random = torch.Generator().manual_seed(2)
        size = case.width // case.heads
        q, k, v = (
            torch.randn(case.batch, length, case.heads, size, generator=random).transpose(1, 2)
            for length in (case.queries, case.keys, case.keys)
        )
        y = attention(q, k, v)
        strides = {name: t.stride()[:3] for name, t in (("q", q), ("k", k), ("v", v), ("y", y))}
        none = dict.fromkeys(("mask_strides", "grad_q", "grad_k", "grad_v"), (0, 0, 0))
        desc = _native.AttentionDesc(
            dtype="float32", mask="none", causal=False, scale=size**-0.5, batch=case.batch, heads=case.heads,
            kv_heads=case.heads, queries=case.queries, keys=case.keys, head_dim=size, value_dim=size,
            **strides, **none,
        )  # fmt: skip
        inputs = [q.data_ptr(), k.data_ptr(), v.data_ptr(), 0, 0, 0]
        with torch.no_grad():
            return between(
                lambda: attention(q, k, v),
                lambda: _native.attention_forward(desc, inputs, y.data_ptr(), 0, 0, threads),
                seconds,
            )


OVERHEAD_CASE = "q64-kv196-b8@tiny"

# Of the issue that founded the op.
INFERENCE_ROW, RAGGED_ROW, TRAINING_ROW = 1.2, 1.8, 1.5


def bars(report: dict[str, Any]) -> list[Bar]:
    """The promises for the rows in the report; those that the run left out count as not measured."""
    result: list[Bar] = []
    rows = [row for row in report["rows"] if row["bar"]]
    for row in rows:
        least = RAGGED_ROW if row["lengths"] else INFERENCE_ROW
        for mode, limit in (("inference", least), ("training", TRAINING_ROW)):
            result.append(Bar(f"{mode}, {row['case']} over its best peer", limit, speedup(row, mode), True))
    for row in rows:
        ours, theirs = of_both(row["errors"], "output")
        result.append(Bar(f"error, {row['case']}", 2 * theirs if theirs else FORMULA, ours, at_least=False))
    return result


FORMULA = 1e-6  # where torch was left out of the run: rounding of products of this depth in float32
