"""softmax(scale * q k^T + mask) v in plain torch, with its backward as the formula, not as autograd.

The backward runs inside a kernel (where autograd is switched off) and can itself be differentiated:
create_graph goes through this file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from interfuse.autocast import without_autocast
from interfuse.ops._attention_problem import (
    AttentionParams,
    AttentionProblem,
    Three,
    empty_gradients,
    empty_outputs,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Widened(NamedTuple):
    """The operands in the dtype of the arithmetic, one key head per query head, padding set to zero."""

    q: Tensor
    k: Tensor
    v: Tensor
    allowed: Tensor | None  # what a row may attend to; None: everything
    bias: Tensor | None  # added to the scores


def _within(lengths: Tensor, most: int) -> Tensor:
    """(batch, most): which positions are inside each length."""
    return torch.arange(most, device=lengths.device) < lengths.unsqueeze(1)


def _widen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    q_lengths: Tensor | None,
    kv_lengths: Tensor | None,
    causal: bool,
) -> _Widened:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    queries, keys = q.shape[2], k.shape[2]
    q, k, v = (t.to(dtype) for t in (q, k, v))
    allowed: list[Tensor] = []
    if q_lengths is not None:
        rows = _within(q_lengths.to(q.device), queries)[:, None, :, None]
        q = q.masked_fill(~rows, 0)  # what padding holds, be it NaN, reaches nothing
        allowed.append(rows)
    if kv_lengths is not None:
        columns = _within(kv_lengths.to(q.device), keys)[:, None, None, :]
        k, v = (t.masked_fill(~columns.transpose(-1, -2), 0) for t in (k, v))
        allowed.append(columns)
    if causal:
        allowed.append(torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril())
    bias = None
    if mask is not None and mask.dtype == torch.bool:
        allowed.append(mask)
    elif mask is not None:
        bias = mask.to(dtype)
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    total = None
    for one in allowed:
        total = one if total is None else total & one
    return _Widened(q, k, v, total, bias)


def _probabilities(w: _Widened, scale: float) -> tuple[Tensor, Tensor]:
    """The softmax of the scores, and the logarithm of its sums; zeros and -inf for rows without any key."""
    scores = torch.matmul(w.q * scale, w.k.transpose(-1, -2))
    if w.bias is not None:
        scores = scores + w.bias
    if w.allowed is not None:
        scores = scores.masked_fill(~w.allowed, float("-inf"))
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0)  # any finite number: softmax of -inf alone is NaN, its gradient too
    lse = torch.logsumexp(scores, -1).masked_fill(empty.squeeze(-1), float("-inf"))
    return torch.softmax(scores, -1).masked_fill(empty, 0), lse


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    q_lengths: Tensor | None,
    kv_lengths: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float = 0.0,
) -> Three:
    """(y, lse, weights). Differentiable, in the mask too; dropout zeroes weights, as torch's."""
    with without_autocast(q.device):
        w = _widen(q, k, v, mask, q_lengths, kv_lengths, causal)
        weights, lse = _probabilities(w, scale)
        if dropout_p:
            weights = F.dropout(weights, dropout_p)
        return torch.matmul(weights, w.v).to(q.dtype), lse, weights.to(q.dtype)


def forward(
    params: AttentionParams,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    q_lengths: Tensor | None,
    kv_lengths: Tensor | None,
) -> Three:
    return attend(q, k, v, mask, q_lengths, kv_lengths, params.causal, params.scale)


def backward(
    params: AttentionParams,
    grad_y: Tensor,
    grad_weights: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    q_lengths: Tensor | None,
    kv_lengths: Tensor | None,
) -> Three:
    """The gradients of q, k and v."""
    with without_autocast(q.device):
        w = _widen(q, k, v, mask, q_lengths, kv_lengths, params.causal)
        p, _ = _probabilities(w, params.scale)
        grad = grad_y.to(p.dtype)
        if q_lengths is not None:
            grad = grad.masked_fill(~_within(q_lengths.to(q.device), q.shape[2])[:, None, :, None], 0)
        grad_p = torch.matmul(grad, w.v.transpose(-1, -2))
        if grad_weights is not None:
            grad_p = grad_p + grad_weights.to(p.dtype)
        grad_scores = p * (grad_p - (p * grad_p).sum(-1, keepdim=True)) * params.scale
        grad_q = torch.matmul(grad_scores, w.k)
        grad_k = torch.matmul(grad_scores.transpose(-1, -2), w.q)
        grad_v = torch.matmul(p.transpose(-1, -2), grad)
        shape = (k.shape[0], k.shape[1], q.shape[1] // k.shape[1], k.shape[2], -1)
        grad_k, grad_v = (t.reshape(*shape[:4], t.shape[-1]).sum(2) for t in (grad_k, grad_v))
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def run(problem: AttentionProblem, q: Tensor, *inputs: Tensor | None) -> Three:
    outputs = empty_outputs(problem, q)
    for to, value in zip(outputs, forward(problem.params, q, *inputs), strict=True):  # type: ignore[arg-type]
        if to.dim() > 1:
            to.copy_(value)
    return outputs


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
    results = backward(problem.params, grad_y, grad_weights, q, k, v, mask, q_lengths, kv_lengths)
    for to, value in zip(grads, results, strict=True):
        to.copy_(value)
    return grads


# ---- attention pooling: sum over t of softmax(context . tanh(hidden[t])) x[t] ----


def _pool_operands(
    x: Tensor, hidden: Tensor, context: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, tanh(hidden) and context in the dtype of the arithmetic, and the weights."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, hidden, context = (t.to(dtype) for t in (x, hidden, context))
    if lengths is None:
        value = torch.tanh(hidden)
        return x, value, context, torch.softmax(torch.matmul(value, context), -1)
    beyond = ~_within(lengths.to(x.device), x.shape[1])
    x, hidden = (t.masked_fill(beyond.unsqueeze(-1), 0) for t in (x, hidden))
    value = torch.tanh(hidden)
    empty = beyond.all(-1, keepdim=True)
    scores = torch.matmul(value, context).masked_fill(beyond, float("-inf")).masked_fill(empty, 0)
    return x, value, context, torch.softmax(scores, -1).masked_fill(empty, 0)


def pool(x: Tensor, hidden: Tensor, context: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y, weights)."""
    with without_autocast(x.device):
        wide, _, _, weights = _pool_operands(x, hidden, context, lengths)
        y = torch.matmul(weights.unsqueeze(1), wide).squeeze(1)
        return y.to(x.dtype), weights.to(x.dtype)


def pool_backward(
    grad_y: Tensor,
    grad_weights: Tensor | None,
    x: Tensor,
    hidden: Tensor,
    context: Tensor,
    lengths: Tensor | None,
) -> Three:
    """The gradients of x, hidden and context."""
    with without_autocast(x.device):
        wide, value, u, p = _pool_operands(x, hidden, context, lengths)
        grad = grad_y.to(p.dtype)
        grad_p = torch.matmul(wide, grad.unsqueeze(-1)).squeeze(-1)
        if grad_weights is not None:
            grad_p = grad_p + grad_weights.to(p.dtype)
        grad_scores = (p * (grad_p - (p * grad_p).sum(-1, keepdim=True))).unsqueeze(-1)
        grad_x = p.unsqueeze(-1) * grad.unsqueeze(1)
        grad_hidden = grad_scores * u * (1 - value * value)
        grad_context = (grad_scores * value).sum((0, 1))
        return grad_x.to(x.dtype), grad_hidden.to(x.dtype), grad_context.to(x.dtype)
