"""How optimize() recognises attention: torch.nn.MultiheadAttention, whole, wherever it is called from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from interfuse.autocast import autocast_dtype
from interfuse.dispatch import choose, refusals
from interfuse.nn.attention import Weights, multihead_forward, weights_of, what_is_wrong
from interfuse.ops._attention_problem import AttentionParams, AttentionProblem
from interfuse.ops.attention import IMPLEMENTATIONS
from interfuse.rewrite.known import PLAIN_TENSORS
from interfuse.rewrite.site import Call, LiveLink, Match, StaticLink, wants_gradient

if TYPE_CHECKING:
    from collections.abc import Sequence

_FORWARD: Any = nn.MultiheadAttention.forward
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
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Attention:
    """attention's part in optimize()."""

    op = "attention"
    whole = True

    def stands(self) -> None:
        pass

    def anchors(self, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention) and not type(module).__module__.startswith(
            "interfuse."
        )

    def refuse(self, module: nn.Module) -> str | None:
        name = type(module).__name__
        if any(nn.utils.parametrize.is_parametrized(m) for m in module.modules()):
            return "its weights are parametrised, so that they are computed anew at every call"
        if type(module) is not nn.MultiheadAttention:
            return f"its type {name} is not exactly nn.MultiheadAttention, so it may compute something else"
        if type(module).forward is not _FORWARD or not _FORWARD.__module__.startswith("torch."):
            return f"{name} is of a class whose forward was replaced"
        dtype = module.out_proj.weight.dtype
        if dtype not in _DTYPES:
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
        tensors = (value, given.pop("key"), given.pop("value"), *weights_of(module))
        masks = [given.get("key_padding_mask"), given.get("attn_mask")]
        if not _fits(module, tensors, masks, bool(given.get("is_causal"))):
            return None
        return Call(tensors, {"module": module, **given})

    def run(self, call: Call) -> Any:
        query, key, value, *weights = call.tensors
        return multihead_forward(
            query=query, key=key, value=value, weights=Weights(*weights), **call.settings
        )

    def calm(self, links: Sequence[LiveLink], call: Call) -> tuple[Sequence[LiveLink], Call]:
        return links, call  # nothing is random: calls with dropout are not taken

    def describe(self, call: Call) -> AttentionProblem:
        query, key = call.tensors[:2]
        module = call.settings["module"]
        batched = query.dim() == 3
        axis = 0 if module.batch_first else 1
        return AttentionProblem(
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

    def kernel(self, seen: AttentionProblem) -> tuple[str | None, tuple[str, ...]]:
        chosen = choose(IMPLEMENTATIONS, seen)
        before = IMPLEMENTATIONS[: IMPLEMENTATIONS.index(chosen)]
        why_not = tuple(f"{r.name}: {r.reason}" for r in refusals(before, seen))
        return None if chosen.name == "reference" else chosen.name, why_not


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
        return all(t.dtype in _DTYPES for t in there)
    return all(t.dtype is x.dtype for t in there) and all(
        m is None or m.dtype in (torch.bool, x.dtype) for m in masks
    )
