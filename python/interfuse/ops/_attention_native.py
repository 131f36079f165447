"""The compiled core as an implementation of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interfuse import _native
from interfuse.bounded_cache import BoundedCache
from interfuse.ops import _native_limits
from interfuse.ops._attention_problem import AttentionProblem, Three, empty_gradients, empty_outputs
from interfuse.ops._native_limits import DTYPE_NAMES

if TYPE_CHECKING:
    from collections.abc import Sequence


_Strides = tuple[int, int, int]


def why_not(problem: AttentionProblem) -> str | None:
    reason = _native_limits.why_not(problem.device, problem.dtype)
    if reason is not None:
        return reason
    if problem.grad_weights:
        return "the native backward takes no gradient of the returned weights."
    return None


def _rows(t: Tensor) -> Tensor:
    """t with a dense last axis, which is all that the core asks for."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _mask_rows(problem: AttentionProblem, mask: Tensor | None) -> Tensor | None:
    """The mask as (batch, heads, queries, keys), dense along the keys; else strides of zero repeat it."""
    return None if mask is None else dense_rows(mask, problem.keys).expand(problem.weights_shape)


def dense_rows(mask: Tensor, keys: int) -> Tensor:
    """The mask with all its keys, dense along them."""
    if mask.dim() == 0 or mask.shape[-1] != keys:
        mask = mask.expand(*mask.shape[:-1], keys)
    return _rows(mask)


def _int64(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to("cpu", torch.int64).contiguous()


def outer_strides(t: Tensor | None) -> _Strides:
    return (0, 0, 0) if t is None else t.stride()[:3]  # type: ignore[return-value]


_descs: BoundedCache[_native.AttentionDesc] = BoundedCache(512)


def _desc(problem: AttentionProblem, *tensors: Tensor | None) -> _native.AttentionDesc:
    """The core's description for tensors of these strides: q, k, v, y, mask, and the three gradients."""
    key = (problem, *[None if t is None else t.stride() for t in tensors])
    found = _descs.get(key)
    if found is not None:
        return found
    q, k, v, y, mask, grad_q, grad_k, grad_v = (outer_strides(t) for t in tensors)
    p = problem
    desc = _native.AttentionDesc(
        dtype=DTYPE_NAMES[p.dtype],
        mask=p.mask,
        causal=p.params.causal,
        scale=p.params.scale,
        batch=p.batch,
        heads=p.heads,
        kv_heads=p.kv_heads,
        queries=p.queries,
        keys=p.keys,
        head_dim=p.head_dim,
        value_dim=p.value_dim,
        q=q,
        k=k,
        v=v,
        y=y,
        mask_strides=mask,
        grad_q=grad_q,
        grad_k=grad_k,
        grad_v=grad_v,
    )
    return _descs.put(key, desc)


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def forward_into(
    problem: AttentionProblem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    q_lengths: Tensor | None,
    kv_lengths: Tensor | None,
    y: Tensor,
    lse: Tensor,
    weights: Tensor | None,
) -> None:
    """Writes y, and lse where the problem saves it; y's last axis is dense."""
    q, k, v, mask = _rows(q), _rows(k), _rows(v), _mask_rows(problem, mask)
    q_lengths, kv_lengths = _int64(q_lengths), _int64(kv_lengths)
    _native.attention_forward(
        _desc(problem, q, k, v, y, mask, None, None, None),
        [pointer(t) for t in (q, k, v, mask, q_lengths, kv_lengths)],
        y.data_ptr(),
        lse.data_ptr() if problem.save else 0,
        pointer(weights),
        torch.get_num_threads(),
    )


def run(
    problem: AttentionProblem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    q_lengths: Tensor | None,
    kv_lengths: Tensor | None,
) -> Three:
    outputs = y, lse, weights = empty_outputs(problem, q)
    asked = weights if problem.weights else None
    forward_into(problem, q, k, v, mask, q_lengths, kv_lengths, y, lse, asked)
    return outputs


def backward_into(
    problem: AttentionProblem,
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    q_lengths: Tensor | None,
    kv_lengths: Tensor | None,
    y: Tensor,
    lse: Tensor,
    grads: Three,
) -> None:
    """Writes the gradients of q, k and v, whose last axes are dense."""
    q, k, v, mask = _rows(q), _rows(k), _rows(v), _mask_rows(problem, mask)
    q_lengths, kv_lengths = _int64(q_lengths), _int64(kv_lengths)
    lse = lse.contiguous()
    if grad_y.stride() != y.stride() or y.stride(-1) != 1:
        grad_y, y = grad_y.contiguous(), y.contiguous()
    _native.attention_backward(
        _desc(problem, q, k, v, y, mask, *grads),
        [pointer(t) for t in (q, k, v, mask, q_lengths, kv_lengths)],
        y.data_ptr(),
        lse.data_ptr(),
        grad_y.data_ptr(),
        grads[0].data_ptr(),
        grads[1].data_ptr(),
        grads[2].data_ptr(),
        torch.get_num_threads(),
    )


def run_backward(
    problem: AttentionProblem,
    grad_y: Tensor,
    grad_weights: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    q_lengths: Tensor | None,
    kv_lengths: Tensor | None,
    y: Tensor,
    lse: Tensor,
    wanted: Sequence[bool],
) -> Three:
    grads = empty_gradients(q, k, v)
    backward_into(problem, grad_y, q, k, v, mask, q_lengths, kv_lengths, y, lse, grads)
    return grads
