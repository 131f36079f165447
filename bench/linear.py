"""linear against its peers: fusion heads and dense layers, the rows that carry the bars and further rows.

`interfuse bench linear` prints the peer table; `pytest bench/linear.py --benchmark-enable` runs each case
under pytest-benchmark, interfuse and eager side by side.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from interfuse.bench.pytest_rows import pytest_generate_tests, test_inference, test_training  # noqa: F401
from interfuse.bench.report import Bar, mean_speedup, over_eager
from interfuse.bench.roofline import Cost
from interfuse.bench.rows import names_of, workload_of
from interfuse.bench.workers import between
from interfuse.cases import linear as cases
from torch import Tensor, nn

from interfuse.nn.linear import CompactLinear, DenseChain

if TYPE_CHECKING:
    from interfuse.cases.linear import Case

ACTIVATIONS = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softmax": lambda: nn.Softmax(-1),
}
ONNX_ACTIVATIONS = {
    "relu": "Relu",
    "gelu": "Gelu",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "softmax": "Softmax",
}

# Of bench/peers.py, those that can run this op.
PROVIDERS = (
    "interfuse", "interfuse_half_weights", "interfuse_int8_weights", "eager", "compile", "compile_frozen",
    "onnxruntime", "openvino",
)  # fmt: skip
BENCHMARKED = ["interfuse", "interfuse_int8_weights", "eager"]  # by pytest-benchmark


def names(further: bool, quick: bool) -> list[str]:
    return names_of(cases.CASES, quick, ("bar", "further") if further else ("bar",))


def workload(name: str) -> LinearWorkload:
    """By name; 'NAME@tiny' is the same case with at most two rows and a hundred columns."""
    return workload_of(name, cases.CASES, "in the list of linear's cases", LinearWorkload)


class Joined(nn.Module):
    """What people write: the inputs concatenated, and layers."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = sum(case.widths)
        for out, activation in zip(case.outputs, case.activations, strict=True):
            layers.append(nn.Linear(width, out, case.bias))
            if activation != "none":
                layers.append(ACTIVATIONS[activation]())
            width = out
        self.layers = nn.Sequential(*layers)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layers(inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1))


