"""The checks of linear_cross_entropy: from what the user or the dispatcher passes to a CrossEntropyProblem.

Every error about arguments, shapes, dtypes or devices is raised in this file, so that eager calls, tracing,
the modules and direct calls of the registered op all say the same sentence. What the labels' values are is
looked at where they are read: by the native core, and by torch in the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interfuse.ops._dtypes import DTYPES
from interfuse.ops._losses_problem import (
    REDUCTIONS,
    CrossEntropyParams,
    CrossEntropyProblem,
    Tensors,
    loss_dtype,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


def fail(sentence: str, op: str = "linear_cross_entropy") -> ValueError:
    return ValueError(f"{op}: {sentence}")


def resolve(
    reduction: object, ignore_index: object, label_smoothing: object, backend: object
) -> CrossEntropyParams:
    """The user's arguments as the registered op takes them. `check_params` judges the values."""
    if not isinstance(reduction, str):
        raise fail(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}.")
    if not isinstance(ignore_index, int):
        raise fail(f"ignore_index must be an integer; got {ignore_index!r}.")
    if not isinstance(label_smoothing, (int, float)):
        raise fail(f"label_smoothing must be a number; got {label_smoothing!r}.")
    if backend is not None and not isinstance(backend, str):
        raise fail(f"backend must be a name or None; got {backend!r}.")
    return CrossEntropyParams(reduction, ignore_index, float(label_smoothing), backend or "")


def check_types(**tensors: object) -> None:
    for name, t in tensors.items():
        if not isinstance(t, Tensor) and not (t is None and name in ("linear_bias", "weight")):
            raise TypeError(f"linear_cross_entropy: {name} must be a torch tensor; got {type(t).__name__}.")


def check_params(p: CrossEntropyParams) -> None:
    if p.reduction not in REDUCTIONS:
        raise fail(f"reduction must be one of {', '.join(REDUCTIONS)}; got {p.reduction!r}.")
    if not 0 <= p.label_smoothing <= 1:
        raise fail(f"label_smoothing must be between 0 and 1; got {p.label_smoothing}.")


def check_shapes(
    x: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None
) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise fail(
            f"the input must have at least one feature in its last dimension; got shape {tuple(x.shape)}."
        )
    if linear_weight.dim() != 2 or linear_weight.shape[1] != x.shape[-1] or linear_weight.shape[0] == 0:
        raise fail(
            f"linear_weight must have shape (classes, {x.shape[-1]}), {x.shape[-1]} being the input's "
            f"features; got {tuple(linear_weight.shape)}."
        )
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise fail(
            f"the target holds the classes' indices, in int64; got {target.dtype}. For probabilities call "
            "torch.nn.functional.linear_cross_entropy."
        )
    if target.shape != x.shape[:-1]:
        raise fail(
            f"the target must have the input's shape but for its last dimension, {tuple(x.shape[:-1])}; "
            f"got {tuple(target.shape)}."
        )
    for name, t in (("linear_bias", linear_bias), ("weight", weight)):
        if t is not None and tuple(t.shape) != (linear_weight.shape[0],):
            raise fail(
                f"{name} must have shape ({linear_weight.shape[0]},), one entry for each class; got "
                f"{tuple(t.shape)}."
            )
    if weight is not None and weight.requires_grad:
        raise fail("the classes' weights are constants and get no gradient; pass weight.detach().")


def check(t: Tensors, p: CrossEntropyParams) -> CrossEntropyProblem:
    """The checked problem, or a ValueError that says what was given, what is allowed and what to do."""
    check_params(p)
    x = t.input
    for name, tensor in zip(Tensors._fields, t, strict=True):
        if tensor is not None and tensor.layout != torch.strided:
            raise fail(
                f"{name} must be a dense tensor; got layout {tensor.layout}. Call to_dense() on it first."
            )
        if tensor is not None and tensor.device != x.device:
            raise fail(
                f"input and {name} must be on one device; got {x.device} and {tensor.device}. Move one "
                "of them."
            )
    check_shapes(*t)
    if x.dim() != 2 or t.target.dtype != torch.int64:
        raise fail(
            "the registered op takes an input of two dimensions and int64 targets; got "
            f"{tuple(x.shape)} and {t.target.dtype}. Call interfuse.ops.linear_cross_entropy, which "
            "converts them."
        )
    if x.dtype not in DTYPES:
        raise fail(
            f"the dtype must be float32, bfloat16, float16 or float64; got {x.dtype}. Convert it first."
        )
    for name, tensor in (("linear_weight", t.linear_weight), ("linear_bias", t.linear_bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise fail(
                f"input and {name} must have one dtype; got {x.dtype} and {tensor.dtype}. Convert one of "
                "them, or run under autocast."
            )
    if t.weight is not None and t.weight.dtype != loss_dtype(x.dtype):
        raise fail(f"the registered op takes class weights in {loss_dtype(x.dtype)}; got {t.weight.dtype}.")
    return CrossEntropyProblem(
        params=p,
        rows=x.shape[0],
        classes=t.linear_weight.shape[0],
        features=x.shape[1],
        dtype=x.dtype,
        device=x.device,
        has_bias=t.linear_bias is not None,
    )


def check_mask(problem: CrossEntropyProblem, mask: Sequence[bool]) -> None:
    if len(mask) not in (0, 3):
        raise fail(
            f"the mask has an entry for input, linear_weight and linear_bias, or none at all; got "
            f"{len(mask)}."
        )
    if mask and mask[2] and not problem.has_bias:
        raise fail("the mask asks for the gradient of linear_bias, and there is none.")


def check_saved(problem: CrossEntropyProblem, grad_loss: Tensor, lse: Tensor, mask: Sequence[bool]) -> None:
    """The tensors that only the backward op takes: the kernels read them by pointer."""
    for name, t, shape in (("grad_loss", grad_loss, problem.loss_shape), ("lse", lse, (problem.rows,))):
        if tuple(t.shape) != shape or t.dtype != problem.loss_dtype or t.device != problem.device:
            raise fail(
                f"the backward op's {name} must have shape {shape}, {problem.loss_dtype}, on "
                f"{problem.device}; got {tuple(t.shape)}, {t.dtype}, on {t.device}. "
                "Pass what the forward op returned with a mask."
            )
    if len(mask) != 3:
        raise fail(
            f"the backward op's mask has an entry for input, linear_weight and linear_bias; got {len(mask)}."
        )
    check_mask(problem, mask)
