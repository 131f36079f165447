"""From a checked conv_pool problem to launches of its Triton kernels: shapes, strides, tiles, splits.

Nothing here touches a device, so the tests compile the very same launches ahead of time from meta tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from interfuse.kernels import conv_pool_kernels as kernels
from interfuse.kernels.launch import (
    Launch,
    Tile,
    allows_tf32,
    interpreting,
    multiprocessors,
    power_of_two,
    reach,
)

from interfuse.bounded_cache import BoundedCache
from interfuse.ops._conv_pool_problem import memory_format

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from interfuse.ops._conv_pool_problem import ConvPoolParams, ConvPoolProblem

# Below this many channels per group, (channel, tap) is one reduction index: a matrix unit takes 16 at a time.
FEW_CHANNELS = 16
# Offsets stay below this with 32 bits; the slack is what masked lanes may run past the end.
LARGEST_32_BIT = 2**31 - 2**24
STEPS_OF_A_SPLIT = 8


@dataclass(frozen=True)
class Geometry:
    """A problem with three spatial dimensions (d, h, w), whatever it came with."""

    batch: int
    groups: int
    channels: int  # per group
    filters: int  # per group
    input: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pad: tuple[int, ...]  # low side; the high side only shows in the sizes
    dilation: tuple[int, ...]
    conv: tuple[int, ...]
    window: tuple[int, ...]
    window_stride: tuple[int, ...]
    window_pad: tuple[int, ...]
    out: tuple[int, ...]

    @staticmethod
    def of(problem: ConvPoolProblem) -> Geometry:
        p = problem.params

        def three(values: Sequence[int], fill: int) -> tuple[int, ...]:
            return (fill,) * (3 - len(values)) + tuple(values)

        return Geometry(
            batch=problem.batch,
            groups=p.groups,
            channels=problem.in_channels // p.groups,
            filters=problem.out_channels // p.groups,
            input=three(problem.input, 1),
            kernel=three(problem.kernel, 1),
            stride=three(p.stride, 1),
            pad=three(p.padding[0::2], 0),
            dilation=three(p.dilation, 1),
            conv=three(problem.conv_sizes, 1),
            window=three(p.pool_size, 1),
            window_stride=three(p.pool_stride, 1),
            window_pad=three(p.pool_padding, 0),
            out=three(problem.out_sizes, 1),
        )

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def flat(self) -> bool:
        return self.channels < FEW_CHANNELS and self.taps > 1

    @property
    def reduction(self) -> int:
        """Weights of a filter that are one run of the reduction."""
        return self.channels * self.taps if self.flat else self.channels

    @property
    def places_at_once(self) -> int:
        """Places of a pooling window inside one tile: the largest power of two that divides the window."""
        places = math.prod(self.window)
        return min(places & -places, 16)

    @property
    def residue_steps(self) -> tuple[int, ...]:
        """Input positions of one residue modulo the stride, per dimension."""
        return tuple(math.ceil(size / s) for size, s in zip(self.input, self.stride, strict=True))

    def convolution(self) -> dict[str, object]:
        """The kernels' constants of the convolution."""
        return {
            "GROUPS": self.groups,
            "CHANNELS": self.channels,
            "FILTERS": self.filters,
            "KERNEL": self.kernel,
            "STRIDE": self.stride,
            "PAD": self.pad,
            "DILATION": self.dilation,
        }

    def pooling(self, apart: bool = True) -> dict[str, object]:
        """The kernels' constants of the pooling; where the gradient is spread already, there is none."""
        if not apart:
            return {"WINDOW": (1, 1, 1), "WSTRIDE": (1, 1, 1), "WPAD": (0, 0, 0)}
        return {"WINDOW": self.window, "WSTRIDE": self.window_stride, "WPAD": self.window_pad}


def _sizes(prefix: str, sizes: Sequence[int]) -> dict[str, int]:
    return {f"{prefix}_{axis}": size for axis, size in zip("dhw", sizes, strict=True)}


def _input_strides(x: Tensor) -> dict[str, int]:
    n, c, *rest = x.stride()
    return {"x_n": n, "x_c": c, **_sizes("x", [0] * (3 - len(rest)) + rest)}


def _dense_strides(
    prefix: str, channel: str, channels: int, pixels: int, channels_last: bool
) -> dict[str, int]:
    """Strides of a dense tensor by image, channel and pixel."""
    steps = (channels * pixels, 1, channels) if channels_last else (channels * pixels, pixels, 1)
    return {f"{prefix}_{axis}": step for axis, step in zip(("n", channel, "p"), steps, strict=True)}


