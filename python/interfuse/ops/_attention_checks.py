"""The checks of attention: from what the user or the dispatcher passes to an AttentionProblem.

Every error about arguments, shapes, dtypes or devices of attention is raised in this file, so that eager
calls, tracing, the modules and direct calls of the registered op all say the same sentence. What lengths hold
is not known before the op runs: the native core looks itself, `check_values` is for the others.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from interfuse.bounded_cache import BoundedCache
from interfuse.ops._attention_problem import AttentionParams, AttentionProblem
from interfuse.ops._dtypes import DTYPES


def fail(sentence: str) -> ValueError:
    return ValueError(f"attention: {sentence}")


class Inputs(NamedTuple):
    """The tensors that the forward op takes, in its order."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    q_lengths: Tensor | None
    kv_lengths: Tensor | None


def check_types(inputs: Inputs) -> None:
    for name, t in zip(Inputs._fields, inputs, strict=True):
        if not isinstance(t, Tensor) and not (t is None and name in ("mask", "q_lengths", "kv_lengths")):
            raise TypeError(f"attention: {name} must be a torch tensor; got {type(t).__name__}.")


def resolve(q: Tensor, causal: object, scale: object, backend: object) -> AttentionParams:
    """The user's arguments as the registered op takes them. `check` judges the tensors."""
    if scale is not None and (not isinstance(scale, (int, float)) or isinstance(scale, bool)):
        raise fail(f"scale must be a number, or None for head_dim ** -0.5; got {scale!r}.")
    if backend is not None and not isinstance(backend, str):
        raise fail(f"backend must be a name or None; got {backend!r}.")
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1]) if q.dim() > 0 and q.shape[-1] else 1.0
    return AttentionParams(bool(causal), float(scale), backend or "")


def check_dropout(dropout_p: object) -> float:
    if not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p <= 1:
        raise fail(f"dropout_p must be a probability from 0 to 1; got {dropout_p!r}.")
    return float(dropout_p)


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise fail(
                f"{name} must have 4 dimensions (batch, heads, length, head_dim); got shape {tuple(t.shape)}."
            )
        if t.layout != torch.strided:
            raise fail(f"{name} must be a dense tensor; got layout {t.layout}. Call to_dense() on it first.")
        if t.dtype != q.dtype:
            raise fail(
                f"q, k and v must have one dtype; got {q.dtype} and {t.dtype} for {name}. Convert one of "
                "them, or run under autocast."
            )
        if t.device != q.device:
            raise fail(
                f"q, k and v must be on one device; got {q.device} and {t.device} for {name}. "
                "Move one of them."
            )
    if q.dtype not in DTYPES:
        raise fail(
            f"the dtype must be float32, bfloat16, float16 or float64; got {q.dtype}. "
            "Convert q, k and v first."
        )
    batch, heads, _, head_dim = q.shape
    if k.shape[0] != batch or v.shape[0] != batch:
        raise fail(f"q, k and v must have one batch size; got {batch}, {k.shape[0]} and {v.shape[0]}.")
    if k.shape[1] != v.shape[1] or k.shape[2] != v.shape[2]:
        raise fail(f"k and v must have the same heads and length; got {tuple(k.shape)} and {tuple(v.shape)}.")
    if k.shape[3] != head_dim:
        raise fail(f"q and k must have one head_dim; got {head_dim} and {k.shape[3]}.")
    if head_dim == 0 or v.shape[3] == 0 or heads == 0 or k.shape[1] == 0:
        raise fail(
            f"heads and head_dim must not be 0; got q {tuple(q.shape)}, k {tuple(k.shape)}, "
            f"v {tuple(v.shape)}."
        )
    if heads % k.shape[1] != 0:
        raise fail(
            f"the heads of q must be a multiple of those of k and v, which they share; got {heads} and "
            f"{k.shape[1]}."
        )


