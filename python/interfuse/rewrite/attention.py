"""How optimize() recognises attention: torch.nn.MultiheadAttention, whole, wherever it is called from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from interfuse.autocast import autocast_dtype
from interfuse.nn import _attention_block
from interfuse.nn.attention import Weights, multihead_forward, weights_of, what_is_wrong
from interfuse.ops._attention_problem import AttentionParams, AttentionProblem
from interfuse.ops._dtypes import KERNEL_DTYPES
from interfuse.ops.attention import IMPLEMENTATIONS
from interfuse.rewrite.known import PLAIN_TENSORS, is_ours, why_not_type
from interfuse.rewrite.site import Call, LiveLink, Match, Pattern, StaticLink, choose_kernel, wants_gradient

if TYPE_CHECKING:
    from collections.abc import Sequence

# forward's arguments after the query, as torch has them.
_NAMES = (
    "key",
    "value",
    "key_padding_mask",
    "need_weights",
    "attn_mask",
    "average_attn_weights",
    "is_causal",
)


class Seen(NamedTuple):
    """A call in words; `alone`: keys and values are the queries, which torch projects by one product;
    `at_once`: the core makes all of it by one call."""

    problem: AttentionProblem
    alone: bool
    at_once: bool


# Below these many scores torch's own module was measured to be as fast as the kernels, or faster: what is
# saved on scores does not yet pay for the calls around them. Torch 2.13, two cores of a Xeon with AVX-512,
# widths of 32 to 512, 7 to 256 tokens, batches of 1 to 32.
LEAST_SCORES = 80_000  # training
LEAST_SCORES_PER_WIDTH = 1_200  # training: the products around the scores grow with the width
LEAST_WITH_WEIGHTS = 1_000_000  # training, where the weights are returned too
LEAST_IN_INFERENCE = 320_000
LEAST_IN_INFERENCE_ALONE = 2_000_000  # torch has a call for the whole of self-attention, or with weights
# From this width on, a module that is one call of the core was faster with the fewest rows that it takes:
# 1.2 to 3 times at widths of 64 to 512, with 4 to 130 thousand scores.
LEAST_WIDTH_AT_ONCE = 64


def why_slower(seen: Seen) -> str | None:
    """Why torch's own module is to run a call, which is faster there."""
    p = seen.problem
    if p.device.type != "cpu" or seen.at_once:
        return None
    if p.save:
        width = p.heads * p.head_dim
        least = LEAST_WITH_WEIGHTS if p.weights else max(LEAST_SCORES, LEAST_SCORES_PER_WIDTH * width)
    else:
        least = LEAST_IN_INFERENCE_ALONE if seen.alone or p.weights else LEAST_IN_INFERENCE
    scores = p.batch * p.heads * p.queries * p.keys
    if scores >= least and not (seen.alone and p.weights and not p.save):
        return None
    what = f"{'self-' if seen.alone else ''}attention{' with its weights' if p.weights else ''}"
    mode = "training" if p.save else "inference"
    return f"torch's own module is as fast for {what} of {scores} scores in {mode}"


