"""CrossAttention's calls in inference that are one call of the core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interfuse.nn import _attention_block
from interfuse.nn._attention_block import Block, Heads
from interfuse.ops._linear_eager import is_plain
from interfuse.torch_state import is_plain_eager, is_untouched

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interfuse.nn.attention import CrossAttention

# Query and context come first, then each layer's weight, in this order, then their biases.
_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")
_PLACES = tuple((2 + i, 0) for i in range(2 * len(_LAYERS)))


def _parameters(module: CrossAttention) -> list[Tensor | None] | None:
    """Weights and biases of the four layers, where calling these is multiplying by them and no more."""
    layers: list[Any] = [module._modules.get(name) for name in _LAYERS]  # noqa: SLF001
    if any(type(layer) is not nn.Linear or not is_untouched(layer, nn.Linear.forward) for layer in layers):
        return None
    return [layer.weight for layer in layers] + [layer.bias for layer in layers]


def _shaped_as_made(module: CrossAttention, parameters: Sequence[Tensor | None]) -> bool:
    """Whoever put another weight in a layer's place hears of it from torch's products."""
    q, kv = module.heads * module.head_dim, module.kv_heads * module.head_dim
    shapes = [
        (q, module.query_dim),
        (kv, module.context_dim),
        (kv, module.context_dim),
        (module.query_dim, q),
    ]
    shapes += [shape[:1] for shape in shapes]  # type: ignore[misc]
    return all(t is None or t.shape == shape for t, shape in zip(parameters, shapes, strict=True))


def run(
    module: CrossAttention, query: Tensor, context: Tensor, lengths: Tensor | None, causal: bool
) -> Tensor | None:
    """The output without dropout, masks and lengths of queries; None where it is to be made part by part."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not is_plain_eager():
        return None
    parameters = _parameters(module)
    if parameters is None:
        return None
    heads = Heads(module.heads, module.kv_heads, module.head_dim, bool(causal))
    known_as = ("cross", id(parameters[0]), heads)
    if lengths is None:
        found = _attention_block.again(query, context, parameters, known_as)
        if found is not None:
            return found
    elif not is_plain(lengths) or lengths.dtype != torch.int64 or lengths.shape != query.shape[:1]:
        return None
    given = [t for t in (query, context, *parameters) if t is not None]
    if not all(is_plain(t) and t.dtype == torch.float32 and not t.is_sparse for t in given):
        return None
    if query.shape[0] != context.shape[0] or not query.numel() or not context.numel():
        return None
    if not _shaped_as_made(module, parameters):
        return None
    block = Block(query, context, parameters, _PLACES, module.query_dim, None, lengths)
    return _attention_block.run(block, heads, known_as if lengths is None else None)
