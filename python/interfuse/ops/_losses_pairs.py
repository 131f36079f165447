"""Losses of two tensors: binary cross-entropy, contrastive, InfoNCE, reconstruction of several modalities.

From top to bottom: the public functions, the implementations, the registered ops, autograd and vmap. The
first two have kernels of their own on the CPU, which read each tensor once; everywhere else they are torch's
functions. InfoNCE is linear_cross_entropy with one modality as the other's weight.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interfuse import _native
from interfuse.autocast import autocast_dtype
from interfuse.dispatch import Implementation, choose
from interfuse.ops._linear_native import row_stride
from interfuse.ops._losses_checks import fail
from interfuse.ops._losses_problem import DTYPES, REDUCTIONS, PairProblem, loss_dtype
from interfuse.ops._vmap import sample, stacked
from interfuse.reference import losses as reference
from interfuse.torch_state import in_transform

if TYPE_CHECKING:
    from collections.abc import Sequence

KINDS = ("bce_with_logits", "mse")
_CORE_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def binary_cross_entropy_with_logits(
    input: Tensor,  # noqa: A002  (torch's name)
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """torch.nn.functional.binary_cross_entropy_with_logits; loss and gradient in one pass over memory."""
    return _elementwise(
        "binary_cross_entropy_with_logits", KINDS[0], input, target, weight, pos_weight, reduction, backend
    )


def contrastive_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 1.0,
    reduction: str = "mean",
    *,
    backend: str | None = None,
) -> Tensor:
    """Half of target d^2 + (1 - target) max(0, margin - d)^2, d the rows' distance (Hadsell et al., 2006).

    At distance 0 the gradient is 0, not NaN.

    Args:
        input1: (..., features).
        input2: (..., features), of the same shape and dtype.
        target: (...): 1 for pairs that belong together, 0 for those that do not, or between.
        margin: the distance from which on pairs that do not belong together cost nothing.
        reduction: "none", "mean" or "sum".
        backend: None to choose the fastest, or "native" or "reference".
    """
    op = "contrastive_loss"
    _check_pair(op, reduction, input1=input1, input2=input2)
    if not isinstance(target, Tensor) or target.shape != input1.shape[:-1]:
        given = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise fail(f"the target must be a tensor of shape {tuple(input1.shape[:-1])}; got {given}.", op)
    if target.device != input1.device:
        raise fail(
            f"input1 and target must be on one device; got {input1.device} and {target.device}. Move one of "
            "them.",
            op,
        )
    if target.requires_grad:
        raise fail("the target is a constant and gets no gradient; pass target.detach().", op)
    if not (isinstance(margin, (int, float)) and math.isfinite(margin) and margin >= 0):
        raise fail(f"margin must be a finite number that is not negative; got {margin!r}.", op)
    dtype = _computed_in(input1)
    rows = [x.reshape(-1, x.shape[-1]) for x in (input1, input2)]
    labels = target.reshape(-1).to(loss_dtype(input1.dtype))
    if _by_formula():
        loss = reference.contrastive_rows(rows[0], rows[1], labels, float(margin))[0]
    else:
        loss = torch.ops.interfuse.contrastive_loss.default(*rows, labels, float(margin), backend or "")[0]
    return _reduced(loss.reshape(target.shape), reduction).to(dtype)


def info_nce(
    input1: Tensor,
    input2: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    normalize: bool = True,
    symmetric: bool = True,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of each row of one modality choosing its partner among all rows of the other.

    The matrix of similarities, (rows, rows), is never kept: see linear_cross_entropy, which computes it some
    rows at a time, with the other modality as weight.

    Args:
        input1: (rows, features).
        input2: (rows, features): row i belongs to row i of input1.
        temperature: what similarities are divided by; a number, or a tensor of one element, perhaps learned.
        normalize: divide each row by its length first, so that similarities are cosines.
        symmetric: the mean of both directions; else input1 chooses from input2 alone.
        reduction: "none", "mean" or "sum", over the rows.
        backend: of linear_cross_entropy.
    """
    from interfuse.ops.losses import linear_cross_entropy

    op = "info_nce"
    _check_pair(op, reduction, input1=input1, input2=input2)
    if input1.dim() != 2:
        raise fail(f"both inputs must have two dimensions, (rows, features); got {tuple(input1.shape)}.", op)
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise fail(f"the temperature must have one element; got {tuple(temperature.shape)}.", op)
        temperature = temperature.reshape(())
    elif not (math.isfinite(temperature) and temperature > 0):
        raise fail(f"the temperature must be a finite number above 0; got {temperature!r}.", op)
    first, second = (F.normalize(x, dim=-1) if normalize else x for x in (input1, input2))
    first = first / temperature
    partner = torch.arange(first.shape[0], device=first.device)
    settings: dict[str, Any] = {"reduction": reduction, "backend": backend}
    loss = linear_cross_entropy(first, second.to(first.dtype), partner, **settings)
    if symmetric:
        loss = (loss + linear_cross_entropy(second.to(first.dtype), first, partner, **settings)) / 2
    return loss