def _weight_layout(weight: Tensor, flat: bool) -> tuple[Tensor, dict[str, int]]:
    """The weight as the products read it, and its strides by filter, channel and tap.

    Tap by tap, a tile's channels should lie together: one small copy a call, never stale. A weight that is
    channels_last already is that copy.
    """
    channels = weight.shape[1]
    rows = weight.flatten(2)
    taps = rows.shape[2]
    if flat or taps == 1:
        return rows.contiguous(), {"weight_k": channels * taps, "weight_c": taps, "weight_t": 1}
    return rows.transpose(1, 2).contiguous(), {
        "weight_k": channels * taps,
        "weight_c": 1,
        "weight_t": channels,
    }


def _arithmetic(dtype: torch.dtype, params: ConvPoolParams) -> str:
    """How a product of float32 is done; the shorter types have one way only."""
    tf32 = dtype == torch.float32 and params.precision != "highest" and allows_tf32()
    return "tf32" if tf32 else "ieee"


@dataclass(frozen=True)
class Product:
    """A matrix product as tiles are chosen for it."""

    kernel: str
    rows: int  # channels
    cols: int  # pixels, or weights of one filter
    depth: int  # reduction steps
    dtype: torch.dtype
    arithmetic: str
    heavy: bool  # programs hold more than accumulators: running maxima, or coordinates of every element
    device: torch.device


def forward_product(problem: ConvPoolProblem, g: Geometry) -> Product:
    pixels = problem.batch * math.prod(g.out) * g.places_at_once
    keeps = problem.save and problem.params.pool == "max" and bool(problem.params.saves_pre)
    heavy = g.flat or math.prod(g.window) > g.places_at_once or keeps
    return _product("forward", problem, g.filters, pixels, g.reduction, heavy)


def input_gradient_product(problem: ConvPoolProblem, g: Geometry) -> Product:
    return _product(
        "input_gradient",
        problem,
        g.channels,
        problem.batch * math.prod(g.residue_steps),
        g.filters,
        heavy=False,
    )


def weight_gradient_product(problem: ConvPoolProblem, g: Geometry) -> Product:
    return _product(
        "weight_gradient", problem, g.filters, g.reduction, problem.batch * math.prod(g.conv), g.flat
    )


def _product(kernel: str, problem: ConvPoolProblem, rows: int, cols: int, depth: int, heavy: bool) -> Product:
    return Product(
        kernel,
        rows,
        cols,
        depth,
        problem.dtype,
        _arithmetic(problem.dtype, problem.params),
        heavy,
        problem.device,
    )


# The tiles that were measured, where somebody asked for that; otherwise the first candidate is taken.
tuned: BoundedCache[Tile] = BoundedCache(256)


def choose_tile(product: Product) -> Tile:
    return tuned.get(product) or candidates(product)[0]


