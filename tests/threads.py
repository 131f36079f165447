"""Results compared to the bit, and several Python threads that compute at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor


def same(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    """To the bit."""
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def check_threads_at_once(run: Callable[..., Iterable[Tensor]], jobs: Sequence[tuple[Any, ...]]) -> None:
    """run(*job) gives each of eight Python threads what it gives alone, whatever the others compute."""
    alone = [run(*job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: run(*job), jobs))
    for job, expected, found in zip(jobs, alone, together, strict=True):
        assert same(found, expected), job
