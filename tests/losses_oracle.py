"""The losses' cases as tensors, and the truth in float64 by torch's own functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from interfuse.ops.losses import linear_cross_entropy

if TYPE_CHECKING:
    from cases.losses import Case
    from torch import Tensor


class Drawn(NamedTuple):
    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None

    def leaves(self) -> list[Tensor]:
        return [t for t in self[:3] if t is not None]

    def training(self) -> Drawn:
        """Copies that ask for gradients."""
        return self._replace(
            input=self.input.detach().clone().requires_grad_(),
            linear_weight=self.linear_weight.detach().clone().requires_grad_(),
            linear_bias=None
            if self.linear_bias is None
            else self.linear_bias.detach().clone().requires_grad_(),
        )

    def double(self) -> Drawn:
        made = self._replace(
            input=self.input.double(),
            linear_weight=self.linear_weight.double(),
            linear_bias=None if self.linear_bias is None else self.linear_bias.double(),
            weight=None if self.weight is None else self.weight.double(),
        )
        return made.training()


def tensors(case: Case, seed: int = 0, dtype: torch.dtype | None = None) -> Drawn:
    generator = torch.Generator().manual_seed(seed)
    dtype = dtype or case.dtype

    def make(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * size).to(dtype)

    x = make(case.rows, case.features)
    # Logits of a few units, so that the losses are no single class's.
    linear_weight = make(case.classes, case.features, size=2 * case.features**-0.5)
    target = torch.randint(0, case.classes, (case.rows,), generator=generator)
    target[: case.ignored] = -100
    weight = (torch.rand(case.classes, generator=generator) + 0.1).to(dtype) if case.weighted else None
    return Drawn(x, linear_weight, make(case.classes) if case.bias else None, target, weight)


def run(case: Case, t: Drawn, **arguments: object) -> Tensor:
    settings = {"reduction": case.reduction, "label_smoothing": case.label_smoothing, **arguments}
    return linear_cross_entropy(
        t.input, t.linear_weight, t.target, linear_bias=t.linear_bias, weight=t.weight, **settings
    )


def torchs(case: Case, t: Drawn) -> Tensor:
    return F.cross_entropy(
        F.linear(t.input, t.linear_weight, t.linear_bias), t.target, t.weight, reduction=case.reduction,
        label_smoothing=case.label_smoothing,
    )  # fmt: skip


def grad_loss(loss: Tensor) -> Tensor:
    return torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(loss.dtype)


def with_gradients(loss: Tensor, t: Drawn) -> list[Tensor]:
    """The loss and the gradients of all that is asked for."""
    return [loss.detach(), *torch.autograd.grad(loss, t.leaves(), grad_loss(loss))]


def truth(case: Case, t: Drawn) -> list[Tensor]:
    exact = t.double()
    return with_gradients(torchs(case, exact), exact)


# ---- losses of two tensors


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The loss and the gradients of the leaves."""
    grad = draw(*loss.shape, seed=9).to(loss.device, loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, grad)]


def contrastive(a: Tensor, b: Tensor, target: Tensor, margin: float, reduction: str) -> Tensor:
    distance = (a - b).square().sum(-1).sqrt()
    loss = (target * distance**2 + (1 - target) * (margin - distance).clamp(min=0) ** 2) / 2
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def similarities(
    a: Tensor, b: Tensor, temperature: Tensor | float, normalize: bool, symmetric: bool, reduction: str
) -> Tensor:
    """InfoNCE by the matrix of similarities."""
    if normalize:
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    logits, partner = a @ b.T / temperature, torch.arange(len(a))
    loss = F.cross_entropy(logits, partner, reduction=reduction)
    return (loss + F.cross_entropy(logits.T, partner, reduction=reduction)) / 2 if symmetric else loss
