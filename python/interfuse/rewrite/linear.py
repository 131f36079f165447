"""How optimize() recognises linear: nn.Linear, with the concatenation before it and the activation behind it,
where there are such."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from interfuse.ops._dtypes import CPU_KERNEL_DTYPES, DTYPES, KERNEL_DTYPES
from interfuse.ops._linear_checks import Options, check, resolve
from interfuse.ops.linear import IMPLEMENTATIONS, linear
from interfuse.rewrite.known import (
    FORWARDS,
    PLAIN_TENSORS,
    activation_of,
    autocast_of,
    is_ours,
    is_quantised,
    tried,
    why_not_module,
)
from interfuse.rewrite.site import Call, LiveLink, Match, Pattern, StaticLink, choose_kernel, wants_gradient
from interfuse.torch_state import current_parameters, is_untouched

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)

# In inference torch's own concatenation and product were measured to be as fast below these sizes. Torch
# 2.13, two cores with AVX-512, 1 to 2048 rows, 32 to 3072 columns, 16 to 1024 outputs.
LEAST_ROWS = 8
LEAST_PRODUCTS = 4_000_000  # rows times columns times outputs


class Seen(NamedTuple):
    """A call in words: shapes and dtypes, and the settings."""

    tensors: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]  # inputs, weight, bias
    device: torch.device
    autocast: torch.dtype | None
    settings: dict[str, Any]
    save: bool


class Linear(Pattern):
    """linear's part in optimize()."""

    op = "linear"
    whole = False

    def anchors(self, module: nn.Module) -> bool:
        # Its subclass in MultiheadAttention is never called.
        return is_quantised(module, "linear") or (
            isinstance(module, nn.Linear)
            and not is_ours(module)
            and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        )

    def leads(self, callee: object) -> bool:
        return any(callee is concatenation for concatenation in CONCATENATIONS)

    def refuse(self, module: nn.Module) -> str | None:
        reason = why_not_module(module, (nn.Linear,), "nn.Linear")
        if reason is not None:
            return reason
        if module.weight.dtype not in DTYPES:
            return f"its weight is {module.weight.dtype}; the kernels take float32, bfloat16 and float16"
        return None

    def match(self, links: Sequence[StaticLink], end: str) -> Match | str:
        joins = any(map(self.leads, links[0].callees))
        if joins and _dimension(links[0].arguments, links[0].keywords) == 0:
            return f"{links[0].text}, which gives its input, does not join the last dimension"
        taken = 1 + joins
        if len(links) > taken:
            following = links[taken]
            if any(
                tried(activation_of, callee, following.arguments, following.keywords)
                for callee in following.callees
            ):
                taken += 1
            else:
                end = f"{following.text} follows, which is no activation of the kernel's"
        text = " -> ".join(link.text for link in links[:taken])
        # torch's own products are as fast where many rows come at once: only measuring tells. For the
        # backward ours keeps the parts of a concatenation, which later code may overwrite; torch's keeps a
        # copy.
        return Match(taken, text, enabled=joins, reason=end, trains=False)

    def prepare(self, links: Sequence[LiveLink], value: Any) -> Call | None:
        parts = [value]
        joins = self.leads(links[0][0])
        if joins:
            found = _parts(value, *links[0][1:])
            if found is None:
                return None
            parts, links = found, links[1:]
        module, arguments, keywords = links[0]
        if (
            type(module) is not nn.Linear
            or arguments
            or keywords
            or not is_untouched(module, FORWARDS[nn.Linear])
        ):
            return None
        settings: dict[str, Any] = {}
        if len(links) > 1:
            activation = activation_of(*links[1])
            if activation is None or not activation.is_constant:
                return None
            settings = activation.settings()
        weight, bias = current_parameters(module, ["weight", "bias"])
        if not joins:
            return Call((value, weight, bias), settings) if fits(value, weight, bias) else None
        widths = tuple(part.shape[-1] for part in parts)
        if not fits(parts[0], weight, bias, sum(widths)):
            return None
        return Call((*parts, weight, bias), settings, lambda tensors: list(tensors[:-2]), widths)

    def run(self, call: Call) -> Tensor:
        *inputs, weight, bias = call.tensors
        return linear(inputs, weight, bias, **call.settings)

    def describe(self, call: Call) -> Seen:
        tensors = tuple(None if t is None else (tuple(t.shape), t.dtype) for t in call.tensors)
        x = call.tensors[0]
        return Seen(tensors, x.device, autocast_of(x), call.settings, wants_gradient(call))

    def kernel(self, seen: Seen) -> tuple[str | None, tuple[str, ...]]:
        *inputs, weight = (
            torch.empty(t[0], dtype=seen.autocast or t[1], device="meta")
            for t in seen.tensors[:-1]
            if t is not None
        )
        bias = None if seen.tensors[-1] is None else weight.new_empty(weight.shape[0])
        settings = {"activation": None, "negative_slope": 0.01, **seen.settings}
        params = resolve(Options(backend=None, **settings))
        problem = replace(check(inputs, weight, bias, None, params, seen.save), device=seen.device)
        return choose_kernel(IMPLEMENTATIONS, problem)

    def rather_not(self, seen: Seen) -> str | None:
        *inputs, weight, _ = (() if t is None else t[0] for t in seen.tensors)
        if len(inputs) == 1 or seen.device.type != "cpu":
            return None
        rows, (outputs, columns) = math.prod(inputs[0][:-1]), weight
        if rows >= LEAST_ROWS and rows * columns * outputs >= LEAST_PRODUCTS:
            return None
        return f"torch's own functions are as fast for {rows} rows of {columns} columns and {outputs} outputs"


def _dimension(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """The one that a concatenation joins, as its arguments say; None where they are not what it takes."""
    given = [*arguments, *keywords.values()]
    if len(given) > 1 or keywords.keys() - {"dim", "axis"}:
        return None
    return given[0] if given else 0


def _parts(value: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> list[Tensor] | None:
    """The tensors that are joined, if they are plain ones, alike but for their last dimension, along which
    they are joined. torch also joins others: empty ones, several dtypes."""
    dimension = _dimension(arguments, keywords)
    if type(value) not in (list, tuple) or not value or type(dimension) is not int:
        return None
    first = value[0]
    if any(type(part) not in PLAIN_TENSORS for part in value) or dimension not in (-1, first.dim() - 1):
        return None
    for part in value:
        if (
            not part.shape
            or not part.shape[-1]
            or part.shape[:-1] != first.shape[:-1]
            or part.dtype is not first.dtype
            or part.device != first.device
            or part.layout is not torch.strided
            or part.is_nested
        ):
            return None
    return list(value)


def fits(value: Any, weight: Any, bias: Any, width: int | None = None) -> bool:
    """Whether the op computes this. What it does not, the modules themselves compute or refuse. `width` is
    that of all inputs together, where the value is the first of several."""
    parameters = (weight,) if bias is None else (weight, bias)
    if any(type(t) not in PLAIN_TENSORS for t in (value, *parameters)):
        return False
    if value.layout is not torch.strided or value.is_nested or not value.dim():
        return False
    if weight.dim() != 2 or not weight.shape[1] or (width or value.shape[-1]) != weight.shape[1]:
        return False
    dtype, autocast = value.dtype, autocast_of(value)
    for t in parameters:
        if t.device != value.device or t.layout is not torch.strided:
            return False
        if t.dtype is not dtype and not (autocast and t.dtype in DTYPES):
            return False
    return (autocast or dtype) in (CPU_KERNEL_DTYPES if value.is_cpu else KERNEL_DTYPES)
