"""Several layers of rnn at work at a time: each on a stream of its own, a part of the steps apart.

A layer's part needs the same part of the layer whose results it reads, and its own part before. Where the
kernels of all layers fit on the device at once, they run beside each other, on multiprocessors of their own.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Task(NamedTuple):
    """Work to put on a stream, behind what is there and behind other tasks, given by their numbers."""

    stream: int
    after: tuple[int, ...]
    run: Callable[[], None]


def tasks_of(layers: Sequence[int], parts: Sequence[range], work: Callable[[int, range], None]) -> list[Task]:
    """Layers in the order in which results go from one to the next; diagonals of (layer, part) in turn."""
    numbers: dict[tuple[int, int], int] = {}
    tasks: list[Task] = []
    for diagonal in range(len(layers) + len(parts) - 1):
        for place, layer in enumerate(layers):
            part = diagonal - place
            if not 0 <= part < len(parts):
                continue
            after = (numbers[place - 1, part],) if place > 0 else ()
            numbers[place, part] = len(tasks)
            tasks.append(Task(place, after, lambda layer=layer, part=part: work(layer, parts[part])))  # type: ignore[misc]
    return tasks


def run(tasks: Sequence[Task], device: torch.device) -> None:
    """On the current stream and others, which it then waits for; one after the other without streams."""
    if device.type != "cuda" or all(task.stream == 0 for task in tasks):
        for task in tasks:
            task.run()
        return
    main = torch.cuda.current_stream(device)
    streams = [main, *_streams(device, max(task.stream for task in tasks))]
    awaited = {number for task in tasks for number in task.after}
    done: dict[int, torch.cuda.Event] = {}
    for stream in streams[1:]:
        stream.wait_stream(main)
    for number, task in enumerate(tasks):
        with torch.cuda.stream(streams[task.stream]):
            for earlier in task.after:
                streams[task.stream].wait_event(done[earlier])
            task.run()
            if number in awaited:
                done[number] = streams[task.stream].record_event()
    for stream in streams[1:]:
        main.wait_stream(stream)


@cache
def _streams(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(count)]
