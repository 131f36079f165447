"""Fixtures: outputs that start as garbage, and what a test changes globally is put back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import torch

import interfuse
from interfuse.rewrite import attention, conv_pool, linear
from interfuse.torch_state import is_plain_eager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# The same examples on every run: a failure is the commit's. `--hypothesis-profile=explore` seeks new ones.
_ANY_TIME = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck), "print_blob": True}
hypothesis.settings.register_profile("repeatable", derandomize=True, **_ANY_TIME)
hypothesis.settings.register_profile("explore", max_examples=3000, **_ANY_TIME)
hypothesis.settings.load_profile("repeatable")

GARBAGE_BYTE = 0xA5


def poison(t: torch.Tensor) -> torch.Tensor:
    """Fill fresh memory with what no kernel would leave: NaN, or a byte that is neither 0 nor 255.

    Not under a tracer or another mode, which would record the filling.
    """
    if not is_plain_eager():
        return t
    if t.dtype.is_floating_point:
        return t.fill_(float("nan"))
    return t.fill_(GARBAGE_BYTE) if t.dtype == torch.uint8 else t


@pytest.fixture
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that torch hands out unwritten holds garbage, so that an unwritten output cannot pass.

    A file asks for it in its pytestmark.
    """

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            return poison(make(*args, **kwargs))

        return made

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """optimize() puts its sites at the sizes of tests too, at which torch's own calls are as fast."""
    monkeypatch.setattr(attention, "why_slower", lambda seen: None)
    monkeypatch.setattr(attention, "LEAST_SCORES", 0)
    monkeypatch.setattr(conv_pool, "LEAST_PRODUCTS", 0)
    monkeypatch.setattr(linear, "LEAST_ROWS", 0)
    monkeypatch.setattr(linear, "LEAST_PRODUCTS", 0)


@pytest.fixture(autouse=True)
def _settings_put_back() -> Iterator[None]:
    torch.manual_seed(0)  # a test's values do not depend on which tests ran before it
    threads, precision = torch.get_num_threads(), interfuse.get_precision()
    yield
    torch.set_num_threads(threads)
    interfuse.set_precision(precision)
