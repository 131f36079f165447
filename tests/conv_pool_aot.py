"""The launches of conv_pool that are compiled ahead of time, and the record of what they take.

    python tests/conv_pool_aot.py     # writes the record anew, after a kernel or a tile changed

The record stands in bench/results/triton_resources.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from aot import RECORDS, compile_all, rows_of, used, write_record
from interfuse.cases.conv_pool import CASES
from interfuse.kernels import conv_pool_launches as plan

from interfuse.ops._conv_pool_checks import Options, check, resolve
from interfuse.ops._conv_pool_problem import empty_gradients, empty_outputs

if TYPE_CHECKING:
    from interfuse.kernels.launch import Launch

RECORD = RECORDS / "triton_resources.json"


@dataclass(frozen=True)
class Step:
    """A training step of a named case, of which some kernels are compiled."""

    case: str
    dtype: torch.dtype
    arithmetic: str
    channels_last: bool
    kernels: tuple[str, ...]

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{self.case} {str(self.dtype)[6:]} {self.arithmetic} {layout}"


MATRIX = ("forward", "input_gradient", "weight_gradient")  # those that multiply matrices
STEPS = (
    Step("second-111", torch.bfloat16, "ieee", True, (*MATRIX, "bias_gradient", "sum_splits")),
    Step("third-54", torch.float32, "tf32", True, MATRIX),
    Step("third-54", torch.float32, "ieee", False, MATRIX),
    Step("first-224", torch.bfloat16, "ieee", False, ("forward", "weight_gradient")),
    Step("conv3d-55", torch.float16, "ieee", True, MATRIX),
    Step("stem-224", torch.bfloat16, "ieee", True, ("forward", "spread_gradient", "weight_gradient")),
    Step("third-54-gelu", torch.float32, "ieee", True, ("forward", "spread_gradient")),
    Step("third-54-avg", torch.bfloat16, "ieee", True, ("forward", "spread_gradient")),
)
ROWS = rows_of(STEPS)


def launches(step: Step) -> list[Launch]:
    """What a training step would launch on a GPU, from tensors without memory."""
    case = next(case for case in CASES if case.name == step.case)
    defaults = Options(1, 0, 1, 1, "zeros", None, 0.01, None, 2, None, 0, False, True, None)
    precision = "default" if step.arithmetic == "tf32" else "highest"
    params = resolve(case.weight[2:], defaults._replace(**case.arguments), precision)
    form = torch.contiguous_format
    if step.channels_last:
        form = torch.channels_last if len(case.input) == 4 else torch.channels_last_3d
    x = torch.empty(case.input, dtype=step.dtype, device="meta", memory_format=form)
    weight = torch.empty(case.weight, dtype=step.dtype, device="meta")
    bias = weight.new_empty(case.weight[0])
    problem = check(x, weight, bias, params, True)
    y, index, pre = empty_outputs(problem)
    saved = y if params.backward_needs_y else None
    grads = empty_gradients(problem, x, weight, (True, True, True))
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        every = plan.forward_launches(problem, x, weight, bias, y, index, pre)
        every += plan.backward_launches(problem, torch.empty_like(y), x, weight, saved, index, pre, grads)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    return every


def compile_row(row: str) -> dict[str, int]:
    step, kernel, architecture = ROWS[row]
    launch = next(launch for launch in launches(step) if launch.kernel.__name__ == kernel)
    return used(launch, architecture)


if __name__ == "__main__":
    write_record(RECORD, compile_all(ROWS, compile_row))