def reconstruction_loss(
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    kinds: str | Sequence[str] = "mse",
    weights: Sequence[float] | None = None,
    *,
    reduction: str = "mean",
) -> Tensor:
    """The weighted sum over modalities of how far each reconstruction is from what it should be.

    Args:
        inputs: the reconstructions, one for each modality; logits for the last two kinds.
        targets: what they should be; class indices for "cross_entropy".
        kinds: of each modality, or of all: "mse", "bce_with_logits", or, over the last dimension,
            "cross_entropy".
        weights: of each modality; None counts them alike, as 1.
        reduction: within a modality, "mean" or "sum".
    """
    op = "reconstruction_loss"
    count = len(inputs)
    kinds = [kinds] * count if isinstance(kinds, str) else list(kinds)
    factors = [1.0] * count if weights is None else list(weights)
    if not count or not len(targets) == len(kinds) == len(factors) == count:
        raise fail(
            f"at least one modality is needed, with a target, a kind and a weight for each; got {count} "
            f"inputs, {len(targets)} targets, {len(kinds)} kinds and {len(factors)} weights.",
            op,
        )
    if reduction not in REDUCTIONS[1:]:
        raise fail(f"reduction must be one of mean, sum; got {reduction!r}.", op)
    total: Any = 0
    for x, target, kind, factor in zip(inputs, targets, kinds, factors, strict=True):
        if kind == "cross_entropy":
            # The logits are there already, and torch's own is one pass over them.
            loss = F.cross_entropy(x.reshape(-1, x.shape[-1]), target.reshape(-1), reduction=reduction)
        elif kind in KINDS:
            loss = _elementwise(op, kind, x, target, None, None, reduction, None)
        else:
            raise fail(f"a kind must be one of {', '.join(KINDS)}, cross_entropy; got {kind!r}.", op)
        total = total + factor * loss
    return total


def _check_pair(op: str, reduction: object, **tensors: object) -> None:
    if reduction not in REDUCTIONS:
        raise fail(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}.", op)
    (name, first), (other, second) = tensors.items()
    for key, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {key} must be a torch tensor; got {type(t).__name__}.")
        if t.layout != torch.strided:
            raise fail(
                f"{key} must be a dense tensor; got layout {t.layout}. Call to_dense() on it first.", op
            )
        if t.dtype not in DTYPES:
            raise fail(
                f"the dtype must be float32, bfloat16, float16 or float64; {key} has {t.dtype}. Convert it "
                "first.",
                op,
            )
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return
    for what, a, b in (
        ("shape", tuple(first.shape), tuple(second.shape)),
        ("dtype", first.dtype, second.dtype),
        ("device", first.device, second.device),
    ):
        if a != b:
            raise fail(f"{name} and {other} must have one {what}; got {a} and {b}. Convert one of them.", op)
    if name == "input1" and first.dim() == 0:
        raise fail("both inputs must have at least one dimension, their features; got numbers.", op)


