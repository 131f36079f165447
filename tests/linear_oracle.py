"""linear's cases as tensors, and the truth in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from interfuse.ops._linear_problem import LinearParams
from interfuse.reference import linear as reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cases.linear import Case
    from torch import Tensor


def params(case: Case) -> LinearParams:
    return LinearParams(case.activations[0])


def tensors(
    case: Case, seed: int = 0, dtype: torch.dtype | None = None, integers: bool = False
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Inputs, weight and bias of the case's first layer. Small integers make every sum exact."""
    generator = torch.Generator().manual_seed(seed)
    depth, out = sum(case.widths), case.outputs[0]

    def make(*shape: int, size: float = 1.0) -> Tensor:
        if integers:
            return torch.randint(-3, 4, shape, generator=generator).to(dtype or case.dtype)
        return (torch.randn(shape, generator=generator) * size).to(dtype or case.dtype)

    inputs = [make(*case.lead, width) for width in case.widths]
    return inputs, make(out, depth, size=depth**-0.5), make(out) if case.bias else None


def truth(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, p: LinearParams) -> Tensor:
    return reference.forward(*doubles(inputs, weight, bias), None, p)


def doubles(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    return [x.double() for x in inputs], weight.double(), None if bias is None else bias.double()


def leaves(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """All of them asking for a gradient, in the order of the backward op's results."""
    given = (*inputs, weight, bias)
    return [t.detach().clone().requires_grad_() for t in given if t is not None]


def true_gradients(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, p: LinearParams, grad_y: Tensor
) -> list[Tensor]:
    """torch's autograd over the reference's forward, in float64."""
    flat = leaves(*doubles(inputs, weight, bias))
    y = reference.forward(*parts(flat, len(inputs)), None, p)
    return list(torch.autograd.grad(y, flat, grad_y.double()))


def parts(flat: Sequence[Tensor], count: int) -> tuple[list[Tensor], Tensor, Tensor | None]:
    return list(flat[:count]), flat[count], flat[count + 1] if len(flat) > count + 1 else None
