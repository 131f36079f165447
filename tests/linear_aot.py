"""The launches of linear that are compiled ahead of time, and the record of what they take.

    python tests/linear_aot.py     # writes the record anew, after a kernel or a tile changed

The record stands in bench/results/triton_resources_linear.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from aot import RECORDS, compile_all, rows_of, used, write_record
from interfuse.cases.linear import CASES
from interfuse.kernels import linear_launches as plan

from interfuse.ops._linear_checks import check
from interfuse.ops._linear_problem import LinearParams, empty_gradients, empty_outputs

if TYPE_CHECKING:
    from interfuse.kernels.launch import Launch

RECORD = RECORDS / "triton_resources_linear.json"


@dataclass(frozen=True)
class Step:
    """A training step of a named case, of which some kernels are compiled."""

    case: str
    dtype: torch.dtype
    arithmetic: str
    activation: str
    kernels: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.case} {str(self.dtype)[6:]} {self.arithmetic} {self.activation}"


MATRIX = ("forward", "product")  # those that multiply matrices
STEPS = (
    Step("head-b256", torch.bfloat16, "ieee", "gelu", (*MATRIX, "gradient", "column_sums")),
    Step("head-b256", torch.float32, "tf32", "relu", MATRIX),
    Step("head-b32", torch.float32, "ieee", "relu", MATRIX),
    Step("three-b16", torch.float16, "ieee", "softmax", ("forward", "softmax", "softmax_gradient")),
)
ROWS = rows_of(STEPS)


def launches(step: Step) -> list[Launch]:
    """What a training step would launch on a GPU, from tensors without memory."""
    case = next(case for case in CASES if case.name == step.case)
    params = LinearParams(step.activation)
    inputs = [torch.empty(*case.lead, width, dtype=step.dtype, device="meta") for width in case.widths]
    weight = torch.empty(case.outputs[0], sum(case.widths), dtype=step.dtype, device="meta")
    bias = weight.new_empty(case.outputs[0])
    problem = check(inputs, weight, bias, None, params, True)
    y, pre = empty_outputs(problem)
    grads = empty_gradients(problem, [True] * (len(inputs) + 2))
    saved = pre if params.saves_pre else y
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = step.arithmetic == "tf32"
    try:
        every = plan.forward_launches(
            problem, inputs, weight, bias, None, y, pre if params.saves_pre else None
        )
        every += plan.backward_launches(problem, torch.empty_like(y), inputs, weight, saved, grads)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return every


def compile_row(row: str) -> dict[str, int]:
    step, kernel, architecture = ROWS[row]
    launch = next(launch for launch in launches(step) if launch.kernel.__name__ == kernel)
    return used(launch, architecture)


if __name__ == "__main__":
    write_record(RECORD, compile_all(ROWS, compile_row))
