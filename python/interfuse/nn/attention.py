"""MultiheadAttention as torch.nn has it, CrossAttention for two modalities, and AttentionPool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interfuse.nn import _attention_cross, _attention_whole
from interfuse.ops._attention_checks import Inputs, check_dropout, check_types, fail, resolve
from interfuse.ops._attention_pool import attention_pool
from interfuse.ops.attention import run_long
from interfuse.torch_state import current_parameters, is_plain_eager

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self


class Weights(NamedTuple):
    """The parameters of a torch.nn.MultiheadAttention."""

    in_proj: Tensor | None  # None: the next three
    q_proj: Tensor | None
    k_proj: Tensor | None
    v_proj: Tensor | None
    in_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    out_proj: Tensor
    out_bias: Tensor | None


_OWN = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k",
        "bias_v"]  # fmt: skip
_OUT = ["weight", "bias"]


def weights_of(module: nn.MultiheadAttention) -> Weights:
    return Weights(*current_parameters(module, _OWN), *current_parameters(module.out_proj, _OUT))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _merged(attn_mask: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One mask from torch.nn's two, in which True means not attended to."""
    masks = [m for m in (attn_mask, key_padding_mask) if m is not None]
    if not masks:
        return None
    if all(m.dtype == torch.bool for m in masks):
        return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
    total = _additive(masks[0], dtype)
    return total if len(masks) == 1 else total + _additive(masks[1], dtype)


