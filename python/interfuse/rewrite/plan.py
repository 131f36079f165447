"""Walks a model and says where a fused op may stand, and for every other place why it may not."""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from interfuse import torch_state
from interfuse.rewrite import source
from interfuse.rewrite.bound import WHOLE, Bound
from interfuse.rewrite.chains import Link, Reading, clip
from interfuse.rewrite.resolve import Resolver, methods_reached
from interfuse.rewrite.site import UNKNOWN, Match, Pattern, StaticLink

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence


@dataclass(frozen=True)
class Candidate:
    """A chain that one call of an op can compute. `key` tells it apart among those of its owner's method."""

    owner: nn.Module
    owner_name: str
    method: str
    key: Hashable
    pattern: Pattern
    match: Match
    name: str
    where: str

    @property
    def identity(self) -> tuple[str, str, Hashable]:
        return (self.owner_name, self.method, self.key)


@dataclass(frozen=True)
class Refused:
    """A module that a chain could have started with, or that could not be looked into, and the reason."""

    name: str
    text: str
    reason: str


@dataclass
class Plan:
    candidates: list[Candidate] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)


@dataclass(frozen=True)
class Anchor:
    name: str
    module: nn.Module
    pattern: Pattern
    refusal: str | None


class Planner:
    def __init__(self, model: nn.Module, patterns: Sequence[Pattern]):
        self.plan = Plan()
        self.anchors: dict[int, Anchor] = {}
        self.heads: dict[int, Anchor] = {}  # modules that a chain may begin with, before its anchor
        self.reasons: dict[int, str] = {}
        self.covered: set[int] = set()
        modules = list(self._walk(model, "", set()))
        for name, module in modules:
            for pattern in patterns:
                if pattern.anchors(module):
                    self.anchors[id(module)] = Anchor(name, module, pattern, pattern.refuse(module))
        able = {id(a.pattern): a.pattern for a in self.anchors.values() if a.refusal is None}
        self.leading = list(able.values())
        for name, module in modules:
            for pattern in self.leading:
                if pattern.leads(module):
                    self.heads[id(module)] = Anchor(name, module, pattern, None)
        for name, module in modules:
            self._look_into(name, module)
        for key, anchor in [*self.anchors.items(), *self.heads.items()]:
            if key not in self.covered:
                reason = anchor.refusal or self.reasons.get(key, "no call of it is seen in any forward")
                self.plan.refused.append(Refused(anchor.name, type(anchor.module).__name__, reason))

    def _walk(self, module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
        """Like named_modules, but not into modules whose code is not Python of the user's."""
        if id(module) in seen:
            return
        seen.add(id(module))
        reason = _opaque(module)
        if reason:
            self.plan.refused.append(Refused(name, type(module).__name__, reason))
            return
        yield name, module
        for child_name, child in module.named_children():
            yield from self._walk(child, f"{name}.{child_name}" if name else child_name, seen)

    def _look_into(self, name: str, module: nn.Module) -> None:
        mine = [a for m in _held_by(module) if (a := self._begins(m)) is not None]
        forward = module.__dict__.get("forward")
        if forward is not None and not isinstance(forward, Bound):
            self._remember(mine, f"the forward of {type(module).__name__} was replaced on the instance")
        elif (whole := self.anchors.get(id(module))) is not None and whole.pattern.whole:
            if whole.refusal is None:
                link = StaticLink((module,), (), {}, type(module).__name__)
                self._found([whole], whole.pattern.match([link], ""), module, name, "forward", WHOLE,
                            name or "(the model)", type(module).__name__)  # fmt: skip
        elif is_sequential(module):
            self._sequential(name, module)
        elif not str(type(module).forward.__module__).startswith("torch.") and any(
            self._begins(m) is not None for m in module.modules()
        ):
            for method in list(methods_reached(module)):
                self._method(name, module, method, mine)
            self._remember(mine, f"no direct call of it is seen in the forward of {type(module).__name__}")
        elif not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            kind = type(module).__name__
            self._remember(mine, f"it is called by torch's own {kind}, whose methods are left as they are")

    def _begins(self, module: nn.Module) -> Anchor | None:
        """What this module is, if a chain of calls may begin with it."""
        anchor = self.anchors.get(id(module))
        return self.heads.get(id(module)) if anchor is None or anchor.pattern.whole else anchor

    def _remember(self, anchors: Sequence[Anchor], reason: str) -> None:
        for anchor in anchors:
            self.reasons.setdefault(id(anchor.module), reason)

    def _sequential(self, name: str, module: nn.Module) -> None:
        children = torch_state.children(module)
        links = [StaticLink((child,), (), {}, type(child).__name__) for _, child in children]
        at = 0
        while at < len(children):
            key, child = children[at]
            anchor = self._begins(child)
            at += 1
            if anchor is None or anchor.refusal:
                continue
            label = f"{name}.{key}" if name else key
            end = f"it ends {name or type(module).__name__}; what reads its value stands outside"
            led = self._led(anchor.pattern, links[at : at + 1]) if id(child) in self.heads else None
            match = led if isinstance(led, str) else anchor.pattern.match(links[at - 1 :], end)
            self._found([anchor], match, module, name, "forward", key, label, type(module).__name__)
            if isinstance(match, Match):
                at += match.length - 1

    def _method(self, name: str, owner: nn.Module, method: str, mine: Sequence[Anchor]) -> None:
        function = getattr(type(owner), method)
        if method in owner.__dict__ and not isinstance(owner.__dict__[method], Bound):
            return
        read = source.read(function)
        if isinstance(read, str):
            self._remember(mine, f"{type(owner).__name__}.{method} cannot be rewritten: {read}")
            return
        reading = Reading(read.tree)
        resolver = Resolver(owner, read, reading)
        led = self._chains_with_heads(name, owner, method, reading, resolver)
        for call in reading.calls():
            before = led.get(call, "")
            if before is None:
                continue
            called = [self.anchors[id(c)] for c in resolver.resolve(call.func) if id(c) in self.anchors]
            able = [anchor for anchor in called if not anchor.refusal and not anchor.pattern.whole]
            if not able:
                continue
            chain = reading.chain(call)
            if len(call.args) != 1 or call.keywords:
                chain = f"it is called with more than one value (line {call.lineno})"
            if isinstance(chain, str):
                self._remember(able, chain)
                continue
            links = [static_link(link, resolver) for link in chain.links]
            match = able[0].pattern.match(links, chain.end)
            if before and isinstance(match, Match):
                match = match._replace(reason=f"{before}; {match.reason}")
            where = f"{type(owner).__name__}.{method}, line {call.lineno}"
            self._found(able, match, owner, name, method, reading.place(call), _label(able), where)

    def _chains_with_heads(
        self, name: str, owner: nn.Module, method: str, reading: Reading, resolver: Resolver
    ) -> dict[ast.Call, str | None]:
        """Finds the chains that begin before their anchor. Gives the calls of anchors that have something of
        the kind before them, and why it is no part of a chain, or None where it is."""
        led: dict[ast.Call, str | None] = {}
        for call in reading.calls():
            callees = resolver.resolve(call.func)
            pattern = next((p for p in self.leading if callees and all(map(p.leads, callees))), None)
            if pattern is None:
                continue
            heads = [self.heads[id(callee)] for callee in callees if id(callee) in self.heads]
            chain = reading.chain(call)
            if isinstance(chain, str):
                self._remember(heads, chain)
                continue
            links = [static_link(link, resolver) for link in chain.links]
            following = self._led(pattern, links[1:2]) if len(links) > 1 else chain.end
            if isinstance(following, str):
                self._remember(heads, following)
                continue
            match = pattern.match(links, chain.end)
            where = f"{type(owner).__name__}.{method}, line {call.lineno}"
            named = heads or following
            self._found(named, match, owner, name, method, reading.place(call), _label(named), where)
            led[chain.links[1].call] = match if isinstance(match, str) else None
        return led

    def _led(self, pattern: Pattern, following: Sequence[StaticLink]) -> Sequence[Anchor] | str:
        """The anchors that a head is followed by, or why they are none of its pattern's."""
        for link in following:
            found = [self.anchors.get(id(callee)) for callee in link.callees]
            able = [a for a in found if a is not None and a.pattern is pattern and a.refusal is None]
            if able and len(able) == len(found):
                return able
            return f"{link.text} follows, which no chain goes on with"
        return "nothing follows"

    def _found(
        self,
        anchors: Sequence[Anchor],
        match: Match | str,
        owner: nn.Module,
        owner_name: str,
        method: str,
        key: Hashable,
        label: str,
        where: str,
    ) -> None:
        if isinstance(match, str):
            self._remember(anchors, match)
            return
        self.covered |= {id(anchor.module) for anchor in anchors}
        self.plan.candidates.append(
            Candidate(owner, owner_name, method, key, anchors[0].pattern, match, label, where)
        )


def _label(anchors: Sequence[Anchor]) -> str:
    return anchors[0].name if len(anchors) == 1 else f"{anchors[0].name} ... {anchors[-1].name}"


def make_plan(model: nn.Module, patterns: Sequence[Pattern]) -> Plan:
    return Planner(model, patterns).plan


def is_sequential(module: nn.Module) -> bool:
    """Whether calling the module calls its children one after the other: by what it runs, whatever its
    name."""
    cls = type(module)
    return (
        isinstance(module, nn.Sequential)
        and cls.forward is SEQUENTIAL_FORWARD
        and inspect.getattr_static(cls, "__iter__") is SEQUENTIAL_ITER
    )


SEQUENTIAL_FORWARD = nn.Sequential.forward
SEQUENTIAL_ITER = inspect.getattr_static(nn.Sequential, "__iter__")


def static_link(link: Link, resolver: Resolver) -> StaticLink:
    callees: tuple[Any, ...] = (link.method,) if link.callee is None else resolver.resolve(link.callee)
    text = f".{link.method}()" if link.callee is None else clip(ast.unparse(link.callee))
    if len(callees) == 1 and isinstance(callees[0], nn.Module):
        text = type(callees[0]).__name__
    elif len(callees) == 1 and link.callee is not None:
        text = getattr(callees[0], "__name__", text)
    return StaticLink(
        callees,
        tuple(map(_constant, link.arguments)),
        {str(k.arg): _constant(k.value) for k in link.keywords},
        text,
    )


def _constant(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return UNKNOWN


def _opaque(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript, which has no Python forward to look into"
    if isinstance(module, fx.GraphModule):
        return "it is a torch.fx graph, whose forward is generated; optimise the model before tracing it"
    if isinstance(module, torch_state.OptimizedModule):
        return "it is compiled; optimise the model first, then pass it to torch.compile"
    return None


def _held_by(module: nn.Module) -> Iterator[nn.Module]:
    """The children that the module itself calls: its own, and those in its lists and dictionaries."""
    for child in module.children():
        yield child
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _held_by(child)
