"""What the command line prints with: aligned tables and a progress bar, both in plain text."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as their widest cell; the first `left` ones flush left, the others flush right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *(line(row) for row in rows)])


def milliseconds(seconds: float) -> str:
    """Three significant digits, so that 0.0123 ms and 123 ms both read well."""
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}"


class Progress:
    """A bar of steps on one line of a terminal. Where the stream is no terminal it says nothing at all,
    so that logs and pipes stay clean."""

    def __init__(self, total: int, stream: TextIO | None = None, width: int = 28) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = total > 0 and self._stream.isatty()
        self._total, self._width = total, width
        self._done = 0
        self._started = time.monotonic()

    def __enter__(self) -> Progress:  # noqa: PYI034  (typing.Self needs Python 3.11)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._stream.write("\r\033[K")
            self._stream.flush()

    def step(self, label: str, done: int = 1) -> None:
        """Counts `done` steps as finished and names the one that comes next."""
        self._done = min(self._total, self._done + done)
        if not self._live:
            return
        filled = self._width * self._done // self._total
        elapsed = time.monotonic() - self._started
        self._stream.write(
            f"\r\033[K[{'#' * filled}{'.' * (self._width - filled)}] {self._done}/{self._total}"
            f" {elapsed:4.0f} s  {label[:70]}"
        )
        self._stream.flush()
