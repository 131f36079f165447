"""What explain() returns: one row for every place that was looked at, printed as a table."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Row:
    """One place in a model. `kernel` is the back end that runs it, once shapes are known, or why that is
    open; `why_not` says why the back ends before it in the table do not. Times are (model's own, fused), in
    seconds."""

    site: str
    calls: str
    where: str
    fused: bool
    kernel: str
    reason: str
    why_not: tuple[str, ...] = ()
    inference: tuple[float, float] | None = None
    training: tuple[float, float] | None = None

    @property
    def verdict(self) -> str:
        parts = [f"fused: {self.kernel}" if self.fused else f"left alone: {self.reason}"]
        for name, times in (("inference", self.inference), ("training", self.training)):
            if times is not None:
                parts.append(f"{name} {1e3 * times[0]:.3g} -> {1e3 * times[1]:.3g} ms")
        if self.fused and self.reason:
            parts.append(self.reason)
        parts += [f"not {refusal}" for refusal in self.why_not]
        return "; ".join(parts)


class Explanation:
    """The rows, and a table of them as text. `own` counts the modules that are interfuse's already."""

    def __init__(self, model: str, rows: Sequence[Row], own: int = 0):
        self.model = model
        self.own = own
        self.rows = list(rows)

    @property
    def fused(self) -> list[Row]:
        return [row for row in self.rows if row.fused]

    def __repr__(self) -> str:
        return f"<explanation of {self.model}: {len(self.fused)} of {len(self.rows)} sites fused>"

    def __str__(self) -> str:
        head = f"{self.model}: {len(self.fused)} of {len(self.rows)} sites fused"
        if not self.rows and self.own:
            return f"{self.model}: nothing to replace; {self.own} of its modules are interfuse's own"
        if not self.rows:
            return f"{self.model}: no module that interfuse has a fused op for"
        total = max(80, shutil.get_terminal_size((110, 24)).columns)
        columns = [
            ("site", [r.site for r in self.rows]),
            ("calls", [r.calls for r in self.rows]),
            ("where", [r.where for r in self.rows]),
        ]
        widths = [min(30, max(len(title), *map(len, cells))) for title, cells in columns]
        rest = max(30, total - sum(widths) - 2 * len(widths))
        widths.append(rest)
        lines = [
            head,
            "",
            _line([title for title, _ in columns] + ["what becomes of it"], widths),
            "  ".join("-" * w for w in widths),
        ]
        for row in self.rows:
            cells = [
                textwrap.wrap(text, width) or [""]
                for text, width in zip((row.site, row.calls, row.where, row.verdict), widths, strict=True)
            ]
            height = max(map(len, cells))
            lines += [_line([(*c, *[""] * height)[at] for c in cells], widths) for at in range(height)]
        return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