def _check_mask(q: Tensor, k: Tensor, mask: Tensor | None) -> str:
    if mask is None:
        return "none"
    full = (*q.shape[:3], k.shape[2])
    if mask.dtype != torch.bool and mask.dtype != q.dtype:
        raise fail(
            f"the mask must be boolean (True: attended to) or of q's dtype {q.dtype} (added to the scores); "
            f"got {mask.dtype}."
        )
    if mask.device != q.device:
        raise fail(f"the mask must be on q's device {q.device}; got {mask.device}. Move it.")
    fits = mask.dim() <= 4 and all(
        m == 1 or m == f for m, f in zip(reversed(mask.shape), reversed(full), strict=False)
    )
    if not fits:
        raise fail(
            f"the mask must broadcast to (batch, heads, queries, keys) = {full}; got shape "
            f"{tuple(mask.shape)}."
        )
    return "boolean" if mask.dtype == torch.bool else "additive"


def _check_lengths(name: str, lengths: Tensor | None, batch: int) -> None:
    if lengths is None:
        return
    if lengths.dtype not in (torch.int64, torch.int32):
        raise fail(f"{name} must be int64; got {lengths.dtype}.")
    if tuple(lengths.shape) != (batch,):
        raise fail(
            f"{name} must have shape ({batch},), one length for each batch entry; got {tuple(lengths.shape)}."
        )


def check(inputs: Inputs, params: AttentionParams, weights: bool, save: bool) -> AttentionProblem:
    """The checked problem, or a ValueError that says what was given, what is allowed and what to do."""
    q, k, v, mask, q_lengths, kv_lengths = inputs
    _check_heads(q, k, v)
    kind = _check_mask(q, k, mask)
    _check_lengths("q_lengths", q_lengths, q.shape[0])
    _check_lengths("kv_lengths", kv_lengths, q.shape[0])
    if not math.isfinite(params.scale):
        raise fail(f"scale must be a finite number; got {params.scale}.")
    return AttentionProblem(
        params=params,
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        queries=q.shape[2],
        keys=k.shape[2],
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        dtype=q.dtype,
        device=q.device,
        mask=kind,
        weights=weights,
        save=save,
    )


def check_values(problem: AttentionProblem, q_lengths: Tensor | None, kv_lengths: Tensor | None) -> None:
    """What the lengths hold. Reads them, so a length on a GPU is waited for."""
    for name, lengths, most in (
        ("q_lengths", q_lengths, problem.queries),
        ("kv_lengths", kv_lengths, problem.keys),
    ):
        if lengths is None or lengths.numel() == 0:
            continue
        least, longest = int(lengths.min()), int(lengths.max())
        if least < 0 or longest > most:
            raise fail(
                f"{name} must be from 0 to {most}, the tensor's own length; got "
                f"{least if least < 0 else longest}."
            )


def check_saved(
    problem: AttentionProblem, grad_y: Tensor, grad_weights: Tensor | None, y: Tensor, lse: Tensor
) -> None:
    """The tensors that only the backward op takes: the kernels read them by pointer."""
    p = problem
    expected = [("grad_y", grad_y, p.y_shape, p.dtype), ("y", y, p.y_shape, p.dtype),
                ("lse", lse, p.row_shape, torch.float32)]  # fmt: skip
    if grad_weights is not None:
        expected.append(("grad_weights", grad_weights, p.weights_shape, p.dtype))
    for name, t, shape, dtype in expected:
        if tuple(t.shape) != tuple(shape) or t.dtype != dtype or t.device != p.device:
            raise fail(
                f"the backward op's {name} must have shape {tuple(shape)}, {dtype}, on {p.device}; got "
                f"{tuple(t.shape)}, {t.dtype}, on {t.device}. "
                "Pass what the forward op returned with save=True."
            )


_problems: BoundedCache[AttentionProblem] = BoundedCache(1024)


def op_problem(inputs: Inputs, params: AttentionParams, weights: bool, save: bool) -> AttentionProblem:
    """`check`, remembered by shapes, dtypes and devices."""
    key = (tuple([None if t is None else (t.shape, t.dtype, t.device, t.layout) for t in inputs]),
           params, weights, save)  # fmt: skip
    return _problems.get(key) or _problems.put(key, check(inputs, params, weights, save))
