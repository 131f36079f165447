"""What the ops' rules for vmap share: one call for each sample, where no single call does it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def sample(value: Any, dim: Any, i: int) -> Any:
    """The i-th sample of a tensor, or of each tensor of a list."""
    if isinstance(value, (list, tuple)):
        return [sample(t, d, i) for t, d in zip(value, dim, strict=True)]
    return value if dim is None else value.select(dim, i)


def stacked(samples: Sequence[Sequence[Tensor]]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The samples' results as one, and where their mapped dimensions are."""
    results = tuple(torch.stack(list(ts)) for ts in zip(*samples, strict=True))
    return results, (0,) * len(results)


def is_mapped(dim: Any) -> bool:
    """Whether a tensor, or one of a list's, is mapped."""
    return any(is_mapped(d) for d in dim) if isinstance(dim, (list, tuple)) else dim is not None
