"""Reading a method's source, proving that it is the code that runs, and compiling a changed copy of it.

A rewritten method is only as good as the text it was made from. A file may have been edited since it was
imported, a decorator may wrap what is written, a class may have been made by `exec`. So `read` compiles the
whole file again and looks for the function's code object in the result: only if it is there, equal in every
instruction, constant and line, is the text believed.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import inspect
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

FUTURE_FLAGS = 0
for _name in __future__.all_feature_names:
    FUTURE_FLAGS |= getattr(__future__, _name).compiler_flag


@dataclass(frozen=True)
class Source:
    """A function, its syntax tree with the line numbers of the file (which nobody changes), its text, and the
    class it is written in, which decides what `self.__name` means."""

    function: FunctionType
    tree: ast.FunctionDef
    text: str
    class_name: str | None


def read(function: object) -> Source | str:
    """The source of a plain Python function, or the reason why it cannot be had."""
    if not isinstance(function, FunctionType):
        return f"it is not a plain Python function but {type(function).__name__}"
    return _read_function(function)


def forget() -> None:
    """Reads every source again when it is next asked for."""
    _read_function.cache_clear()


@functools.lru_cache(maxsize=256)
def _read_function(function: FunctionType) -> Source | str:
    code = function.__code__
    if hasattr(function, "__wrapped__"):
        return "it is wrapped by a decorator"
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        return "it is a generator or a coroutine"
    try:
        text = "".join(inspect.findsource(function)[0])
    except (OSError, TypeError):
        return "its source cannot be found"
    try:
        module, again = _parsed(text, code.co_filename)
    except (SyntaxError, ValueError):
        return "the file with its source does not parse"
    tree, class_name = _definition(module, code)
    if tree is None:
        return "its source is not a def where the code says it is (was the file changed after the import?)"
    if tree.decorator_list:
        return "it is wrapped by a decorator"
    if not any(code == other for other in _codes(again) if other.co_name == code.co_name):
        return (
            "its source is not the code that runs (was the file, or the function, changed after the import?)"
        )
    return Source(function, tree, ast.get_source_segment(text, tree) or "", class_name)


@functools.lru_cache(maxsize=8)
def _parsed(text: str, filename: str) -> tuple[ast.Module, CodeType]:
    module = ast.parse(text)
    return module, compile(text, filename, "exec", dont_inherit=True)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _definition(module: ast.Module, code: CodeType) -> tuple[ast.FunctionDef | None, str | None]:
    """The def that a code object comes from, and the name of the class around it."""
    waiting: list[tuple[ast.AST, str | None]] = [(module, None)]
    while waiting:
        node, class_name = waiting.pop()
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            first = node.decorator_list[0].lineno if node.decorator_list else node.lineno
            if first == code.co_firstlineno:
                return node, class_name
        within = node.name if isinstance(node, ast.ClassDef) else class_name
        waiting += [(child, within) for child in ast.iter_child_nodes(node)]
    return None, None


def copy_tree(source: Source) -> ast.FunctionDef:
    return copy.deepcopy(source.tree)


def compile_like(source: Source, tree: ast.FunctionDef, extra: Sequence[str]) -> CodeType:
    """The code of `tree` as it would be in the place of the source's function: in a class of the same name,
    with the same free variables, and with those in `extra` besides."""
    original = source.function.__code__
    in_class = source.class_name is not None
    free = [name for name in original.co_freevars if not (in_class and name == "__class__")]
    outer = ast.parse(
        f"def scope({', '.join([*free, *extra])}):\n  class {source.class_name or 'Unused'}: pass"
    )
    scope = outer.body[0]
    if not isinstance(scope, ast.FunctionDef) or not isinstance(scope.body[0], ast.ClassDef):
        raise TypeError("ast.parse made something other than a def and a class out of a def and a class.")
    if in_class:
        scope.body[0].body = [tree]
    else:
        scope.body = [tree]
    module = compile(
        ast.fix_missing_locations(outer),
        original.co_filename,
        "exec",
        original.co_flags & FUTURE_FLAGS,
        dont_inherit=True,
    )
    return next(
        code
        for code in _codes(module)
        if code.co_name == tree.name and code.co_firstlineno == original.co_firstlineno
    )


def function_like(source: Source, code: CodeType, extra: Mapping[str, object]) -> FunctionType:
    """A function of `code` with the globals, defaults and free variables of the source's function."""
    original = source.function
    cells = dict(zip(original.__code__.co_freevars, original.__closure__ or (), strict=True))
    cells |= {name: CellType(value) for name, value in extra.items()}
    function = FunctionType(
        code,
        original.__globals__,
        original.__name__,
        original.__defaults__,
        tuple(cells[name] for name in code.co_freevars),
    )
    function.__kwdefaults__ = original.__kwdefaults__
    function.__annotations__ = original.__annotations__
    function.__qualname__ = original.__qualname__
    function.__module__ = original.__module__
    function.__doc__ = original.__doc__
    return function
