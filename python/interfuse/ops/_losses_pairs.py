"""Losses of two tensors: binary cross-entropy, contrastive, InfoNCE, reconstruction of several modalities.

The public functions and their checks; the registered ops stand in _losses_pairs_ops.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interfuse.autocast import autocast_dtype, cast
from interfuse.ops import _losses_info_nce as info_nce_eager
from interfuse.ops import _losses_pairs_eager as eager
from interfuse.ops._dtypes import DTYPES
from interfuse.ops._losses_checks import fail
from interfuse.ops._losses_problem import REDUCTIONS, loss_dtype
from interfuse.reference import losses as reference
from interfuse.torch_state import in_transform

if TYPE_CHECKING:
    from collections.abc import Sequence

KINDS = ("bce_with_logits", "mse")


def binary_cross_entropy_with_logits(
    input: Tensor,  # noqa: A002  (torch's name)
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """torch.nn.functional.binary_cross_entropy_with_logits; the loss is one pass over memory."""
    return _elementwise(
        "binary_cross_entropy_with_logits", KINDS[0], input, target, weight, pos_weight, reduction, backend
    )


def contrastive_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 1.0,
    reduction: str = "mean",
    *,
    backend: str | None = None,
) -> Tensor:
    """Half of target d^2 + (1 - target) max(0, margin - d)^2, d the rows' distance (Hadsell et al., 2006).

    At distance 0 the gradient is 0, not NaN.

    Args:
        input1: (..., features).
        input2: (..., features), of the same shape and dtype.
        target: (...): 1 for pairs that belong together, 0 for those that do not, or between.
        margin: the distance from which on pairs that do not belong together cost nothing.
        reduction: "none", "mean" or "sum".
        backend: None to choose the fastest, or "native", "triton" or "reference".
    """
    short = eager.contrastive(input1, input2, target, margin, reduction, backend)
    if short is not None:
        return short
    op = "contrastive_loss"
    _check_pair(op, reduction, input1=input1, input2=input2)
    if not isinstance(target, Tensor) or target.shape != input1.shape[:-1]:
        given = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise fail(f"the target must be a tensor of shape {tuple(input1.shape[:-1])}; got {given}.", op)
    if target.device != input1.device:
        raise fail(
            f"input1 and target must be on one device; got {input1.device} and {target.device}. Move one of "
            "them.",
            op,
        )
    if target.requires_grad:
        raise fail("the target is a constant and gets no gradient; pass target.detach().", op)
    if not (isinstance(margin, (int, float)) and 0 <= margin < math.inf):
        raise fail(f"margin must be a finite number that is not negative; got {margin!r}.", op)
    dtype = _computed_in(input1)
    rows = [x.reshape(-1, x.shape[-1]) for x in (input1, input2)]
    labels = target.reshape(-1).to(loss_dtype(input1.dtype))
    if _by_formula():
        loss = reference.contrastive_rows(rows[0], rows[1], labels, float(margin))[0]
    else:
        loss = torch.ops.interfuse.contrastive_loss.default(*rows, labels, float(margin), backend or "")[0]
    return reference.reduced(loss.reshape(target.shape), reduction).to(dtype)


def info_nce(
    input1: Tensor,
    input2: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    normalize: bool = True,
    symmetric: bool = True,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of each row of one modality choosing its partner among all rows of the other.

    The matrix of similarities, (rows, rows), is computed once for both directions, some of it at a time, and
    once more by backward. It is kept only where it is small (1,024 rows at most, on the CPU).

    Args:
        input1: (rows, features).
        input2: (rows, features): row i belongs to row i of input1.
        temperature: what similarities are divided by; a number, or a tensor of one element, perhaps learned.
        normalize: divide each row by its length first, so that similarities are cosines.
        symmetric: the mean of both directions; else input1 chooses from input2 alone.
        reduction: "none", "mean" or "sum", over the rows.
        backend: None to choose the fastest, or "native", "triton" or "reference".
    """
    op = "info_nce"
    _check_pair(op, reduction, input1=input1, input2=input2)
    if input1.dim() != 2:
        raise fail(f"both inputs must have two dimensions, (rows, features); got {tuple(input1.shape)}.", op)
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise fail(f"the temperature must have one element; got {tuple(temperature.shape)}.", op)
        temperature = temperature.reshape(())
    elif not 0 < temperature < math.inf:
        raise fail(f"the temperature must be a finite number above 0; got {temperature!r}.", op)
    no_features = input1.shape[1] == 0
    if eager.is_short(backend, reduction) and eager.is_dense(input1, input2) and not no_features:
        loss = info_nce_eager.run(input1, input2, temperature, normalize, symmetric, reduction)
        if loss is not None:
            return loss
    first, second = (F.normalize(x, dim=-1) if normalize else x for x in (input1, input2))
    first = first / temperature
    second = second.to(first.dtype)
    out_dtype, dtype = _computed_in(first), autocast_dtype(first.device)
    if dtype is not None:
        first, second = cast(first, dtype), cast(second, dtype)
    if _by_formula() or no_features:
        each = reference.info_nce_rows(first, second, symmetric)[0]
    else:
        each = torch.ops.interfuse.info_nce.default(first, second, symmetric, backend or "")[0]
    return reference.reduced(each, reduction).to(out_dtype)