def _computed_in(x: Tensor) -> torch.dtype:
    """The dtype of the loss: the input's, and as torch's losses float32 under autocast."""
    return x.dtype if autocast_dtype(x.device) is None else loss_dtype(x.dtype)


def _by_formula() -> bool:
    """torch.func and forward mode differentiate torch's formula; the kernels are for plain autograd."""
    return not torch.compiler.is_compiling() and in_transform()


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _elementwise(
    op: str,
    kind: str,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    backend: str | None,
) -> Tensor:
    if isinstance(x, Tensor) and isinstance(target, Tensor) and target.is_floating_point():
        target = target.to(x.dtype)
    _check_pair(op, reduction, input=x, target=target)
    constants = (target, weight, pos_weight)
    for name, t in zip(("weight", "pos_weight"), constants[1:], strict=True):
        if t is None:
            continue
        if t.device != x.device:
            raise fail(f"input and {name} must be on one device; got {x.device} and {t.device}.", op)
        if torch.broadcast_shapes(t.shape, x.shape) != x.shape:
            raise fail(
                f"{name} must broadcast to the input's shape, {tuple(x.shape)}; got {tuple(t.shape)}.", op
            )
    exact = loss_dtype(x.dtype)
    factor, positive = (None if t is None else t.to(exact) for t in (weight, pos_weight))
    if _by_formula() or any(t is not None and t.requires_grad for t in constants):
        # The kernels take these as constants; torch's formula differentiates by them too.
        loss = _reduced(reference.elementwise(x, target, factor, positive, kind), reduction)
    else:
        save = torch.is_grad_enabled() and x.requires_grad
        loss = torch.ops.interfuse.elementwise_loss.default(
            x, target, factor, positive, kind, reduction, backend or "", save
        )[0]
    return loss.to(_computed_in(x))


# ---- implementations


def _why_not(problem: PairProblem) -> str | None:
    if problem.device.type != "cpu":
        return f"the native kernels run on the CPU; the tensors are on {problem.device}."
    if problem.dtype not in _CORE_DTYPES:
        return f"the native kernels compute in float32 and bfloat16; the tensors are {problem.dtype}."
    return None


def _matrix(t: Tensor, shape: torch.Size) -> tuple[Tensor, list[int]]:
    """Weights as the core reads them beside a dense (rows, columns), and their two strides."""
    t = t.expand(shape)
    if not shape:
        return t, [0, 0]
    rows = row_stride(t[..., :1])
    columns = 0 if shape[-1] == 1 else t.stride(-1)
    if rows is None or columns not in (0, 1):
        return t.contiguous(), [shape[-1], 1]
    return t, [rows, columns]


def _native_elementwise(
    x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, kind: str, reduction: str,
    grad_loss: Tensor | None, loss: Tensor | None, grad: Tensor | None,
) -> None:  # fmt: skip
    x, t = x.contiguous(), target.contiguous()
    columns = x.shape[-1] if x.dim() else 1
    placed = [(None, [0, 0]) if w is None else _matrix(w, x.shape) for w in (weight, pos_weight)]
    if grad_loss is not None:
        grad_loss = grad_loss.contiguous()
    given = (x, t, placed[0][0], placed[1][0], grad_loss, loss, grad)
    rows = x.numel() // columns if columns else 0
    _native.elementwise_loss(
        kind, _CORE_DTYPES[x.dtype], reduction, rows, columns, placed[0][1], placed[1][1],
        [0 if s is None else s.data_ptr() for s in given], torch.get_num_threads(),
    )  # fmt: skip


def _empty_loss(x: Tensor, reduction: str) -> Tensor:
    shape = x.shape if reduction == "none" else ()
    return torch.empty(shape, dtype=loss_dtype(x.dtype), device=x.device)