class Attention(Pattern):
    """attention's part in optimize()."""

    op = "attention"
    whole = True

    def anchors(self, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention) and not is_ours(module)

    def refuse(self, module: nn.Module) -> str | None:
        reason = why_not_type(module, (nn.MultiheadAttention,), "nn.MultiheadAttention")
        if reason is not None:
            return reason
        out_proj: Any = module.out_proj
        if nn.utils.parametrize.is_parametrized(out_proj):
            return "its out_proj is parametrised, so that its weights are computed anew at every call"
        dtype = out_proj.weight.dtype
        if dtype not in KERNEL_DTYPES:
            return f"its weights are {dtype}; the kernels take float32, bfloat16 and float16"
        return None

    def match(self, links: Sequence[StaticLink], end: str) -> Match | str:
        return Match(1, links[0].text, enabled=True, reason=end)

    def prepare(self, links: Sequence[LiveLink], value: Any) -> Call | None:
        forward, arguments, keywords = links[0]
        module: nn.MultiheadAttention = forward.owner
        if type(module) is not nn.MultiheadAttention or len(arguments) > len(_NAMES):
            return None
        given = dict(zip(_NAMES, arguments, strict=False))
        if given.keys() & keywords.keys() or keywords.keys() - set(_NAMES):
            return None
        given.update(keywords)
        if "key" not in given or "value" not in given or (module.training and module.dropout):
            return None  # what is missing torch says itself; dropout is torch's own
        at_once = _at_once(module, value, given)
        kind = (given["key"].shape, given["key"] is value, bool(given.get("need_weights", True)), at_once)
        if not at_once and _few(module, value, given["key"]) and not torch.compiler.is_compiling():
            # Whatever else it is, no kernel takes it (why_slower): what is asked below takes as long as that
            # saves. The one weight is there for whether a gradient is wanted.
            return Call(
                (value, given["key"], given["value"], module.out_proj.weight),
                {"module": module, **given},
                kind=kind,
            )
        tensors = (value, given.pop("key"), given.pop("value"), *weights_of(module))
        masks = [given.get("key_padding_mask"), given.get("attn_mask")]
        if not _fits(module, tensors, masks, bool(given.get("is_causal"))):
            return None
        return Call(tensors, {"module": module, **given}, kind=kind)

    def run(self, call: Call) -> Any:
        query, key, value, *weights = call.tensors
        return multihead_forward(
            query=query, key=key, value=value, weights=Weights(*weights), **call.settings
        )

    def describe(self, call: Call) -> Seen:
        query, key = call.tensors[:2]
        module = call.settings["module"]
        batched = query.dim() == 3
        axis = 0 if module.batch_first else 1
        problem = AttentionProblem(
            params=AttentionParams(bool(call.settings.get("is_causal")), 1.0),
            batch=query.shape[axis] if batched else 1,
            heads=module.num_heads,
            kv_heads=module.num_heads,
            queries=query.shape[1 - axis] if batched else query.shape[0],
            keys=key.shape[1 - axis] if batched else key.shape[0],
            head_dim=module.head_dim,
            value_dim=module.head_dim,
            dtype=autocast_dtype(query.device) or query.dtype,
            device=query.device,
            mask="none" if call.settings.get("attn_mask") is None else "additive",
            weights=bool(call.settings.get("need_weights", True)),
            save=wants_gradient(call),
        )
        kind: Any = call.kind
        return Seen(problem, key is query, kind[-1])

    def kernel(self, seen: Seen) -> tuple[str | None, tuple[str, ...]]:
        return choose_kernel(IMPLEMENTATIONS, seen.problem, why_slower(seen))


def _at_once(module: nn.MultiheadAttention, query: Any, given: dict[str, Any]) -> bool:
    """Whether an inference call with these arguments is one call of the core, and faster for it."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or given.get("need_weights", True):
        return False
    if given["key"] is not given["value"] or not module.batch_first or module.in_proj_weight is None:
        return False
    if module.bias_k is not None or module.add_zero_attn or type(query) is not Tensor or query.dim() != 3:
        return False
    if module.embed_dim < LEAST_WIDTH_AT_ONCE or not query.is_cpu or query.dtype != torch.float32:
        return False
    if query.is_nested or autocast_dtype(query.device) is not None:
        return False
    return _attention_block.takes(query.shape[0] * query.shape[1])


def _few(module: nn.MultiheadAttention, query: Any, key: Any) -> bool:
    """Whether these are plain tensors with fewer scores than any kernel is taken for."""
    if type(query) is not Tensor or type(key) is not Tensor or query.is_nested or key.is_nested:
        return False
    dims = query.dim()
    if dims not in (2, 3) or key.dim() != dims or not query.is_cpu:
        return False
    tokens = query.numel() * key.numel() // max(1, query.shape[-1] * key.shape[-1])
    batch = 1 if dims == 2 else max(1, query.shape[0 if module.batch_first else 1])
    return tokens // batch * module.num_heads < LEAST_SCORES


def _fits(
    module: nn.MultiheadAttention, tensors: Sequence[Any], masks: Sequence[Any], is_causal: bool
) -> bool:
    """Whether the op computes this. What it does not, the module itself computes, or says what is wrong."""
    there = [t for t in tensors if t is not None]
    if any(type(t) not in PLAIN_TENSORS for t in there) or any(
        m is not None and (type(m) not in PLAIN_TENSORS or m.requires_grad) for m in masks
    ):
        return False
    x = tensors[0]
    if any(t.device != x.device or t.layout is not torch.strided or t.is_nested for t in there):
        return False
    query, key, value = tensors[:3]
    if what_is_wrong(module, query, key, value, masks[0], masks[1], is_causal) is not None:
        return False
    if not query.numel() or not key.numel():
        return False
    if autocast_dtype(x.device) is not None:
        return all(t.dtype in KERNEL_DTYPES for t in there)
    return all(t.dtype is x.dtype for t in there) and all(
        m is None or m.dtype in (torch.bool, x.dtype) for m in masks
    )
