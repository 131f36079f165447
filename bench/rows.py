"""The cases of an op's benchmark by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

    from typing_extensions import Self


class _Shrinks(Protocol):
    def tiny(self) -> Self: ...


Shrinks = TypeVar("Shrinks", bound=_Shrinks)


def names_of(cases: Iterable[Any], quick: bool, wanted: Container[str] | None = None) -> list[str]:
    """Of the cases, or of those whose `bench` is wanted; where it is to be quick, of their tiny versions."""
    return [
        f"{case.name}{'@tiny' if quick else ''}" for case in cases if wanted is None or case.bench in wanted
    ]


def workload_of(name: str, cases: Iterable[Any], list_name: str, make: Callable[[Any], Shrinks]) -> Shrinks:
    """What `make` makes of the case with this name; of 'NAME@tiny', the tiny version."""
    plain, _, variant = name.partition("@")
    for case in cases:
        if case.name == plain:
            made = make(case)
            return made.tiny() if variant == "tiny" else made
    raise ValueError(f"There is no case '{plain}' {list_name}.")
