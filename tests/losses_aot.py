"""The launches of the losses that are compiled ahead of time, and the record of what they take.

    python tests/losses_aot.py     # writes the record anew, after a kernel or a tile changed

The record stands in bench/results/triton_resources_losses.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from aot import ARCHITECTURES, RECORDS, compile_all, used, write_record
from interfuse.kernels import losses_launches as plan
from interfuse.kernels import losses_pairs_launches as pairs

from interfuse.ops._losses_problem import (
    CrossEntropyParams,
    CrossEntropyProblem,
    Elements,
    Factor,
    Similarity,
    Tensors,
    empty_loss,
)

if TYPE_CHECKING:
    from interfuse.kernels.launch import Launch

RECORD = RECORDS / "triton_resources_losses.json"
KERNELS = ("sums", "combine", "gradient")
MATRIX = ("sums", "gradient", "similarity_gradient")  # those that multiply matrices


@dataclass(frozen=True)
class Step:
    """A training step, all of whose kernels are compiled."""

    dtype: torch.dtype
    arithmetic: str = "ieee"
    rows: int = 2048
    bias: bool = True
    label_smoothing: float = 0.0
    weighted: bool = False

    def __str__(self) -> str:
        more = [f"{self.rows} rows"] if self.rows != 2048 else []
        more += [] if self.bias else ["no bias"]
        more += ["smooth"] if self.label_smoothing else []
        more += ["weighted"] if self.weighted else []
        return " ".join([str(self.dtype)[6:], self.arithmetic, *more])


STEPS = (
    Step(torch.bfloat16),
    Step(torch.bfloat16, bias=False, label_smoothing=0.1, weighted=True),
    Step(torch.bfloat16, rows=1),
    Step(torch.float16, label_smoothing=0.1),
    Step(torch.float32),
    Step(torch.float32, "tf32", label_smoothing=0.1, weighted=True),
)


@dataclass(frozen=True)
class Pairs:
    """A training step of a loss of two tensors."""

    loss: str
    dtype: torch.dtype
    arithmetic: str = "ieee"
    shape: tuple[int, int] = (4096, 512)
    reduction: str = "mean"
    weighted: bool = False
    symmetric: bool = True

    def __str__(self) -> str:
        more = [f"{self.shape[0]} x {self.shape[1]}"] if self.shape != (4096, 512) else []
        more += [] if self.reduction == "mean" else [self.reduction]
        more += ["weighted"] if self.weighted else []
        more += [] if self.symmetric else ["one direction"]
        return " ".join([self.loss, str(self.dtype)[6:], self.arithmetic, *more])

    @property
    def kernels(self) -> tuple[str, ...]:
        return {
            "info_nce": ("similarity_gradient",),
            "contrastive": ("contrastive", "contrastive_gradient"),
        }.get(self.loss, ("elementwise", "elementwise_gradient", *self.second_stage))

    @property
    def second_stage(self) -> tuple[str, ...]:
        return () if self.reduction == "none" else ("total",)


PAIRS = (
    Pairs("bce_with_logits", torch.float32, weighted=True),
    Pairs("bce_with_logits", torch.bfloat16, reduction="none"),
    Pairs("bce_with_logits", torch.float32, shape=(1 << 17, 1 << 15)),
    Pairs("mse", torch.float16),
    Pairs("contrastive", torch.float32),
    Pairs("contrastive", torch.bfloat16, shape=(64, 16)),
    Pairs("info_nce", torch.bfloat16),
    Pairs("info_nce", torch.bfloat16, shape=(4096, 64), symmetric=False),
    Pairs("info_nce", torch.float16, shape=(16, 512)),
    Pairs("info_nce", torch.float32),
    Pairs("info_nce", torch.float32, "tf32"),
)

ROWS = {
    f"{kernel} | {step} | sm_{architecture}": (step, kernel, architecture)
    for step, kernels in (*((s, KERNELS) for s in STEPS), *((p, p.kernels) for p in PAIRS))
    for kernel in kernels
    for architecture in ARCHITECTURES
}


def pair_launches(step: Pairs) -> list[Launch]:
    """In the order of the step's kernels."""
    device = torch.device("meta")
    x, y, grad, other = (torch.empty(step.shape, dtype=step.dtype, device=device) for _ in range(4))
    rows = [torch.empty(step.shape[0], device=device) for _ in range(4)]
    if step.loss == "info_nce":
        params = CrossEntropyParams(reduction="none")
        problem = CrossEntropyProblem(params, len(x), *step.shape, step.dtype, device, has_bias=False)
        side = Similarity(x, y, rows[0], rows[1] if step.symmetric else None)
        return [pairs.similarity_gradient_launch(problem, side, rows[2], rows[3], grad)]
    if step.loss == "contrastive":
        return [
            pairs.contrastive_launch(x, y, rows[0], 1.0, rows[1], rows[2]),
            pairs.contrastive_gradient_launch(x, y, rows[0], rows[1], grad, other),
        ]
    factor = Factor(None, (0, 0))
    if step.weighted:
        factor = Factor(torch.empty(step.shape[1], device=device), (0, 1))
    e = Elements(x, y, factor, factor, step.loss, step.reduction)
    loss = empty_loss(x, step.reduction)
    first, sums = pairs.elementwise_launch(e, loss if step.reduction == "none" else None)
    return [
        first,
        pairs.elementwise_gradient_launch(e, 0.5, loss, grad),
        pairs.total_launch(sums, 0.5, empty_loss(x, "sum")),
    ]


def step_launches(step: Step) -> list[Launch]:
    device, classes, features = torch.device("meta"), 20_000, 256
    params = CrossEntropyParams(label_smoothing=step.label_smoothing)
    problem = CrossEntropyProblem(params, step.rows, classes, features, step.dtype, device, step.bias)

    def empty(*shape: int, dtype: torch.dtype = step.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def floats(*shape: int) -> torch.Tensor:
        return empty(*shape, dtype=torch.float32)

    t = Tensors(
        empty(step.rows, features),
        empty(classes, features),
        empty(step.rows, dtype=torch.int64),
        empty(classes) if step.bias else None,
        floats(classes) if step.weighted else None,
    )
    parts, rows = plan.empty_parts(problem, device), [floats(step.rows) for _ in range(4)]
    labels = plan.Labels(floats(step.rows), floats(step.rows))
    return [
        plan.sums_launch(problem, t, parts),
        plan.combine_launch(problem, parts, labels, floats(), floats(step.rows), floats(step.rows)),
        plan.gradient_launch(problem, t, *rows, empty(step.rows, classes)),
    ]


def launches(step: Step | Pairs) -> list[Launch]:
    """What a training step would launch on a GPU, from tensors without memory."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = step.arithmetic == "tf32"
    try:
        return pair_launches(step) if isinstance(step, Pairs) else step_launches(step)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def compile_row(row: str) -> dict[str, int]:
    step, kernel, architecture = ROWS[row]
    names = step.kernels if isinstance(step, Pairs) else KERNELS
    return used(launches(step)[names.index(kernel)], architecture)


if __name__ == "__main__":
    write_record(RECORD, compile_all(ROWS, compile_row))
