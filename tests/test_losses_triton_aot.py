"""The losses' Triton kernels compiled for GPUs that are not here: they compile, and no register spills."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed.")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("The compiler is not there when kernels are interpreted.", allow_module_level=True)

import aot
import losses_aot
import triton


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    return aot.compile_all(losses_aot.ROWS, losses_aot.compile_row)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads(losses_aot.RECORD.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("row", losses_aot.ROWS)
def test_nothing_spills(compiled: dict[str, dict[str, int]], row: str) -> None:
    used = compiled[row]
    assert used["spills"] == 0
    assert used["stack"] == 0
    assert used["registers"] <= 255
    assert used["shared"] <= 99 * 1024  # every GPU since Ampere
    multiplies = row.split(" | ", maxsplit=1)[0] in ("sums", "gradient", "similarity_gradient")
    assert (used["matrix"] > 0) == (multiplies and "float32 ieee" not in row)


@pytest.mark.slow
def test_the_record_is_of_these_kernels(compiled: dict[str, dict[str, int]], record: dict[str, Any]) -> None:
    """What another version of the compiler uses may differ; what is compiled may not."""
    advice = f"run `python tests/{losses_aot.__name__}.py` and look at what changed"
    assert list(record["rows"]) == list(compiled), advice
    if record["triton"] == triton.__version__:
        assert record["rows"] == compiled, advice
