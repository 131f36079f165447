"""What one call of linear asks for: its parameters, its sizes, and what its implementations return.

An implementation is a module with

    why_not(problem) -> str | None
    run(problem, inputs, weight, bias, scale) -> (y, pre)
    run_backward(problem, grad_y, inputs, weight, bias, scale, y, pre, mask)
        -> gradients of each input, of the weight and of the bias

Everything is checked before: shapes, dtypes, devices. Strides are any. Gradients not wanted are (0,).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interfuse import activations, memory

if TYPE_CHECKING:
    from collections.abc import Sequence

ACTIVATIONS = (*activations.ACTIVATIONS, "softmax")

Two = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LinearParams:
    """The registered op's parameters, in its order. All else follows from the tensors."""

    activation: str = "none"
    negative_slope: float = 0.01
    backend: str = ""

    @property
    def saves_pre(self) -> bool:
        """Training saves the value before the activation."""
        return self.activation in activations.NEEDS_PREACTIVATION

    @property
    def backward_needs_y(self) -> bool:
        """The activation's gradient is computed from the output itself."""
        return self.activation != "none" and not self.saves_pre

    def as_args(self) -> tuple[object, ...]:
        return self.activation, self.negative_slope, self.backend


PARAM_COUNT = 3


@dataclass(frozen=True, eq=False)
class LinearProblem:
    """A checked call: what an implementation's `why_not` looks at. Caches are keyed by its identity."""

    params: LinearParams
    lead: tuple[int, ...]  # the inputs' shape but for the last dimension
    widths: tuple[int, ...]
    out_features: int
    dtype: torch.dtype  # of everything but the weight and its scale
    weight_dtype: torch.dtype  # the same; or bfloat16 or int8 beside another one
    device: torch.device
    has_bias: bool
    save: bool

    @property
    def rows(self) -> int:
        return math.prod(self.lead)

    @property
    def depth(self) -> int:
        return sum(self.widths)


def empty_outputs(problem: LinearProblem) -> Two:
    """Unwritten (y, pre) as the op returns them; (0,) where nothing is saved."""
    shape = (*problem.lead, problem.out_features)
    y = memory.empty(shape, dtype=problem.dtype, device=problem.device, keep=problem.save)
    saved = shape if problem.save and problem.params.saves_pre else (0,)
    return y, memory.empty(saved, dtype=problem.dtype, device=problem.device)


def empty_gradients(problem: LinearProblem, mask: Sequence[bool]) -> list[Tensor]:
    """Unwritten gradients of the inputs, the weight and the bias; (0,) where not wanted."""
    p = problem
    shapes: list[tuple[int, ...]] = [(*p.lead, width) for width in p.widths]
    shapes += [(p.out_features, p.depth), (p.out_features,)]
    dtypes = [p.dtype] * len(p.widths) + [p.weight_dtype, p.dtype]
    return [
        memory.empty(shape if wanted else (0,), dtype=dtype, device=p.device)
        for shape, dtype, wanted in zip(shapes, dtypes, mask, strict=True)
    ]
