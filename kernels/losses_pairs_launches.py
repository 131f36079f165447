"""The launches of the losses of two tensors, listed without touching a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from interfuse.kernels import losses_pairs_kernels as kernels
from interfuse.kernels.launch import Launch, Tile, interpreting, multiprocessors, power_of_two
from interfuse.kernels.losses_launches import divided, precision, tile_of

if TYPE_CHECKING:
    from torch import Tensor

    from interfuse.ops._losses_problem import CrossEntropyProblem, Elements, Similarity

# Elements that a program has at a time.
BLOCK = 1024
# What programs sum is added up by one program.
MOST_SUMS = 4096


def _block() -> int:
    return 16 if interpreting() else BLOCK


def _constants(e: Elements) -> dict[str, object]:
    # 32 bits where they are enough: weights are found by dividing each element's place by the columns.
    wide = e.input.numel() + 2 * _block() >= 2**31
    return {"BCE": e.kind == "bce_with_logits", "WIDE": wide, "BLOCK": _block()}


def _tensors(e: Elements) -> dict[str, Tensor | int | float | None]:
    return {
        "x": e.input, "target": e.target, "weight": e.weight.values, "weight_row": e.weight.strides[0],
        "weight_col": e.weight.strides[1], "pos_weight": e.pos_weight.values,
        "pos_row": e.pos_weight.strides[0], "pos_col": e.pos_weight.strides[1], "count": e.input.numel(),
        "columns": e.columns}  # fmt: skip


def elementwise_launch(e: Elements, losses: Tensor | None) -> tuple[Launch, Tensor]:
    """With the sums of its programs, which it writes where it writes no losses."""
    block, count, device = _block(), e.input.numel(), e.input.device
    programs = divided(count, block)
    if losses is None:
        programs = min(programs, 3 if interpreting() else min(16 * multiprocessors(device), MOST_SUMS))
    span = divided(divided(count, block), programs) * block if programs else block
    sums = torch.empty(divided(count, span), dtype=torch.float32, device=device)
    args = {**_tensors(e), "losses": losses, "sums": sums, "span": span}
    return Launch(kernels.elementwise, sums.numel(), args, _constants(e)), sums


def total_launch(sums: Tensor, scale: float, loss: Tensor) -> Launch:
    args: dict[str, Tensor | int | float | None] = {
        "sums": sums, "loss": loss, "count": sums.numel(), "scale": scale}  # fmt: skip
    return Launch(kernels.total, 1, args, {"BLOCK": _block()})


def elementwise_gradient_launch(e: Elements, scale: float, grad_loss: Tensor, grad: Tensor) -> Launch:
    args = {**_tensors(e), "grad_loss": grad_loss, "grad": grad, "scale": scale}
    constants = {**_constants(e), "EACH": e.reduction == "none"}
    return Launch(kernels.elementwise_gradient, divided(e.input.numel(), _block()), args, constants)


def _pairs_tile(columns: int) -> dict[str, int]:
    if interpreting():
        return {"ROWS": 4, "COLS": 16}
    cols = power_of_two(columns, 16, 256)
    return {"ROWS": BLOCK // cols, "COLS": cols}


def contrastive_launch(
    a: Tensor, b: Tensor, target: Tensor, margin: float, loss: Tensor, slope: Tensor
) -> Launch:
    rows, columns = a.shape
    args: dict[str, Tensor | int | float | None] = {
        "a": a, "b": b, "target": target, "loss": loss, "slope": slope, "row_count": rows,
        "columns": columns, "margin": margin}  # fmt: skip
    tile = _pairs_tile(columns)
    return Launch(kernels.contrastive, divided(rows, tile["ROWS"]), args, tile)


def contrastive_gradient_launch(
    a: Tensor, b: Tensor, slope: Tensor, grad_loss: Tensor, grad_a: Tensor, grad_b: Tensor
) -> Launch:
    rows, columns = a.shape
    args: dict[str, Tensor | int | float | None] = {
        "a": a, "b": b, "slope": slope, "grad_loss": grad_loss, "grad_a": grad_a, "grad_b": grad_b,
        "row_count": rows, "columns": columns}  # fmt: skip
    tile = _pairs_tile(columns)
    programs = divided(rows, tile["ROWS"]) * divided(columns, tile["COLS"])
    return Launch(kernels.contrastive_gradient, programs, args, tile)


def similarity_tile(problem: CrossEntropyProblem) -> tuple[Tile, int]:
    """Of the similarities, and how many features of the gradient a program has."""
    tile = tile_of(problem)
    if interpreting():
        return tile, 16
    # Registers hold the similarities and the gradient beside them.
    side = 64 if tile.cols == 128 else 32
    return Tile(tile.rows, side, tile.depth, tile.warps, tile.stages), power_of_two(problem.features, 16, 128)


def similarity_gradient_launch(
    problem: CrossEntropyProblem, s: Similarity, scale: Tensor, at_partner: Tensor, grad: Tensor
) -> Launch:
    """Of the gradient of s.input, with s.other the other modality."""
    tile, width = similarity_tile(problem)
    args: dict[str, Tensor | int | float | None] = {
        "x": s.input, "x_row": s.input.stride(0), "other": s.other, "lse": s.lse, "other_lse": s.other_lse,
        "scale": scale, "at_partner": at_partner, "grad": grad,
        "row_count": problem.rows, "features": problem.features}  # fmt: skip
    how = {"PRECISION": precision(problem), "WIDEN": interpreting()}
    constants = {**how, **tile.constants(), "WIDTH": width}
    programs = divided(problem.rows, tile.rows) * divided(problem.features, width)
    return Launch(kernels.similarity_gradient, programs, args, constants, tile.warps, tile.stages)
