"""rnn against its peers: recurrent stacks as documented models have them, dense and ragged.

Every provider gets time-major input, so that none has to transpose it first. `interfuse bench rnn` prints the
peer table; `pytest bench/rnn.py --benchmark-enable` runs each case under pytest-benchmark.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from interfuse.bench.pytest_rows import pytest_generate_tests, test_inference, test_training  # noqa: F401
from interfuse.bench.report import Bar, mean_speedup, of_both, speedup
from interfuse.bench.roofline import Cost
from interfuse.bench.rows import names_of, workload_of
from interfuse.bench.workers import between
from interfuse.cases import rnn as cases
from torch import Tensor, nn

import interfuse

if TYPE_CHECKING:
    import numpy as np
    from interfuse.cases.rnn import Case

# Of bench/peers.py, those that can run this op.
PROVIDERS = (
    "interfuse", "interfuse_half_weights", "interfuse_padded", "eager", "compile", "compile_frozen",
    "onnxruntime", "openvino",
)  # fmt: skip
BENCHMARKED = ["interfuse", "eager"]  # by pytest-benchmark
OURS = {
    "rnn_tanh": (interfuse.nn.RNN, interfuse.nn.EmbeddingRNN),
    "rnn_relu": (interfuse.nn.RNN, interfuse.nn.EmbeddingRNN),
    "lstm": (interfuse.nn.LSTM, interfuse.nn.EmbeddingLSTM),
    "gru": (interfuse.nn.GRU, interfuse.nn.EmbeddingGRU),
}
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
# ONNX keeps its gates in another order than torch.
ONNX_GATES = {"rnn_tanh": (0,), "rnn_relu": (0,), "lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}


def names(further: bool, quick: bool) -> list[str]:
    return names_of(cases.CASES, quick, ("bar", "further") if further else ("bar",))


def gpu_names() -> list[str]:
    return [case.name for case in cases.GPU]


def workload(name: str) -> RnnWorkload:
    """By name; 'NAME@tiny' is the same case on few short sequences."""
    return workload_of(name, (*cases.CASES, *cases.GPU), "in the list of rnn's cases", RnnWorkload)


class Sequences(nn.Module):
    """y of an optional embedding and a recurrent stack, as plain torch has it: ragged batches are packed."""

    def __init__(self, embedding: nn.Embedding | None, rnn: nn.RNNBase, lengths: Tensor | None) -> None:
        super().__init__()
        self.embedding, self.rnn, self.lengths = embedding, rnn, lengths

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embedding is None else self.embedding(x)
        if self.lengths is None:
            return self.rnn(x)[0]
        packed = nn.utils.rnn.pack_padded_sequence(x, self.lengths, enforce_sorted=False)
        y, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], total_length=x.shape[0])
        return y


class Ours(nn.Module):
    """The same on interfuse's module, which takes ids and lengths as they are."""

    def __init__(self, rnn: nn.Module, lengths: Tensor | None) -> None:
        super().__init__()
        self.rnn, self.lengths = rnn, lengths

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0] if self.lengths is None else self.rnn(x, lengths=self.lengths)[0]


class OnBackend(nn.Module):
    """The op on a named back end, whatever it would choose by itself."""

    def __init__(self, rnn: nn.RNNBase, cell: str, lengths: Tensor | None, backend: str) -> None:
        super().__init__()
        self.rnn, self.cell, self.lengths, self.backend = rnn, cell, lengths, backend

    def forward(self, x: Tensor) -> Tensor:
        y, _ = interfuse.ops.rnn(
            x, list(self.rnn.parameters()), cell=self.cell, bidirectional=self.rnn.bidirectional,
            lengths=self.lengths, backend=self.backend,
        )  # fmt: skip
        return y


