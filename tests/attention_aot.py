"""The launches of attention that are compiled ahead of time, and the record of what they take.

    python tests/attention_aot.py     # writes the record anew, after a kernel or a tile changed

The record stands in bench/results/triton_resources_attention.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from aot import RECORDS, compile_all, rows_of, used, write_record
from interfuse.kernels import attention as kernels
from interfuse.kernels import attention_launches as plan
from interfuse.kernels import attention_pool as pooling

from interfuse.ops._attention_pool import PoolProblem
from interfuse.ops._attention_problem import (
    AttentionParams,
    AttentionProblem,
    empty_gradients,
    empty_outputs,
)

if TYPE_CHECKING:
    from interfuse.kernels.launch import Launch

RECORD = RECORDS / "triton_resources_attention.json"
WALKS = ("forward", "backward_queries", "backward_keys")
POOLING = ("pool_scores", "pool_sums", "pool_slopes", "pool_grad_x", "pool_grad_hidden")
MATRIX = (*WALKS, "probabilities")  # those that multiply matrices


@dataclass(frozen=True)
class Step:
    """A training step, of which some kernels are compiled."""

    head_dim: int
    dtype: torch.dtype
    arithmetic: str = "ieee"
    value_dim: int = 0  # 0: head_dim
    mask: str = "none"
    causal: bool = False
    ragged: bool = False
    queries: int = 512
    kernels: tuple[str, ...] = WALKS

    def __str__(self) -> str:
        more = [f"values {self.value_dim}"] if self.value_dim else []
        more += [self.mask] if self.mask != "none" else []
        more += [word for word in ("causal", "ragged") if getattr(self, word)]
        more += [f"queries {self.queries}"] if self.queries != 512 else []
        return " ".join([str(self.head_dim), str(self.dtype)[6:], self.arithmetic, *more])


BRAIN, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
STEPS = (
    Step(32, BRAIN, kernels=(*MATRIX, "row_sums")),
    Step(32, BRAIN, queries=64),
    Step(64, BRAIN, ragged=True, kernels=(*MATRIX, *POOLING)),
    Step(64, HALF, causal=True),
    Step(128, BRAIN, mask="boolean", ragged=True),
    Step(128, HALF, value_dim=64, mask="additive"),
    Step(256, BRAIN),
    Step(32, SINGLE, "tf32"),
    Step(64, SINGLE, "tf32", ragged=True),
    Step(128, SINGLE, "tf32"),
    Step(256, SINGLE, "tf32"),
    Step(32, SINGLE, ragged=True, kernels=(*MATRIX, "row_sums")),
    Step(64, SINGLE, mask="additive", causal=True),
    Step(128, SINGLE),
    Step(256, SINGLE),
    Step(20, SINGLE, value_dim=1, queries=1, kernels=(*MATRIX, "row_sums", *POOLING)),
)
ROWS = rows_of(STEPS)


def launches(step: Step) -> list[Launch]:
    """What a training step with returned weights would launch on a GPU, from tensors without memory."""
    batch, heads, kv_heads, keys, value_dim = 8, 8, 4, 196, step.value_dim or step.head_dim
    p = AttentionProblem(
        AttentionParams(step.causal, 0.125), batch, heads, kv_heads, step.queries, keys, step.head_dim,
        value_dim, step.dtype, torch.device("meta"), step.mask, weights=True, save=True,
    )  # fmt: skip

    def empty(*shape: int, dtype: torch.dtype = p.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=p.device)

    q = empty(batch, step.queries, heads, step.head_dim).transpose(1, 2)
    k = empty(batch, keys, kv_heads, step.head_dim).transpose(1, 2)
    v = empty(batch, keys, kv_heads, value_dim).transpose(1, 2)
    mask = None
    if step.mask != "none":
        mask = empty(step.queries, keys, dtype=torch.bool if step.mask == "boolean" else p.dtype)
    mask = kernels.full_mask(p, mask)
    lengths = (empty(batch, dtype=torch.int64),) * 2 if step.ragged else (None, None)
    y, lse, weights = empty_outputs(p, q)
    grads, delta = empty_gradients(q, k, v), torch.empty_like(lse)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = step.arithmetic == "tf32"
    try:
        return [
            plan.forward(p, q, k, v, mask, *lengths, y, lse),
            plan.probabilities(p, q, k, mask, *lengths, lse, weights),
            plan.row_sums(p, y, y, lengths[0], delta),
            plan.backward_queries(p, q, k, v, mask, *lengths, lse, delta, y, grads[0]),
            plan.backward_keys(p, q, k, v, mask, *lengths, lse, delta, y, *grads[1:]),
            *pool_launches(step),
        ]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def pool_launches(step: Step) -> list[Launch]:
    p = PoolProblem(8, 100, 4 * step.head_dim, 2 * step.head_dim, step.dtype, torch.device("meta"))

    def empty(*shape: int, dtype: torch.dtype = p.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=p.device)

    x, hidden, context = empty(p.batch, p.steps, p.width), empty(p.batch, p.steps, p.hidden), empty(p.hidden)
    lengths = empty(p.batch, dtype=torch.int64) if step.ragged else None
    scores = empty(p.batch, p.steps, dtype=torch.float32)
    y, weights = empty(p.batch, p.width), empty(p.batch, p.steps)
    each = empty(p.batch, p.hidden, dtype=SINGLE)
    return [
        pooling.scores_launch(p, hidden, context, lengths, scores),
        pooling.sums_launch(p, x, scores, lengths, y, weights),
        pooling.slopes_launch(p, x, scores, lengths, y, weights if step.ragged else None, scores),
        pooling.grad_x_launch(p, scores, lengths, y, x),
        pooling.grad_hidden_launch(p, hidden, context, lengths, scores, hidden, each),
    ]


def compile_row(row: str) -> dict[str, int]:
    step, kernel, architecture = ROWS[row]
    return used(next(one for one in launches(step) if one.kernel.__name__ == kernel), architecture)


if __name__ == "__main__":
    write_record(RECORD, compile_all(ROWS, compile_row))
