"""A dictionary that forgets its oldest entries, for whatever is cached by shape."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable

Value = TypeVar("Value")


class BoundedCache(Generic[Value]):
    """Lookups take no lock: `get` is the plain dictionary's, since every eager call starts with one."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: dict[Hashable, Value] = {}
        self._lock = Lock()
        self.get = self._entries.get

    def put(self, key: Hashable, value: Value) -> Value:
        with self._lock:
            while len(self._entries) >= self._capacity:
                self._entries.pop(next(iter(self._entries)), None)
            self._entries[key] = value
        return value

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)
