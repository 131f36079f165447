"""InfoNCE of few rows on the CPU: the matrix of similarities is small then, and kept.

Lengths, similarities, both directions' losses and all gradients are one step of autograd by formulas, where
the same in torch's functions is twenty. Only torch's operators read what is saved, which so may be anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interfuse.reference import losses as reference
from interfuse.torch_state import SingleLevelFunction, apply, is_batched_gradient

if TYPE_CHECKING:
    from collections.abc import Sequence

# Rows up to which this is faster than linear_cross_entropy by more than a quarter: a matrix of 4 MiB.
MOST_ROWS = 1024
# torch.nn.functional.normalize divides by no less.
_LEAST_LENGTH = 1e-12


def by_formula(
    a: Tensor, b: Tensor, temperature: float | Tensor, normalize: bool, symmetric: bool, reduction: str
) -> Tensor:
    first, second = (F.normalize(x, dim=-1) if normalize else x for x in (a, b))
    return reference.reduced(reference.info_nce_rows(first / temperature, second, symmetric)[0], reduction)


def _lengths(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(_LEAST_LENGTH)


class _Small(SingleLevelFunction):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, temperature: float | Tensor, normalize: bool, symmetric: bool,
        reduction: str,
    ) -> Tensor:  # fmt: skip
        lengths = [_lengths(x) for x in (a, b)] if normalize else []
        u, v = (a / lengths[0], b / lengths[1]) if normalize else (a, b)
        z = (u @ v.T).div_(temperature)
        lse = torch.logsumexp(z, 1)
        sums = [lse, torch.logsumexp(z, 0)] if symmetric else [lse]
        learned, number = (temperature, 0.0) if isinstance(temperature, Tensor) else (None, temperature)
        ctx.save_for_backward(a, b, learned, u, v, z, *sums, *lengths)
        ctx.settings = number, normalize, symmetric, reduction
        ctx.set_materialize_grads(False)
        mean = (sums[0] + sums[1]).div_(2) if symmetric else lse
        return reference.reduced(mean - z.diagonal(), reduction)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Any, ...]:
        nothing = (None,) * 3
        if grad_loss is None:
            return (None, None, None, *nothing)
        a, b, learned, u, v, z, lse, *rest = ctx.saved_tensors
        temperature, normalize, symmetric, reduction = ctx.settings
        temperature = temperature if learned is None else learned
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or is_batched_gradient(grad_loss):
            return (*_again(grad_loss, (a, b, temperature), needs, ctx.settings[1:]), *nothing)
        scale = grad_loss / len(z) if reduction == "mean" else grad_loss
        grad = torch.exp(z - lse.unsqueeze(1))
        grad = grad.mul_(scale.unsqueeze(1) if scale.dim() else scale)
        if symmetric:
            grad = grad.add_(torch.exp(z - rest[0]).mul_(scale)).div_(2)
        grad.diagonal().sub_(scale)
        by_temperature = None
        if needs[2]:
            by_temperature = (-(grad * z).sum() / temperature).reshape(temperature.shape)
        grad = grad.div_(temperature)
        sides = [grad @ v if needs[0] else None, grad.T @ u if needs[1] else None]
        if normalize:
            pairs = zip(sides, (u, v), rest[-2:], strict=True)
            sides = [None if g is None else _of_unscaled(g, x, length) for g, x, length in pairs]
        return (*sides, by_temperature, *nothing)


def _of_unscaled(grad: Tensor, x: Tensor, length: Tensor) -> Tensor:
    """The gradient of what was divided by its length: none along its own direction."""
    along = (grad * x).sum(1, keepdim=True)
    return grad.addcmul_(x, along, value=-1).div_(length)


def _again(
    grad_loss: Tensor, given: Sequence[Any], needs: Sequence[bool], settings: tuple[Any, ...]
) -> list[Tensor | None]:
    """By the formula, whose gradients can themselves be differentiated."""
    wanted = [t for t, needed in zip(given, needs, strict=True) if needed]
    with torch.enable_grad():
        loss = by_formula(*given, *settings)
    found = iter(torch.autograd.grad(loss, wanted, grad_loss, create_graph=torch.is_grad_enabled()))
    return [next(found) if needed else None for needed in needs]


def run(
    a: Tensor, b: Tensor, temperature: float | Tensor, normalize: bool, symmetric: bool, reduction: str
) -> Tensor:
    return apply(_Small, a, b, temperature, normalize, symmetric, reduction)
