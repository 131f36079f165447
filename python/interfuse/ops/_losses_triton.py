"""The Triton kernels as an implementation of linear_cross_entropy; triton is imported when asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from interfuse.ops import _triton

if TYPE_CHECKING:
    from interfuse.ops._losses_problem import CrossEntropyProblem, Gradients, Results


def _kernels() -> Any:
    from interfuse.kernels import losses

    return losses


def why_not(problem: CrossEntropyProblem) -> str | None:
    return _triton.why_not(problem.device) or _kernels().why_not(problem)


def run(problem: CrossEntropyProblem, *arguments: Any) -> Results:
    return _kernels().run(problem, *arguments)


def run_backward(problem: CrossEntropyProblem, *arguments: Any) -> Gradients:
    return _kernels().run_backward(problem, *arguments)