def _as_lengths(key_padding_mask: Tensor | None) -> Tensor | None:
    """The lengths that a padding mask stands for, where it pads at the end alone and looking is free."""
    if key_padding_mask is None or key_padding_mask.dtype != torch.bool or not key_padding_mask.is_cpu:
        return None
    if torch.compiler.is_compiling() or not is_plain_eager() or key_padding_mask.shape[1] == 0:
        return None
    lengths = (~key_padding_mask).sum(1)
    at_end = torch.arange(key_padding_mask.shape[1]) >= lengths.unsqueeze(1)
    return lengths if torch.equal(at_end, key_padding_mask) else None


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, lengths: Tensor | None) -> Tensor:
    """F.linear of a (batch, length, width); in inference, rows beyond their length stay unwritten."""
    if lengths is None or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    if not is_plain_eager() or not x.is_cpu:
        return F.linear(x, weight, bias)
    counts = lengths.tolist()
    if 5 * sum(counts) > 4 * x.shape[0] * x.shape[1]:  # one large product is worth a few rows too many
        return F.linear(x, weight, bias)
    out = x.new_empty(*x.shape[:2], weight.shape[0])
    transposed = weight.t()
    for i, count in enumerate(counts):
        if bias is None:
            torch.mm(x[i, :count], transposed, out=out[i, :count])
        else:
            torch.addmm(bias, x[i, :count], transposed, out=out[i, :count])
    return out


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on interfuse's kernels: its arguments, its state_dict, its results.

    The one difference: a query that may attend to nothing gives zeros, where torch gives NaN. Dropout in
    training runs in plain torch.
    """

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention) -> Self:
        """The same module with interfuse's forward, sharing the given Parameters."""
        if type(module) is not nn.MultiheadAttention:
            raise fail(
                f"{cls.__name__}.from_torch takes a torch.nn.MultiheadAttention and no subclass, whose "
                f"forward could differ; got {type(module).__module__}.{type(module).__qualname__}."
            )
        shared = cls(
            module.embed_dim, module.num_heads, module.dropout, module.in_proj_bias is not None,
            module.bias_k is not None, module.add_zero_attn, module.kdim, module.vdim, module.batch_first,
            "meta", module.out_proj.weight.dtype)  # fmt: skip
        for name, parameter in module.named_parameters(recurse=False):
            setattr(shared, name, parameter)
        shared.out_proj.weight, shared.out_proj.bias = module.out_proj.weight, module.out_proj.bias
        return shared.train(module.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch.nn.MultiheadAttention's."""
        return multihead_forward(
            self,
            query,
            key,
            value,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
        )


def multihead_forward(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    weights: Weights | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The forward of a torch.nn.MultiheadAttention, whatever class holds its parameters.

    weights: in the place of the module's own.
    """
    if query.is_nested or key.is_nested or value.is_nested:
        return nn.MultiheadAttention.forward(
            module,
            query,
            key,
            value,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
        )
    weights = weights_of(module) if weights is None else weights
    plain = key_padding_mask is None and attn_mask is None and not need_weights and not is_causal
    extended = weights.bias_k is not None or module.add_zero_attn
    drops = module.training and module.dropout
    if plain and value is key and module.batch_first and not extended and not drops:
        packed = weights.in_proj, weights.in_bias, weights.out_proj, weights.out_bias
        found = _attention_whole.again(query, key, packed, module.num_heads)
        if found is not None:
            return found, None
    batched = query.dim() == 3
    same_key, same_value = key is query, value is key
    wrong = what_is_wrong(module, query, key, value, key_padding_mask, attn_mask, is_causal)
    wrong = wrong or _wrong_dtypes(query, key, value, weights.out_proj.dtype)
    if wrong is not None:
        raise fail(wrong)
    axis = 0 if module.batch_first else 1
    if not batched:
        query, key, value = query.unsqueeze(axis), key.unsqueeze(axis), value.unsqueeze(axis)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    heads, batch = module.num_heads, query.shape[axis]
    queries, keys = query.shape[1 - axis], key.shape[1 - axis]
    causal = is_causal and key_padding_mask is None and not need_weights
    if causal:
        attn_mask = None
    lengths = None if extended else _as_lengths(key_padding_mask)
    if lengths is not None:
        key_padding_mask = None
    if attn_mask is not None:
        attn_mask = (
            attn_mask.view(batch, heads, queries, keys) if attn_mask.dim() == 3 else attn_mask[None, None]
        )
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[:, None, None, :]
    if same_value and not extended and not need_weights and not drops:
        whole = _whole_call(weights, query, key, attn_mask, key_padding_mask, lengths)
        if whole is not None and _attention_whole.fits(whole):
            setting = _attention_whole.Setting(heads, module.batch_first, causal)
            output = _attention_whole.run(whole, setting)
            return output if batched else output.squeeze(axis), None
    projected = _in_projection(
        weights,
        query,
        key,
        value,
        same_key and same_value,
        same_value,
        lengths if module.batch_first else None,
    )
    q, k, v = (_split_heads(t, heads, axis) for t in projected)
    if extended:
        k, v, added = _extended(weights, module.add_zero_attn, k, v)
        attn_mask, key_padding_mask = (
            None if m is None else F.pad(m, (0, added)) for m in (attn_mask, key_padding_mask)
        )
    mask = _merged(attn_mask, key_padding_mask, q.dtype)
    dropout = check_dropout(module.dropout) if module.training else 0.0
    inputs = Inputs(q, k, v, mask, None, lengths)
    y, attended = run_long(inputs, resolve(q, causal, None, None), dropout, need_weights)
    y = y.transpose(1, 2) if module.batch_first else y.permute(2, 0, 1, 3)
    output = F.linear(y.flatten(2), weights.out_proj, weights.out_bias)
    if not batched:
        output = output.squeeze(axis)
    if not need_weights:
        return output, None
    attended = attended.mean(1) if average_attn_weights else attended
    return output, attended if batched else attended.squeeze(0)


def _whole_call(
    weights: Weights,
    query: Tensor,
    context: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
) -> _attention_whole.Tensors | None:
    if weights.in_proj is None:
        return None
    mask = _merged(attn_mask, key_padding_mask, query.dtype)
    return _attention_whole.Tensors(
        query,
        context,
        weights.in_proj,
        weights.in_bias,
        weights.out_proj,
        weights.out_bias,
        mask,
        lengths,
    )


def _wrong_dtypes(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> str | None:
    if query.dtype == key.dtype == value.dtype == dtype or torch.is_autocast_enabled(query.device.type):
        return None
    return (
        f"query, key and value must have the module's dtype, {dtype}; got {query.dtype}, {key.dtype} and "
        f"{value.dtype}. Convert them, or the module, or run under autocast."
    )


def what_is_wrong(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> str | None:
    """With the arguments of a call, in a sentence; dtypes are another question, devices the products' own."""
    shapes = f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
    if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
        return (
            "query, key and value must all have 3 dimensions, or 2 without a batch; got shapes "
            f"{shapes}."
        )
    widths = {"query": (query, module.embed_dim), "key": (key, module.kdim), "value": (value, module.vdim)}
    for name, (t, width) in widths.items():
        if t.shape[-1] != width:
            return f"the {name}'s last dimension must be {width} for this module; got {t.shape[-1]}."
    batched = query.dim() == 3
    axis = 0 if module.batch_first else 1
    batch = query.shape[axis] if batched else 1
    queries, keys = (t.shape[1 - axis if batched else 0] for t in (query, key))
    if key.shape[:-1] != value.shape[:-1] or (batched and key.shape[axis] != batch):
        return f"key and value must have one length, and all three one batch size; got shapes {shapes}."
    if is_causal and attn_mask is None:
        return "is_causal is a hint about attn_mask, as in torch; got is_causal=True without an attn_mask."
    padding_shapes: list[tuple[int, ...]] = [(batch, keys) if batched else (keys,)]
    mask_shapes = [(queries, keys), (batch * module.num_heads, queries, keys)]
    for name, mask, allowed in (
        ("key_padding_mask", key_padding_mask, padding_shapes),
        ("attn_mask", attn_mask, mask_shapes),
    ):
        if mask is None:
            continue
        if mask.dtype != torch.bool and not mask.is_floating_point():
            return f"{name} must be boolean or floating point; got {mask.dtype}."
        if tuple(mask.shape) not in allowed:
            return f"{name} must have shape {' or '.join(map(str, allowed))}; got {tuple(mask.shape)}."
    return None


def _in_projection(
    weights: Weights,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    all_same: bool,
    value_is_key: bool,
    lengths: Tensor | None,
) -> Sequence[Tensor]:
    """The three projections, as few products as the inputs allow."""
    weight, bias = weights.in_proj, weights.in_bias
    if weight is None:
        each: Any = (weights.q_proj, weights.k_proj, weights.v_proj)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return [
            _project(x, w, b, n)
            for x, w, b, n in zip((query, key, value), each, biases, (None, lengths, lengths), strict=True)
        ]
    width = query.shape[-1]
    if all_same:
        return F.linear(query, weight, bias).chunk(3, -1)
    if value_is_key:
        q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
        both = _project(key, weight[width:], kv_bias, lengths)
        return (F.linear(query, weight[:width], q_bias), *both.chunk(2, -1))
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return [
        _project(x, w, b, n)
        for x, w, b, n in zip(
            (query, key, value), weight.chunk(3), biases, (None, lengths, lengths), strict=True
        )
    ]


def _split_heads(t: Tensor, heads: int, axis: int) -> Tensor:
    """A projection, whose batch is its axis-th dimension, as (batch, heads, length, head_dim); no copy."""
    t = t.unflatten(-1, (heads, t.shape[-1] // heads))
    return t.transpose(1, 2) if axis == 0 else t.permute(1, 2, 0, 3)


def _extended(weights: Weights, zero: bool, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
    """k and v with the learned key (bias_k, bias_v) and the zero key at their ends, and their number."""
    added = 0
    if weights.bias_k is not None and weights.bias_v is not None:
        row = (1, k.shape[1], 1, k.shape[3])
        k, v = (
            torch.cat([t, b.to(t.dtype).view(row).expand(t.shape[0], -1, -1, -1)], 2)
            for t, b in ((k, weights.bias_k), (v, weights.bias_v))
        )
        added += 1
    if zero:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        added += 1
    return k, v, added


Lengths = Tensor | list[int] | tuple[int, ...]


def _length_tensor(name: str, lengths: Lengths | None, device: torch.device) -> Tensor | None:
    if lengths is None or isinstance(lengths, Tensor):
        return lengths
    if not isinstance(lengths, (list, tuple)) or not all(type(n) is int for n in lengths):
        raise fail(
            f"{name} must be an int64 tensor or a list of integers, one for each batch entry; "
            f"got {lengths!r}."
        )
    return torch.tensor(lengths, dtype=torch.int64, device=device)


class CrossAttention(nn.Module):
    """Queries of one modality attend to another, of any length and width.

    Args:
        query_dim: the width of the queries, and of the output.
        context_dim: the width of the context, which gives keys and values; None: query_dim.
        heads: query heads; kv_heads: key and value heads, which query heads share (None: as many).
        head_dim: None for query_dim // heads.
        bias: whether the projections have one.
        dropout: of the attention weights, in training.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise fail(f"heads must be a multiple of kv_heads, both at least 1; got {heads} and {kv_heads}.")
        if head_dim is None:
            if query_dim % heads:
                raise fail(
                    f"query_dim must be a multiple of heads, or head_dim be given; got {query_dim} and "
                    f"{heads}."
                )
            head_dim = query_dim // heads
        context_dim = query_dim if context_dim is None else context_dim
        self.query_dim, self.context_dim = query_dim, context_dim
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.dropout = check_dropout(dropout)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(query_dim, heads * head_dim, bias, **place)
        self.k_proj = nn.Linear(context_dim, kv_heads * head_dim, bias, **place)
        self.v_proj = nn.Linear(context_dim, kv_heads * head_dim, bias, **place)
        self.out_proj = nn.Linear(heads * head_dim, query_dim, bias, **place)

    def forward(
        self,
        query: Tensor,
        context: Tensor,
        *,
        query_lengths: Lengths | None = None,
        context_lengths: Lengths | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(batch, queries, query_dim) from query of that shape and context (batch, keys, context_dim).

        Args:
            query_lengths: how many rows of each query are real; beyond, the attention is zero.
            context_lengths: how many rows of each context are real; the others are never read.
            mask: as interfuse.ops.attention takes it: broadcastable to (batch, heads, queries, keys).
            causal: query i attends to context 0 to i alone.
            return_weights: also return the weights (batch, heads, queries, keys).
        """
        for name, t, width in (("query", query, self.query_dim), ("context", context, self.context_dim)):
            if t.dim() != 3 or t.shape[-1] != width:
                raise fail(f"{name} must have shape (batch, length, {width}); got {tuple(t.shape)}.")
        kv_lengths = _length_tensor("context_lengths", context_lengths, context.device)
        q_lengths = _length_tensor("query_lengths", query_lengths, query.device)
        dropout = self.dropout if self.training else 0.0
        if mask is None and q_lengths is None and not return_weights and not dropout:
            found = _attention_cross.run(self, query, context, kv_lengths, causal)
            if found is not None:
                return found
        q = _split_heads(self.q_proj(query), self.heads, 0)
        k, v = (
            _split_heads(_project(context, p.weight, p.bias, kv_lengths), self.kv_heads, 0)
            for p in (self.k_proj, self.v_proj)
        )
        inputs = Inputs(q, k, v, mask, q_lengths, kv_lengths)
        check_types(inputs)
        y, weights = run_long(inputs, resolve(q, causal, None, None), dropout, return_weights)
        output = self.out_proj(y.transpose(1, 2).flatten(2))
        return (output, weights) if return_weights else output

    def extra_repr(self) -> str:
        return f"{self.query_dim}, {self.context_dim}, heads={self.heads}, kv_heads={self.kv_heads}"


class AttentionPool(nn.Module):
    """softmax(context . tanh(projection(x))) over time, and the sum of x with these weights.

    Args:
        width: of x; hidden: of the projection (None: width).
        bias: whether the projection has one.
    """

    def __init__(
        self,
        width: int,
        hidden: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = width if hidden is None else hidden
        self.projection = nn.Linear(width, hidden, bias, device=device, dtype=dtype)
        self.context = nn.Parameter(torch.empty(hidden, device=device, dtype=dtype))
        nn.init.normal_(self.context, std=hidden**-0.5)

    def forward(
        self, x: Tensor, lengths: Lengths | None = None, *, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(batch, width) from x (batch, steps, width); lengths: how many steps of each sequence are real."""
        return attention_pool(
            x, self.projection.weight, self.projection.bias, self.context,
            lengths=_length_tensor("lengths", lengths, x.device), return_weights=return_weights)  # fmt: skip
