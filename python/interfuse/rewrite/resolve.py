"""Which objects an expression in a method may stand for, found without running anything.

Only what can be looked up is resolved: attributes along a module's children, items of ModuleLists, globals,
closure variables, and local variables that take their values from such. The answer serves to find chains and
to report on them; what is really called is looked at again at every call.
"""

from __future__ import annotations

import ast
import builtins
import inspect
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

from interfuse import torch_state
from interfuse.rewrite import source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from interfuse.rewrite.chains import Reading

Objects = tuple[Any, ...]
CONTAINERS = (nn.ModuleList, nn.Sequential)


class Resolver:
    """Resolves expressions of one method for one instance."""

    def __init__(self, owner: nn.Module, read: source.Source, reading: Reading):
        self.owner = owner
        self.function = read.function
        self.class_name = read.class_name or ""
        self.reading = reading
        parameters = reading.tree.args
        every = [*parameters.posonlyargs, *parameters.args]
        self.self_name = every[0].arg if every else ""
        self.parameters = {
            a.arg for a in [*every, *parameters.kwonlyargs, parameters.vararg, parameters.kwarg] if a
        }
        self.stored = {n.id for n in reading.names if not isinstance(n.ctx, ast.Load)}
        self._busy: set[str] = set()

    def resolve(self, node: ast.expr) -> Objects:
        if isinstance(node, ast.Name):
            return self._name(node.id)
        if isinstance(node, ast.Attribute):
            name = node.attr
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{self.class_name.lstrip('_')}{name}"
            return tuple(found for base in self.resolve(node.value) for found in _attribute(base, name))
        if isinstance(node, ast.Subscript):
            return tuple(found for base in self.resolve(node.value) for found in _item(base, node.slice))
        return ()

    def _name(self, name: str) -> Objects:
        if name in self.stored:
            return self._local(name)
        if name == self.self_name:
            return (self.owner,)
        if name in self.parameters:
            return ()
        code, cells = self.function.__code__, self.function.__closure__ or ()
        if name in code.co_freevars:
            try:
                return (cells[code.co_freevars.index(name)].cell_contents,)
            except ValueError:  # the variable has no value yet
                return ()
        if name in self.function.__globals__:
            return (self.function.__globals__[name],)
        return (getattr(builtins, name),) if hasattr(builtins, name) else ()

    def _local(self, name: str) -> Objects:
        """What a local variable may hold, if everything it is ever given can be resolved."""
        if name in self.parameters or name in self._busy:
            return ()
        self._busy.add(name)
        try:
            found: list[Any] = []
            for store in (n for n in self.reading.names if n.id == name and not isinstance(n.ctx, ast.Load)):
                given = self._given(store)
                if not given:
                    return ()
                found += given
            return tuple(found)
        finally:
            self._busy.discard(name)

    def _given(self, target: ast.expr) -> Objects:
        parent = self.reading.parent[target]
        position = None
        if isinstance(parent, ast.Tuple):
            position = parent.elts.index(target)
            target, parent = parent, self.reading.parent[parent]
        if isinstance(parent, (ast.For, ast.comprehension)) and parent.target is target:
            return self._elements(parent.iter, position)
        if isinstance(parent, ast.Assign) and parent.targets == [target] and position is None:
            return self.resolve(parent.value)
        return ()

    def _elements(self, iterated: ast.expr, position: int | None) -> Objects:
        if isinstance(iterated, ast.Call) and isinstance(iterated.func, ast.Name):
            function = self.resolve(iterated.func)
            if function == (zip,) and position is not None and position < len(iterated.args):
                return self._elements(iterated.args[position], None)
            if function == (enumerate,) and position == 1:
                return self._elements(iterated.args[0], None)
            if function == (reversed,):
                return self._elements(iterated.args[0], position)
            return ()
        if position is not None:
            return ()
        if isinstance(iterated, (ast.Tuple, ast.List)):
            return tuple(found for element in iterated.elts for found in self.resolve(element))
        return tuple(m for base in self.resolve(iterated) if isinstance(base, CONTAINERS) for m in base)


def _attribute(base: Any, name: str) -> Objects:
    if isinstance(base, nn.Module):
        children = dict(torch_state.children(base))
        if name in children:
            return (children[name],)
        return (base.__dict__[name],) if name in base.__dict__ else ()
    if isinstance(base, ModuleType):
        return (vars(base)[name],) if name in vars(base) else ()
    return ()


def _item(base: Any, index: ast.expr) -> Objects:
    try:
        key = ast.literal_eval(index)
    except ValueError:
        key = None
    if isinstance(base, nn.ModuleDict):
        return (base[key],) if key in base else tuple(base.values())
    if isinstance(base, CONTAINERS):
        if isinstance(key, int) and -len(base) <= key < len(base):
            return (base[key],)
        return () if isinstance(index, ast.Slice) else tuple(base)
    return ()


def methods_reached(owner: nn.Module) -> Iterator[str]:
    """`forward`, and the methods of the user's class that it reaches through `self.name`."""
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        name = waiting.pop(0)
        yield name
        read = source.read(getattr(type(owner), name))
        if isinstance(read, str):
            continue
        me = next((a.arg for a in [*read.tree.args.posonlyargs, *read.tree.args.args]), "")
        for node in ast.walk(read.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == me:
                function = inspect.getattr_static(type(owner), node.attr, None)
                if (
                    isinstance(function, FunctionType)
                    and node.attr not in seen
                    and not hasattr(nn.Module, node.attr)
                ):
                    seen.add(node.attr)
                    waiting.append(node.attr)
