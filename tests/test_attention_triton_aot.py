"""attention's Triton kernels compiled for GPUs that are not here: they compile, and no register spills."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed.")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("The compiler is not there when kernels are interpreted.", allow_module_level=True)

import aot
import attention_aot
import triton


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    return aot.compile_all(attention_aot.ROWS, attention_aot.compile_row)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads(attention_aot.RECORD.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("row", attention_aot.ROWS)
def test_nothing_spills(compiled: dict[str, dict[str, int]], row: str) -> None:
    used = compiled[row]
    assert used["spills"] == 0
    assert used["stack"] == 0
    assert used["registers"] <= 255
    assert used["shared"] <= 99 * 1024  # what every GPU since Ampere has for a program
    on_matrix_units = attention_aot.ROWS[row][1] in attention_aot.MATRIX and "float32 ieee" not in row
    assert (used["matrix"] > 0) == on_matrix_units


@pytest.mark.slow
def test_the_record_is_of_these_kernels(compiled: dict[str, dict[str, int]], record: dict[str, Any]) -> None:
    """What another version of the compiler uses may differ; what is compiled may not."""
    advice = f"run `python tests/{attention_aot.__name__}.py` and look at what changed"
    assert list(record["rows"]) == list(compiled), advice
    if record["triton"] == triton.__version__:
        assert record["rows"] == compiled, advice
