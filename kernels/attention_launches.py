"""The launches of an attention problem: arguments, tiles, and the arithmetic they multiply in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from interfuse.kernels import attention_kernels as kernels
from interfuse.kernels.launch import Launch, Tile, interpreting, power_of_two

from interfuse.numerics import get_precision

if TYPE_CHECKING:
    from torch import Tensor

    from interfuse.ops._attention_problem import AttentionProblem

LOG2E = 1.4426950408889634
WIDEST = 256  # of a head: the tiles hold whole rows
# That a thread may have: the assembler would otherwise spill some, so that more programs fit at a time.
MOST_REGISTERS = 255


def arithmetic(problem: AttentionProblem) -> str:
    """How a product of float32 is done, by torch's switch for them; the shorter types have one way only."""
    allowed = torch.backends.cuda.matmul.allow_tf32 and get_precision() != "highest"
    return "tf32" if problem.dtype == torch.float32 and allowed else "ieee"


def _blocks(problem: AttentionProblem) -> tuple[int, int]:
    return power_of_two(problem.head_dim, 16, WIDEST), power_of_two(problem.value_dim, 16, WIDEST)


def tile(problem: AttentionProblem, backward: bool) -> Tile:
    """Rows are queries, cols are keys. Such that nothing spills on the architectures tested."""
    widest = max(_blocks(problem))
    if problem.dtype == torch.float32 and arithmetic(problem) == "ieee":
        # Products on the vector units: operands and results all stand in registers.
        side = 32 if widest <= 64 else 16
        return Tile(side, side, widest, 8 if widest > 64 else 4, 1)
    row_bytes = widest * (4 if problem.dtype == torch.float32 else 2)
    if backward:
        side = 64 if row_bytes <= 128 else 32 if row_bytes <= 512 else 16
        return Tile(side, side, widest, 8, 2 if row_bytes <= 128 else 1)
    if row_bytes <= 128:
        return Tile(64 if problem.queries <= 64 else 128, 64, widest, 4 if problem.queries <= 64 else 8, 2)
    return Tile(64 if row_bytes <= 512 else 32, 32, widest, 8, 2 if row_bytes <= 256 else 1)


def _strides(**tensors: Tensor | None) -> dict[str, int]:
    """{name_batch, name_head, name_row: strides} of each; a mask's along the keys too."""
    found = {}
    for name, t in tensors.items():
        axes = ("batch", "head", "row", "col") if name == "mask" else ("batch", "head", "row")
        for axis, place in zip(axes, range(4), strict=False):
            found[f"{name}_{axis}"] = 0 if t is None else t.stride(place)
    return found


def _constants(problem: AttentionProblem, chosen: Tile) -> dict[str, Any]:
    p = problem
    depth, units = _blocks(p)
    return {
        "HEAD_DIM": p.head_dim, "VALUE_DIM": p.value_dim, "MASK": p.mask, "CAUSAL": p.params.causal,
        "PRECISION": arithmetic(p), "WIDEN": interpreting() and p.dtype == torch.bfloat16,
        "ROWS": chosen.rows, "COLS": chosen.cols, "DEPTH": depth, "UNITS": units,
    }  # fmt: skip


def _sizes(problem: AttentionProblem) -> dict[str, int | float]:
    p = problem
    return {"scale": p.params.scale * LOG2E, "heads": p.heads, "group": p.heads // p.kv_heads,
            "queries": p.queries, "keys": p.keys}  # fmt: skip


def _launch(
    kernel: Any, programs: int, args: dict[str, Any], constants: dict[str, Any], chosen: Tile
) -> Launch:
    return Launch(kernel, programs, args, constants, chosen.warps, chosen.stages, MOST_REGISTERS)


