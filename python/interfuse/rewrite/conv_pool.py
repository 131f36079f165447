"""How optimize() recognises conv_pool: a convolution, then an activation, then a pool, each torch's own."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from interfuse.numerics import get_precision
from interfuse.ops import _conv_pool_native as native
from interfuse.ops._conv_pool_checks import Options, check, resolve
from interfuse.ops._dtypes import CPU_KERNEL_DTYPES, DTYPES, KERNEL_DTYPES
from interfuse.ops.conv_pool import IMPLEMENTATIONS, conv_pool, pad_by_mode
from interfuse.rewrite.known import (
    CONVOLUTIONS,
    FORWARDS,
    PLAIN_TENSORS,
    Activation,
    Pool,
    activation_of,
    autocast_of,
    is_quantised,
    pool_of,
    touched,
    tried,
    why_not_module,
)
from interfuse.rewrite.site import Call, LiveLink, Match, Pattern, StaticLink, choose_kernel, wants_gradient
from interfuse.torch_state import is_untouched

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interfuse.ops._conv_pool_problem import ConvPoolProblem

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMALISATIONS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

# Without a pool a training step saves torch one function, and ours is one of Python's, which a small kernel
# does not pay for: such sites of up to 32 million products each cost whole models 0.03 to 1 ms a step, though
# timed by themselves they are faster.
LEAST_PRODUCTS = 64_000_000

# What conv_pool takes where a site says nothing.
CALL_DEFAULTS: dict[str, Any] = {
    "activation": None,
    "negative_slope": 0.01,
    "pool": None,
    "pool_size": 2,
    "pool_stride": None,
    "pool_padding": 0,
    "ceil_mode": False,
    "count_include_pad": True,
}


class Seen(NamedTuple):
    """A call in words: (shape, strides, dtype) of input, weight and bias, and the settings."""

    tensors: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None, ...]
    device: torch.device
    autocast: torch.dtype | None
    settings: dict[str, Any]
    save: bool


class ConvPool(Pattern):
    """conv_pool's part in optimize()."""

    op = "conv_pool"
    whole = False

    def anchors(self, module: nn.Module) -> bool:
        return isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) or is_quantised(module, "conv")

    def refuse(self, module: nn.Module) -> str | None:
        if isinstance(module, TRANSPOSED):
            return f"{type(module).__name__} is a transposed convolution, which has no fused kernel"
        reason = why_not_module(module, CONVOLUTIONS, "nn.Conv1d, Conv2d or Conv3d")
        if reason is not None:
            return reason
        dtype = module.weight.dtype
        if dtype not in DTYPES:
            return f"its weight is {dtype}; the kernels take float32, bfloat16, float16 and float64"
        return None

    def match(self, links: Sequence[StaticLink], end: str) -> Match | str:
        dimensions = {CONVOLUTIONS[type(c)] for c in links[0].callees if type(c) in CONVOLUTIONS}
        if len(dimensions) != 1:
            return "the loop that calls it goes over convolutions of different dimensions"
        spatial = dimensions.pop()
        taken = 1
        activation = _first_activation(links, taken)
        taken += activation is not None
        pool = _first_pool(links, taken, spatial)
        taken += isinstance(pool, Pool)
        if activation is None and isinstance(pool, Pool) and pool.kind == "max":
            after = _first_activation(links, taken)
            taken += after is not None and after.increasing
        text = " -> ".join(link.text for link in links[:taken])
        if taken == len(links):
            reason = end
        elif isinstance(pool, str):
            reason = f"{links[taken].text}, which follows, {pool}"
        else:
            reason = _why_not_link(links[taken])
        return Match(taken, text, enabled=taken > 1, reason=reason)

    def prepare(self, links: Sequence[LiveLink], value: Any) -> Call | None:
        conv, arguments, keywords = links[0]
        spatial = CONVOLUTIONS.get(type(conv))
        if (
            spatial is None
            or arguments
            or keywords
            or type(value) not in PLAIN_TENSORS
            or not is_untouched(conv, FORWARDS[type(conv)])
        ):
            return None
        parameters = conv.__dict__["_parameters"]  # a parameter is found here three times as fast
        weight = parameters.get("weight")
        bias = parameters.get("bias")
        if weight is None or (bias is None and "bias" not in parameters):
            weight, bias = conv.weight, conv.bias  # plain attributes, as FSDP leaves them
        if not fits(value, weight, bias, conv.groups, spatial):
            return None
        settings = {
            "stride": conv.stride,
            "padding": conv.padding,
            "dilation": conv.dilation,
            "groups": conv.groups,
            "padding_mode": conv.padding_mode,
        }
        activation = pool = None
        for callee, arguments, keywords in links[1:]:
            if activation is None and (found := activation_of(callee, arguments, keywords)) is not None:
                if pool is not None and not (found.increasing and pool.kind == "max"):
                    return None
                activation = found
            elif pool is None and isinstance(pooling := pool_of(callee, arguments, keywords), Pool):
                pool = pooling
            else:
                return None
        if activation is not None:
            if not activation.is_constant:
                return None
            settings |= activation.settings()
        if pool is not None:
            if pool.spatial != spatial:
                return None
            settings |= pool.settings()
        return Call((value, weight, bias), settings)

    def run(self, call: Call) -> Tensor:
        return conv_pool(*call.tensors, **call.settings)

    def describe(self, call: Call) -> Seen:
        x = call.tensors[0]
        tensors = tuple(None if t is None else (tuple(t.shape), t.stride(), t.dtype) for t in call.tensors)
        return Seen(tensors, x.device, autocast_of(x), call.settings, wants_gradient(call))

    def kernel(self, seen: Seen) -> tuple[str | None, tuple[str, ...]]:
        def meta(t: tuple[Any, Any, torch.dtype] | None) -> Tensor | None:
            return (
                None
                if t is None
                else torch.empty_strided(t[0], t[1], dtype=seen.autocast or t[2], device="meta")
            )

        x, weight, bias = map(meta, seen.tensors)
        if x is None or weight is None:
            raise TypeError("a call of conv_pool has an input and a weight; neither may be None.")
        settings = CALL_DEFAULTS | seen.settings
        mode = settings["padding_mode"]
        params = resolve(tuple(weight.shape[2:]), Options(backend=None, **settings), get_precision())
        x = x if x.dim() == weight.dim() else x.unsqueeze(0)
        if mode != "zeros":
            x, params = pad_by_mode(x, params, mode)
        problem = replace(check(x, weight, bias, params, seen.save), device=seen.device)
        kernel, why_not = choose_kernel(IMPLEMENTATIONS, problem, _trains_slower(seen))
        return _algorithm(problem) if kernel == "native" else kernel, why_not


