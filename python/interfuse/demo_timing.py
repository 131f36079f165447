"""How both halves of the demo take their figures."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

ROUNDS = 5


def training_step(model: nn.Module, *inputs: Tensor) -> Callable[[], object]:
    """Forward, and gradients of the parameters and of every input that can have one."""
    given = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    leaves = [x for x in given if x.requires_grad] + list(model.parameters())
    grad = torch.ones_like(model(*inputs))
    return lambda: torch.autograd.grad(model(*given), leaves, grad)


def in_turn(
    steps: Mapping[str, Callable[[], object]], seconds: float, tick: Callable[[], None]
) -> dict[str, float]:
    """Median time of a call of each, the providers taking turns so that a slow moment falls on both."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            step()
            end = time.perf_counter() + seconds / ROUNDS
            while True:
                begin = time.perf_counter()
                step()
                now = time.perf_counter()
                times[name].append(now - begin)
                if now > end:
                    break
        tick()
    return {name: statistics.median(values) for name, values in times.items()}


def largest_error(value: Tensor, truth: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((value.double() - truth).abs().max() / truth.abs().max())
