"""The compiled core as an implementation of conv_pool."""

from __future__ import annotations

from interfuse.ops.conv_pool_problem import ConvPoolProblem


def why_not(problem: ConvPoolProblem) -> str | None:
    return "the native core is not built yet."


def run(*args): raise NotImplementedError
def run_backward(*args): raise NotImplementedError
