"""The losses against their peers: cross-entropy of a linear layer, whose row carries the bars, and those of
two tensors.

`interfuse bench losses` prints the peer table; `pytest bench/losses.py --benchmark-enable` runs each case
under pytest-benchmark, interfuse and eager side by side.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from interfuse.bench.pytest_rows import pytest_generate_tests, test_inference, test_training  # noqa: F401
from interfuse.bench.report import Bar, over_eager
from interfuse.bench.roofline import Cost
from interfuse.bench.rows import names_of, workload_of
from interfuse.bench.workers import between
from interfuse.cases import losses as cases
from torch import Tensor, nn

from interfuse import ops
from interfuse.nn.losses import LinearCrossEntropyLoss

if TYPE_CHECKING:
    from collections.abc import Callable

    from interfuse.cases.losses import Case, PairCase

# Of bench/peers.py, those that can run this op.
PROVIDERS = ("interfuse", "eager", "torch_fused", "compile")
BENCHMARKED = ["interfuse", "torch_fused", "eager"]  # by pytest-benchmark


def names(further: bool, quick: bool) -> list[str]:
    wanted = ("bar", "beside", "further") if further else ("bar", "beside")
    return names_of((*cases.CASES, *cases.PAIRS), quick, wanted)


def gpu_names() -> list[str]:
    """Beside these rows, one that is large enough for a GPU."""
    return ["info-nce-4096x256"]


def workload(name: str) -> LossWorkload | PairWorkload:
    """By name; 'NAME@tiny' is the same case with eight rows and at most a hundred classes or features."""

    def make(case: Case | PairCase) -> LossWorkload | PairWorkload:
        return PairWorkload(case) if isinstance(case, cases.PairCase) else LossWorkload(case)

    return workload_of(name, (*cases.CASES, *cases.PAIRS), "in the list of losses' cases", make)


class Head(nn.Module):
    """What people write: a linear layer, and the cross-entropy of its logits."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.linear = nn.Linear(case.features, case.classes, case.bias)
        self.loss = nn.CrossEntropyLoss(reduction=case.reduction, label_smoothing=case.label_smoothing)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.linear(x), target)


class Fused(Head):
    """torch's own fused form, in chunks."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(
            x, self.linear.weight, target, linear_bias=self.linear.bias, reduction=self.loss.reduction,
            label_smoothing=self.loss.label_smoothing, options=nn.LinearCrossEntropyOptions(),
        )  # fmt: skip


class LossWorkload:
    """One case as plain torch, as torch's fused form, and as interfuse's module."""

    channels_last = None
    mask = None

    def __init__(self, case: Case) -> None:
        self.case = case
        self.name = case.name
        self.dtype = case.dtype
        self.gradients = ("input", "weight", *(("bias",) if case.bias else ()))

    def why_not(self, provider: str) -> str | None:
        if provider == "torch_fused" and not hasattr(F, "linear_cross_entropy"):
            return f"torch {torch.__version__} has no linear_cross_entropy; 2.13 has."
        if provider == "torch_fused" and self.case.label_smoothing > 0:
            return "torch's linear_cross_entropy in chunks takes no label smoothing."
        return None

    def describe(self) -> dict[str, Any]:
        return {
            "kernel": "native",
            "kernel_why": "linear_cross_entropy has one kernel.",
            "bar": self.case.bench == "bar",
            "input": [self.case.rows, self.case.features],
            "weight": [self.case.classes, self.case.features],
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def tiny(self) -> LossWorkload:
        return LossWorkload(dataclasses.replace(self.case, rows=8, classes=100, ignored=0))

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return Head(self.case).to(self.dtype)

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(self.case.rows, self.case.features, generator=generator).to(self.dtype)
        target = torch.randint(0, self.case.classes, (self.case.rows,), generator=generator)
        target[: self.case.ignored] = -100
        return [x, target]

    def ours(self, module: Any) -> nn.Module:
        return LinearCrossEntropyLoss.from_torch(module.linear, module.loss)

    def torch_fused(self, module: Any) -> nn.Module:
        fused = Fused(self.case)
        fused.linear = module.linear
        return fused

    def cost(self, training: bool) -> Cost:
        """Forward: the product, and every tensor once. Training: three products of that size, and the
        gradients' bytes beside a second reading of input and weight. Logits need not be in memory."""
        rows, features, classes = self.case.rows, self.case.features, self.case.classes
        elements = rows * features + classes * (features + self.case.bias)
        passes = 3 if training else 1
        return Cost(passes * 2 * rows * features * classes, passes * elements * self.dtype.itemsize)

    def onnx(self, module: nn.Module) -> bytes:
        raise NotImplementedError("A loss is for training, which the ONNX peers do not do.")

    def overhead(self, seconds: float, threads: int) -> dict[str, float]:
        """One call of the op against the same call of the binding, with everything prepared."""
        from interfuse import _native
        from interfuse.ops.losses import linear_cross_entropy

        case, head = self.case, self.module()
        linear: Any = head.linear
        x, target = self.inputs()
        desc = _native.CrossEntropyDesc(
            "float32", case.rows, case.classes, case.features, case.features, "mean", -100, 0.0
        )
        loss = torch.empty(1)
        tensors = [x.data_ptr(), linear.weight.data_ptr(), linear.bias.data_ptr(), 0, target.data_ptr()]

        def op() -> Tensor:
            return linear_cross_entropy(x, linear.weight, target, linear_bias=linear.bias)

        def binding() -> None:
            _native.cross_entropy_forward(desc, tensors, loss.data_ptr(), 0, [0, 0, 0], threads)

        with torch.no_grad():
            return between(op, binding, seconds)


