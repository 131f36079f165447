"""conv_pool against its peers: the rows that carry the bars, further rows, and pytest-benchmark cases.

`interfuse bench conv_pool` prints the peer table; `pytest bench/conv_pool.py --benchmark-enable` runs each
case under pytest-benchmark, interfuse and eager side by side.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from interfuse.bench import sweep
from interfuse.bench.pytest_rows import pytest_generate_tests, test_inference, test_training  # noqa: F401
from interfuse.bench.report import Bar, mean_speedup, memory_share
from interfuse.bench.roofline import Cost
from interfuse.bench.rows import names_of, workload_of
from interfuse.bench.workers import between
from interfuse.cases import conv_pool as cases
from torch import Tensor, nn

import interfuse

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from interfuse.cases.conv_pool import Case

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
ONNX_ACTIVATIONS = {
    "relu": "Relu",
    "leaky_relu": "LeakyRelu",
    "gelu": "Gelu",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
}
CHANNELS_LAST = {1: None, 2: torch.channels_last, 3: torch.channels_last_3d}

# Of bench/peers.py, those that can run this op.
PROVIDERS = (
    "interfuse", "interfuse_channels_last", "interfuse_highest", "eager", "channels_last", "compile",
    "compile_channels_last", "compile_frozen", "onnxruntime", "openvino",
)  # fmt: skip
BENCHMARKED = ["interfuse", "eager", "channels_last"]  # by pytest-benchmark


def names(further: bool, quick: bool) -> list[str]:
    return names_of(cases.CASES, quick, ("bar", "further") if further else ("bar",))


def sweep_rows(only: Sequence[str] | None, quick: bool, training: bool, threads: int) -> Iterator[sweep.Row]:
    """Every class of the sweep, or those named, in all its forms; `quick`: tiny, to show that it works."""
    torch.set_num_threads(threads)
    dtypes = (torch.float32,) if quick else (torch.float32, torch.bfloat16)
    for case in cases.SWEEP:
        if only and case.name not in only:
            continue
        for form in sweep.forms(case, (1,) if quick else (1, 8), dtypes):
            made = ConvPoolWorkload(form)
            seconds = 0.001 if quick else 0.1
            yield from sweep.rows(made.tiny(40) if quick else made, training, seconds, threads)


def workload(name: str) -> ConvPoolWorkload:
    """By name; 'NAME@tiny' is the same case on a batch of one and small images."""
    return workload_of(name, cases.CASES, "in the list of conv_pool's cases", ConvPoolWorkload)


class ConvPoolWorkload:
    """One case as plain torch, as interfuse's module, and as an ONNX graph."""

    gradients = ("input", "weight", "bias")
    mask = None

    def __init__(self, case: Case) -> None:
        self.case = case
        self.name = case.name
        self.dtype = case.dtype
        self.spatial = len(case.weight) - 2
        self.channels_last = CHANNELS_LAST[self.spatial]
        given = case.arguments
        self.stride = spread(given.get("stride", 1), self.spatial)
        self.padding = spread(given.get("padding", 0), self.spatial)
        self.dilation = spread(given.get("dilation", 1), self.spatial)
        self.groups = given.get("groups", 1)
        self.activation = given.get("activation")
        self.pool = given.get("pool")
        self.pool_size = spread(given.get("pool_size", 2), self.spatial)
        self.pool_stride = spread(given.get("pool_stride") or self.pool_size, self.spatial)
        self.pool_padding = spread(given.get("pool_padding", 0), self.spatial)

    def why_not(self, provider: str) -> str | None:
        return None

    def describe(self) -> dict[str, Any]:
        plan = self.native_plan()
        return {
            "kernel": plan.algorithm,
            "kernel_why": plan.why,
            "bar": self.case.bench == "bar",
            "input": list(self.case.input),
            "weight": list(self.case.weight),
            "dtype": str(self.dtype).removeprefix("torch."),
            **{name: value for name, value in self.case.arguments.items() if value is not None},
        }

    def tiny(self, most: int = 24) -> ConvPoolWorkload:
        sizes = [min(size, most if self.spatial < 3 else 10) for size in self.case.input[2:]]
        return ConvPoolWorkload(dataclasses.replace(self.case, input=(1, self.case.input[1], *sizes)))

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        layers: list[nn.Module] = [
            CONVOLUTIONS[self.spatial](
                self.case.input[1], self.case.weight[0], self.case.weight[2:], self.stride, self.padding,
                self.dilation, self.groups, self.case.bias,
            )
        ]  # fmt: skip
        if self.activation:
            layers.append(ACTIVATIONS[self.activation]())
        if self.pool:
            pools = MAX_POOLS if self.pool == "max" else AVG_POOLS
            sizes = (self.pool_size, self.pool_stride, self.pool_padding)
            layers.append(pools[self.spatial](*(s[0] if self.spatial == 1 else s for s in sizes)))
        return nn.Sequential(*layers).to(self.dtype)

    def inputs(self) -> list[Tensor]:
        x = torch.randn(self.case.input, generator=torch.Generator().manual_seed(2))
        return [x.to(self.dtype)]

    def ours(self, module: nn.Module) -> nn.Module:
        fused = {1: interfuse.nn.ConvPool1d, 2: interfuse.nn.ConvPool2d, 3: interfuse.nn.ConvPool3d}
        layers = list(module.children())
        activation = layers[1] if self.activation else None
        return fused[self.spatial].from_torch(layers[0], activation, layers[-1] if self.pool else None)

    def output_sizes(self) -> tuple[list[int], list[int]]:
        """Of the convolution and of the whole."""
        conv, out = [], []
        for axis in range(self.spatial):
            reach = self.dilation[axis] * (self.case.weight[2 + axis] - 1) + 1
            size = (self.case.input[2 + axis] + 2 * self.padding[axis] - reach) // self.stride[axis] + 1
            conv.append(size)
            if self.pool:
                window = self.pool_size[axis]
                size = (size + 2 * self.pool_padding[axis] - window) // self.pool_stride[axis] + 1
            out.append(size)
        return conv, out

    def output_shape(self) -> list[int]:
        return [self.case.input[0], self.case.weight[0], *self.output_sizes()[1]]

    def cost(self, training: bool) -> Cost:
        """Forward: the direct convolution, and every tensor once. Training: three convolutions of that size
        (the result and two gradients), and the gradients' bytes beside a second reading of x and weight."""
        conv, out = self.output_sizes()
        batch, out_channels = self.case.input[0], self.case.weight[0]
        operations = 2 * batch * math.prod(conv) * math.prod(self.case.weight)
        x, w = math.prod(self.case.input), math.prod(self.case.weight)
        y = batch * out_channels * math.prod(out)
        elements = 3 * (x + w) + 2 * (y + out_channels) if training else x + w + y + out_channels
        return Cost((3 if training else 1) * operations, elements * self.dtype.itemsize)

    def onnx(self, module: nn.Module) -> bytes:
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        conv = module[0]
        weights = [numpy_helper.from_array(conv.weight.detach().numpy(), "w")]
        if conv.bias is not None:
            weights.append(numpy_helper.from_array(conv.bias.detach().numpy(), "b"))
        nodes = [
            helper.make_node(
                "Conv", ["x", *(w.name for w in weights)], ["conv"], kernel_shape=self.case.weight[2:],
                strides=self.stride, pads=[*self.padding, *self.padding], dilations=self.dilation,
                group=self.groups,
            )
        ]  # fmt: skip
        if self.activation == "silu":
            nodes.append(helper.make_node("Sigmoid", ["conv"], ["gate"]))
            nodes.append(helper.make_node("Mul", ["conv", "gate"], ["active"]))
        elif self.activation:
            nodes.append(helper.make_node(ONNX_ACTIVATIONS[self.activation], ["conv"], ["active"]))
        if self.pool:
            settings = {
                "kernel_shape": self.pool_size,
                "strides": self.pool_stride,
                "pads": [*self.pool_padding, *self.pool_padding],
            }
            if self.pool == "avg":
                settings["count_include_pad"] = 1
            kind = "MaxPool" if self.pool == "max" else "AveragePool"
            nodes.append(helper.make_node(kind, [nodes[-1].output[0]], ["pooled"], **settings))
        graph = helper.make_graph(
            nodes, self.name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.case.input)],
            [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, self.output_shape())],
            weights,
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString())

    def native_plan(self) -> Any:
        """The native core's plan for the case, made by hand as an embedder would make it."""
        from interfuse import _native

        batch, channels, *sizes = self.case.input
        strides = [*torch.empty(self.case.input, device="meta").stride()]
        return _native.ConvPoolDesc(
            spatial=self.spatial,
            dtype=str(self.dtype).removeprefix("torch."),
            channels_last=False,
            weight_channels_last=False,
            batch=batch,
            in_channels=channels,
            out_channels=self.case.weight[0],
            groups=self.groups,
            input=sizes,
            kernel=self.case.weight[2:],
            stride=self.stride,
            padding=[side for padding in self.padding for side in (padding, padding)],
            dilation=self.dilation,
            x_strides=[*strides[:2], *[0] * (3 - self.spatial), *strides[2:]],
            activation=self.activation or "none",
            negative_slope=0.01,
            pool=self.pool or "none",
            pool_size=self.pool_size,
            pool_stride=self.pool_stride,
            pool_padding=self.pool_padding,
            ceil_mode=False,
            count_include_pad=True,
            precision="default",
            save=False,
        )

    def overhead(self, seconds: float, threads: int) -> dict[str, float]:
        """One call of the op against the same call of the binding, with everything prepared, in turn."""
        from interfuse import _native

        module = self.module()
        x, weight, bias = self.inputs()[0], module[0].weight, module[0].bias
        desc, y = self.native_plan(), torch.empty(self.output_shape())
        pointers = [t.data_ptr() for t in (x, weight, bias, y)]

        def op() -> Tensor:
            return interfuse.ops.conv_pool(x, weight, bias, **self.case.arguments)

        def binding() -> None:
            _native.conv_pool_forward(desc, *pointers, 0, 0, threads)

        with torch.no_grad():
            return between(op, binding, seconds)


