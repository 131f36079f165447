"""The Triton kernels as an implementation of rnn; triton is imported only when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from interfuse.ops import _triton

if TYPE_CHECKING:
    from torch import Tensor

    from interfuse.ops._rnn_problem import Four, RnnProblem


def _kernels() -> Any:
    from interfuse.kernels import rnn

    return rnn


def why_not(problem: RnnProblem) -> str | None:
    reason = _triton.why_not(problem.device)
    return reason if reason is not None else _kernels().why_not(problem)


def reserve_row(problem: RnnProblem) -> int:
    return _kernels().reserve_row(problem)


def run(problem: RnnProblem, *inputs: Any) -> Four:
    return _kernels().run(problem, *inputs)


def run_backward(problem: RnnProblem, *arguments: Any) -> list[Tensor | None]:
    return _kernels().run_backward(problem, *arguments)
