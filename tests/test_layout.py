"""An op has one name, and that name opens every room."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = (
    "csrc/cpu/{op}.cpp",
    "kernels/{op}.py",
    "python/interfuse/ops/{op}.py",
    "python/interfuse/reference/{op}.py",
    "python/interfuse/nn/{op}.py",
    "python/interfuse/rewrite/{op}.py",
    "tests/cases/{op}.py",
    "tests/test_{op}*.py",
    "bench/{op}.py",
)
LONGEST = 600


def ops() -> list[str]:
    """The public modules that functions of interfuse.ops come from; a family of functions is one op."""
    tree = ast.parse((ROOT / "python/interfuse/ops/__init__.py").read_text(encoding="utf-8"))
    modules = {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    names = [module.removeprefix("interfuse.ops.") for module in modules if module.startswith("interfuse.")]
    return sorted(name for name in names if not name.startswith("_"))


def sources() -> list[Path]:
    folders = ("csrc", "kernels", "python", "tests", "bench", "scripts", "examples")
    kinds = {".py", ".pyi", ".cpp", ".cu", ".h", ".c"}
    return [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]


def test_there_are_ops() -> None:
    assert {"conv_pool", "losses"} <= set(ops())


@pytest.mark.parametrize("room", ROOMS)
def test_every_op_has_every_room(room: str) -> None:
    missing = [op for op in ops() if not list(ROOT.glob(room.format(op=op)))]
    assert not missing, f"{missing} have no {room}"


def test_references_and_cases_belong_to_ops() -> None:
    """The ops above are those that the package exports; one left out there would escape them."""
    known = ops()
    for room in ("python/interfuse/reference", "tests/cases"):
        strays = {path.stem for path in (ROOT / room).glob("*.py")} - {"__init__", *known}
        assert not strays, f"{room} holds {strays}, which interfuse.ops does not export"


def test_files_stay_readable() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    long = {str(path.relative_to(ROOT)): count for path, count in lengths.items() if count > LONGEST}
    assert not long, f"files of more than {LONGEST} lines, each perhaps two files in one: {long}"