class RnnWorkload:
    """One case as plain torch, as interfuse's module, and as an ONNX graph."""

    channels_last = None
    dtype = torch.float32

    def __init__(self, case: Case) -> None:
        self.case = dataclasses.replace(case, batch_first=False)
        self.name = case.name
        self.lengths = case.lengths()
        # Back ends that a GPU has beside the one that is chosen by itself.
        self.gpu_backends = () if case.vocabulary else ("cuda",)
        self.mask = None
        if self.lengths is not None:
            self.mask = (torch.arange(case.steps)[:, None] < self.lengths).unsqueeze(-1).float()
        names = (name for name, _ in self.case.module().named_parameters())
        self.gradients = ["table" if case.vocabulary else "input", *names]

    def why_not(self, provider: str) -> str | None:
        if provider == "interfuse_padded" and self.lengths is None:
            return "all sequences of this case have the same length."
        if provider in ("onnxruntime", "openvino") and self.case.projection:
            return "ONNX has no LSTM with projections."
        return None

    def describe(self) -> dict[str, Any]:
        return {"kernel": "native", **dataclasses.asdict(self.case), "bar": self.case.bench == "bar"}

    def tiny(self) -> RnnWorkload:
        case = self.case
        return RnnWorkload(dataclasses.replace(case, batch=min(case.batch, 3), steps=min(case.steps, 10)))

    def module(self) -> nn.Module:
        rnn = self.case.module()
        embedding = nn.Embedding(self.case.vocabulary, self.case.inputs) if self.case.vocabulary else None
        return Sequences(embedding, rnn, self.lengths)

    def inputs(self) -> list[Tensor]:
        return [self.case.input()]

    def ours(self, module: nn.Module) -> nn.Module:
        """The parameters of a `Sequences`, shared."""
        plain, embedded = OURS[self.case.cell]
        if module.embedding is None:
            return Ours(plain.from_torch(module.rnn), self.lengths)
        return Ours(embedded.from_torch(module.embedding, module.rnn), self.lengths)

    def ours_on(self, module: nn.Module, backend: str) -> nn.Module:
        return OnBackend(module.rnn, self.case.cell, self.lengths, backend)

    def ours_half_weights(self, module: nn.Module) -> nn.Module:
        return interfuse.optimize(module, dtype=torch.bfloat16)

    def ours_padded(self, module: nn.Module) -> nn.Module:
        made: Any = self.ours(module)
        made.lengths = None
        return made

    def tokens(self) -> int:
        case = self.case
        return case.batch * case.steps if self.lengths is None else int(self.lengths.sum())

    def cost(self, training: bool) -> Cost:
        """Both products of every layer for every token that exists; every weight once a step for each tile of
        the batch is a matter of caches, so the bytes are the tensors' alone. Training: three times that."""
        case, gates = self.case, GATES[self.case.cell]
        operations = weights = 0
        for layer in range(case.layers):
            depth = (case.inputs if layer == 0 else case.directions * case.outputs) + case.outputs
            each = gates * case.hidden * depth + case.hidden * case.projection
            weights += case.directions * (each + 2 * gates * case.hidden)
            operations += case.directions * 2 * self.tokens() * each
        elements = weights + self.tokens() * (case.inputs + case.directions * case.outputs)
        times = 3 if training else 1
        return Cost(times * operations, times * 4 * elements)

    def onnx(self, module: nn.Module) -> bytes:
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        case = self.case
        constants, nodes, at = [], [], "x"

        def constant(name: str, value: np.ndarray) -> str:
            constants.append(numpy_helper.from_array(value, name))
            return name

        if module.embedding is not None:
            table = constant("table", module.embedding.weight.detach().numpy())
            nodes.append(helper.make_node("Gather", [table, "x"], ["embedded"]))
            at = "embedded"
        lengths = "" if self.lengths is None else constant("lengths", self.lengths.int().numpy())
        settings: dict[str, Any] = {"hidden_size": case.hidden}
        if case.cell == "gru":
            settings["linear_before_reset"] = 1
        if case.bidirectional:
            settings["direction"] = "bidirectional"
        shape = constant("shape", torch.tensor([0, 0, -1]).numpy())
        for layer in range(case.layers):
            stacked = [self.onnx_weights(module.rnn, f"_l{layer}")]
            stacked += [self.onnx_weights(module.rnn, f"_l{layer}_reverse")] if case.bidirectional else []
            given = [constant(f"{name}{layer}", torch.stack(parts).numpy())
                     for name, parts in zip("wrb", zip(*stacked, strict=True), strict=True)]  # fmt: skip
            made = helper.make_node(
                case.cell.split("_")[0].upper(), [at, *given, lengths], [f"directions{layer}"], **settings
            )
            # (steps, directions, batch, hidden) to (steps, batch, directions * hidden)
            ways, turned, at = f"directions{layer}", f"turned{layer}", f"y{layer}"
            nodes += [made, helper.make_node("Transpose", [ways], [turned], perm=[0, 2, 1, 3])]
            nodes += [helper.make_node("Reshape", [turned, shape], [at])]
        out = [case.steps, case.batch, case.directions * case.hidden]
        x, kind = self.inputs()[0], TensorProto.INT64 if case.vocabulary else TensorProto.FLOAT
        graph = helper.make_graph(
            nodes, self.name, [helper.make_tensor_value_info("x", kind, x.shape)],
            [helper.make_tensor_value_info(at, TensorProto.FLOAT, out)],
            constants,
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString())

    def onnx_weights(self, rnn: nn.RNNBase, suffix: str) -> tuple[Tensor, Tensor, Tensor]:
        """One direction's input weight, recurrent weight and biases, with the gates in ONNX's order."""
        gates, order = GATES[self.case.cell], ONNX_GATES[self.case.cell]
        w, r, *biases = (
            torch.cat([parameter.detach().chunk(gates)[i] for i in order])
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            if (parameter := getattr(rnn, name + suffix, None)) is not None
        )
        return w, r, torch.cat(biases)

    def overhead(self, seconds: float, threads: int) -> dict[str, float]:
        """One call of the module against the same call of the binding, with everything prepared, in turn."""
        from interfuse import _native

        case, rnn = self.case, self.ours(self.module()).rnn
        x = self.inputs()[0]
        desc = _native.RnnDesc(
            case.cell, case.directions, case.bias, False, "float32", False, case.batch, case.steps,
            case.inputs, case.hidden, case.projection, case.layers, (x.stride(0), x.stride(1)), 0,
        )  # fmt: skip
        with torch.no_grad():
            y, state = rnn(x)
        states = [t.data_ptr() for t in (state if isinstance(state, tuple) else (state, state))]
        weights = [t.data_ptr() for t in rnn.parameters()]
        weights = [at for i in range(0, len(weights), 4) for at in (*weights[i : i + 4], 0)]

        def binding() -> None:
            _native.rnn_forward(
                desc, x.data_ptr(), 0, 0, 0, 0, weights, y.data_ptr(), *states, 0, threads
            )

        with torch.no_grad():
            return between(lambda: rnn(x), binding, seconds)