def contrastive(a: Tensor, b: Tensor, target: Tensor) -> Tensor:
    distance = F.pairwise_distance(a, b)
    return (target * distance.square() + (1 - target) * (1 - distance).clamp(min=0).square()).mean() / 2


def similarities(a: Tensor, b: Tensor, target: Tensor) -> Tensor:
    logits = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / 0.07
    partner = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, partner) + F.cross_entropy(logits.T, partner)) / 2


# As people write them, and ours. The target is what rows belong to, or not there.
TORCHS = {
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "mse": F.mse_loss,
    "contrastive": contrastive,
    "info_nce": similarities,
}
OURS = {
    "bce_with_logits": ops.binary_cross_entropy_with_logits,
    "mse": lambda x, target: ops.reconstruction_loss([x], [target]),
    "contrastive": ops.contrastive_loss,
    "info_nce": lambda a, b, target: ops.info_nce(a, b),
}


class PairHead(nn.Module):
    """A loss of two tensors. The target is a buffer: gradients are asked for of all inputs."""

    target: Tensor

    def __init__(self, function: Callable[..., Tensor], target: Tensor) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("target", target)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, self.target)


class PairWorkload:
    """One case as torch's functions and as ours."""

    channels_last = None
    mask = None

    def __init__(self, case: PairCase) -> None:
        self.case = case
        self.name = case.name
        self.dtype = case.dtype
        self.of_rows = case.loss in ("contrastive", "info_nce")
        self.gradients = ("first", "second") if self.of_rows else ("input",)

    def why_not(self, provider: str) -> str | None:
        return "torch has no fused form of this loss." if provider == "torch_fused" else None

    def describe(self) -> dict[str, Any]:
        shape = [self.case.rows, self.case.features]
        return {"kernel": self.case.loss, "bar": False, "input": shape, "dtype": str(self.dtype)[6:]}

    def tiny(self) -> PairWorkload:
        return PairWorkload(dataclasses.replace(self.case, rows=8, features=min(self.case.features, 100)))

    def _drawn(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.case.rows, self.case.features, generator=generator)

    def module(self) -> nn.Module:
        target = (self._drawn(1) > 0).float()
        target = target[:, 0].contiguous() if self.of_rows else target
        return PairHead(TORCHS[self.case.loss], target.to(self.dtype))

    def inputs(self) -> list[Tensor]:
        # Distances near the margin, so that either kind of pair costs something.
        scale = self.case.features**-0.5 if self.of_rows else 1.0
        count = 2 if self.of_rows else 1
        return [(self._drawn(seed) * scale).to(self.dtype) for seed in range(2, 2 + count)]

    def ours(self, module: Any) -> nn.Module:
        return PairHead(OURS[self.case.loss], module.target)

    def cost(self, training: bool) -> Cost:
        """Forward: both tensors once. Training: their gradients' bytes beside a second reading."""
        elements = self.case.rows * self.case.features
        written = 2 if self.of_rows else 1
        moved = (4 + written if training else 2) * elements * self.dtype.itemsize
        if self.case.loss == "info_nce":
            return Cost((3 if training else 1) * 2 * self.case.rows * elements, moved)
        return Cost((6 if training else 3) * elements, moved)

    def onnx(self, module: nn.Module) -> bytes:
        raise NotImplementedError("A loss is for training, which the ONNX peers do not do.")

    def overhead(self, seconds: float, threads: int) -> dict[str, float]:
        raise NotImplementedError(f"The overhead of a call is measured on {OVERHEAD_CASE}.")


OVERHEAD_CASE = "vocabulary-20k@tiny"

# Of the issue that founded the op; the row is named as in the list of cases.
MEMORY_SHARE, TRAINING_ROW, TIMES_TORCHS_ERROR = 0.25, 1.0, 2.0


def bars(report: dict[str, Any]) -> list[Bar]:
    """The promises for the rows in the report; those that the run left out count as not measured."""
    result = []
    for row in report["rows"]:
        if not row["bar"]:
            continue
        name, share = row["case"], over_eager(row.get("memory", {}), "first")
        result.append(Bar(f"peak memory over eager's, {name}", MEMORY_SHARE, share, at_least=False))
        ratio = row.get("training", {}).get("ratio")
        result.append(Bar(f"training, {name} over its best peer", TRAINING_ROW, ratio, at_least=True))
        for what in ("output", *(f"grad_{name}" for name in ("input", "weight", "bias"))):
            share = over_eager(row["errors"], what)
            result.append(
                Bar(f"error of {what} over eager's, {name}", TIMES_TORCHS_ERROR, share, at_least=False)
            )
    return result
