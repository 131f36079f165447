"""The checks of linear: from what the user or the dispatcher passes to a LinearProblem.

Every error about arguments, shapes, dtypes or devices of linear is raised in this file, so that eager calls,
tracing, the modules and direct calls of the registered op all say the same sentence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interfuse.bounded_cache import BoundedCache
from interfuse.ops._dtypes import DTYPES
from interfuse.ops._linear_problem import ACTIVATIONS, LinearParams, LinearProblem

# A weight may have one of these instead of the inputs' dtype; int8 comes with a scale.
WEIGHT_DTYPES = (torch.bfloat16, torch.int8)

Inputs = Tensor | Sequence[Tensor]
Layer = tuple[Tensor, Tensor | None, Tensor | None, tuple[Any, ...]]  # weight, bias, scale, Options' values


def fail(sentence: str) -> ValueError:
    return ValueError(f"linear: {sentence}")


class Options(NamedTuple):
    """The public function's arguments behind the tensors, as the user gave them."""

    activation: str | None
    negative_slope: float
    backend: str | None


def resolve(options: Options) -> LinearParams:
    """The user's arguments as the registered op takes them. `check` judges the values."""
    for name, text in (("activation", options.activation), ("backend", options.backend)):
        if text is not None and not isinstance(text, str):
            raise fail(f"{name} must be a name or None; got {text!r}.")
    if not isinstance(options.negative_slope, (int, float)):
        raise fail(f"negative_slope must be a number; got {options.negative_slope!r}.")
    return LinearParams(options.activation or "none", float(options.negative_slope), options.backend or "")


def as_list(inputs: Inputs) -> list[Tensor]:
    """The inputs as a list, whether one tensor or several were given."""
    if isinstance(inputs, Tensor):
        return [inputs]
    if not isinstance(inputs, (list, tuple)):
        raise TypeError(f"linear: inputs must be a tensor or a list of tensors; got {type(inputs).__name__}.")
    for x in inputs:
        if not isinstance(x, Tensor):
            raise TypeError(f"linear: every input must be a torch tensor; got {type(x).__name__}.")
    return list(inputs)


def check_types(weight: object, bias: object, scale: object) -> None:
    for name, t in (("weight", weight), ("bias", bias), ("scale", scale)):
        if not isinstance(t, Tensor) and not (t is None and name != "weight"):
            raise TypeError(f"linear: the {name} must be a torch tensor; got {type(t).__name__}.")


def check_params(p: LinearParams) -> None:
    if p.activation not in ACTIVATIONS:
        raise fail(f"activation must be one of {', '.join(ACTIVATIONS)}; got {p.activation!r}.")
    if not math.isfinite(p.negative_slope):
        raise fail(f"negative_slope must be a finite number; got {p.negative_slope}.")


def check_inputs(inputs: Sequence[Tensor]) -> None:
    if not inputs:
        raise fail("at least one input is needed; got an empty list.")
    first = inputs[0]
    for i, x in enumerate(inputs):
        if x.layout != torch.strided:
            raise fail(
                f"input {i} must be a dense tensor; got layout {x.layout}. Call to_dense() on it first."
            )
        if x.dim() == 0 or x.shape[-1] == 0:
            raise fail(
                f"every input must have at least one column in its last dimension; input {i} has shape "
                f"{tuple(x.shape)}."
            )
        if x.dtype not in DTYPES:
            raise fail(
                f"the inputs' dtype must be float32, bfloat16, float16 or float64; input {i} has {x.dtype}. "
                "Convert it first."
            )
        if x.dtype != first.dtype:
            raise fail(
                f"all inputs must have one dtype; got {first.dtype} and {x.dtype}. Convert one of them, or "
                "run under autocast."
            )
        if x.device != first.device:
            raise fail(
                f"all inputs must be on one device; got {first.device} and {x.device}. Move one of them."
            )
        if x.shape[:-1] != first.shape[:-1]:
            raise fail(
                f"all inputs must have one shape but for the last dimension; got {tuple(first.shape)} and "
                f"{tuple(x.shape)}."
            )