def candidates(product: Product) -> list[Tile]:
    """At most four tiles worth trying, the likeliest first; none spills on the architectures tested."""
    vector_units = product.dtype == torch.float32 and product.arithmetic == "ieee"
    most = 64 if product.heavy or vector_units else 128
    rows, cols = power_of_two(product.rows, 16, most), power_of_two(product.cols, 16, most)
    if vector_units:
        depth, stages = 16, 2
    else:
        deep = 64 if product.dtype != torch.float32 and rows >= 64 and not product.heavy else 32
        depth, stages = power_of_two(product.depth, 16, deep), 3
    # Accumulators that a thread may hold beside everything else that it has in registers.
    share = 8 if product.kernel == "weight_gradient" else 16 if product.heavy else 32

    def tile(rows: int, cols: int, stages: int) -> Tile:
        return Tile(rows, cols, depth, 8 if rows * cols > 128 * share else 4, stages)

    found = [
        tile(rows, cols, stages),
        tile(rows, max(cols // 2, 16), stages),
        tile(max(rows // 2, 16), cols, stages),
        tile(rows, cols, stages - 1),
    ]
    return list(dict.fromkeys(found))


def forward_launches(
    problem: ConvPoolProblem,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    index: Tensor,
    pre: Tensor,
) -> list[Launch]:
    """What fills y, and index and pre where training wants them (they are empty otherwise)."""
    p, g = problem.params, Geometry.of(problem)
    channels, out_pixels, conv_pixels = problem.out_channels, math.prod(g.out), math.prod(g.conv)
    product = forward_product(problem, g)
    tile, per = choose_tile(product), g.places_at_once
    packed, weight_strides = _weight_layout(weight, g.flat)
    pooled = problem.batch * out_pixels
    cols = max(tile.cols // per, 1)
    increasing = p.activation in ("none", "relu", "tanh", "sigmoid") or (
        p.activation == "leaky_relu" and p.negative_slope > 0
    )
    return [
        Launch(
            kernels.forward,
            math.ceil(g.filters / tile.rows) * g.groups * math.ceil(pooled / cols),
            {
                "x": x,
                "weight": packed,
                "bias": None if bias is None else bias.contiguous(),
                "y": y,
                "index": index if index.numel() else None,
                "pre": pre if pre.numel() else None,
                "pooled": pooled,
                **_sizes("in", g.input),
                **_sizes("conv", g.conv),
                **_sizes("out", g.out),
                **_input_strides(x),
                **weight_strides,
                **_dense_strides("y", "k", channels, out_pixels, problem.channels_last),
                **_dense_strides("pre", "k", channels, conv_pixels, problem.channels_last),
                "slope": p.negative_slope,
            },
            {
                **g.convolution(),
                **g.pooling(),
                "ACTIVATION": p.activation,
                "POOL": p.pool,
                "POOL_FIRST": p.pool == "max" and increasing,
                "COUNT_PAD": p.count_include_pad,
                "PRECISION": product.arithmetic,
                "FLAT": g.flat,
                "WIDE": max(reach(x, weight, y, pre), pooled * per) > LARGEST_32_BIT,
                "WIDEN": interpreting(),
                "PER": per,
                **tile.constants(),
                "COLS": cols,
            },
            tile.warps,
            tile.stages,
        )
    ]


@dataclass(frozen=True)
class Gradient:
    """The gradient before bias and activation: at the convolution's resolution, or pooled with an index."""

    values: Tensor
    index: Tensor | None
    pixels: int
    strides: dict[str, int]
    out: tuple[int, ...]

    @property
    def pooled(self) -> bool:
        return self.index is not None

    def args(self) -> dict[str, Tensor | int | float | None]:
        return {"grad": self.values, "index": self.index, **_sizes("out", self.out), **self.strides}


def gradient_before_activation(
    problem: ConvPoolProblem, grad_y: Tensor, y: Tensor | None, index: Tensor, pre: Tensor
) -> tuple[list[Launch], Gradient]:
    """What the products read as the convolution's gradient, and the launches that compute it.

    After a max pool of disjoint windows that is grad_y itself at the pooled resolution, times the
    activation's derivative where the index does not hold it already. Overlapping windows and averages are
    gathered once to the convolution's resolution.
    """
    p, g = problem.params, Geometry.of(problem)
    channels, form = problem.out_channels, memory_format(problem)
    disjoint = all(stride >= size for stride, size in zip(g.window_stride, g.window, strict=True))
    stays = p.pool == "none" or (p.pool == "max" and disjoint)
    saved = pre if p.saves_pre else y if p.backward_needs_y else None
    out = g.out if stays else g.conv
    pixels = math.prod(out)
    launches: list[Launch] = []
    values = grad_y
    if saved is not None or not stays:
        shape = grad_y.shape if stays else (problem.batch, channels, *problem.conv_sizes)
        values = torch.empty(shape, dtype=grad_y.dtype, device=grad_y.device, memory_format=form)
        total, block = values.numel(), 1024 if stays else 256
        launches.append(
            Launch(
                kernels.spread_gradient,
                math.ceil(total / block),
                {
                    "grad": grad_y,
                    "index": index if p.pool == "max" else None,
                    "saved": saved,
                    "out": values,
                    "total": total,
                    **_sizes("conv", g.conv),
                    **_sizes("out", g.out),
                    "slope": p.negative_slope,
                },
                {
                    "FILTERS": channels,
                    **g.pooling(),
                    "ACTIVATION": p.activation,
                    "POOL": "none" if stays else p.pool,
                    "COUNT_PAD": p.count_include_pad,
                    "CHANNELS_LAST": problem.channels_last,
                    "WIDE": reach(values, grad_y) > LARGEST_32_BIT,
                    "BLOCK": block,
                },
            )
        )
    return launches, Gradient(
        values,
        index if stays and p.pool == "max" else None,
        pixels,
        _dense_strides("grad", "k", channels, pixels, problem.channels_last),
        out,
    )


def input_gradient_launch(
    problem: ConvPoolProblem, gradient: Gradient, weight: Tensor, grad_x: Tensor
) -> Launch:
    g = Geometry.of(problem)
    product = input_gradient_product(problem, g)
    tile, steps, pixels = choose_tile(product), g.residue_steps, product.cols
    packed, weight_strides = _weight_layout(weight, flat=False)
    common = tuple(math.gcd(s, d) for s, d in zip(g.stride, g.dilation, strict=True))
    inverse = tuple(pow(d // c, -1, s // c) for s, d, c in zip(g.stride, g.dilation, common, strict=True))
    programs = (
        math.ceil(g.channels / tile.rows) * g.groups * math.prod(g.stride) * math.ceil(pixels / tile.cols)
    )
    return Launch(
        kernels.input_gradient,
        programs,
        {
            **gradient.args(),
            "weight": packed,
            "out": grad_x,
            "pixels": pixels,
            **_sizes("in", g.input),
            **_sizes("step", steps),
            **_sizes("conv", g.conv),
            **weight_strides,
            **_dense_strides("x", "c", problem.in_channels, math.prod(g.input), problem.channels_last),
        },
        {
            **g.convolution(),
            **g.pooling(gradient.pooled),
            "COMMON": common,
            "INVERSE": inverse,
            "PRECISION": product.arithmetic,
            "WIDE": max(reach(gradient.values, weight, grad_x), pixels) > LARGEST_32_BIT,
            "WIDEN": interpreting(),
            **tile.constants(),
        },
        tile.warps,
        tile.stages,
    )


def _splits(programs: int, steps: int, device: torch.device) -> int:
    """How often a long reduction is split: to fill the device, but not into less work than the sum costs."""
    return max(1, min(steps // STEPS_OF_A_SPLIT, 2 * multiprocessors(device) // programs))


def _reduction(kernel: Launch, out: Tensor, splits: int) -> list[Launch]:
    """The splits' partial results, then their sum; a reduction in one piece writes its result at once."""
    if splits == 1:
        return [replace(kernel, args={**kernel.args, "out": out})]
    parts = torch.empty((splits, out.numel()), dtype=torch.float32, device=out.device)
    return [
        replace(kernel, programs=kernel.programs * splits, args={**kernel.args, "out": parts}),
        Launch(
            kernels.sum_splits,
            math.ceil(out.numel() / 256),
            {"parts": parts, "out": out, "total": out.numel(), "splits": splits},
            {"BLOCK": 256},
        ),
    ]


def weight_gradient_launches(
    problem: ConvPoolProblem, gradient: Gradient, x: Tensor, grad_weight: Tensor
) -> list[Launch]:
    g = Geometry.of(problem)
    product = weight_gradient_product(problem, g)
    tile = choose_tile(product)
    places = problem.batch * gradient.pixels * (math.prod(g.window) if gradient.pooled else 1)
    col_tiles = (
        math.ceil(g.channels * g.taps / tile.cols) if g.flat else g.taps * math.ceil(g.channels / tile.cols)
    )
    programs = math.ceil(g.filters / tile.rows) * col_tiles * g.groups
    splits = _splits(programs, math.ceil(places / tile.depth), x.device)
    per_split = math.ceil(math.ceil(places / splits) / tile.depth) * tile.depth
    return _reduction(
        Launch(
            kernels.weight_gradient,
            programs,
            {
                **gradient.args(),
                "x": x,
                "places": places,
                "per_split": per_split,
                **_sizes("in", g.input),
                **_sizes("conv", g.conv),
                **_input_strides(x),
            },
            {
                **g.convolution(),
                **g.pooling(gradient.pooled),
                "PRECISION": product.arithmetic,
                "FLAT": g.flat,
                "WIDE": max(reach(gradient.values, x), places, splits * grad_weight.numel()) > LARGEST_32_BIT,
                "WIDEN": interpreting(),
                **tile.constants(),
            },
            tile.warps,
            tile.stages,
        ),
        grad_weight,
        splits,
    )


def bias_gradient_launches(problem: ConvPoolProblem, gradient: Gradient, grad_bias: Tensor) -> list[Launch]:
    pixels = problem.batch * gradient.pixels
    rows = power_of_two(problem.out_channels, 1, 32 if problem.channels_last else 4)
    cols = 1024 // rows
    programs = math.ceil(problem.out_channels / rows)
    splits = _splits(programs, math.ceil(pixels / cols), grad_bias.device)
    per_split = math.ceil(math.ceil(pixels / splits) / cols) * cols
    return _reduction(
        Launch(
            kernels.bias_gradient,
            programs,
            {
                "grad": gradient.values,
                "index": gradient.index,
                "pixels": pixels,
                "per_split": per_split,
                "size": gradient.pixels,
                **gradient.strides,
            },
            {
                "FILTERS": problem.out_channels,
                "WIDE": max(reach(gradient.values), pixels) > LARGEST_32_BIT,
                "ROWS": rows,
                "COLS": cols,
            },
        ),
        grad_bias,
        splits,
    )


def backward_launches(
    problem: ConvPoolProblem,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    index: Tensor,
    pre: Tensor,
    grads: Sequence[Tensor | None],
) -> list[Launch]:
    """What fills grad_x, grad_weight and grad_bias, where they are given."""
    grad_x, grad_weight, grad_bias = grads
    grad_y = grad_y.contiguous(memory_format=memory_format(problem))
    launches, gradient = gradient_before_activation(problem, grad_y, y, index, pre)
    if grad_x is not None:
        launches.append(input_gradient_launch(problem, gradient, weight, grad_x))
    if grad_weight is not None:
        launches += weight_gradient_launches(problem, gradient, x, grad_weight)
    if grad_bias is not None:
        launches += bias_gradient_launches(problem, gradient, grad_bias)
    return launches
