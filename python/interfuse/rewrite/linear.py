"""How optimize() recognises linear: nn.Linear, alone or with the activation behind it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from interfuse.autocast import autocast_dtype
from interfuse.dispatch import choose, refusals
from interfuse.ops._linear_checks import Options, check, resolve
from interfuse.ops._linear_problem import DTYPES
from interfuse.ops.linear import IMPLEMENTATIONS, linear
from interfuse.rewrite.known import PLAIN_TENSORS, activation_of, touched
from interfuse.rewrite.site import Call, LiveLink, Match, StaticLink, wants_gradient
from interfuse.torch_state import current_parameters, is_untouched

if TYPE_CHECKING:
    from collections.abc import Sequence

FORWARD = nn.Linear.forward
# What kernels compute in; anything else is for the reference, and torch's own modules are faster than that.
CPU_DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Seen(NamedTuple):
    """A call in words: shapes and dtypes of input, weight and bias, and the settings."""

    tensors: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]
    device: torch.device
    autocast: torch.dtype | None
    settings: dict[str, Any]
    save: bool


class Linear:
    """linear's part in optimize()."""

    op = "linear"
    whole = False

    def stands(self) -> None:
        pass

    def anchors(self, module: nn.Module) -> bool:
        where = type(module).__module__
        quantised = where.startswith("torch.ao.nn") and where.endswith("linear")
        # Its subclass in MultiheadAttention is never called.
        return quantised or (
            isinstance(module, nn.Linear)
            and not where.startswith("interfuse.")
            and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        )

    def refuse(self, module: nn.Module) -> str | None:
        name = type(module).__name__
        if isinstance(module, nn.modules.lazy.LazyModuleMixin):
            return f"{name} has no weight yet: call the model once, then optimise it"
        if nn.utils.parametrize.is_parametrized(module):
            return "its weight is parametrised, so that it is computed anew at every call"
        if type(module).__module__.startswith("torch.ao."):
            return f"{name} is a quantised module, or one being prepared for it"
        if type(module) is not nn.Linear:
            return f"its type {name} is not exactly nn.Linear, so it may compute something else"
        watched = touched(module)
        if watched:
            return f"{name} {watched}"
        if module.weight.dtype not in DTYPES:
            return f"its weight is {module.weight.dtype}; the kernels take float32, bfloat16 and float16"
        return None

    def match(self, links: Sequence[StaticLink], end: str) -> Match | str:
        following = links[1] if len(links) > 1 else None
        taken = 1
        if following is not None:
            if any(_reads_as_activation(callee, following) for callee in following.callees):
                taken = 2
            else:
                end = f"{following.text} follows, which is no activation of the kernel's"
        # torch's own products are as fast where many rows come at once: only measuring tells.
        return Match(taken, " -> ".join(link.text for link in links[:taken]), enabled=False, reason=end)

    def prepare(self, links: Sequence[LiveLink], value: Any) -> Call | None:
        module, arguments, keywords = links[0]
        if type(module) is not nn.Linear or arguments or keywords or not is_untouched(module, FORWARD):
            return None
        settings: dict[str, Any] = {}
        if len(links) > 1:
            found = activation_of(*links[1])
            if found is None or not isinstance(found.slope, (int, float)):
                return None
            settings = {"activation": found.name, "negative_slope": found.slope}
        weight, bias = current_parameters(module, ["weight", "bias"])
        return Call((value, weight, bias), settings) if fits(value, weight, bias) else None

    def run(self, call: Call) -> Tensor:
        return linear(*call.tensors, **call.settings)

    def calm(self, links: Sequence[LiveLink], call: Call) -> tuple[Sequence[LiveLink], Call]:
        return links, call

    def describe(self, call: Call) -> Seen:
        tensors = tuple(None if t is None else (tuple(t.shape), t.dtype) for t in call.tensors)
        x = call.tensors[0]
        return Seen(tensors, x.device, _autocast(x), call.settings, wants_gradient(call))

    def kernel(self, seen: Seen) -> tuple[str | None, tuple[str, ...]]:
        x, weight, bias = (
            None if t is None else torch.empty(t[0], dtype=seen.autocast or t[1], device="meta")
            for t in seen.tensors
        )
        if x is None or weight is None:
            raise TypeError("a call of linear has an input and a weight; neither may be None.")
        settings = {"activation": None, "negative_slope": 0.01, **seen.settings}
        params = resolve(Options(backend=None, **settings))
        problem = replace(check([x], weight, bias, None, params, seen.save), device=seen.device)
        chosen = choose(IMPLEMENTATIONS, problem)
        before = IMPLEMENTATIONS[: IMPLEMENTATIONS.index(chosen)]
        why_not = tuple(f"{r.name}: {r.reason}" for r in refusals(before, problem))
        return None if chosen.name == "reference" else chosen.name, why_not


def _reads_as_activation(callee: Any, link: StaticLink) -> bool:
    try:
        return activation_of(callee, link.arguments, link.keywords) is not None
    except TypeError:  # arguments that the function does not take: calling it will say so
        return False


def fits(value: Any, weight: Any, bias: Any) -> bool:
    """Whether the op computes this. What it does not, the modules themselves compute or refuse."""
    parameters = (weight,) if bias is None else (weight, bias)
    if any(type(t) not in PLAIN_TENSORS for t in (value, *parameters)):
        return False
    if value.layout is not torch.strided or value.is_nested or not value.dim():
        return False
    if weight.dim() != 2 or not weight.shape[1] or value.shape[-1] != weight.shape[1]:
        return False
    dtype, autocast = value.dtype, _autocast(value)
    for t in parameters:
        if t.device != value.device or t.layout is not torch.strided:
            return False
        if t.dtype is not dtype and not (autocast and t.dtype in DTYPES):
            return False
    return (autocast or dtype) in (CPU_DTYPES if value.is_cpu else GPU_DTYPES)


def _autocast(value: Tensor) -> torch.dtype | None:
    """The dtype that autocast would have the products compute in."""
    return None if value.dtype is torch.float64 else autocast_dtype(value.device)
