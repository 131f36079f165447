"""The precision switch: whether fast algorithms with a larger rounding error are allowed."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PRECISIONS = ("default", "highest")

_precision = "default"


def get_precision() -> str:
    """The precision in force: "default" or "highest"."""
    return _precision


def set_precision(value: str) -> None:
    """Choose between speed and error for every later call in this process.

    "default" may use Winograd convolutions (relative error under 1e-5 in float32); "highest" never does,
    and its error is at most about twice torch's own.
    """
    global _precision
    if value not in PRECISIONS:
        raise ValueError(f"The precision must be one of {', '.join(PRECISIONS)}; got {value!r}.")
    _precision = value


@contextmanager
def precision(value: str) -> Iterator[None]:
    """`set_precision(value)` for the calls made inside the `with` block (by any thread of the process)."""
    before = get_precision()
    set_precision(value)
    try:
        yield
    finally:
        set_precision(before)
