"""Choosing an implementation: one predicate chooses, explains and refuses.

Each op has an ordered table of implementations that ends in its reference. Beside each one stands
`why_not(problem)`: None where it can run the problem, otherwise the sentence that says why not. `choose`
takes the first that can, `explain` prints the sentences of those passed over, and an implementation asked
for by name raises its own. `rather_not(problem)` is the sentence where it can, but a later one was measured
to be faster: it is then passed over too, unless it is asked for by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def _gladly(problem: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to run an op. What `run` and `run_backward` take is the op's own business."""

    name: str
    why_not: Callable[[Any], str | None]
    run: Callable[..., Any]
    run_backward: Callable[..., Any]
    rather_not: Callable[[Any], str | None] = field(default=_gladly, kw_only=True)

    def passes(self, problem: Any) -> str | None:
        """Why it is not taken where the choice is free."""
        return self.why_not(problem) or self.rather_not(problem)


@dataclass(frozen=True)
class Refusal:
    """An implementation that was passed over, and its reason."""

    name: str
    reason: str


class BackendError(RuntimeError):
    """A backend asked for by name cannot run the problem."""


def choose(table: Sequence[Implementation], problem: Any, backend: str | None = None) -> Implementation:
    """The first implementation of the table that takes the problem, or the one asked for by name."""
    if backend:
        implementation = named(table, backend)
        reason = implementation.why_not(problem)
        if reason is not None:
            raise BackendError(f"backend {backend!r} was asked for, but cannot run this: {reason}")
        return implementation
    for implementation in table:
        if implementation.passes(problem) is None:
            return implementation
    raise BackendError("no implementation can run this, though every table should end in a reference.")


def named(table: Sequence[Implementation], backend: str) -> Implementation:
    for implementation in table:
        if implementation.name == backend:
            return implementation
    names = ", ".join(implementation.name for implementation in table)
    raise ValueError(f"backend must be one of {names}, or None to let interfuse choose; got {backend!r}.")


def refusals(table: Sequence[Implementation], problem: Any) -> list[Refusal]:
    """Every implementation that is not taken for the problem, with its reason, in the table's order."""
    reasons = ((implementation.name, implementation.passes(problem)) for implementation in table)
    return [Refusal(name, reason) for name, reason in reasons if reason is not None]
