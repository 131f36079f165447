"""A whole cross-attention in inference, from its projections to the output's, as one call of the core.

Each thread takes some batch entries from end to end, so that keys and values come out of the cache of the
core that made them. A call like one before is found by its weight and its shapes, and compared in the
binding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from interfuse._native import AttentionBlockDesc, attention_block_call, attention_block_forward, info
from interfuse.bounded_cache import BoundedCache
from interfuse.ops import _attention_native as native
from interfuse.torch_state import DLPACK_EXCHANGE, WATCHERS, in_forward_mode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_MATRIX_UNITS = bool(info()["matrix_units"])
_LEAST_ROWS = 128  # with fewer, or without matrix units, torch's products are as fast

# Of the core's addresses, in their order: which of a call's tensors, and how many floats from its start.
_Places = tuple[tuple[int, int], ...]
_NONE = (-1, 0)


class Heads(NamedTuple):
    """How projections are cut, and the order of the scores."""

    number: int
    kv_number: int
    size: int
    causal: bool


class Block(NamedTuple):
    """What a call takes: (batch, length, width) query and context, the parameters, and where in these the
    weights of q, k, v and the output lie, then their biases."""

    query: Tensor
    context: Tensor
    parameters: Sequence[Tensor | None]
    places: _Places
    out_dim: int
    mask: Tensor | None = None  # broadcastable to (batch, heads, queries, keys), boolean or float32
    lengths: Tensor | None = None  # of the context, int64


def packed_places(width: int, with_bias: bool) -> _Places:
    """Of parameters in_proj, in_bias, out_proj and out_bias, behind query and context."""
    size = width * width
    biases = [(3, i * width) for i in range(3)] if with_bias else [_NONE] * 3
    return ((2, 0), (2, size), (2, 2 * size), (4, 0), *biases, (5, 0))


def takes(rows: int) -> bool:
    """Whether calls with so many rows of queries, in all batch entries, are made here."""
    return _MATRIX_UNITS and rows >= _LEAST_ROWS


def _row(t: Tensor) -> int | None:
    """Floats from row to row of a (batch, length, width), or None where they are not evenly apart."""
    (batch, length, width), (outer, row, one) = t.shape, t.stride()
    if one != 1 and width > 1:
        return None
    if length == 1:
        return outer
    return row if batch == 1 or outer == length * row else None


_descs: BoundedCache[AttentionBlockDesc] = BoundedCache(512)
_recent: BoundedCache[Callable[[Sequence[Tensor | None], int], Tensor | None]] = BoundedCache(1024)


def run(block: Block, heads: Heads, remember_as: tuple[object, ...] | None) -> Tensor | None:
    """The output, of plain float32 tensors on the CPU; None where the products are to be made one by one.

    remember_as: what `again` will be asked with, beside the shapes; None where masks or lengths are involved.
    """
    query, context = block.query, block.context
    batch, queries = query.shape[:2]
    if not takes(batch * queries):
        return None
    rows = _row(query), _row(context)
    if rows[0] is None or rows[1] is None:
        return None
    if not all(t is None or t.is_contiguous() for t in block.parameters):
        return None
    mask, kind = block.mask, "none"
    if mask is not None:
        if not mask.is_cpu or mask.is_neg() or mask.dtype not in (torch.bool, torch.float32):
            return None
        kind = "boolean" if mask.dtype == torch.bool else "additive"
        mask = native.dense_rows(mask, context.shape[1]).expand(batch, heads.number, queries, -1)
    strides = native.outer_strides(mask)
    lengths = None if block.lengths is None else block.lengths.contiguous()
    sizes = (batch, heads.number, heads.kv_number, queries, context.shape[1], heads.size, query.shape[2],
             context.shape[2], block.out_dim)  # fmt: skip
    key = (kind, heads, sizes, rows, strides)
    desc = _descs.get(key)
    if desc is None:
        desc = AttentionBlockDesc(kind, heads.causal, heads.size**-0.5, sizes, rows[0], rows[1], strides)
        _descs.put(key, desc)
    tensors = (query, context, *block.parameters)
    shape = (batch, queries, block.out_dim)
    if remember_as is not None and mask is None and lengths is None and not torch.is_grad_enabled():
        places = ((0, 0), (1, 0), _NONE, _NONE, *block.places)
        made = attention_block_call(
            DLPACK_EXCHANGE, WATCHERS, (Tensor, nn.Parameter), desc, tensors, places, shape,
            (queries * block.out_dim, block.out_dim, 1))  # fmt: skip
        _recent.put((*remember_as, query.shape, context.shape), made)
    starts = [native.pointer(t) for t in tensors]
    given = [starts[i] + 4 * offset if i >= 0 and starts[i] else 0 for i, offset in block.places]
    y = query.new_empty(shape)
    addresses = [*starts[:2], native.pointer(mask), native.pointer(lengths), *given]
    attention_block_forward(desc, addresses, y.data_ptr(), torch.get_num_threads())
    return y


def again(
    query: Tensor, context: Tensor, parameters: Sequence[Tensor | None], known_as: tuple[object, ...]
) -> Tensor | None:
    """The output of a call like a recent one, else None."""
    if torch.is_grad_enabled() or in_forward_mode():
        return None
    recent = _recent.get((*known_as, query.shape, context.shape))
    return None if recent is None else recent((query, context, *parameters), torch.get_num_threads())
