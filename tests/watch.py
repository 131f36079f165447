"""Sees which ops go through the dispatcher."""

from __future__ import annotations

from typing import Any

import torch


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the ops that go through the dispatcher. Being a mode, it also closes the short way."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    """A subclass that sees the calls made with it."""

    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs)
