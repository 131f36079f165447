"""attention on a GPU: what the op calls to run the Triton kernels, and when it cannot.

attention_launches.py lists the launches of a problem, attention_kernels.py holds the kernels, and
attention_pool.py attention pooling. Nothing here waits for the device: lengths are read by kernels alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from interfuse.kernels import attention_launches as plan
from interfuse.kernels.launch import device_why_not, on_device_of

from interfuse.ops._attention_problem import empty_gradients, empty_outputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from interfuse.ops._attention_problem import AttentionProblem, Three


def why_not(problem: AttentionProblem) -> str | None:
    """The sentence that says why these kernels cannot run the problem, or None."""
    reason = device_why_not(problem.device, problem.dtype)
    if reason is not None:
        return reason
    if problem.grad_weights:
        return "the Triton backward takes no gradient of the returned weights."
    widest = max(problem.head_dim, problem.value_dim)
    if widest > plan.WIDEST:
        return f"the Triton kernels hold heads of at most {plan.WIDEST} elements; here they have {widest}."
    return None


def dense_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def full_mask(problem: AttentionProblem, mask: Tensor | None) -> Tensor | None:
    """As (batch, heads, queries, keys) by strides of zero; a boolean one as bytes."""
    if mask is None:
        return None
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    return mask.expand(problem.weights_shape)


def run(
    problem: AttentionProblem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    q_lengths: Tensor | None,
    kv_lengths: Tensor | None,
) -> Three:
    """(y, lse, weights) as the registered op returns them."""
    y, lse, weights = empty_outputs(problem, q)
    q, k, v, mask = dense_rows(q), dense_rows(k), dense_rows(v), full_mask(problem, mask)
    sums: Tensor | None = lse
    if not problem.save:
        shape = problem.row_shape
        sums = torch.empty(shape, dtype=torch.float32, device=q.device) if problem.weights else None
    with on_device_of(q):
        plan.forward(problem, q, k, v, mask, q_lengths, kv_lengths, y, sums).run()
        if sums is not None and problem.weights:
            plan.probabilities(problem, q, k, mask, q_lengths, kv_lengths, sums, weights).run()
    return y, lse, weights


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
    """Gradients of q, k and v; unwritten where not wanted."""
    grads = grad_q, grad_k, grad_v = empty_gradients(q, k, v)
    q, k, v, mask = dense_rows(q), dense_rows(k), dense_rows(v), full_mask(problem, mask)
    y, grad_y, lse = dense_rows(y), dense_rows(grad_y), lse.contiguous()
    delta = torch.empty_like(lse)
    given = (q, k, v, mask, q_lengths, kv_lengths, lse, delta, grad_y)
    with on_device_of(q):
        plan.row_sums(problem, y, grad_y, q_lengths, delta).run()
        if wanted[0]:
            plan.backward_queries(problem, *given, grad_q).run()
        if wanted[1] or wanted[2]:
            plan.backward_keys(problem, *given, grad_k, grad_v).run()
    return grads