def forward(
    problem: AttentionProblem, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    q_lengths: Tensor | None, kv_lengths: Tensor | None, y: Tensor, lse: Tensor | None,
) -> Launch:  # fmt: skip
    p, chosen = problem, tile(problem, backward=False)
    args = {"q": q, "k": k, "v": v, "mask": mask, "q_lengths": q_lengths, "kv_lengths": kv_lengths, "y": y,
            "lse": lse, **_sizes(p), **_strides(q=q, k=k, v=v, y=y, mask=mask)}  # fmt: skip
    programs = p.batch * p.heads * triton.cdiv(p.queries, chosen.rows)
    return _launch(kernels.forward, programs, args, _constants(p, chosen), chosen)


def probabilities(
    problem: AttentionProblem, q: Tensor, k: Tensor, mask: Tensor | None, q_lengths: Tensor | None,
    kv_lengths: Tensor | None, lse: Tensor, weights: Tensor,
) -> Launch:  # fmt: skip
    p, chosen = problem, tile(problem, backward=True)
    args = {"q": q, "k": k, "mask": mask, "q_lengths": q_lengths, "kv_lengths": kv_lengths, "lse": lse,
            "weights": weights, **_sizes(p), **_strides(q=q, k=k, mask=mask)}  # fmt: skip
    constants = _constants(p, chosen)
    del constants["VALUE_DIM"], constants["UNITS"]
    programs = p.batch * p.heads * triton.cdiv(p.queries, chosen.rows) * triton.cdiv(p.keys, chosen.cols)
    return _launch(kernels.probabilities, programs, args, constants, chosen)


def row_sums(
    problem: AttentionProblem, y: Tensor, grad_y: Tensor, q_lengths: Tensor | None, delta: Tensor
) -> Launch:
    p, rows, units = problem, 32, _blocks(problem)[1]
    args = {"y": y, "grad_y": grad_y, "q_lengths": q_lengths, "delta": delta, "heads": p.heads,
            "queries": p.queries, **_strides(y=y, g=grad_y)}  # fmt: skip
    constants = {"VALUE_DIM": p.value_dim, "ROWS": rows, "UNITS": units}
    return Launch(kernels.row_sums, p.batch * p.heads * triton.cdiv(p.queries, rows), args, constants)


def backward_queries(
    problem: AttentionProblem, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    q_lengths: Tensor | None, kv_lengths: Tensor | None, lse: Tensor, delta: Tensor, grad_y: Tensor,
    grad_q: Tensor,
) -> Launch:  # fmt: skip
    p, chosen = problem, tile(problem, backward=True)
    args = {"q": q, "k": k, "v": v, "mask": mask, "q_lengths": q_lengths, "kv_lengths": kv_lengths,
            "lse": lse, "delta": delta, "grad_y": grad_y, "grad_q": grad_q, **_sizes(p),
            "natural": p.params.scale,
            **_strides(q=q, k=k, v=v, g=grad_y, out=grad_q, mask=mask)}  # fmt: skip
    programs = p.batch * p.heads * triton.cdiv(p.queries, chosen.rows)
    return _launch(kernels.backward_queries, programs, args, _constants(p, chosen), chosen)


def backward_keys(
    problem: AttentionProblem, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    q_lengths: Tensor | None, kv_lengths: Tensor | None, lse: Tensor, delta: Tensor, grad_y: Tensor,
    grad_k: Tensor, grad_v: Tensor,
) -> Launch:  # fmt: skip
    p, chosen = problem, tile(problem, backward=True)
    args = {"q": q, "k": k, "v": v, "mask": mask, "q_lengths": q_lengths, "kv_lengths": kv_lengths,
            "lse": lse, "delta": delta, "grad_y": grad_y, "grad_k": grad_k, "grad_v": grad_v, **_sizes(p),
            "natural": p.params.scale,
            **_strides(q=q, k=k, v=v, g=grad_y, gk=grad_k, gv=grad_v, mask=mask)}  # fmt: skip
    programs = p.batch * p.kv_heads * triton.cdiv(p.keys, chosen.cols)
    return _launch(kernels.backward_keys, programs, args, _constants(p, chosen), chosen)
