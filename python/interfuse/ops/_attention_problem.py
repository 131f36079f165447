"""What one call of attention asks for: its parameters, its sizes, and what its implementations return.

An implementation is a module with

    why_not(problem) -> str | None
    run(problem, q, k, v, mask, q_lengths, kv_lengths) -> (y, lse, weights)
    run_backward(problem, grad_y, grad_weights, q, k, v, mask, q_lengths, kv_lengths, y, lse, wanted)
        -> gradients of q, k, v; anything in the place of one that is not wanted

Everything is checked before: shapes, dtypes, devices. The mask is (batch, heads, queries, keys), mostly with
strides of zero; tensors may have any strides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interfuse import memory

if TYPE_CHECKING:
    from collections.abc import Sequence


Three = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class AttentionParams:
    """The registered op's parameters, in its order."""

    causal: bool
    scale: float
    backend: str = ""

    def as_args(self) -> tuple[object, ...]:
        return self.causal, self.scale, self.backend


PARAM_COUNT = 3


@dataclass(frozen=True, eq=False)
class AttentionProblem:
    """A checked call: what an implementation's `why_not` looks at. Caches are keyed by its identity."""

    params: AttentionParams
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    mask: str  # "none", "boolean" (True: attended to) or "additive"
    weights: bool  # forward returns the probabilities too
    save: bool  # forward returns what backward needs
    grad_weights: bool = False  # backward is given a gradient of the probabilities

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.queries, self.value_dim

    @property
    def row_shape(self) -> tuple[int, int, int]:
        return self.batch, self.heads, self.queries

    @property
    def weights_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.queries, self.keys


def empty_ordered(shape: Sequence[int], like: Tensor, keep: bool = True) -> Tensor:
    """Unwritten memory without gaps, whose first three dimensions stand in the order of `like`'s.

    Projected heads are views of (batch, length, heads * head_dim) or (length, batch, ...): a result in the
    same order is such a view too, and what comes after it needs no copy.
    """
    strides = like.stride()
    order = sorted(range(3), key=lambda d: -strides[d])
    ordered = [shape[d] for d in order] + [shape[3]]
    t = memory.empty(ordered, dtype=like.dtype, device=like.device, keep=keep)
    return t.permute(*(order.index(d) for d in range(3)), 3)


def empty_outputs(problem: AttentionProblem, q: Tensor) -> Three:
    """Unwritten (y, lse, weights) as the op returns them; (0,) where one was not asked for."""
    y = empty_ordered(problem.y_shape, q, keep=problem.save)
    lse = memory.empty(problem.row_shape if problem.save else (0,), dtype=torch.float32, device=q.device)
    shape = problem.weights_shape if problem.weights else (0,)
    return y, lse, torch.empty(shape, dtype=q.dtype, device=q.device)


def empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> Three:
    """Unwritten gradients as the backward op returns them."""
    return empty_ordered(q.shape, q), empty_ordered(k.shape, k), empty_ordered(v.shape, v)
