"""Interfuse beside torch's own modules on many classes of problems: is any of them slower?

Both run in one process, in turns: they share torch's threads, so neither spins beside the other. That is less
strict than the benchmark, which gives every peer a process of its own, and quick enough for hundreds of rows.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import torch
from interfuse.bench import peers

from interfuse.terminal import table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from interfuse.bench.conv_pool import ConvPoolWorkload
    from interfuse.cases.conv_pool import Case

LEAST_RATIO = 0.95  # what noise leaves of a tie
CALL_SECONDS = 5e-6  # that a call may take beside its kernel, which on tiny problems is more than that share


@dataclasses.dataclass(frozen=True)
class Row:
    """One class in one form: seconds of torch's modules in the same layout, and of interfuse's."""

    case: str
    batch: int
    layout: str
    dtype: str
    pool: bool
    training: bool
    eager: float
    ours: float

    @property
    def ratio(self) -> float:
        return self.eager / self.ours

    @property
    def slower(self) -> bool:
        return self.ratio < LEAST_RATIO and self.ours - self.eager > CALL_SECONDS

    def cells(self) -> list[str]:
        form = f"{self.layout} {self.dtype}{' max-pooled' if self.pool else ''}"
        times = (f"{1e6 * self.eager:.0f}", f"{1e6 * self.ours:.0f}", f"{self.ratio:.2f}x")
        mode = "training" if self.training else "inference"
        return [self.case, str(self.batch), form, mode, *times, "SLOWER" if self.slower else ""]


def forms(case: Case, batches: Sequence[int], dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    for batch in batches:
        for dtype in dtypes:
            for pool in (None, "max"):
                arguments = {**case.arguments, "pool": pool}
                yield dataclasses.replace(
                    case, input=(batch, *case.input[1:]), dtype=dtype, arguments=arguments
                )


def rows(workload: ConvPoolWorkload, training: bool, seconds: float, threads: int) -> Iterator[Row]:
    """Of one form, in every layout that torch has for it."""
    for layout, theirs, mine in (
        ("contiguous", "eager", "interfuse"),
        ("channels_last", "channels_last", "interfuse_channels_last"),
    ):
        if peers.PROVIDERS[theirs].why_not(workload):
            continue
        eager, ours = (peers.PROVIDERS[name].build(workload, threads) for name in (theirs, mine))
        modes: list[tuple[bool, Callable[[], Any], Callable[[], Any]]] = [(False, eager.infer, ours.infer)]
        if training and eager.train is not None and ours.train is not None:
            modes.append((True, eager.train, ours.train))
        for trains, first, second in modes:
            with torch.set_grad_enabled(trains):
                times = in_turns(first, second, seconds)
            dtype = str(workload.dtype).removeprefix("torch.")
            batch, pool = workload.case.input[0], workload.pool is not None
            yield Row(workload.name, batch, layout, dtype, pool, trains, *times)


def in_turns(first: Callable[[], Any], second: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """The lower quartile of each: what disturbs a call makes it longer, never shorter."""
    steps, times = (first, second), ([], [])  # type: tuple[Any, Any], tuple[list[float], list[float]]
    for step in steps * 2:
        step()
    rounds = 4
    for _ in range(rounds):
        for step, kept in zip(steps, times, strict=True):
            end = time.perf_counter() + seconds / rounds
            while True:
                begin = time.perf_counter()
                step()
                kept.append(time.perf_counter() - begin)
                if time.perf_counter() >= end:
                    break
    low = [sorted(kept)[len(kept) // 4] for kept in times]
    return low[0], low[1]


def text(found: Sequence[Row]) -> str:
    head = ["case", "batch", "form", "mode", "eager us", "ours us", "ratio", ""]
    slower = sum(row.slower for row in found)
    verdict = f"{slower} of {len(found)} rows are slower than torch's own modules (below {LEAST_RATIO})."
    return f"{table(head, [row.cells() for row in found])}\n\n{verdict}"