class LinearWorkload:
    """One case as plain torch, as interfuse's chain, and as an ONNX graph."""

    channels_last = None
    mask = None

    def __init__(self, case: Case) -> None:
        self.case = case
        self.name = case.name
        self.dtype = case.dtype
        each = ("weight", "bias") if case.bias else ("weight",)
        self.gradients = (
            *(f"input_{i}" for i in range(len(case.widths))),
            *(f"{name}_{layer}" for layer in range(len(case.outputs)) for name in each),
        )

    def why_not(self, provider: str) -> str | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {
            "kernel": "native",
            "kernel_why": "linear has one kernel.",
            "bar": self.case.bench == "bar",
            "input": [*self.case.lead, *self.case.widths],
            "weight": list(self.case.outputs),
            "dtype": str(self.dtype).removeprefix("torch."),
            "activations": list(self.case.activations),
        }

    def tiny(self) -> LinearWorkload:
        lead = tuple(min(size, 2) for size in self.case.lead)
        widths = tuple(min(width, 50) for width in self.case.widths)
        return LinearWorkload(dataclasses.replace(self.case, lead=lead, widths=widths))

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return Joined(self.case).to(self.dtype)

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(2)
        shapes = [(*self.case.lead, width) for width in self.case.widths]
        return [torch.randn(shape, generator=generator).to(self.dtype) for shape in shapes]

    def ours(self, module: nn.Module) -> nn.Module:
        return self.chain(module)

    def chain(self, module: nn.Module) -> DenseChain:
        layers: Any = module.layers
        return DenseChain.from_torch(layers, self.case.widths)

    def ours_half_weights(self, module: nn.Module) -> nn.Module:
        return self.compact(module, torch.bfloat16)

    def ours_int8_weights(self, module: nn.Module) -> nn.Module:
        return self.compact(module, torch.int8)

    def compact(self, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        layers: Any = self.chain(module)
        return DenseChain(*(CompactLinear(layer, dtype) for layer in layers))

    def cost(self, training: bool) -> Cost:
        """Forward: the products, and every tensor once. Training: three products of that size, and the
        gradients' bytes beside a second reading of inputs and weights."""
        rows, width, products, weights, values = math.prod(self.case.lead), sum(self.case.widths), 0, 0, 0
        for out in self.case.outputs:
            products += rows * width * out
            weights += width * out + out * self.case.bias
            values += rows * width
            width = out
        last = rows * width
        elements = 3 * (values + weights) + 2 * last if training else values + weights + last
        return Cost((3 if training else 1) * 2 * products, elements * self.dtype.itemsize)

    def onnx(self, module: nn.Module) -> bytes:
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        given = [f"x{i}" for i in range(len(self.case.widths))]
        nodes, weights, value = [], [], given[0]
        if len(given) > 1:
            nodes.append(helper.make_node("Concat", given, ["joined"], axis=-1))
            value = "joined"
        layers: Any = module.layers
        linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
        for i, (linear, activation) in enumerate(zip(linears, self.case.activations, strict=True)):
            arrays = {f"w{i}": linear.weight.detach().T.contiguous(), f"b{i}": linear.bias.detach()}
            weights += [numpy_helper.from_array(t.numpy(), name) for name, t in arrays.items()]
            if len(self.case.lead) == 1:
                nodes.append(helper.make_node("Gemm", [value, *arrays], [f"sum{i}"]))
            else:
                nodes.append(helper.make_node("MatMul", [value, f"w{i}"], [f"product{i}"]))
                nodes.append(helper.make_node("Add", [f"product{i}", f"b{i}"], [f"sum{i}"]))
            value = f"sum{i}"
            if activation != "none":
                nodes.append(helper.make_node(ONNX_ACTIVATIONS[activation], [value], [f"active{i}"]))
                value = f"active{i}"
        graph = helper.make_graph(
            nodes,
            self.name,
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, [*self.case.lead, width])
                for name, width in zip(given, self.case.widths, strict=True)
            ],
            [
                helper.make_tensor_value_info(
                    value, TensorProto.FLOAT, [*self.case.lead, self.case.outputs[-1]]
                )
            ],
            weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString())

    def overhead(self, seconds: float, threads: int) -> dict[str, float]:
        """One call of the first layer's op against the same call of the binding, with everything prepared."""
        from interfuse import _native
        from interfuse.ops.linear import linear

        layers: Any = self.chain(self.module())
        first, xs = layers[0], self.inputs()
        rows, out = math.prod(self.case.lead), first.out_features
        desc = _native.LinearDesc(
            "float32", "float32", rows, out, self.case.widths, self.case.widths, first.activation or "none",
            0.01, False,
        )  # fmt: skip
        y, pointers = torch.empty(rows, out), [x.data_ptr() for x in xs]
        weight, bias = first.weight.data_ptr(), first.bias.data_ptr()

        def op() -> Tensor:
            return linear(xs, first.weight, first.bias, first.activation)

        def binding() -> None:
            _native.linear_forward(desc, pointers, weight, 0, bias, y.data_ptr(), 0, threads)

        with torch.no_grad():
            return between(op, binding, seconds)


OVERHEAD_CASE = "head-b1@tiny"

# Of the issue that founded the op; the rows are named as in the list of cases.
INFERENCE_MEAN, INFERENCE_ROW, TRAINING_MEAN = 1.3, 1.0, 1.3
INT8_ROW, INT8_RATIO = "large-b1", 2.5
OVERHEAD_SECONDS = 5e-6
TIMES_TORCHS_ERROR = 2.0


def bars(report: dict[str, Any]) -> list[Bar]:
    """The promises for the rows in the report; those that the run left out count as not measured."""
    rows = {row["case"]: row for row in report["rows"] if row["bar"]}
    result = []
    for mode, mean in (("inference", INFERENCE_MEAN), ("training", TRAINING_MEAN)):
        value = mean_speedup(report, mode, names(False, False))
        result.append(
            Bar(f"{mode}, geometric mean over the best peer of each row", mean, value, at_least=True)
        )
    for name, row in rows.items():
        ratio = row.get("inference", {}).get("ratio")
        result.append(Bar(f"inference, {name} over its best peer", INFERENCE_ROW, ratio, at_least=True))
    result.append(
        Bar(f"int8 weights, {INT8_ROW} over its best peer", INT8_RATIO, int8_ratio(rows), at_least=True)
    )
    overhead = report.get("overhead", {}).get("overhead")
    result.append(Bar("call overhead in seconds", OVERHEAD_SECONDS, overhead, at_least=False))
    for name, row in rows.items():
        share = over_eager(row["errors"], "output")
        result.append(Bar(f"error over eager's, {name}", TIMES_TORCHS_ERROR, share, at_least=False))
    return result


def int8_ratio(rows: dict[str, Any]) -> float | None:
    inference = rows.get(INT8_ROW, {}).get("inference", {})
    ours, peer = inference.get("times", {}).get("interfuse_int8_weights"), inference.get("best_peer")
    return peer["median"] / ours["default"]["median"] if ours and peer else None