def _keeps(reduction: str, save: bool) -> bool:
    return save and reduction != "none"


def _run_native(
    x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, kind: str, reduction: str,
    save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    loss = _empty_loss(x, reduction)
    grad = torch.empty_like(x, memory_format=torch.contiguous_format) if _keeps(reduction, save) else None
    _native_elementwise(x, target, weight, pos_weight, kind, reduction, None, loss, grad)
    return loss, x.new_empty(0) if grad is None else grad


def _run_native_backward(
    grad_loss: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None,
    kind: str, reduction: str,
) -> Tensor:  # fmt: skip
    grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    _native_elementwise(x, target, weight, pos_weight, kind, reduction, grad_loss, None, grad)
    return grad


def _run_reference(
    x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, kind: str, reduction: str,
    save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    loss = _reduced(reference.elementwise(x, target, weight, pos_weight, kind), reduction)
    if not _keeps(reduction, save):
        return loss.clone(), x.new_empty(0)
    one = torch.ones((), dtype=loss.dtype, device=loss.device)
    return loss.clone(), _run_reference_backward(one, x, target, weight, pos_weight, kind, reduction)


def _run_reference_backward(*args: Any) -> Tensor:
    return reference.elementwise_backward(*args).clone(memory_format=torch.contiguous_format)


def _run_native_contrastive(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float
) -> tuple[Tensor, Tensor]:
    a, b, labels = input1.contiguous(), input2.contiguous(), target.contiguous()
    loss, slope = torch.empty_like(labels), torch.empty_like(labels)
    pointers = [t.data_ptr() for t in (a, b, labels, loss, slope)]
    rows, columns = a.shape
    _native.contrastive_loss(_CORE_DTYPES[a.dtype], rows, columns, margin, pointers, torch.get_num_threads())
    return loss, slope


def _run_native_contrastive_backward(
    grad_loss: Tensor, input1: Tensor, input2: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    a, b, given = input1.contiguous(), input2.contiguous(), (slope.contiguous(), grad_loss.contiguous())
    grads = torch.empty_like(a), torch.empty_like(b)
    _native.contrastive_loss_backward(
        _CORE_DTYPES[a.dtype],
        a.shape[0],
        a.shape[1],
        [t.data_ptr() for t in (a, b, *given, *grads)],
        torch.get_num_threads(),
    )
    return grads


# In order of preference; the references run everything.
ELEMENTWISE = (
    Implementation("native", _why_not, _run_native, _run_native_backward),
    Implementation("reference", lambda problem: None, _run_reference, _run_reference_backward),
)
CONTRASTIVE = (
    Implementation("native", _why_not, _run_native_contrastive, _run_native_contrastive_backward),
    Implementation(
        "reference", lambda problem: None, reference.contrastive_rows, reference.contrastive_backward
    ),
)


# ---- registered ops


def _chosen(table: Sequence[Implementation], x: Tensor, backend: str) -> Implementation:
    return choose(table, PairProblem(x.dtype, x.device), backend)


def _run(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *tensors, backend, save = args
    return _chosen(ELEMENTWISE, x, backend).run(x, *tensors, save)


def _run_backward(grad_loss: Tensor, x: Tensor, *args: Any) -> Tensor:
    *rest, backend = args
    return _chosen(ELEMENTWISE, x, backend).run_backward(grad_loss, x, *rest)


def _run_contrastive(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float, backend: str
) -> tuple[Tensor, Tensor]:
    return _chosen(CONTRASTIVE, input1, backend).run(input1, input2, target, margin)


def _run_contrastive_backward(
    grad_loss: Tensor, input1: Tensor, input2: Tensor, slope: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    run = _chosen(CONTRASTIVE, input1, backend).run_backward
    return run(grad_loss, input1, input2, slope)


def _fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    reduction, save = args[-3], args[-1]
    grad = torch.empty_like(x, memory_format=torch.contiguous_format) if _keeps(reduction, save) else None
    return _empty_loss(x, reduction), x.new_empty(0) if grad is None else grad


def _fake_backward(grad_loss: Tensor, x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_contrastive(input1: Tensor, input2: Tensor, target: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    rows = [torch.empty(target.shape, dtype=target.dtype, device=target.device) for _ in range(2)]
    return rows[0], rows[1]


def _fake_contrastive_backward(grad_loss: Tensor, input1: Tensor, input2: Tensor, *args: Any) -> Any:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (input1, input2))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, kind, reduction, backend, save = inputs
    grad = output[1]
    ctx.save_for_backward(*tensors, grad)
    ctx.settings, ctx.has_grad = (kind, reduction, backend), _keeps(reduction, save)
    ctx.mark_non_differentiable(grad)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * 7
    if grad_loss is None:
        return (None, *nothing)
    *tensors, grad = ctx.saved_tensors
    if torch.is_grad_enabled():
        return (reference.elementwise_backward(grad_loss, *tensors, *ctx.settings[:2]), *nothing)
    if ctx.has_grad:
        # A product and not the saved tensor itself, which may become a .grad and be added to in place.
        return (grad * grad_loss, *nothing)
    return (
        torch.ops.interfuse.elementwise_loss_backward.default(grad_loss, *tensors, *ctx.settings),
        *nothing,
    )


def _setup_contrastive(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input1, input2, target, margin, backend = inputs
    ctx.save_for_backward(input1, input2, target, output[1])
    ctx.settings = margin, backend
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_contrastive(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * 3
    if grad_loss is None:
        return (None, None, *nothing)
    input1, input2, target, slope = ctx.saved_tensors
    margin, backend = ctx.settings
    if torch.is_grad_enabled():
        slope = reference.contrastive_slope(input1, input2, target, margin)
        return (*reference.contrastive_backward(grad_loss, input1, input2, slope), *nothing)
    op = torch.ops.interfuse.contrastive_loss_backward.default
    return (*op(grad_loss, input1, input2, slope, backend), *nothing)


def _vmap(op: Any, count: int, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """Each sample is a call."""
    samples = [op(*sample(args[:count], in_dims[:count], i), *args[count:]) for i in range(info.batch_size)]
    if isinstance(samples[0], Tensor):
        return torch.stack(samples), 0
    return stacked(samples)


def register(library: torch.library.Library) -> None:
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    both = "Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, str kind, str reduction"
    both += ", str backend"
    pair = "Tensor input1, Tensor input2"
    for name, schema, run, fake, tensors in (
        ("elementwise_loss", f"({both}, bool save) -> (Tensor loss, Tensor grad)", _run, _fake, 4),
        ("elementwise_loss_backward", f"(Tensor grad_loss, {both}) -> Tensor", _run_backward,
         _fake_backward, 5),
        ("contrastive_loss",
         f"({pair}, Tensor target, float margin, str backend) -> (Tensor loss, Tensor slope)",
         _run_contrastive, _fake_contrastive, 3),
        ("contrastive_loss_backward",
         f"(Tensor grad_loss, {pair}, Tensor slope, str backend) -> (Tensor grad1, Tensor grad2)",
         _run_contrastive_backward, _fake_contrastive_backward, 4),
    ):  # fmt: skip
        library.define(f"{name}{schema}", tags=tags)
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"interfuse::{name}", fake, lib=library)
        op = getattr(torch.ops.interfuse, name).default
        torch.library.register_vmap(f"interfuse::{name}", partial(_vmap, op, tensors), lib=library)
    torch.library.register_autograd(
        "interfuse::elementwise_loss", _backward, setup_context=_setup, lib=library
    )
    torch.library.register_autograd(
        "interfuse::contrastive_loss", _backward_contrastive, setup_context=_setup_contrastive, lib=library
    )
