"""A site: one place in a model where a run of calls may go to one fused op instead.

Nothing about the model is remembered in a site. At every call it is handed the callees that the model would
call now, and its pattern looks at them: if they are what they were taken for, the fused op runs; if anything
has changed (a hook, a replaced module, another kind of tensor), they are called as they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_dynamo_compiling

from interfuse import torch_state
from interfuse.dispatch import Implementation, choose, refusals


class Match(NamedTuple):
    """The first `length` links of a chain, and what they are in words. `enabled` is False for what pays only
    where it is measured to, `trains` for what does so in training alone."""

    length: int
    text: str
    enabled: bool
    reason: str  # why it ends there, and does not take more
    trains: bool = True


class StaticLink(NamedTuple):
    """A link as far as it is known before the model runs. Arguments that are not constants are UNKNOWN."""

    callees: tuple[Any, ...]  # what it may call: several for a loop over modules; empty if unknown
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    text: str


class Unknown:
    def __repr__(self) -> str:
        return "that is computed"


UNKNOWN = Unknown()


LiveLink = tuple[Any, tuple[Any, ...], dict[str, Any]]  # callee or method name, arguments, keywords


class Call(NamedTuple):
    """A fused call ready to be made. Tensors first, so that a site can see whether a gradient is wanted."""

    tensors: tuple[Any, ...]
    settings: dict[str, Any]
    wrap: Callable[[Sequence[Any]], Any] = lambda tensors: tensors[0]  # what the links take, from the tensors
    kind: Hashable = None  # what decides over kernels beside the first tensor, where a site's calls differ


class Pattern(Protocol):
    """What an op adds to optimize(): how its chains look before the model runs, and at each call.

    `whole`: the op stands for a module's own forward, wherever it is called from. Its chains have one link,
    and what calls the module need not be understood.
    """

    op: str
    whole: bool

    def stands(self) -> None:
        """A site has come to stand in a model, made or loaded."""
        return

    def anchors(self, module: nn.Module) -> bool:
        """Whether the report should speak of this module: a chain of this op may start with it."""

    def leads(self, callee: object) -> bool:
        """Whether a chain may begin with a call of this, right before an anchor's."""
        return False

    def refuse(self, module: nn.Module) -> str | None:
        """Why no chain can start with this anchor, whatever follows it."""

    def match(self, links: Sequence[StaticLink], end: str) -> Match | str:
        """How much of the chain one call of the op computes, or why nothing of it."""

    def prepare(self, links: Sequence[LiveLink], value: Any) -> Call | None:
        """The fused call, if these callees and this value are what the op takes; else None."""

    def run(self, call: Call) -> Any:
        """Makes the call, and gives what the plain calls give: a tensor, or for a module several."""

    def calm(self, links: Sequence[LiveLink], call: Call) -> tuple[Sequence[LiveLink], Call]:
        """Both without what they draw at random, so that they can be compared."""
        return links, call

    def describe(self, call: Call) -> Any:
        """What `kernel` needs to know of a call: shapes and settings, no tensors."""

    def kernel(self, seen: Any) -> tuple[str | None, tuple[str, ...]]:
        """Which kernel runs a call like this one (None: only the reference does), and why others do not."""

    def rather_not(self, seen: Any) -> str | None:
        """Why a call like this one is better left to the model's own calls, where nobody measures them."""
        return None


def choose_kernel(
    table: Sequence[Implementation], problem: Any, slower: str | None = None
) -> tuple[str | None, tuple[str, ...]]:
    """What `Pattern.kernel` gives where an op's table decides. `slower` says why the model's own calls are
    better even so."""
    chosen = choose(table, problem)
    why_not = tuple(f"{r.name}: {r.reason}" for r in refusals(table[: table.index(chosen)], problem))
    if slower is not None:
        return None, (*why_not, f"{chosen.name}: {slower}")
    return None if chosen.name == "reference" else chosen.name, why_not


Trial = Callable[["Site", Sequence[LiveLink], Any], Any]

MOST_KINDS = 64  # of calls that a site remembers; more shapes than that, and it starts anew


