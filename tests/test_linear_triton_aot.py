"""linear's Triton kernels compiled for GPUs that are not here: they compile, and no register spills."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed.")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("The compiler is not there when kernels are interpreted.", allow_module_level=True)

import aot
import linear_aot
import triton


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    return aot.compile_all(linear_aot.ROWS, linear_aot.compile_row)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads(linear_aot.RECORD.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("row", linear_aot.ROWS)
def test_nothing_spills(compiled: dict[str, dict[str, int]], row: str) -> None:
    used = compiled[row]
    assert used["spills"] == 0
    assert used["stack"] == 0
    assert used["registers"] <= 255
    assert used["shared"] <= 99 * 1024, "more shared memory than a program gets on every GPU since Ampere"
    products = any(name in row for name in linear_aot.PRODUCTS)
    on_vector_units = "float32 ieee" in row or not products
    if "float32 ieee" in row and "sm_100" in row and triton.__version__.startswith("3.7."):
        return  # that compiler puts such products on Blackwell's matrix unit: docs/gpu-notes.md
    assert (used["matrix"] == 0) == on_vector_units


@pytest.mark.slow
def test_the_record_is_of_these_kernels(compiled: dict[str, dict[str, int]], record: dict[str, Any]) -> None:
    """What another version of the compiler uses may differ; what is compiled may not."""
    advice = f"run `python tests/{linear_aot.__name__}.py` and look at what changed"
    assert list(record["rows"]) == list(compiled), advice
    if record["triton"] == triton.__version__:
        assert record["rows"] == compiled, advice
