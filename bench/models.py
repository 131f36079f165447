"""The documented fusion models against their peers: whole models, made of plain torch for everybody else.

`interfuse bench models` prints the peer table; `pytest bench/models.py --benchmark-enable` runs each case
under pytest-benchmark.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from interfuse.bench.pytest_rows import pytest_generate_tests, test_inference, test_training  # noqa: F401
from interfuse.bench.report import Bar, speedup
from interfuse.bench.rnn import ONNX_GATES
from interfuse.bench.roofline import Cost
from interfuse.bench.rows import names_of, workload_of
from torch import Tensor, nn

import interfuse
from interfuse import models
from interfuse.nn import compact

# Of bench/peers.py, those that can run whole models.
PROVIDERS = (
    "interfuse", "interfuse_optimized", "interfuse_half_weights", "eager", "channels_last", "compile",
    "compile_channels_last", "compile_frozen", "onnxruntime", "openvino",
)  # fmt: skip
BENCHMARKED = ["interfuse", "interfuse_optimized", "eager"]  # by pytest-benchmark
VOCABULARY, EMBEDDING, HIDDEN, LAYERS, WIDTH, CLASSES = 10_000, 64, 128, 2, 512, 10
CHANNELS = (32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Case:
    """`shape` is the image's or the video's; `features` are the audio's, and 0 where there is text."""

    name: str
    shape: tuple[int, ...]
    steps: int
    batch: int
    features: int = 0


CASES = [
    *(Case(f"image-text-b{n}", (3, 128, 128), 64, n) for n in (1, 8, 32)),
    *(Case(f"video-audio-b{n}", (3, 22, 112, 112), 100, n, 40) for n in (1, 4)),
]


def names(further: bool, quick: bool) -> list[str]:
    return names_of(CASES, quick)


def workload(name: str) -> ModelWorkload:
    """By name; 'NAME@tiny' is the same model on the smallest pictures and few steps."""
    return workload_of(name, CASES, "among the models' cases", ModelWorkload)


