"""The Triton kernels as an implementation of attention; triton is imported only when it is asked for."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from interfuse.ops import _triton

if TYPE_CHECKING:
    from interfuse.ops._attention_problem import AttentionProblem, Three


def _kernels() -> Any:
    from interfuse.kernels import attention

    return attention


def why_not(problem: AttentionProblem) -> str | None:
    reason = _triton.why_not(problem.device)
    if reason is not None:
        return reason
    if find_spec("interfuse.kernels.attention") is None:
        return "this build has no Triton kernels for attention."
    return _kernels().why_not(problem)


def run(problem: AttentionProblem, *inputs: Any) -> Three:
    return _kernels().run(problem, *inputs)


def run_backward(problem: AttentionProblem, *arguments: Any) -> Three:
    return _kernels().run_backward(problem, *arguments)
