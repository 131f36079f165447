"""How much of the machine others used while something was timed, and timing it again when that was too much.

A worker tells how much processor time it used; what the machine counted beyond that was the others'.
Whether a figure is taken again depends on that share alone, never on the figure.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interfuse.bench.compare import Here
    from interfuse.bench.workers import Worker

TOO_MUCH = 0.1  # of all processors


def ticks() -> tuple[int, int] | None:
    """(idle, used) of all processors since the start, in clock ticks; None where there is no /proc."""
    try:
        with open("/proc/stat") as stat:
            user, nice, system, idle, waiting, *rest = (int(value) for value in stat.readline().split()[1:])
    except OSError:
        return None
    return idle + waiting, user + nice + system + sum(rest[:3])  # interrupts, and what a hypervisor took away


def share_of_others(before: tuple[int, int], after: tuple[int, int], own_seconds: float) -> float:
    idle, used = after[0] - before[0], after[1] - before[1]
    own = own_seconds * os.sysconf("SC_CLK_TCK")
    return min(1.0, max(0.0, used - own) / max(1, idle + used))


def ask(worker: Worker | Here, patience: int, **command: Any) -> dict[str, Any]:
    """The worker's answer, with the share of the machine that others had meanwhile as `others`.

    Up to `patience` times an answer that was disturbed is waited out and asked for again; the least disturbed
    one of all counts.
    """
    best: dict[str, Any] = {}
    for attempt in range(patience + 1):
        if attempt:
            time.sleep(0.5)
        before = ticks()
        answer = worker.ask(**command)
        after = ticks()
        if "failed" in answer or before is None or after is None:
            return {"others": None, **answer}
        answer["others"] = share_of_others(before, after, answer["cpu"])
        if not best or answer["others"] < best["others"]:
            best = answer
        if best["others"] <= TOO_MUCH:
            break
    return best
