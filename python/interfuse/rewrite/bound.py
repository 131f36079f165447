"""The callables that optimize() puts on instances, in the place of `forward` or of another method.

They live in the instance's `__dict__`, so type(m), the parameters, the hooks and the state_dict stay what
they were, and removing them puts everything back. They hold the module strongly, as a bound method would, and
leave it to deepcopy's and pickle's own memory to give a copied module a callable that holds the copy.
"""

from __future__ import annotations

import hashlib
import inspect
from types import MethodType
from typing import TYPE_CHECKING, Any

from interfuse import torch_state
from interfuse.rewrite import source
from interfuse.rewrite.chains import Chain, Place, Reading

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from interfuse.rewrite.site import Site


WHOLE = None  # the key of a site that is a module's whole forward


class Bound:
    """What three kinds of bound method share: an owner, the name they stand under, and their sites."""

    owner: nn.Module
    method: str
    sites: dict[Any, Site]
    lengths: dict[Any, int]  # how many calls each site stands for

    @property
    def __wrapped__(self) -> MethodType:
        """The method that this stands for: inspect.signature reads the parameters from it."""
        return MethodType(getattr(type(self.owner), self.method), self.owner)

    def __getattr__(self, name: str) -> Any:
        # As a bound method does: __code__, __globals__ and the like are the function's. Exporters read them.
        if "owner" not in self.__dict__ or "method" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)

    def __repr__(self) -> str:
        return f"<interfuse: {type(self.owner).__name__}.{self.method} with {len(self.sites)} fused sites>"

    def bind(self) -> None:
        # Not setattr, which a module may have changed.
        self.owner.__dict__[self.method] = self

    def unbind(self) -> None:
        self.owner.__dict__.pop(self.method, None)


class SequentialForward(Bound):
    """nn.Sequential's forward with sites at some children, by name. The children are walked as they are
    now."""

    def __init__(self, owner: nn.Module, lengths: dict[str, int], sites: dict[str, Site]):
        self.owner = owner
        self.method = "forward"
        self.lengths = lengths
        self.sites = sites

    def __call__(self, input: Any) -> Any:  # noqa: A002  (nn.Sequential's own name)
        children = torch_state.children(self.owner)
        at = 0
        while at < len(children):
            name, child = children[at]
            site = self.sites.get(name)
            if site is None:
                input = child(input)  # noqa: A001
                at += 1
            else:
                end = at + self.lengths[name]
                input = site([(link, (), {}) for _, link in children[at:end]], input)  # noqa: A001
                at = end
        return input


class PlainForward:
    """A module's forward as its class has it. (torch.compile does not follow types.MethodType.)"""

    def __init__(self, owner: nn.Module):
        self.owner = owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.owner).forward(self.owner, *args, **kwargs)


class ModuleForward(Bound):
    """A module's own forward as one site: an op computes all of it."""

    def __init__(self, owner: nn.Module, site: Site):
        self.owner = owner
        self.method = "forward"
        self.lengths = {WHOLE: 1}
        self.sites = {WHOLE: site}
        self.first, self.second = list(inspect.signature(type(owner).forward).parameters)[1:3]
        site.pattern.stands()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.sites[WHOLE].pattern.stands()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        site = self.sites[WHOLE]
        beside = args[1] if len(args) > 1 else kwargs.get(self.second)
        if site.leaves(args[0] if args else kwargs.get(self.first), beside):
            return type(self.owner).forward(self.owner, *args, **kwargs)
        plain = PlainForward(self.owner)
        if not args:
            if self.first not in kwargs:
                return plain(**kwargs)
            args = (kwargs.pop(self.first),)
        return site([(plain, args[1:], kwargs)], args[0], beside)


class RewrittenMethod(Bound):
    """A method of a user's module, compiled again from its source with chains of calls replaced by sites."""

    def __init__(self, owner: nn.Module, method: str, lengths: dict[Place, int], sites: dict[Place, Site]):
        self.owner = owner
        self.method = method
        self.lengths = lengths
        self.sites = sites
        self.digest = ""
        self.stale: str | None = None
        self._build()

    def _build(self) -> None:
        original = getattr(type(self.owner), self.method)
        read = source.read(original)
        self.stale = read if isinstance(read, str) else None
        if not isinstance(read, str):
            digest = hashlib.sha256(read.text.encode()).hexdigest()
            if self.digest not in ("", digest):
                self.stale = "its source is not what it was when the model was optimised; optimise it again"
            self.digest = self.digest or digest
        if isinstance(read, str) or self.stale:
            self.function = original
        else:
            self.function = rewritten(read, self.lengths, self.sites)
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now = getattr(type(self.owner), self.method)
        return (self.function if now is self.original else now)(self.owner, *args, **kwargs)

    def why_stopped(self) -> str | None:
        """Why the method runs as it is written, without sites."""
        if getattr(type(self.owner), self.method) is not self.original:
            return f"{type(self.owner).__name__}.{self.method} was replaced since; optimise it again"
        return self.stale

    def __getstate__(self) -> dict[str, Any]:
        made = ("function", "original", "stale")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._build()


def rewritten(read: source.Source, lengths: dict[Place, int], sites: dict[Place, Site]) -> Any:
    """The source's function with each site's chain replaced by a call of the site."""
    reading = Reading(source.copy_tree(read))
    starts = {reading.place(call): call for call in reading.calls()}
    names = {f"interfuse_site_{number}": place for number, place in enumerate(sites)}
    chains: list[tuple[Chain, int, str]] = []
    for name, place in names.items():
        chain = reading.chain(starts[place])
        if isinstance(chain, str) or len(chain.links) < lengths[place]:
            raise LookupError(
                f"{read.function.__qualname__} has no chain of {lengths[place]} calls at {place}."
            )
        chains.append((chain, lengths[place], name))
    for chain, length, name in chains:
        reading.replace(chain, length, name)
    code = source.compile_like(read, reading.tree, list(names))
    return source.function_like(read, code, {name: sites[place] for name, place in names.items()})


def bound_methods(module: nn.Module) -> Sequence[Bound]:
    """What optimize() has put on this instance, where it still stands in its place."""
    return [
        value for name, value in module.__dict__.items() if isinstance(value, Bound) and value.method == name
    ]
