"""The launches of a linear problem, listed without touching a device (kernels in linear_kernels.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from interfuse.kernels import linear_kernels as kernels
from interfuse.kernels.launch import Launch, Tile, interpreting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from interfuse.ops._linear_problem import LinearProblem

MOST_INPUTS = 4
ELEMENTWISE = 1024


def _divided(count: int, by: int) -> int:
    return -(-count // by)


def _tile(rows: int, cols: int, dtype: torch.dtype, precision: str) -> Tile:
    """A tile no larger than the result, small where products run on the vector units."""
    side = 64 if dtype != torch.float32 or precision == "tf32" else 32
    side = 16 if interpreting() else side

    def fitting(size: int, most: int) -> int:
        return max(16, min(most, 1 << max(0, size - 1).bit_length()))

    return Tile(
        rows=fitting(rows, side), cols=fitting(cols, 2 * side), depth=16 if interpreting() else 32,
        warps=4, stages=3 if dtype != torch.float32 else 2,
    )  # fmt: skip


def _arithmetic(problem: LinearProblem) -> dict[str, object]:
    tf32 = problem.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {"PRECISION": "tf32" if tf32 else "ieee", "WIDEN": interpreting()}


def forward_launches(
    problem: LinearProblem,
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    y: Tensor,
    pre: Tensor | None,
) -> list[Launch]:
    """`inputs` are (rows, width) with stride 1 along a row."""
    p, arithmetic = problem, _arithmetic(problem)
    tile = _tile(p.rows, p.out_features, p.dtype, str(arithmetic["PRECISION"]))
    softmax = p.params.activation == "softmax"
    # What softmax reads has not been rounded to fewer bits.
    z = torch.empty_like(y, dtype=torch.float32) if softmax and y.dtype != torch.float32 else y
    missing = [None] * (MOST_INPUTS - len(inputs))
    given = [*inputs, *missing]
    args: dict[str, Tensor | int | float | None] = {}
    for i, x in enumerate(given):
        args |= {
            f"x{i}": x,
            f"row{i}": 0 if x is None else x.stride(0),
            f"width{i}": 0 if x is None else x.shape[1],
        }
    args |= {"weight": weight, "bias": bias, "scale": scale, "y": z, "pre": pre, "row_count": p.rows,
             "outputs": p.out_features, "depth": p.depth, "slope": p.params.negative_slope}  # fmt: skip
    programs = _divided(p.rows, tile.rows) * _divided(p.out_features, tile.cols)
    activation = "none" if softmax else p.params.activation
    constants = {"ACTIVATION": activation, **arithmetic, **tile.constants()}
    launches = [Launch(kernels.forward, programs, args, constants, tile.warps, tile.stages)]
    if softmax:
        cols = 16 if interpreting() else ELEMENTWISE
        rest: dict[str, Tensor | int | float | None] = {"z": z, "y": y, "outputs": p.out_features}
        launches.append(Launch(kernels.softmax, p.rows, rest, {"COLS": cols}))
    return launches


def _product(
    problem: LinearProblem, a: Tensor, b: Tensor, c: Tensor, rows: int, columns: int, depth: int, turned: bool
) -> Launch:
    """c = a b, or c = a^T b where `turned`."""
    arithmetic = _arithmetic(problem)
    tile = _tile(rows, columns, problem.dtype, str(arithmetic["PRECISION"]))
    a_row, a_step = (1, a.stride(0)) if turned else (a.stride(0), 1)
    args: dict[str, Tensor | int | float | None] = {
        "a": a, "b": b, "c": c, "a_row": a_row, "a_step": a_step, "b_step": b.stride(0), "c_row": c.stride(0),
        "row_count": rows, "column_count": columns, "depth": depth}  # fmt: skip
    programs = _divided(rows, tile.rows) * _divided(columns, tile.cols)
    return Launch(
        kernels.product, programs, args, {**arithmetic, **tile.constants()}, tile.warps, tile.stages
    )


def backward_launches(
    problem: LinearProblem,
    grad_y: Tensor,
    inputs: Sequence[Tensor],
    weight: Tensor,
    saved: Tensor | None,
    grads: Sequence[Tensor | None],
) -> list[Launch]:
    """`grads` are those of the inputs (rows, width), the weight and the bias, None where not wanted.

    `saved` is the output or the value before the activation; None without an activation.
    """
    p, launches = problem, []
    *by_inputs, by_weight, by_bias = grads
    grad = grad_y
    if saved is not None:
        grad = torch.empty_like(grad_y)
        args: dict[str, Tensor | int | float | None] = {"grad": grad_y, "to": grad}
        if p.params.activation == "softmax":
            args |= {"y": saved, "outputs": p.out_features}
            cols = 16 if interpreting() else ELEMENTWISE
            launches.append(Launch(kernels.softmax_gradient, p.rows, args, {"COLS": cols}))
        else:
            count = grad_y.numel()
            args |= {"saved": saved, "count": count, "slope": p.params.negative_slope}
            constants = {"ACTIVATION": p.params.activation, "COLS": ELEMENTWISE}
            launches.append(Launch(kernels.gradient, _divided(count, ELEMENTWISE), args, constants))
    column = 0
    for x, to, width in zip(inputs, by_inputs, p.widths, strict=True):
        part = slice(column, column + width)
        if to is not None:
            launches.append(_product(p, grad, weight[:, part], to, p.rows, width, p.out_features, False))
        if by_weight is not None:
            launches.append(_product(p, grad, x, by_weight[:, part], p.out_features, width, p.rows, True))
        column += width
    if by_bias is not None:
        args = {"grad": grad, "to": by_bias, "row_count": p.rows, "outputs": p.out_features}
        constants = {"ROWS": 32, "COLS": 32}
        launches.append(Launch(kernels.column_sums, _divided(p.out_features, 32), args, constants))
    return launches
