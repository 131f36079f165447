"""The Triton kernels as an implementation of attention; triton is imported only when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from interfuse.ops import _triton

if TYPE_CHECKING:
    from torch import Tensor

    from interfuse.ops._attention_pool import PoolProblem
    from interfuse.ops._attention_problem import AttentionProblem, Three


def _kernels() -> Any:
    from interfuse.kernels import attention

    return attention


def why_not(problem: AttentionProblem) -> str | None:
    reason = _triton.why_not(problem.device)
    if reason is not None:
        return reason
    return _kernels().why_not(problem)


def run(problem: AttentionProblem, *inputs: Any) -> Three:
    return _kernels().run(problem, *inputs)


def run_backward(problem: AttentionProblem, *arguments: Any) -> Three:
    return _kernels().run_backward(problem, *arguments)


def _pool_kernels() -> Any:
    from interfuse.kernels import attention_pool

    return attention_pool


def pool_why_not(problem: PoolProblem) -> str | None:
    reason = _triton.why_not(problem.device)
    return reason if reason is not None else _pool_kernels().why_not(problem)


def pool_run(problem: PoolProblem, *inputs: Any) -> tuple[Tensor, Tensor]:
    return _pool_kernels().run(problem, *inputs)


def pool_run_backward(problem: PoolProblem, *arguments: Any) -> Three:
    return _pool_kernels().run_backward(problem, *arguments)
