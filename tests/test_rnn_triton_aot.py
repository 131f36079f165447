"""rnn's Triton kernels compiled for GPUs that are not here: they compile, and no register spills."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed.")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("The compiler is not there when kernels are interpreted.", allow_module_level=True)

import aot
import rnn_aot
import triton
from interfuse.kernels import rnn_launches as plan


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    return aot.compile_all(rnn_aot.ROWS, rnn_aot.compile_row)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads(rnn_aot.RECORD.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("row", rnn_aot.ROWS)
def test_nothing_spills(compiled: dict[str, dict[str, int]], row: str) -> None:
    used = compiled[row]
    assert used["spills"] == 0
    assert used["stack"] == 0
    assert used["registers"] <= 255
    step, kernel, _ = rnn_aot.ROWS[row]
    walks = kernel in rnn_aot.WALKS
    resident = walks and rnn_aot.launches(step)[1].kernel.__name__.startswith("resident")
    # Resident kernels are chosen by the device's shared memory; the rest runs on every GPU since Ampere.
    assert used["shared"] <= (plan.RESIDENT_BYTES + plan.BESIDE_RESIDENT_BYTES if resident else 99 * 1024)
    on_matrix_units = (walks or kernel == "input_gates") and "float32 ieee" not in row
    assert (used["matrix"] > 0) == on_matrix_units


@pytest.mark.slow
def test_the_record_is_of_these_kernels(compiled: dict[str, dict[str, int]], record: dict[str, Any]) -> None:
    """What another version of the compiler uses may differ; what is compiled may not."""
    advice = f"run `python tests/{rnn_aot.__name__}.py` and look at what changed"
    assert list(record["rows"]) == list(compiled), advice
    if record["triton"] == triton.__version__:
        assert record["rows"] == compiled, advice