def _trains_slower(seen: Seen) -> str | None:
    """Why torch's own functions are to train a convolution, even where it was measured alone to be slower."""
    if not seen.save or seen.settings.get("pool") or seen.device.type != "cpu":
        return None
    (x, *_), (weight, *_) = (t for t in seen.tensors[:2] if t is not None)
    spatial = len(weight) - 2
    strides = seen.settings["stride"]
    pixels = math.prod(x[: len(x) - spatial - 1]) * math.prod(
        size // step for size, step in zip(x[-spatial:], strides, strict=True)
    )
    if pixels * math.prod(weight) >= LEAST_PRODUCTS:
        return None
    return (
        f"torch's own functions train as fast where no pool follows and there are less than "
        f"{LEAST_PRODUCTS // 1_000_000} million products"
    )


def _algorithm(problem: ConvPoolProblem) -> str:
    """The core's, and why none before it in its table; in one dimension there is no other."""
    name, why = native.describe(problem)
    if problem.spatial == 1 or not why.startswith("Not "):
        return f"native, {name}"
    return f"native, {name} (n{why[1:].rstrip('.')})"


def fits(value: Tensor, weight: Any, bias: Any, groups: int, spatial: int) -> bool:
    """Whether the op computes this. What it does not, the modules themselves compute, or say what is
    wrong."""
    if type(weight) not in PLAIN_TENSORS or (bias is not None and type(bias) not in PLAIN_TENSORS):
        return False
    if value.dim() - spatial not in (1, 2) or value.shape[-spatial - 1] != weight.shape[1] * groups:
        return False
    if value.layout is not torch.strided or weight.layout is not torch.strided or value.is_nested:
        return False
    on_cpu = value.is_cpu
    if on_cpu != weight.is_cpu:
        return False
    dtype = value.dtype
    autocast = autocast_of(value)
    if autocast and dtype in DTYPES and weight.dtype in DTYPES:
        dtype = autocast
    elif dtype is not weight.dtype:
        return False
    return dtype in (CPU_KERNEL_DTYPES if on_cpu else KERNEL_DTYPES)


def _read_at(read: Any, links: Sequence[StaticLink], at: int) -> list[Any]:
    """What each callee of the link at this place is read as; nothing where there is no further link."""
    return [
        tried(read, callee, link.arguments, link.keywords)
        for link in links[at : at + 1]
        for callee in link.callees
    ]


def _first_activation(links: Sequence[StaticLink], at: int) -> Activation | None:
    return next((f for f in _read_at(activation_of, links, at) if isinstance(f, Activation)), None)


def _first_pool(links: Sequence[StaticLink], at: int, spatial: int) -> Pool | str | None:
    found = _read_at(pool_of, links, at)
    return next(
        (f for f in found if isinstance(f, str) or (isinstance(f, Pool) and f.spatial == spatial)), None
    )


def _why_not_link(link: StaticLink) -> str:
    for callee in link.callees:
        if isinstance(callee, nn.Module):
            watched = touched(callee)
            if watched:
                return f"{link.text}, which follows, {watched}"
            if isinstance(callee, NORMALISATIONS):
                return f"{link.text} follows; normalisation is not folded into convolutions"
            if isinstance(callee, DROPOUTS):
                return f"{link.text} follows, which reads the value in training"
    return f"{link.text} follows, which is no activation or pool of the kernel's"
