"""All ops' Triton kernels compiled for GPUs that are not here: they compile, and no register spills."""

from __future__ import annotations

import functools
import importlib
import json
import os

import pytest

pytest.importorskip("triton", reason="triton is not installed.")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("The compiler is not there when kernels are interpreted.", allow_module_level=True)

import aot
import triton

LAUNCHES = {
    op: importlib.import_module(f"{op}_aot") for op in ("attention", "conv_pool", "linear", "losses", "rnn")
}
ROWS = [(op, row) for op, launches in LAUNCHES.items() for row in launches.ROWS]
# docs/gpu-notes.md: this compiler puts a few exact float32 products of these ops on Blackwell's matrix unit.
MISPLACED = ("conv_pool", "linear") if triton.__version__.startswith("3.7.") else ()


@functools.cache
def compiled(op: str) -> dict[str, dict[str, int]]:
    return aot.compile_all(LAUNCHES[op].ROWS, LAUNCHES[op].compile_row)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "row"), ROWS)
def test_nothing_spills(op: str, row: str) -> None:
    launches, used = LAUNCHES[op], compiled(op)[row]
    assert used["spills"] == 0
    assert used["stack"] == 0
    assert used["registers"] <= 255
    assert used["shared"] <= (launches.shared_limit(row) if hasattr(launches, "shared_limit") else aot.SHARED)
    exact = "float32 ieee" in row
    if op in MISPLACED and exact and "sm_100" in row:
        return
    assert (used["matrix"] > 0) == (row.split(" | ", maxsplit=1)[0] in launches.MATRIX and not exact)


@pytest.mark.slow
@pytest.mark.parametrize("op", LAUNCHES)
def test_the_record_is_of_these_kernels(op: str) -> None:
    """What another version of the compiler uses may differ; what is compiled may not."""
    record = json.loads(LAUNCHES[op].RECORD.read_text(encoding="utf-8"))
    advice = f"run `python tests/{op}_aot.py` and look at what changed"
    assert list(record["rows"]) == list(compiled(op)), advice
    if record["triton"] == triton.__version__:
        assert record["rows"] == compiled(op), advice
