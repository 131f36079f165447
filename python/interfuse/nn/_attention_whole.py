"""A whole cross-attention, from its projections to the output's, as one step of autograd.

What torch would do between the products costs as much as the attention where sequences are short: gradients
of keys and values are joined by a copy, gradients of a weight's rows are padded with zeros and added up, and
every value between comes from memory that is new to the process. Here keys and values are one matrix and so
are their gradients, weights' gradients are written where they belong, and what nobody sees outside stays in
memory that is kept. In eager calls on the CPU; everything else goes through the registered op.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interfuse import memory
from interfuse.nn import _attention_block
from interfuse.nn._attention_block import Block, Heads, packed_places
from interfuse.nn._attention_products import Gradients, gradients, project
from interfuse.ops import _attention_native as native
from interfuse.ops._attention_checks import Inputs, op_problem
from interfuse.ops._attention_problem import AttentionParams
from interfuse.ops.attention import run_long
from interfuse.torch_state import is_batched_gradient, is_plain_eager

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interfuse.ops._attention_problem import AttentionProblem

MOST_KEPT = 1 << 24  # elements of one thread's memory between calls: 64 MiB
_TYPES = (Tensor, nn.Parameter)


class Setting(NamedTuple):
    """What a call is made of beside its tensors."""

    heads: int
    batch_first: bool
    causal: bool


class Tensors(NamedTuple):
    """What a call takes. `context` gives keys and values; in_proj has the rows of q, k and v."""

    query: Tensor
    context: Tensor
    in_proj: Tensor
    in_bias: Tensor | None
    out_proj: Tensor
    out_bias: Tensor | None
    mask: Tensor | None  # as the op takes it
    lengths: Tensor | None  # of the context


def _shaped_as_usual(tensors: Tensors) -> bool:
    """Whoever put another weight in a module's place hears of it from torch's products."""
    query, context, in_proj, in_bias, out_proj, out_bias = tensors[:6]
    width, outputs = query.shape[-1], out_proj.shape[0]
    return (
        context.shape[-1] == width
        and in_proj.shape == (3 * width, width)
        and out_proj.shape == (outputs, width)
        and (in_bias is None or in_bias.shape == (3 * width,))
        and (out_bias is None or out_bias.shape == (outputs,))
    )


def fits(tensors: Tensors) -> bool:
    """Whether the call is one that this file makes; the op and torch's products make all others."""
    if torch.compiler.is_compiling() or not is_plain_eager():
        return False
    for t in tensors[:6]:
        if t is None:
            continue
        if type(t) not in _TYPES or t.dtype != torch.float32 or not t.is_cpu or t.is_neg():
            return False
    mask = tensors.mask
    if mask is not None and (type(mask) is not Tensor or (mask.requires_grad and torch.is_grad_enabled())):
        return False
    return tensors.query.numel() > 0 and tensors.context.numel() > 0 and _shaped_as_usual(tensors)


def run(tensors: Tensors, setting: Setting) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:6]):
        found: Tensor = _Whole.apply(setting, *tensors)  # type: ignore[no-untyped-call]
        return found
    output = _by_block(tensors, setting)
    return _forward(tensors, setting, save=False)[0] if output is None else output


def _known_as(in_proj: Tensor, heads: int) -> tuple[object, ...]:
    return id(in_proj), heads