def reconstruction_loss(
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    kinds: str | Sequence[str] = "mse",
    weights: Sequence[float] | None = None,
    *,
    reduction: str = "mean",
) -> Tensor:
    """The weighted sum over modalities of how far each reconstruction is from what it should be.

    Args:
        inputs: the reconstructions, one for each modality; logits for the last two kinds.
        targets: what they should be; class indices for "cross_entropy".
        kinds: of each modality, or of all: "mse", "bce_with_logits", or, over the last dimension,
            "cross_entropy".
        weights: of each modality; None counts them alike, as 1.
        reduction: within a modality, "mean" or "sum".
    """
    op = "reconstruction_loss"
    count = len(inputs)
    kinds = [kinds] * count if isinstance(kinds, str) else list(kinds)
    factors = [1.0] * count if weights is None else list(weights)
    if not count or not len(targets) == len(kinds) == len(factors) == count:
        raise fail(
            f"at least one modality is needed, with a target, a kind and a weight for each; got {count} "
            f"inputs, {len(targets)} targets, {len(kinds)} kinds and {len(factors)} weights.",
            op,
        )
    if reduction not in REDUCTIONS[1:]:
        raise fail(f"reduction must be one of mean, sum; got {reduction!r}.", op)
    total: Any = None
    for x, target, kind, factor in zip(inputs, targets, kinds, factors, strict=True):
        if kind == "cross_entropy":
            # The logits are there already, and torch's own is one pass over them.
            loss = F.cross_entropy(x.reshape(-1, x.shape[-1]), target.reshape(-1), reduction=reduction)
        elif kind in KINDS:
            loss = _elementwise(op, kind, x, target, None, None, reduction, None)
        else:
            raise fail(f"a kind must be one of {', '.join(KINDS)}, cross_entropy; got {kind!r}.", op)
        part = loss if factor == 1 else factor * loss  # a step of autograd costs more than a small loss
        total = part if total is None else total + part
    return total


def _check_pair(op: str, reduction: object, **tensors: object) -> None:
    if reduction not in REDUCTIONS:
        raise fail(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}.", op)
    (name, first), (other, second) = tensors.items()
    for key, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {key} must be a torch tensor; got {type(t).__name__}.")
        if t.layout != torch.strided:
            raise fail(
                f"{key} must be a dense tensor; got layout {t.layout}. Call to_dense() on it first.", op
            )
        if t.dtype not in DTYPES:
            raise fail(
                f"the dtype must be float32, bfloat16, float16 or float64; {key} has {t.dtype}. Convert it "
                "first.",
                op,
            )
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return
    for what, a, b in (
        ("shape", tuple(first.shape), tuple(second.shape)),
        ("dtype", first.dtype, second.dtype),
        ("device", first.device, second.device),
    ):
        if a != b:
            raise fail(f"{name} and {other} must have one {what}; got {a} and {b}. Convert one of them.", op)
    if name == "input1" and first.dim() == 0:
        raise fail("both inputs must have at least one dimension, their features; got numbers.", op)


def _computed_in(x: Tensor) -> torch.dtype:
    """The dtype of the loss: the input's, and as torch's losses float32 under autocast."""
    return x.dtype if autocast_dtype(x.device) is None else loss_dtype(x.dtype)


def _by_formula() -> bool:
    """torch.func and forward mode differentiate torch's formula; the kernels are for plain autograd."""
    return not torch.compiler.is_compiling() and in_transform()


def _elementwise(
    op: str,
    kind: str,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    backend: str | None,
) -> Tensor:
    short = eager.elementwise(kind, x, target, weight, pos_weight, reduction, backend)
    if short is not None:
        return short
    if isinstance(x, Tensor) and isinstance(target, Tensor) and target.is_floating_point():
        target = target.to(x.dtype)
    _check_pair(op, reduction, input=x, target=target)
    constants = (target, weight, pos_weight)
    for name, t in zip(("weight", "pos_weight"), constants[1:], strict=True):
        if t is None:
            continue
        if t.device != x.device:
            raise fail(f"input and {name} must be on one device; got {x.device} and {t.device}.", op)
        if torch.broadcast_shapes(t.shape, x.shape) != x.shape:
            raise fail(
                f"{name} must broadcast to the input's shape, {tuple(x.shape)}; got {tuple(t.shape)}.", op
            )
    exact = loss_dtype(x.dtype)
    factor, positive = (None if t is None else t.to(exact) for t in (weight, pos_weight))
    if _by_formula() or any(t is not None and t.requires_grad for t in constants):
        # The kernels take these as constants; torch's formula differentiates by them too.
        loss = reference.reduced(reference.elementwise(x, target, factor, positive, kind), reduction)
    else:
        loss = torch.ops.interfuse.elementwise_loss.default(
            x, target, factor, positive, kind, reduction, backend or ""
        )
    return loss.to(_computed_in(x))