class Site:
    """Calls the fused op where it may, and the callees where it may not. `inference` and `training` say where
    it was found to pay; `seen` is the last new kind of call in words, for the report, and `declined` tells
    that there was one which the op does not take. `weight_dtype`: what weights may be rounded to in
    inference, by patterns whose calls have such a setting. `measured`: on example inputs, which then decide
    over rules."""

    def __init__(
        self,
        pattern: Pattern,
        inference: bool = True,
        training: bool = True,
        weight_dtype: torch.dtype | None = None,
        measured: bool = False,
    ):
        self.pattern = pattern
        self.weight_dtype = weight_dtype
        self.inference = inference
        self.training = training
        self.measured = measured
        self.seen: Any = None
        self.declined = False
        self.trial: Trial | None = None
        self._served: dict[Hashable, bool] = {}
        self._plain: set[Hashable] = set()  # calls known to be the model's own, by their sketches

    def leaves(self, value: Any, beside: Any = None) -> bool:
        """Whether calls like this one are known to be the model's own; `beside` is an argument that decides
        over them too. This is short, since a small model's calls take not much longer than Python's code that
        asks, which is in no cache when they come: what takes 0.5 us in a loop takes 5 in a model."""
        if not self._plain or is_dynamo_compiling():
            return False
        return _sketch(value, beside) in self._plain

    def __call__(self, links: Sequence[LiveLink], value: Any, beside: Any = None) -> Any:
        if self.leaves(value, beside):
            return run_plainly(links, value)
        if self.trial is not None:
            return self.trial(self, links, value)
        compiling = torch.compiler.is_compiling()
        # What TorchScript and ONNX write down should be made of torch's own ops.
        if torch_state.is_tracing() or (compiling and torch.onnx.is_in_onnx_export()):
            return run_plainly(links, value)
        if not self.training and is_grad_enabled() and _may_be_trained(value):
            return run_plainly(links, value)  # known without asking the pattern, which takes longer
        if compiling:
            call = self.pattern.prepare(links, value)
            if call is None or not self._stands(gradient := wants_gradient(call)):
                return run_plainly(links, value)
            return self.run(call, gradient)
        call = self.pattern.prepare(links, value)
        if call is None:
            self.declined = True
            return run_plainly(links, value)
        gradient = wants_gradient(call)
        if self._stands(gradient) and self.serves(call, gradient):
            return self.run(call, gradient)
        sketch = _sketch(value, beside)
        if sketch is not None:
            if len(self._plain) >= MOST_KINDS:
                self._plain.clear()
            self._plain.add(sketch)
        return run_plainly(links, value)

    def _stands(self, gradient: bool) -> bool:
        return self.training if gradient else self.inference

    def run(self, call: Call, gradient: bool) -> Any:
        return self.pattern.run(call if gradient or self.weight_dtype is None else self.rounded(call))

    def rounded(self, call: Call) -> Call:
        """The call as inference makes it."""
        if self.weight_dtype is None or "weight_dtype" not in call.settings:
            return call
        return call._replace(settings={**call.settings, "weight_dtype": self.weight_dtype})

    def serves(self, call: Call, gradient: bool) -> bool:
        """Whether a kernel takes the call, and not only the reference, which is slower than the plain
        calls."""
        value = call.tensors[0]
        kind = (value.shape, value.dtype, value.device, gradient, call.kind)
        served = self._served.get(kind)
        if served is None:
            if len(self._served) >= MOST_KINDS:
                self._served.clear()
            self.seen = self.pattern.describe(call)
            served = self.pattern.kernel(self.seen)[0] is not None and not self.rather_not()
            self._served[kind] = served
        return served

    def rather_not(self) -> str | None:
        """Why the model's own calls are to run one like the last new kind, where it has not been measured."""
        return None if self.measured else self.pattern.rather_not(self.seen)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"trial": None}


def _may_be_trained(value: Any) -> bool:
    """Whether a call on this value surely wants a gradient, or is of ids, which can have none themselves."""
    if isinstance(value, Tensor):
        return value.requires_grad or not value.is_floating_point()
    return isinstance(value, (list, tuple)) and any(isinstance(t, Tensor) and t.requires_grad for t in value)


def _sketch(value: Any, beside: Any = None) -> Hashable:
    """What mostly decides over a call, as far as it shows at a glance: of the value, or the first of several,
    and of an argument beside it. None where the value is no plain tensor. An error costs speed alone."""
    lead = None
    if type(value) is not Tensor:
        if type(value) is not list or not value or type(value[0]) is not Tensor:
            return None
        lead = tuple([getattr(t, "shape", None) for t in value])
        value = value[0]
    gradient = is_grad_enabled()
    shape = beside.shape if type(beside) is Tensor else None
    return lead or value.shape, shape, value.dtype, value.is_cpu, gradient, gradient and value.requires_grad


def wants_gradient(call: Call) -> bool:
    if is_grad_enabled():
        for t in call.tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def run_plainly(links: Sequence[LiveLink], value: Any) -> Any:
    """What the model would have done by itself."""
    for callee, arguments, keywords in links:
        if isinstance(callee, str):
            value = getattr(value, callee)(*arguments, **keywords)
        else:
            value = callee(value, *arguments, **keywords)
    return value