OVERHEAD_CASE = "audio-b1@tiny"

# Of the issue that founded the op.
INFERENCE_MEAN, INFERENCE_ROW, INFERENCE_BATCH_1, HALF_WEIGHTS = 1.3, 1.0, 1.4, 2.0
TRAINING_ROW, TRAINING_STEP_BY_STEP = 1.5, 2.0  # torch runs GRU and RNN step by step
RAGGED = {"inference": 2.0, "training": 3.0}  # over torch's packed path


def bars(report: dict[str, Any]) -> list[Bar]:
    """The promises for the rows in the report; those that the run left out count as not measured."""
    rows = {row["case"]: row for row in report["rows"] if row["bar"]}
    mean = mean_speedup(report, "inference", names(False, False))
    result: list[Bar] = []

    def at_least(name: str, limit: float, measured: float | None) -> None:
        result.append(Bar(name, limit, measured, at_least=True))

    at_least("inference, geometric mean over the best peer of each row", INFERENCE_MEAN, mean)
    for name, row in rows.items():
        least = INFERENCE_BATCH_1 if row["batch"] == 1 else INFERENCE_ROW
        at_least(f"inference, {name} over its best peer", least, speedup(row, "inference"))
        if row["batch"] == 1:
            value = speedup(row, "inference", "interfuse_half_weights")
            at_least(f"inference, {name} with bfloat16 weights over its best peer", HALF_WEIGHTS, value)
        least = TRAINING_ROW if row["cell"] == "lstm" else TRAINING_STEP_BY_STEP
        at_least(f"training, {name} over its best peer", least, speedup(row, "training"))
        for mode, wanted in RAGGED.items() if row["ragged"] else ():
            at_least(f"{mode}, {name} over torch's packed path", wanted, speedup(row, mode, theirs=["eager"]))
            padded = speedup(row, mode, theirs=["interfuse_padded"])
            at_least(f"{mode}, {name} over its own padded run", 1.0, padded)
    for name, row in rows.items():
        ours, theirs = of_both(row["errors"], "output")
        limit = None if theirs is None else max(2 * theirs, FORMULA * row["steps"] ** 0.5)
        result.append(Bar(f"error, {name}", limit or FORMULA, ours, at_least=False))
    return result


# Rounding of a state that is made anew at every step, in float32; it grows with the root of their number.
FORMULA = 1e-7
