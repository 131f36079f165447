"""attention: softmax(scale * q k^T + mask) v of projected heads as one op.

From top to bottom: the public function, the table of implementations, the registered ops and their fake
kernels. Autograd and vmap stand in _attention_transforms.py, errors in _attention_checks.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from interfuse.autocast import autocast_dtype, cast
from interfuse.dispatch import BackendError, Implementation, choose, named
from interfuse.ops import _attention_native as native
from interfuse.ops import _attention_transforms as transforms
from interfuse.ops import _attention_triton as triton
from interfuse.ops._attention_checks import (
    Inputs,
    check,
    check_dropout,
    check_saved,
    check_types,
    check_values,
    op_problem,
    resolve,
)
from interfuse.ops._attention_problem import (
    PARAM_COUNT,
    AttentionParams,
    AttentionProblem,
    Three,
    empty_gradients,
    empty_outputs,
)
from interfuse.reference import attention as reference
from interfuse.torch_state import is_plain_eager

# In order of preference; the reference runs everything.
IMPLEMENTATIONS = (
    Implementation("native", native.why_not, native.run, native.run_backward),
    Implementation("triton", triton.why_not, triton.run, triton.run_backward),
    Implementation("reference", lambda problem: None, reference.run, reference.run_backward),
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    q_lengths: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_weights: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + mask) v, head by head; a row that attends to nothing gives zeros.

    Args:
        q: (batch, heads, queries, head_dim).
        k: (batch, kv_heads, keys, head_dim), where kv_heads divides heads: query head h reads key head
            h // (heads // kv_heads).
        v: (batch, kv_heads, keys, value_dim).
        mask: broadcastable to (batch, heads, queries, keys); boolean (True: attended to) or added to the
            scores.
        dropout_p: the probability with which a weight is zeroed. Runs on the reference alone.
        q_lengths: (batch,) int64: how many query rows of each batch entry are real; the others give zeros.
        kv_lengths: (batch,) int64: how many keys of each batch entry are real; the others are never read.
        causal: query i attends to keys 0 to i alone.
        scale: None for head_dim ** -0.5.
        return_weights: also return the weights (batch, heads, queries, keys).
        backend: None to choose the fastest, or "native", "triton" or "reference"; one that cannot run the
            call raises its reason.
    """
    inputs = Inputs(q, k, v, mask, q_lengths, kv_lengths)
    check_types(inputs)
    params = resolve(q, causal, scale, backend)
    dropout_p = check_dropout(dropout_p)
    y, weights = run_long(inputs, params, dropout_p, return_weights)
    return (y, weights) if return_weights else y


def run_long(
    inputs: Inputs, params: AttentionParams, dropout_p: float, return_weights: bool
) -> tuple[Tensor, Tensor]:
    """What comes before the registered op, and the op; without weights the second result is (0,)."""
    if not torch.compiler.is_dynamo_compiling() and is_plain_eager():
        wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:4])
        if not wants_grad and not dropout_p and all(type(t) is Tensor or t is None for t in inputs):
            y, _, weights = _run(
                *inputs, *params.as_args(), return_weights, False
            )  # nothing else would see the op
            return y, weights
    dtype = autocast_dtype(inputs.q.device)
    if dtype is not None:
        q, k, v, mask = (None if t is None else cast(t, dtype) for t in inputs[:4])
        inputs = Inputs(q, k, v, mask, *inputs[4:])  # type: ignore[arg-type]
    reason = _why_reference_alone(inputs, dropout_p)
    if reason is not None:
        return _differentiable(inputs, params, dropout_p, return_weights, reason)
    y, _, weights = torch.ops.interfuse.attention.default(*inputs, *params.as_args(), return_weights, False)
    return y, weights


def _why_reference_alone(inputs: Inputs, dropout_p: float) -> str | None:
    """What only the reference does, by plain torch operators that autograd sees one by one."""
    if dropout_p:
        return f"the kernels have no dropout; got dropout_p={dropout_p}."
    mask = inputs.mask
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        return "the kernels give no gradient of the mask, and this mask requires one."
    return None


def _differentiable(
    inputs: Inputs, params: AttentionParams, dropout_p: float, return_weights: bool, reason: str
) -> tuple[Tensor, Tensor]:
    if params.backend and named(IMPLEMENTATIONS, params.backend).name != "reference":
        raise BackendError(f"backend {params.backend!r} was asked for, but cannot run this: {reason}")
    problem = check(inputs, params, return_weights, False)
    if not torch.compiler.is_compiling():
        check_values(problem, inputs.q_lengths, inputs.kv_lengths)
    y, _, weights = reference.attend(*inputs, params.causal, params.scale, dropout_p)
    return y, weights if return_weights else weights.new_empty(0)


def _implementation(problem: AttentionProblem, inputs: Inputs) -> Implementation:
    implementation = choose(IMPLEMENTATIONS, problem, problem.params.backend)
    if implementation.name != "native":  # the core looks itself
        check_values(problem, inputs.q_lengths, inputs.kv_lengths)
    return implementation


def _run(*args: Any) -> Three:
    inputs = Inputs(*args[:6])
    problem = op_problem(inputs, AttentionParams(*args[6 : 6 + PARAM_COUNT]), args[-2], args[-1])
    return _implementation(problem, inputs).run(problem, *inputs)


def _backward_problem(args: Any, make: Any) -> AttentionProblem:
    params = AttentionParams(*args[10 : 10 + PARAM_COUNT])
    problem = make(Inputs(*args[2:8]), params, args[1] is not None, True)
    check_saved(problem, *args[:2], *args[8:10])
    return replace(problem, grad_weights=True) if args[1] is not None else problem


def _run_backward(*args: Any) -> Three:
    problem = _backward_problem(args, op_problem)
    inputs = Inputs(*args[2:8])
    return _implementation(problem, inputs).run_backward(problem, *args[:10], args[-1])


def _fake(*args: Any) -> Three:
    params = AttentionParams(*args[6 : 6 + PARAM_COUNT])
    return empty_outputs(check(Inputs(*args[:6]), params, args[-2], args[-1]), args[0])


def _fake_backward(*args: Any) -> Three:
    _backward_problem(args, check)
    return empty_gradients(*args[2:5])


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? q_lengths, Tensor? kv_lengths"
_PARAMETERS = "bool causal, float scale, str backend"

_library = torch.library.Library("interfuse", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library.define(
    f"attention({_TENSORS}, {_PARAMETERS}, bool return_weights, bool save) "
    "-> (Tensor y, Tensor lse, Tensor weights)",
    tags=_tags,
)
_library.define(
    f"attention_backward(Tensor grad_y, Tensor? grad_weights, {_TENSORS}, Tensor y, Tensor lse, "
    f"{_PARAMETERS}, bool[3] wanted) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    tags=_tags,
)
_library.impl("attention", _run, "CompositeExplicitAutograd")
_library.impl("attention_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("interfuse::attention", _fake, lib=_library)
torch.library.register_fake("interfuse::attention_backward", _fake_backward, lib=_library)
_OPS = (torch.ops.interfuse.attention.default, torch.ops.interfuse.attention_backward.default)
transforms.register_autograd(_library, *_OPS)
transforms.register_vmap(_library, *_OPS)