class ModelWorkload:
    """One case as plain torch, as interfuse's model, and as an ONNX graph."""

    dtype = torch.float32
    mask = None

    def __init__(self, case: Case) -> None:
        self.case, self.name = case, case.name
        self.spatial = len(case.shape) - 1
        self.channels_last = torch.channels_last if self.spatial == 2 else torch.channels_last_3d
        names = ["image"] if self.spatial == 2 else ["video", "audio"]
        self.gradients = [*names, *(name for name, _ in self.made("torch", "meta").named_parameters())]

    def why_not(self, provider: str) -> str | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"kernel": "native", **dataclasses.asdict(self.case), "bar": True}

    def tiny(self) -> ModelWorkload:
        least = models.smallest_size(len(CHANNELS))
        shape = (self.case.shape[0], *(least for _ in range(self.spatial)))
        return ModelWorkload(
            dataclasses.replace(self.case, shape=shape, steps=5, batch=min(2, self.case.batch))
        )

    def made(self, layers: str, device: str = "cpu") -> nn.Module:
        torch.manual_seed(0)
        with torch.device(device):
            if self.spatial == 2:
                return models.image_text_fusion(self.case.shape, CLASSES, layers=layers)
            return models.video_audio_fusion(
                self.case.shape, CLASSES, audio_features=self.case.features, layers=layers
            )

    def module(self) -> nn.Module:
        return self.made("torch")

    def inputs(self) -> list[Tensor]:
        draw, case = torch.Generator().manual_seed(2), self.case
        seen = torch.randn(case.batch, *case.shape, generator=draw)
        if case.features:
            return [seen, torch.randn(case.batch, case.steps, case.features, generator=draw)]
        return [seen, torch.randint(VOCABULARY, (case.batch, case.steps), generator=draw)]

    def ours(self, module: nn.Module) -> nn.Module:
        fused = self.made("fused")
        fused.load_state_dict(module.state_dict())
        return fused

    def ours_optimized(self, module: nn.Module) -> nn.Module:
        return interfuse.optimize(module)

    def ours_half_weights(self, module: nn.Module) -> nn.Module:
        """Recurrent and dense weights in bfloat16; those of convolutions are few."""
        return compact(self.ours(module), torch.bfloat16)

    def cost(self, training: bool) -> Cost:
        """Every product of every layer, and every weight and input once. Training: three times that."""
        case, sizes, operations = self.case, list(self.case.shape[1:]), 0
        for before, after in zip((case.shape[0], *CHANNELS), CHANNELS, strict=False):
            sizes = [n - 2 for n in sizes]
            operations += math.prod(sizes) * before * after * 3**self.spatial
            sizes = [n // 2 for n in sizes]
        wide = (case.features or EMBEDDING) + (2 * LAYERS - 1) * HIDDEN
        operations += case.steps * 4 * HIDDEN * wide
        operations += WIDTH * (math.prod(sizes) * CHANNELS[-1] + WIDTH + HIDDEN + CLASSES)
        read = sum(x.numel() for x in self.inputs())
        weights = sum(p.numel() for name, p in self.module().named_parameters() if "embedding" not in name)
        times = 3 if training else 1
        return Cost(times * 2 * case.batch * operations, times * 4 * (read + weights))

    def onnx(self, module: nn.Module) -> bytes:
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        constants: list[Any] = []
        nodes: list[Any] = []

        def constant(value: Tensor) -> str:
            constants.append(numpy_helper.from_array(value.detach().numpy(), f"c{len(constants)}"))
            return constants[-1].name

        def node(kind: str, *given: str, outputs: int = 1, **settings: Any) -> str:
            """The name of the last output; those before it are left out."""
            made = f"n{len(nodes)}"
            nodes.append(helper.make_node(kind, given, [""] * (outputs - 1) + [made], **settings))
            return made

        def dense(at: str, chain: nn.Sequential) -> str:
            for layer in chain:
                if isinstance(layer, nn.Linear):
                    at = node("Gemm", at, constant(layer.weight), constant(layer.bias), transB=1)
                else:
                    at = node("Relu", at)
            return at

        seeing, reading = module.encoders
        window = [2] * self.spatial
        image = "x"
        for block in seeing.blocks:
            conv = block[0]
            weights = constant(conv.weight), constant(conv.bias)
            image = node("Conv", image, *weights, kernel_shape=conv.kernel_size)
            image = node("MaxPool", node("Relu", image), kernel_shape=window, strides=window)
        image = dense(node("Flatten", image, axis=1), seeing.dense.layers)
        text = "z"
        if reading.recurrent.embedding is not None:
            text = node("Gather", constant(reading.recurrent.embedding.weight), text)
        text = node("Transpose", text, perm=[1, 0, 2])
        rnn = reading.recurrent.rnn
        squeezed = constant(torch.tensor([1]))
        for layer in range(LAYERS):
            w, r, *biases = (
                torch.cat([getattr(rnn, f"{name}_l{layer}").chunk(4)[i] for i in ONNX_GATES["lstm"]])[None]
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            given = [text, constant(w), constant(r), constant(torch.cat(biases, 1))]
            if layer + 1 < LAYERS:  # all states, without the axis of directions
                text = node("Squeeze", node("LSTM", *given, hidden_size=HIDDEN), squeezed)
            else:  # the last state alone
                text = node("LSTM", *given, outputs=2, hidden_size=HIDDEN)
                text = node("Squeeze", text, constant(torch.tensor([0])))
        dense(node("Concat", image, text, axis=1), module.head.dense.layers)
        seen, read = self.inputs()
        kind = TensorProto.FLOAT if read.is_floating_point() else TensorProto.INT64
        graph = helper.make_graph(
            nodes, self.name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, seen.shape),
             helper.make_tensor_value_info("z", kind, read.shape)],
            [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, [len(seen), CLASSES])],
            constants,
        )  # fmt: skip
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        onnx.checker.check_model(made)
        return bytes(made.SerializeToString())


# Of the issue that asked for the models.
INFERENCE_MEAN, INFERENCE_ROW, OVER_TORCH, TRAINING_MEAN, HALF_WEIGHTS = 1.5, 1.0, 3.0, 2.5, 1.6
TORCH = ("eager", "channels_last", "compile", "compile_channels_last", "compile_frozen")


def bars(report: dict[str, Any]) -> list[Bar]:
    """The promises for the rows in the report; those that the run left out count as not measured."""
    rows = {row["case"]: row for row in report["rows"]}
    result: list[Bar] = []

    def at_least(name: str, limit: float, measured: float | None) -> None:
        result.append(Bar(name, limit, measured, at_least=True))

    def mean(mode: str, theirs: tuple[str, ...] = ()) -> float | None:
        ratios = [speedup(rows.get(name, {}), mode, theirs=theirs) for name in names(False, False)]
        known = [value for value in ratios if value is not None]
        return math.prod(known) ** (1 / len(known)) if len(known) == len(ratios) else None

    at_least("inference, geometric mean over the best peer of each row", INFERENCE_MEAN, mean("inference"))
    at_least("inference, geometric mean over the best of torch's ways", OVER_TORCH, mean("inference", TORCH))
    at_least("training, geometric mean over the best peer of each row", TRAINING_MEAN, mean("training"))
    for name, row in rows.items():
        at_least(f"inference, {name} over its best peer", INFERENCE_ROW, speedup(row, "inference"))
        if row["batch"] == 1:
            value = speedup(row, "inference", "interfuse_half_weights")
            at_least(f"inference, {name} with bfloat16 weights over its best peer", HALF_WEIGHTS, value)
    return result
