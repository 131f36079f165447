"""The Triton kernels as an implementation of linear; triton is imported only when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from interfuse.ops import _triton
from interfuse.ops._linear_native import leaky_why_not

if TYPE_CHECKING:
    from torch import Tensor

    from interfuse.ops._linear_problem import LinearProblem, Two


def _kernels() -> Any:
    from interfuse.kernels import linear

    return linear


def why_not(problem: LinearProblem) -> str | None:
    return _triton.why_not(problem.device) or leaky_why_not(problem) or _kernels().why_not(problem)


def run(problem: LinearProblem, *tensors: Any) -> Two:
    return _kernels().run(problem, *tensors)


def run_backward(problem: LinearProblem, *arguments: Any) -> list[Tensor]:
    return _kernels().run_backward(problem, *arguments)
