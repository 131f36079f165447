"""The launches of linear_cross_entropy, listed without touching a device (kernels in losses_kernels.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from interfuse.kernels import losses_kernels as kernels
from interfuse.kernels.launch import Launch, Tile, interpreting, multiprocessors, power_of_two

if TYPE_CHECKING:
    from torch import Tensor

    from interfuse.ops._losses_problem import CrossEntropyProblem, Tensors

ROWS_COMBINED = 128
# Elements of the logits' gradient that exist at a time, and its rows at least: fewer would not fill a GPU.
CHUNK_ELEMENTS, LEAST_CHUNK_ROWS = 1 << 24, 256


def divided(count: int, by: int) -> int:
    return -(-count // by)


def chunk_rows(problem: CrossEntropyProblem) -> int:
    if interpreting():
        return 16  # several chunks in tests
    return max(LEAST_CHUNK_ROWS, CHUNK_ELEMENTS // problem.classes)


def precision(problem: CrossEntropyProblem) -> str:
    tf32 = problem.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def tile_of(problem: CrossEntropyProblem) -> Tile:
    """Small where products run on the vector units."""
    if interpreting():
        return Tile(rows=16, cols=16, depth=16, warps=4, stages=2)
    units = problem.dtype != torch.float32 or precision(problem) == "tf32"
    side = 64 if units else 32
    rows = power_of_two(problem.rows, 16, side)
    # With four warps, a whole tile of logits would leave too few registers for the rest.
    warps = 8 if rows == side else 4
    return Tile(rows=rows, cols=2 * side, depth=32, warps=warps, stages=3 if units else 2)


def _constants(problem: CrossEntropyProblem) -> dict[str, object]:
    return {
        "SMOOTH": problem.params.label_smoothing > 0,
        "PRECISION": precision(problem),
        "WIDEN": interpreting(),
        **tile_of(problem).constants(),
    }


@dataclass(frozen=True)
class Labels:
    """What follows from the labels alone, for each row: whether it counts, and its label's weight."""

    counts: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Parts:
    """What `sums` writes: for each part of the classes and row, and each row's label's logit."""

    size: int  # of a part, in classes
    top: Tensor
    total: Tensor
    weighted: Tensor
    label: Tensor


def empty_parts(problem: CrossEntropyProblem, device: torch.device) -> Parts:
    """As many parts as fill the device."""
    tile = tile_of(problem)
    tiles = divided(problem.classes, tile.cols)
    wanted = 2 if interpreting() else divided(2 * multiprocessors(device), divided(problem.rows, tile.rows))
    size = divided(tiles, min(wanted, tiles)) * tile.cols
    shape = (divided(problem.classes, size), problem.rows)
    top, total, weighted = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(3))
    # A label that is no class leaves the NaN.
    label = torch.full((problem.rows,), float("nan"), dtype=torch.float32, device=device)
    return Parts(size, top, total, weighted, label)


def sums_launch(problem: CrossEntropyProblem, t: Tensors, parts: Parts) -> Launch:
    tile = tile_of(problem)
    args: dict[str, Tensor | int | float | None] = {
        "x": t.input, "x_row": t.input.stride(0), "weight": t.linear_weight, "bias": t.linear_bias,
        "class_weight": t.weight, "target": t.target, "top": parts.top, "total": parts.total,
        "weighted": parts.weighted, "label": parts.label, "row_count": problem.rows,
        "classes": problem.classes, "features": problem.features, "part": parts.size}  # fmt: skip
    programs = divided(problem.rows, tile.rows) * parts.top.shape[0]
    return Launch(kernels.sums, programs, args, _constants(problem), tile.warps, tile.stages)


def combine_launch(
    problem: CrossEntropyProblem, parts: Parts, labels: Labels, weights: Tensor, loss: Tensor, lse: Tensor
) -> Launch:
    smoothing = problem.params.label_smoothing
    args: dict[str, Tensor | int | float | None] = {
        "top": parts.top, "total": parts.total, "weighted": parts.weighted, "label": parts.label,
        "of_label": labels.weight, "counts": labels.counts, "loss": loss, "lse": lse,
        "row_count": problem.rows, "parts": parts.top.shape[0], "smoothing": float(smoothing),
        "by_class": smoothing / problem.classes, "weights": weights}  # fmt: skip
    constants = {"SMOOTH": smoothing > 0, "ROWS": 16 if interpreting() else ROWS_COMBINED}
    return Launch(kernels.combine, divided(problem.rows, constants["ROWS"]), args, constants)


def gradient_launch(
    problem: CrossEntropyProblem,
    t: Tensors,
    lse: Tensor,
    by_softmax: Tensor,
    by_label: Tensor,
    by_class: Tensor,
    to: Tensor,
) -> Launch:
    """Of the rows of `to`; all tensors are of these rows."""
    tile = tile_of(problem)
    args: dict[str, Tensor | int | float | None] = {
        "x": t.input, "x_row": t.input.stride(0), "weight": t.linear_weight, "bias": t.linear_bias,
        "class_weight": t.weight, "target": t.target, "lse": lse, "by_softmax": by_softmax,
        "by_label": by_label, "by_class": by_class, "to": to, "row_count": to.shape[0],
        "classes": problem.classes, "features": problem.features}  # fmt: skip
    programs = divided(to.shape[0], tile.rows) * divided(problem.classes, tile.cols)
    return Launch(kernels.gradient, programs, args, _constants(problem), tile.warps, tile.stages)
