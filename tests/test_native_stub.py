"""python/interfuse/_native.pyi says what the compiled module really has."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import torch  # noqa: F401  (before the core: its OpenMP runtime is the one that both use)

from interfuse import _native

STUB = Path(__file__).resolve().parent.parent / "python/interfuse/_native.pyi"

# What pybind11 adds to every class of its own accord.
INHERITED = {"__module__", "__new__", "__doc__", "__init__", "_pybind11_conduit_v1_"}


def parameters_in_stub(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def parameters_in_module(function: Any) -> list[str]:
    """Names from the signature that pybind11 writes into the first line of the docstring."""
    signature = function.__doc__.splitlines()[0]
    inside = signature[signature.index("(") + 1 : signature.rindex(") ->")]
    return re.findall(r"(?:^|, )(\w+)(?=:)", re.sub(r"\[[^\]]*\]", "", inside))


def stub_entries() -> dict[str, ast.stmt]:
    body = ast.parse(STUB.read_text(encoding="utf-8")).body
    return {node.name: node for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}


def test_the_module_has_what_the_stub_names_and_nothing_else() -> None:
    assert set(stub_entries()) == {name for name in vars(_native) if not name.startswith("_")}


def test_functions_have_the_parameters_that_the_stub_gives() -> None:
    for name, node in stub_entries().items():
        if isinstance(node, ast.FunctionDef):
            assert parameters_in_stub(node) == parameters_in_module(getattr(_native, name)), name


def test_classes_have_the_members_that_the_stub_gives() -> None:
    for name, node in stub_entries().items():
        if not isinstance(node, ast.ClassDef):
            continue
        real = getattr(_native, name)
        members = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
        assert set(members) - INHERITED == set(vars(real)) - INHERITED, name
        for member, definition in members.items():
            if member == "__init__" or not definition.decorator_list:
                assert parameters_in_stub(definition) == parameters_in_module(getattr(real, member)), member