def _by_block(tensors: Tensors, setting: Setting) -> Tensor | None:
    """The output by one call of the core, or None where the products are to be made one by one."""
    if not setting.batch_first:
        return None
    query, context, in_proj, in_bias, out_proj, out_bias, mask, lengths = tensors
    width, plain = query.shape[-1], mask is None and lengths is None and not setting.causal
    places = packed_places(width, in_bias is not None)
    parameters = in_proj, in_bias, out_proj, out_bias
    block = Block(query, context, parameters, places, out_proj.shape[0], mask, lengths)
    heads = Heads(setting.heads, setting.heads, width // setting.heads, setting.causal)
    return _attention_block.run(block, heads, _known_as(in_proj, setting.heads) if plain else None)


def again(query: Tensor, context: Tensor, parameters: Sequence[Any], heads: int) -> Tensor | None:
    """The output of a plain inference call like a recent one, batch first; else None. parameters: in_proj,
    in_bias, out_proj, out_bias."""
    if torch.compiler.is_compiling() or parameters[0] is None:
        return None
    return _attention_block.again(query, context, parameters, _known_as(parameters[0], heads))


class _Kept(threading.local):
    memory: Tensor | None = None


_kept = _Kept()


def _kept_memory(*shapes: tuple[int, int]) -> list[Tensor]:
    """Matrices in memory that this thread keeps from call to call; they must not outlive the call."""
    sizes = [-(-rows * columns // 16) * 16 for rows, columns in shapes]
    total = sum(sizes)
    memory = _kept.memory
    if memory is None or memory.numel() < total:
        memory = torch.empty(total)
        _kept.memory = memory if total <= MOST_KEPT else None
    found, at = [], 0
    for (rows, columns), size in zip(shapes, sizes, strict=True):
        found.append(memory.as_strided((rows, columns), (columns, 1), at))
        at += size
    return found


class _Views(NamedTuple):
    """Heads of projections, as the op has them: (batch, heads, length, head_dim)."""

    q: Tensor
    k: Tensor
    v: Tensor


def _heads(t: Tensor, batch: int, setting: Setting, count: int) -> Sequence[Tensor]:
    """A matrix (tokens, count * width) as `count` tensors of heads."""
    rows, wide = t.shape
    length, size = rows // batch, wide // count // setting.heads
    outer, row = (length * wide, wide) if setting.batch_first else (wide, batch * wide)
    shape, strides = (batch, setting.heads, length, size), (outer, size, row, 1)
    at = t.storage_offset()
    return [t.as_strided(shape, strides, at + i * (wide // count)) for i in range(count)]


def _views(q: Tensor, kv: Tensor, batch: int, setting: Setting) -> _Views:
    return _Views(_heads(q, batch, setting, 1)[0], *_heads(kv, batch, setting, 2))


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _real(tensors: Tensors, setting: Setting) -> list[slice] | None:
    """The rows of the context that are real, where leaving the others out pays; None: all."""
    if tensors.lengths is None or not setting.batch_first:
        return None
    batch, length = tensors.context.shape[:2]
    counts = tensors.lengths.tolist()
    if 5 * sum(counts) > 4 * batch * length:  # one large product is worth a few rows too many
        return None
    return [slice(b * length, b * length + count) for b, count in enumerate(counts)]


def _problem(views: _Views, tensors: Tensors, setting: Setting, save: bool) -> AttentionProblem:
    params = AttentionParams(setting.causal, views.q.shape[-1] ** -0.5)
    return op_problem(Inputs(*views, tensors.mask, None, tensors.lengths), params, False, save)


def _forward(tensors: Tensors, setting: Setting, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, and q, keys beside values, the attention's result and its sums; those only if `save`."""
    with torch.no_grad():
        query, context, in_proj, in_bias, out_proj, out_bias = tensors[:6]
        width, batch = query.shape[-1], query.shape[0 if setting.batch_first else 1]
        x, c = _rows(query), _rows(context)
        shapes = ((x.shape[0], width), (c.shape[0], 2 * width), (x.shape[0], width))
        q, kv, y = (memory.empty(s, dtype=torch.float32) for s in shapes) if save else _kept_memory(*shapes)
        q_bias, kv_bias = (None, None) if in_bias is None else (in_bias[:width], in_bias[width:])
        project(x, in_proj[:width], q_bias, q)
        for rows in _real(tensors, setting) or [slice(None)]:
            project(c[rows], in_proj[width:], kv_bias, kv[rows])
        views = _views(q, kv, batch, setting)
        problem = _problem(views, tensors, setting, save)
        lse = torch.empty(problem.row_shape if save else (0,))
        into = _heads(y, batch, setting, 1)[0]
        native.forward_into(problem, *views, tensors.mask, None, tensors.lengths, into, lse, None)
        output = torch.empty(x.shape[0], out_proj.shape[0])
        project(y, out_proj, out_bias, output)
        return output.view(*query.shape[:-1], -1), q, kv, y, lse


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, setting: Setting, *tensors: Tensor | None) -> Tensor:
        given = Tensors(*tensors)  # type: ignore[arg-type]
        output, *saved = _forward(given, setting, save=True)
        ctx.save_for_backward(*tensors, *saved)
        ctx.setting = setting
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, saved = Tensors(*ctx.saved_tensors[:8]), ctx.saved_tensors[8:]
        wanted = ctx.needs_input_grad[1:7]
        if torch.is_grad_enabled() or not _as_saved(tensors, grad, saved):
            grads = _by_ops(tensors, ctx.setting, grad, wanted)
        else:
            grads = _backward(tensors, ctx.setting, grad, wanted, *saved)
        return (None, *grads, None, None)


def _as_saved(tensors: Tensors, grad: Tensor, saved: Sequence[Tensor]) -> bool:
    """Saved tensors may come back through the user's hooks as anything, and grad from any transform."""
    if not is_plain_eager() or is_batched_gradient(grad):
        return False
    width = tensors.query.shape[-1]
    rows, context_rows = tensors.query.numel() // width, tensors.context.numel() // width
    shapes = ((rows, width), (context_rows, 2 * width), (rows, width))
    return all(
        type(t) is Tensor and t.is_cpu and t.dtype is torch.float32 and not t.is_neg() and t.is_contiguous()
        for t in saved
    ) and (
        type(grad) is Tensor
        and grad.is_cpu
        and all(t.shape == shape for t, shape in zip(saved, shapes, strict=False))
    )


def _backward(
    tensors: Tensors, setting: Setting, grad: Tensor, wanted: Sequence[bool], q: Tensor, kv: Tensor,
    y: Tensor, lse: Tensor,
) -> list[Tensor | None]:  # fmt: skip
    query, context, in_proj, _, out_proj, _ = tensors[:6]
    width, batch = query.shape[-1], query.shape[0 if setting.batch_first else 1]
    x, c, g = _rows(query), _rows(context), _rows(grad).contiguous()
    found = [
        memory.empty(t.shape, dtype=torch.float32) if yes and t is not None else None
        for t, yes in zip(tensors[:6], wanted, strict=True)
    ]
    grad_query, grad_context, grad_in, grad_in_bias, grad_out, grad_out_bias = found
    inner = any(wanted[:4])
    grad_y, grad_q, grad_kv = _kept_memory(y.shape, q.shape, kv.shape)  # type: ignore[arg-type]
    gradients(g, y, out_proj, Gradients(grad_y if inner else None, grad_out, grad_out_bias))
    if not inner:
        return found
    views = _views(q, kv, batch, setting)
    problem = _problem(views, tensors, setting, True)
    heads = [_heads(t, batch, setting, 1)[0] for t in (grad_y, y)]
    grads = _views(grad_q, grad_kv, batch, setting)
    native.backward_into(problem, heads[0], *views, tensors.mask, None, tensors.lengths, heads[1], lse, grads)
    parts = [None if t is None else (t[:width], t[width:]) for t in (grad_in, grad_in_bias)]
    for_q, for_kv = ([None if t is None else t[i] for t in parts] for i in range(2))
    gradients(grad_q, x, in_proj[:width], Gradients(_rows_of(grad_query), *for_q))
    _context_gradients(
        grad_kv, c, in_proj[width:], _real(tensors, setting), Gradients(_rows_of(grad_context), *for_kv)
    )
    return found


def _rows_of(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.view(-1, t.shape[-1])


def _context_gradients(
    grad: Tensor, context: Tensor, weight: Tensor, real: list[slice] | None, to: Gradients
) -> None:
    if real is None:
        gradients(grad, context, weight, to)
        return
    if to.x is not None:
        to.x.zero_()
    for rows in real:
        gradients(
            grad[rows], context[rows], weight, Gradients(None if to.x is None else to.x[rows], None, None)
        )
    if to.weight is not None:
        for i, rows in enumerate(real):
            torch.addmm(to.weight, grad[rows].t(), context[rows], beta=min(i, 1), out=to.weight)
    if to.bias is not None:
        torch.sum(grad, 0, out=to.bias)  # the kernel writes zeros where the context is padding


def _leaf(t: Tensor) -> Tensor:
    """A view, because one tensor may stand in two places, whose gradients are asked for apart; a hook may
    have given it back without its graph."""
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def _by_ops(tensors: Tensors, setting: Setting, grad: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    """The same gradients by ops that have derivatives and transforms of their own."""
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        apart: list[Any] = [
            _leaf(t) if yes and t is not None else t for t, yes in zip(tensors[:6], wanted, strict=True)
        ]
        query, context, in_proj, in_bias, out_proj, out_bias = apart
        batch, width = query.shape[0 if setting.batch_first else 1], query.shape[-1]
        q_bias, kv_bias = (None, None) if in_bias is None else (in_bias[:width], in_bias[width:])
        q = F.linear(_rows(query), in_proj[:width], q_bias)
        kv = F.linear(_rows(context), in_proj[width:], kv_bias)
        views = _views(q, kv, batch, setting)
        params = AttentionParams(setting.causal, views.q.shape[-1] ** -0.5)
        y, _ = run_long(Inputs(*views, tensors.mask, None, tensors.lengths), params, 0.0, False)
        order = (0, 2, 1, 3) if setting.batch_first else (2, 0, 1, 3)
        output = F.linear(y.permute(order).flatten(2), out_proj, out_bias)
        leaves = [t for t, yes in zip(apart, wanted, strict=True) if yes]
        grads = iter(torch.autograd.grad(output, leaves, grad, create_graph=create))
    return [next(grads) if yes else None for yes in wanted]
