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
# From here on, cosines give similarities of at most 30, whose exponentials are summed as they are.
_LEAST_TEMPERATURE = 1 / 30
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
        learned = temperature if isinstance(temperature, Tensor) else None
        number = float(temperature)
        z = (u / number) @ v.T
        bounded = normalize and number >= _LEAST_TEMPERATURE
        along = (1, 0) if symmetric else (1,)  # rows choose among columns, and columns among rows
        # Partners are kept apart from the others, beside whose sum they would round a small loss away.
        if bounded:
            own = z.exp_().diagonal().clone()
            z.fill_diagonal_(0)
            others = [z.sum(i) for i in along]
            sums = [o + own for o in others]
            losses = [torch.log1p(o / own) for o in others]
            wrong = [o / s for o, s in zip(others, sums, strict=True)]
        else:
            own = z.diagonal().clone()
            z.fill_diagonal_(-torch.inf)
            others = [torch.logsumexp(z, i) - own for i in along]
            losses, wrong = [F.softplus(o) for o in others], [torch.sigmoid(o) for o in others]
            sums = [own + loss for loss in losses]
        at_partner = (wrong[0] + wrong[1]).div_(2) if symmetric else wrong[0]
        ctx.save_for_backward(a, b, learned, u, v, z, at_partner, *sums, *lengths)
        ctx.settings, ctx.bounded = (number, normalize, symmetric, reduction), bounded
        ctx.set_materialize_grads(False)
        loss = losses[0].add_(losses[1]).div_(2) if symmetric else losses[0]
        return reference.reduced(loss, reduction)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Any, ...]:
        nothing = (None,) * 3
        if grad_loss is None:
            return (None, None, None, *nothing)
        a, b, learned, u, v, z, at_partner, *rest = ctx.saved_tensors
        number, normalize, symmetric, reduction = ctx.settings
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or is_batched_gradient(grad_loss):
            given = a, b, number if learned is None else learned
            return (*_again(grad_loss, given, needs, ctx.settings[1:]), *nothing)
        scale = (grad_loss / (number * (len(z) if reduction == "mean" else 1))).expand(len(z))
        sums = rest[: 1 + symmetric]
        grad = _of_similarities(z, sums, scale / len(sums), ctx.bounded)
        grad.diagonal().sub_(scale * at_partner)
        sides = [grad @ v if needs[0] or needs[2] else None, grad.T @ u if needs[1] else None]
        # The gradient's product with the similarities, without either of them.
        by_temperature = (-(sides[0] * u).sum() / number).reshape(learned.shape) if needs[2] else None
        if normalize:
            pairs = zip(sides, (u, v), rest[-2:], strict=True)
            sides = [None if g is None else _of_unscaled(g, x, length) for g, x, length in pairs]
        return (sides[0] if needs[0] else None, sides[1], by_temperature, *nothing)


def _of_similarities(z: Tensor, sums: Sequence[Tensor], scale: Tensor, bounded: bool) -> Tensor:
    """Softmax of rows and, where both sums are given, of columns. Bounded: of exponentials and their sums."""
    if bounded:
        factors = (scale / sums[0]).unsqueeze(1)
        return z * factors if len(sums) == 1 else torch.add(factors, scale / sums[1]).mul_(z)
    grad = torch.sub(z, sums[0].unsqueeze(1)).exp_().mul_(scale.unsqueeze(1))
    return grad if len(sums) == 1 else grad.add_(torch.sub(z, sums[1]).exp_().mul_(scale))


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
