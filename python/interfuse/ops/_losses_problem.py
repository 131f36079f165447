"""What one call of linear_cross_entropy asks for: its parameters, its sizes, and what implementations return.

An implementation is a module with

    why_not(problem) -> str | None
    run(problem, tensors, mask) -> Results
    run_backward(problem, grad_loss, tensors, lse, mask) -> gradients of input, linear_weight and linear_bias

Everything is checked before: shapes, dtypes, devices. Strides are any. Gradients not wanted are (0,).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from interfuse import memory

if TYPE_CHECKING:
    from collections.abc import Sequence

REDUCTIONS = ("none", "mean", "sum")


class Tensors(NamedTuple):
    """What the registered op takes, in its order."""

    input: Tensor  # (rows, features)
    linear_weight: Tensor  # (classes, features)
    target: Tensor  # (rows,) int64
    linear_bias: Tensor | None  # (classes,)
    weight: Tensor | None  # (classes,): a constant, in the loss's dtype


class Results(NamedTuple):
    """What the registered op returns; (0,) where nothing is saved."""

    loss: Tensor
    lse: Tensor  # (rows,): logarithms of the sums of exponentials
    grad_input: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class CrossEntropyParams:
    """The registered op's parameters, in its order. All else follows from the tensors."""

    reduction: str = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    backend: str = ""

    @property
    def is_number(self) -> bool:
        """The loss is one number, so that its gradients may be computed along with it."""
        return self.reduction != "none"

    def as_args(self) -> tuple[object, ...]:
        return self.reduction, self.ignore_index, self.label_smoothing, self.backend


PARAM_COUNT = 4


@dataclass(frozen=True)
class CrossEntropyProblem:
    """A checked call: what an implementation's `why_not` looks at."""

    params: CrossEntropyParams
    rows: int
    classes: int
    features: int
    dtype: torch.dtype
    device: torch.device
    has_bias: bool

    @property
    def loss_dtype(self) -> torch.dtype:
        return loss_dtype(self.dtype)

    @property
    def loss_shape(self) -> tuple[int, ...]:
        return () if self.params.is_number else (self.rows,)


@dataclass(frozen=True)
class PairProblem:
    """A checked call of a loss of two tensors: all that a `why_not` looks at."""

    dtype: torch.dtype
    device: torch.device


class Factor(NamedTuple):
    """What elements are multiplied by: a matrix beside theirs, read by two strides; None is 1."""

    values: Tensor | None
    strides: tuple[int, int]


class Elements(NamedTuple):
    """A loss element by element, as kernels read it: input and target are dense."""

    input: Tensor
    target: Tensor
    weight: Factor
    pos_weight: Factor
    kind: str
    reduction: str

    @property
    def columns(self) -> int:
        return self.input.shape[-1] if self.input.dim() else 1

    def empty_loss(self) -> Tensor:
        return empty_loss(self.input, self.reduction)


class Similarity(NamedTuple):
    """One modality beside the other, and the logarithms of the sums of exponentials that its gradient has."""

    input: Tensor
    other: Tensor
    lse: Tensor | None
    other_lse: Tensor | None


def empty_loss(x: Tensor, reduction: str) -> Tensor:
    shape = x.shape if reduction == "none" else ()
    return torch.empty(shape, dtype=loss_dtype(x.dtype), device=x.device)


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the loss of tensors of this dtype: sums over a vocabulary are not kept in half precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_gradients(problem: CrossEntropyProblem, mask: Sequence[bool]) -> Gradients:
    """Unwritten gradients of input, linear_weight and linear_bias; (0,) where not wanted."""
    p = problem
    shapes = ((p.rows, p.features), (p.classes, p.features), (p.classes,))
    first, second, third = (
        memory.empty(shape if wanted else (0,), dtype=p.dtype, device=p.device)
        for shape, wanted in zip(shapes, mask, strict=True)
    )
    return first, second, third


def empty_results(problem: CrossEntropyProblem, mask: Sequence[bool]) -> Results:
    """Unwritten results as the op returns them; without a mask nothing is saved."""
    p = problem
    loss = torch.empty(p.loss_shape, dtype=p.loss_dtype, device=p.device)
    lse = torch.empty((p.rows if mask else 0,), dtype=p.loss_dtype, device=p.device)
    return Results(loss, lse, *empty_gradients(problem, with_loss(problem.params, mask)))


def with_loss(params: CrossEntropyParams, mask: Sequence[bool]) -> tuple[bool, bool, bool]:
    """Which gradients the forward computes along with the loss."""
    if not mask or not params.is_number:
        return False, False, False
    first, second, third = mask
    return first, second, third
