"""The rows of a file under pytest-benchmark: it imports all three, and names the providers as BENCHMARKED."""

from __future__ import annotations

from typing import Any

import torch
from interfuse.bench import peers


def pytest_generate_tests(metafunc: Any) -> None:
    """A hook and no decorator: the command line imports this file too, and needs no pytest for that."""
    metafunc.parametrize("provider", metafunc.module.BENCHMARKED)
    metafunc.parametrize("name", metafunc.module.names(further=True, quick=False))


def test_inference(benchmark: Any, request: Any, name: str, provider: str) -> None:
    built = peers.built_here(request.module.workload(name), provider)
    with torch.no_grad():
        benchmark(built.infer)


def test_training(benchmark: Any, request: Any, name: str, provider: str) -> None:
    import pytest

    train = peers.built_here(request.module.workload(name), provider).train
    if train is None:
        pytest.skip(f"{provider} does not train.")
    benchmark(train)