OVERHEAD_CASE = "first-224@tiny"

# Of the issue that founded the op; the rows are named as in the list of cases.
INFERENCE_MEAN, INFERENCE_ROW, INFERENCE_DEEP_ROWS = 1.8, 1.0, 2.2
DEEP_ROWS = ("second-111", "third-54")
TRAINING_MEAN, TRAINING_ROW = 3.0, 1.5
MEMORY_SHARE, OVERHEAD_SECONDS = 0.5, 5e-6
ERRORS = {"interfuse": ("default", 1e-5), "interfuse_highest": ("highest", 1e-6)}


def bars(report: dict[str, Any]) -> list[Bar]:
    """The promises for the rows in the report; those that the run left out count as not measured."""
    rows = {row["case"]: row for row in report["rows"] if row["bar"]}
    result = []
    for mode, mean, least in (
        ("inference", INFERENCE_MEAN, INFERENCE_ROW),
        ("training", TRAINING_MEAN, TRAINING_ROW),
    ):
        value = mean_speedup(report, mode, names(False, False))
        result.append(
            Bar(f"{mode}, geometric mean over the best peer of each row", mean, value, at_least=True)
        )
        for name, row in rows.items():
            limit = INFERENCE_DEEP_ROWS if mode == "inference" and name in DEEP_ROWS else least
            ratio = row.get(mode, {}).get("ratio")
            result.append(Bar(f"{mode}, {name} over its best peer", limit, ratio, at_least=True))
    for name, row in rows.items():
        share = memory_share(row)
        result.append(
            Bar(f"memory of a training step, {name}, share of eager's", MEMORY_SHARE, share, at_least=False)
        )
    overhead = report.get("overhead", {}).get("overhead")
    result.append(Bar("call overhead in seconds", OVERHEAD_SECONDS, overhead, at_least=False))
    for name, row in rows.items():
        for provider, (precision, limit) in ERRORS.items():
            error = row["errors"].get(provider, {}).get("output")
            result.append(Bar(f"error at '{precision}', {name}", limit, error, at_least=False))
    return result


def spread(value: Any, count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value)
