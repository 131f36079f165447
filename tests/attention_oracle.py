"""attention's inputs from a case, and its truth in float64 from the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from interfuse.ops.attention import attention
from interfuse.reference.attention import attend

if TYPE_CHECKING:
    from cases.attention import Case
    from torch import Tensor


def make_mask(case: Case, dtype: torch.dtype, random: torch.Generator) -> Tensor | None:
    full = (case.batch, case.heads, case.queries, case.keys)
    match case.mask:
        case "":
            return None
        case "boolean":
            return torch.rand(*full[2:], generator=random) < 0.7
        case "per-head":
            return torch.rand(full, generator=random) < 0.7
        case "padding":
            return (torch.rand(case.batch, case.keys, generator=random) < 0.7)[:, None, None, :]
        case "empty-rows":
            mask = torch.rand(case.batch, 1, *full[2:], generator=random) < 0.3
            mask[:, :, ::3] = False
            return mask
        case "additive":
            values = torch.randn(*full[2:], generator=random)
            holes = torch.rand(*full[2:], generator=random) < 0.2
            return values.masked_fill(holes, float("-inf")).to(dtype)
    raise ValueError(case.mask)


@dataclass
class Call:
    """One call's tensors and arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    q_lengths: Tensor | None
    kv_lengths: Tensor | None
    causal: bool
    scale: float | None

    def leaves(self) -> list[Tensor]:
        return [t.requires_grad_() for t in (self.q, self.k, self.v)]

    def run(self, **changes: Any) -> Any:
        arguments = {
            "mask": self.mask, "q_lengths": self.q_lengths, "kv_lengths": self.kv_lengths,
            "causal": self.causal, "scale": self.scale, **changes}  # fmt: skip
        return attention(self.q, self.k, self.v, **arguments)

    def truth(self) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """Float64 leaves, and y, lse and weights that depend on them."""
        leaves = [t.detach().double().requires_grad_() for t in (self.q, self.k, self.v)]
        mask = self.mask
        mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask
        scale = self.q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return leaves, *attend(*leaves, mask, self.q_lengths, self.kv_lengths, self.causal, scale)


def heads(batch: int, count: int, length: int, size: int, random: torch.Generator) -> Tensor:
    """As a projection leaves them: (batch, length, heads * size) seen as (batch, heads, length, size)."""
    return torch.randn(batch, length, count, size, generator=random).transpose(1, 2)


def make(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Call:
    random = torch.Generator().manual_seed(seed)
    kv_heads, value_dim = case.kv_heads or case.heads, case.value_dim or case.head_dim
    q = heads(case.batch, case.heads, case.queries, case.head_dim, random).to(dtype)
    k = heads(case.batch, kv_heads, case.keys, case.head_dim, random).to(dtype)
    v = heads(case.batch, kv_heads, case.keys, value_dim, random).to(dtype)
    q_lengths = kv_lengths = None
    if case.ragged:
        q_lengths = torch.randint(0, case.queries + 1, (case.batch,), generator=random)
        kv_lengths = torch.randint(0, case.keys + 1, (case.batch,), generator=random)
        q_lengths[0], q_lengths[1], kv_lengths[1], kv_lengths[-1] = case.queries, 0, case.keys, 0
    return Call(q, k, v, make_mask(case, dtype, random), q_lengths, kv_lengths, case.causal, case.scale)


def gradients(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> list[Tensor]:
    """y and the gradients of q, k and v."""
    call = make(case, dtype, seed)
    leaves = call.leaves()
    y = call.run(**changes)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]
