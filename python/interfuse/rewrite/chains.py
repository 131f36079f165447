"""Chains of calls in a function's source whose intermediate values nothing else can read.

A chain is `self.pool(F.relu(self.conv(x)))`, `self.conv(x).relu()`, or the same over adjacent statements:

    x = self.conv(x)
    x = F.relu(x)

In the nested form the values between have no name, so nothing else can read them. In the second form it has
to be shown that the variable dies: the next statement reads it once and then overwrites it or returns, or it
is read nowhere else in the function. Wherever that cannot be shown, the chain ends there, and says why.

Rewriting replaces the outermost call of a chain by one call of a site, which is given the same callees,
looked up at the same moment, and the same arguments. Everything around it (branches, loops, context managers,
training flags) stays the code that it was.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# Where a call stands in a function: line (counted from the def), column, last line, last column.
Place = tuple[int, int, int, int]

READS_LOCALS = ("locals", "vars", "dir", "eval", "exec")
SCOPES = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.Lambda,
    ast.ClassDef,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)
# What may stand between a statement and the variable it reads, such that the variable is always read.
TRANSPARENT = (
    ast.Call,
    ast.Attribute,
    ast.Subscript,
    ast.BinOp,
    ast.UnaryOp,
    ast.Tuple,
    ast.List,
    ast.keyword,
)


@dataclass(frozen=True)
class Link:
    """One call of a chain. The first argument, or the object of a method, is the value from the link
    before."""

    call: ast.Call
    callee: ast.expr | None  # None: a method of the value, named `method`
    method: str | None
    arguments: tuple[ast.expr, ...]
    keywords: tuple[ast.keyword, ...]
    dropped: ast.stmt | None = None  # the assignment that handed the value over, which fusing removes


@dataclass(frozen=True)
class Chain:
    links: tuple[Link, ...]  # in the order in which they run
    end: str  # why it does not go on after the last link


class Reading:
    """A function's syntax tree with what is asked of it: parents, calls, chains."""

    def __init__(self, tree: ast.FunctionDef):
        self.tree = tree
        self.parent: dict[ast.AST, ast.AST] = {}
        for node in ast.walk(tree):
            for child in ast.iter_child_nodes(node):
                self.parent[child] = node
        # The body alone: defaults and annotations run elsewhere.
        self.nodes = [node for statement in tree.body for node in ast.walk(statement)]
        self.names = [node for node in self.nodes if isinstance(node, ast.Name)]
        self.reads_locals = any(node.id in READS_LOCALS for node in self.names)
        self.shared = {
            name for node in self.nodes if isinstance(node, (ast.Global, ast.Nonlocal)) for name in node.names
        }

    def calls(self) -> Iterator[ast.Call]:
        """The calls in the function itself, in the order of the text."""
        found = [node for node in self.nodes if isinstance(node, ast.Call)]
        yield from sorted(found, key=lambda call: (call.lineno, call.col_offset))

    def place(self, call: ast.Call) -> Place:
        first = self.tree.lineno
        return (
            call.lineno - first,
            call.col_offset,
            (call.end_lineno or first) - first,
            call.end_col_offset or 0,
        )

    def chain(self, start: ast.Call) -> Chain | str:
        """The chain that begins with this call, or why the call itself cannot be replaced."""
        if not start.args or any(isinstance(argument, ast.Starred) for argument in start.args):
            return f"it is called with no value, or with an unknown number of them (line {start.lineno})"
        if not is_load(start.func):
            return f"what it is called through is itself computed (line {start.lineno})"
        first = _link(start, start.func, None, start.args[1:], None)
        if isinstance(first, str):
            return first
        links = [first]
        while True:
            following = self.consumer(links[-1].call)
            if isinstance(following, str):
                return Chain(tuple(links), following)
            links.append(following)

    def consumer(self, node: ast.expr, dropped: ast.stmt | None = None) -> Link | str:
        """The one call that reads the value of this expression."""
        parent = self.parent[node]
        if isinstance(parent, ast.Call) and parent.args and parent.args[0] is node and is_load(parent.func):
            return _link(parent, parent.func, None, parent.args[1:], dropped)
        if isinstance(parent, ast.Attribute) and parent.value is node:
            call = self.parent[parent]
            if isinstance(call, ast.Call) and call.func is parent:
                return _link(call, None, parent.attr, call.args, dropped)
            return f"its value's .{parent.attr} is read (line {parent.lineno})"
        if isinstance(parent, (ast.Assign, ast.AnnAssign)) and parent.value is node:
            targets = parent.targets if isinstance(parent, ast.Assign) else [parent.target]
            if len(targets) == 1 and isinstance(targets[0], ast.Name):
                return self._through_variable(parent, targets[0].id)
            return f"its value is stored as {', '.join(map(ast.unparse, targets))} (line {parent.lineno})"
        if isinstance(parent, ast.Return):
            return f"its value is returned (line {parent.lineno})"
        return (
            f"its value goes into {clip(ast.unparse(parent))} (line {getattr(parent, 'lineno', node.lineno)})"
        )

    def _through_variable(self, store: ast.stmt, name: str) -> Link | str:
        """The consumer of a value that is assigned to a variable: only if the variable is dead afterwards."""
        blocker = self._variable_blocker(store, name)
        if blocker:
            return blocker
        block = self._block(store)
        index = block.index(store)
        after = block[index + 1] if index + 1 < len(block) else None
        loads = [n for n in self.names if n.id == name and isinstance(n.ctx, ast.Load)]
        reads = [n for n in loads if after is not None and self._within(n, after)]
        if after is None or not reads:
            later = [n.lineno for n in loads if n.lineno > store.lineno]
            if later:
                return f"its value is kept as {name}, which is read only later (line {later[0]})"
            return f"its value is kept as {name} (line {store.lineno})"
        if len(reads) > 1:
            return f"its value is kept as {name}, which is read {len(reads)} times (line {after.lineno})"
        if not isinstance(after, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return)):
            return f"its value is kept as {name} and read inside another statement (line {after.lineno})"
        if not self._dead_after(after, name, loads):
            lines = sorted({n.lineno for n in loads if n.lineno > store.lineno} - {reads[0].lineno})
            where = f"also read in line {lines[0]}" if lines else "also read elsewhere"
            return f"its value is kept as {name}, which is {where}"
        if not self._read_first(reads[0], after):
            return f"other calls run before {name} is read (line {after.lineno})"
        following = self.consumer(reads[0], dropped=store)
        if isinstance(following, Link) and following.dropped is not store:
            return f"its value is renamed (line {after.lineno})"
        return following

    def _variable_blocker(self, store: ast.stmt, name: str) -> str | None:
        if name in self.shared:
            return f"its value is kept as {name}, a global or nonlocal variable"
        if self.reads_locals:
            return f"its value is kept as {name}, and the function may read its variables by other means"
        for node in self.names:
            if node.id == name and any(isinstance(a, SCOPES) for a in self._ancestors(node)):
                return f"its value is kept as {name}, which an inner function or comprehension reads"
        if any(isinstance(a, ast.Try) or type(a).__name__ == "TryStar" for a in self._ancestors(store)):
            return f"its value is kept as {name} inside a try statement (line {store.lineno})"
        return None

    def _dead_after(self, statement: ast.stmt, name: str, loads: list[ast.Name]) -> bool:
        """Whether nothing can read the variable once this statement has run."""
        if isinstance(statement, ast.Return):
            return True
        targets: list[ast.expr] = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        names = [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
        if any(isinstance(t, ast.Name) and t.id == name for t in names):
            return True
        others = [n for n in self.names if n.id == name and not isinstance(n.ctx, ast.Load)]
        return len(loads) == 1 and len(others) == 1

    def _read_first(self, load: ast.Name, statement: ast.stmt) -> bool:
        """Whether the statement reads the variable for certain, and calls nothing before it does."""
        node: ast.AST = load
        while node is not statement:
            parent = self.parent[node]
            if parent is not statement:
                if not isinstance(parent, TRANSPARENT):
                    return False
                for child in ast.iter_child_nodes(parent):
                    if child is node:
                        break
                    if isinstance(child, ast.expr) and not is_load(child):
                        return False
            node = parent
        return True

    def _ancestors(self, node: ast.AST) -> Iterator[ast.AST]:
        """From the node's parent up to, and without, the function itself."""
        while (node := self.parent[node]) is not self.tree:
            yield node

    def _within(self, node: ast.AST, statement: ast.stmt) -> bool:
        return any(a is statement for a in self._ancestors(node))

    def _block(self, statement: ast.stmt) -> list[ast.stmt]:
        parent = self.parent[statement]
        for _, value in ast.iter_fields(parent):
            if isinstance(value, list) and any(v is statement for v in value):
                return value
        raise LookupError(f"line {statement.lineno} stands in no block of its parent.")

    def replace(self, chain: Chain, length: int, site: str) -> None:
        """Puts a call of `site` in the place of the chain's first `length` links."""
        links = chain.links[:length]
        value = links[0].call.args[0]
        described = ast.Tuple([_description(link) for link in links], ast.Load())
        for link in links:
            if link.dropped is not None:
                block = self._block(link.dropped)
                block[block.index(link.dropped)] = ast.copy_location(ast.Pass(), link.dropped)
        outermost = links[-1].call
        outermost.func = ast.Name(site, ast.Load())
        outermost.args = [described, value]
        outermost.keywords = []
        ast.fix_missing_locations(ast.copy_location(outermost.func, outermost))


def _link(
    call: ast.Call,
    callee: ast.expr | None,
    method: str | None,
    arguments: list[ast.expr],
    dropped: ast.stmt | None,
) -> Link | str:
    values = [*arguments, *(k.value for k in call.keywords)]
    if any(k.arg is None for k in call.keywords) or not all(map(is_load, values)):
        return (
            f"the arguments of {clip(ast.unparse(call.func))} are computed in the call (line {call.lineno})"
        )
    return Link(call, callee, method, tuple(arguments), tuple(call.keywords), dropped)


def _description(link: Link) -> ast.expr:
    """The link as the site is given it: (callee or method name, arguments, keywords)."""
    callee = link.callee if link.callee is not None else ast.Constant(link.method)
    keywords = ast.Dict([ast.Constant(k.arg) for k in link.keywords], [k.value for k in link.keywords])
    return ast.Tuple([callee, ast.Tuple(list(link.arguments), ast.Load()), keywords], ast.Load())


def is_load(node: ast.expr) -> bool:
    """Whether evaluating the expression only looks things up, so that it does not matter when it is done."""
    if isinstance(node, (ast.Constant, ast.Name)):
        return True
    if isinstance(node, ast.Attribute):
        return is_load(node.value)
    if isinstance(node, ast.Subscript):
        return is_load(node.value) and is_load(node.slice)
    if isinstance(node, (ast.Tuple, ast.List)):
        return all(map(is_load, node.elts))
    return isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant)


def clip(text: str, width: int = 40) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."