def check_weight(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, depth: int) -> None:
    for name, t in (("weight", weight), ("bias", bias), ("scale", scale)):
        if t is not None and t.layout != torch.strided:
            raise fail(
                f"the {name} must be a dense tensor; got layout {t.layout}. Call to_dense() on it first."
            )
        if t is not None and t.device != x.device:
            raise fail(
                f"inputs and {name} must be on one device; got {x.device} and {t.device}. Move one of them."
            )
    if weight.dim() != 2 or weight.shape[1] != depth or weight.shape[0] == 0:
        raise fail(
            f"the weight must have shape (out_features, {depth}), {depth} being the inputs' columns "
            f"together; got {tuple(weight.shape)}."
        )
    if weight.dtype != x.dtype and weight.dtype not in WEIGHT_DTYPES:
        raise fail(
            f"the weight must have the inputs' dtype, or be bfloat16 or int8; got {weight.dtype} with inputs "
            f"of {x.dtype}. Convert one of them, or run under autocast."
        )
    if bias is not None and bias.dtype != x.dtype:
        raise fail(
            f"inputs and bias must have one dtype; got {x.dtype} and {bias.dtype}. Convert one of them, or "
            "run under autocast."
        )
    if (weight.dtype == torch.int8) != (scale is not None):
        raise fail(
            "an int8 weight needs its scale, and no other weight has one; got a weight of "
            f"{weight.dtype} and {'no' if scale is None else 'a'} scale. See interfuse.ops.quantize_weight."
        )
    if scale is not None and scale.dtype != torch.float32:
        raise fail(f"the scale must be float32; got {scale.dtype}.")
    for name, t in (("bias", bias), ("scale", scale)):
        if t is not None and (t.dim() != 1 or t.shape[0] != weight.shape[0]):
            raise fail(
                f"the {name} must have shape ({weight.shape[0]},), one entry for each row of the weight; got "
                f"{tuple(t.shape)}."
            )


def check(
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    p: LinearParams,
    save: bool,
) -> LinearProblem:
    """The checked problem, or a ValueError that says what was given, what is allowed and what to do."""
    check_params(p)
    check_inputs(inputs)
    widths = tuple(x.shape[-1] for x in inputs)
    x = inputs[0]
    check_weight(x, weight, bias, scale, sum(widths))
    return LinearProblem(
        params=p,
        lead=tuple(x.shape[:-1]),
        widths=widths,
        out_features=weight.shape[0],
        dtype=x.dtype,
        weight_dtype=weight.dtype,
        device=x.device,
        has_bias=bias is not None,
        save=save,
    )


def check_saved(
    problem: LinearProblem, grad_y: Tensor, y: Tensor | None, pre: Tensor, mask: Sequence[bool]
) -> None:
    """The tensors that only the backward op takes: the kernels read them by pointer."""
    shape = (*problem.lead, problem.out_features)
    expected = [("grad_y", grad_y, shape), ("pre", pre, shape if problem.params.saves_pre else (0,))]
    if problem.params.backward_needs_y:
        if y is None:
            raise fail(f"the backward of activation {problem.params.activation!r} needs the output y.")
        expected.append(("y", y, shape))
    for name, t, sizes in expected:
        if tuple(t.shape) != tuple(sizes) or t.dtype != problem.dtype or t.device != problem.device:
            raise fail(
                f"the backward op's {name} must have shape {tuple(sizes)}, {problem.dtype}, on "
                f"{problem.device}; got {tuple(t.shape)}, {t.dtype}, on {t.device}. "
                "Pass what the forward op returned with save=True."
            )
    if len(mask) != len(problem.widths) + 2:
        raise fail(
            f"the backward op's mask has an entry for each input, the weight and the bias, "
            f"{len(problem.widths) + 2} here; got {len(mask)}."
        )


_problems: BoundedCache[LinearProblem] = BoundedCache(1024)


def _key(t: Tensor | None) -> Any:
    return None if t is None else (t.shape, t.dtype, t.device)


def op_problem(
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    p: LinearParams,
    save: bool,
) -> LinearProblem:
    """`check` of the registered op's arguments, remembered by shapes, dtypes and devices."""
    if any(t is not None and t.layout != torch.strided for t in (*inputs, weight, bias, scale)):
        return check(inputs, weight, bias, scale, p, save)  # raises
    key = (tuple([_key(x) for x in inputs]), _key(weight), _key(bias), _key(scale), p, save)
    return _problems.get(key) or _problems.put(key, check(inputs, weight, bias, scale, p, save))
