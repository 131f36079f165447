"""InfoNCE of eager calls on the CPU: one step of autograd, forward and backward one call of the core each.

Of few rows the core keeps the matrix of similarities, which backward then reads; of more it computes each
block of it again. Tensors that come back from saving otherwise than they were, second derivatives and several
gradients at once take torch's functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interfuse.ops import _losses_pairs_native as native
from interfuse.ops._losses_pairs_eager import as_saved
from interfuse.reference import losses as reference
from interfuse.torch_state import SingleLevelFunction, apply, is_batched_gradient

if TYPE_CHECKING:
    from collections.abc import Sequence

# Rows up to which the matrix is kept: 4 MiB, which is faster than computing it again.
MOST_KEPT = 1024
# Of these, the core divides by them in float32.
TEMPERATURES = 1e-30, 1e30


def by_formula(
    a: Tensor, b: Tensor, temperature: float | Tensor, normalize: bool, symmetric: bool, reduction: str
) -> Tensor:
    first, second = (F.normalize(x, dim=-1) if normalize else x for x in (a, b))
    return reference.reduced(reference.info_nce_rows(first / temperature, second, symmetric)[0], reduction)


def _number(temperature: float | Tensor) -> float:
    return float(temperature.detach() if isinstance(temperature, Tensor) else temperature)


class _InfoNce(SingleLevelFunction):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, temperature: float | Tensor, normalize: bool, symmetric: bool,
        reduction: str,
    ) -> Tensor:  # fmt: skip
        learned = temperature if isinstance(temperature, Tensor) else None
        settings = native.InfoNce(reduction, symmetric, normalize, _number(temperature))
        kept = native.empty_similarities(len(a)) if len(a) <= MOST_KEPT else None
        loss, sums = native.run_info_nce(a, b, settings, kept)
        saved = (a, b, learned, sums, kept)
        ctx.save_for_backward(*saved)
        ctx.settings, ctx.shapes = settings, [None if t is None else t.shape for t in saved]
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Any, ...]:
        nothing = (None,) * 3
        if grad_loss is None:
            return (None, None, None, *nothing)
        a, b, learned, sums, kept = saved = ctx.saved_tensors
        settings, needs = ctx.settings, ctx.needs_input_grad[:3]
        if not as_saved(grad_loss, saved, ctx.shapes) or is_batched_gradient(grad_loss):
            given = a, b, settings.temperature if learned is None else learned
            rest = settings.normalize, settings.symmetric, settings.reduction
            return (*_again(grad_loss, given, needs, rest), *nothing)
        grads, slope = native.run_info_nce_backward(grad_loss, a, b, settings, sums, kept, needs)
        return (*grads, torch.full_like(learned, slope) if needs[2] else None, *nothing)


def _again(
    grad_loss: Tensor, given: Sequence[Any], needs: Sequence[bool], settings: tuple[Any, ...]
) -> list[Tensor | None]:
    """By the formula, whose gradients can themselves be differentiated."""
    wanted = [t for t, needed in zip(given, needs, strict=True) if needed]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        loss = by_formula(*given, *settings)
    found = iter(torch.autograd.grad(loss, wanted, grad_loss, create_graph=again))
    return [next(found) if needed else None for needed in needs]


def run(
    a: Tensor, b: Tensor, temperature: float | Tensor, normalize: bool, symmetric: bool, reduction: str
) -> Tensor | None:
    """The loss, or None where the temperature is not for the core."""
    number = _number(temperature)
    least, most = TEMPERATURES
    if not least < number < most:
        return None
    wanted = (a, b, temperature) if isinstance(temperature, Tensor) else (a, b)
    if torch.is_grad_enabled() and any(t.requires_grad for t in wanted):
        return apply(_InfoNce, a, b, temperature, normalize, symmetric, reduction)
    return native.run_info_nce(a, b, native.InfoNce(reduction, symmetric, normalize, number), None)[0]
