"""The launches of linear_cross_entropy that are compiled ahead of time, and the record of what they take.

    python tests/losses_aot.py     # writes the record anew, after a kernel or a tile changed

The record stands in bench/results/triton_resources_losses.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from aot import ARCHITECTURES, RECORDS, compile_all, used, write_record
from interfuse.kernels import losses_launches as plan

from interfuse.ops._losses_problem import CrossEntropyParams, CrossEntropyProblem, Tensors

if TYPE_CHECKING:
    from interfuse.kernels.launch import Launch

RECORD = RECORDS / "triton_resources_losses.json"
KERNELS = ("sums", "combine", "gradient")


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
ROWS = {
    f"{kernel} | {step} | sm_{architecture}": (step, kernel, architecture)
    for step in STEPS
    for kernel in KERNELS
    for architecture in ARCHITECTURES
}


def launches(step: Step) -> list[Launch]:
    """What a training step would launch on a GPU, from tensors without memory."""
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
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = step.arithmetic == "tf32"
    try:
        parts, rows = plan.empty_parts(problem, device), [floats(step.rows) for _ in range(4)]
        labels = plan.Labels(floats(step.rows), floats(step.rows))
        return [
            plan.sums_launch(problem, t, parts),
            plan.combine_launch(problem, parts, labels, floats(), floats(step.rows), floats(step.rows)),
            plan.gradient_launch(problem, t, *rows, empty(step.rows, classes)),
        ]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def compile_row(row: str) -> dict[str, int]:
    step, kernel, architecture = ROWS[row]
    return used(launches(step)[KERNELS.index(kernel)], architecture)


if __name__ == "__main__":
    write_record(RECORD, compile_all(ROWS, compile_row))
