"""The losses that train fusion models.

From top to bottom: the public functions, the table of implementations, the registered ops and their fake
kernels. Autograd and vmap stand in _losses_transforms.py, errors in _losses_checks.py, and the losses of two
tensors in _losses_pairs.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from interfuse.autocast import autocast_dtype, cast
from interfuse.dispatch import Implementation, choose
from interfuse.ops import _losses_native as native
from interfuse.ops import _losses_pairs_ops as pairs
from interfuse.ops import _losses_transforms as transforms
from interfuse.ops import _losses_triton as triton
from interfuse.ops._losses_checks import check, check_mask, check_saved, check_shapes, check_types, resolve
from interfuse.ops._losses_pairs import (
    binary_cross_entropy_with_logits,
    contrastive_loss,
    info_nce,
    reconstruction_loss,
)
from interfuse.ops._losses_problem import (
    PARAM_COUNT,
    CrossEntropyParams,
    Gradients,
    Results,
    Tensors,
    empty_gradients,
    empty_results,
    loss_dtype,
)
from interfuse.reference import losses as reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = [
    "binary_cross_entropy_with_logits",
    "contrastive_loss",
    "info_nce",
    "linear_cross_entropy",
    "reconstruction_loss",
]

# Of linear_cross_entropy, in order of preference; the reference runs everything.
IMPLEMENTATIONS = (
    Implementation("native", native.why_not, native.run, native.run_backward),
    Implementation("triton", triton.why_not, triton.run, triton.run_backward),
    Implementation("reference", lambda problem: None, reference.run, reference.run_backward),
)


def linear_cross_entropy(
    input: Tensor,  # noqa: A002  (torch's name)
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """cross_entropy(input @ linear_weight^T + linear_bias, target), without keeping the logits.

    Where the loss is one number (reduction "mean" or "sum") and a gradient is wanted, the gradients are
    computed with it, and backward only scales them: what is kept is as large as the gradients, never as the
    logits. With reduction "none" backward computes the logits again.

    Args:
        input: (..., features).
        linear_weight: (classes, features), as torch.nn.Linear's; of the input's dtype.
        target: (...) integers: a class, or ignore_index. A class that there is not is an error on the CPU,
            and on a GPU gives a loss of NaN.
        linear_bias: (classes,) or None.
        weight: (classes,) or None: how much each class counts. A constant, it gets no gradient.
        reduction: "none", "mean" (over the labels' weights) or "sum".
        ignore_index: a label of rows that do not count.
        label_smoothing: the share of each label that is spread over all classes.
        backend: None to choose the fastest, or "native", "triton" or "reference"; one that cannot run the
            call raises its reason.

    Returns:
        The loss in the input's dtype; float32 under autocast.
    """
    check_types(
        input=input, linear_weight=linear_weight, target=target, linear_bias=linear_bias, weight=weight
    )
    params = resolve(reduction, ignore_index, label_smoothing, backend)
    x, dtype = input, autocast_dtype(input.device)
    out_dtype = x.dtype
    if dtype is not None:
        x, linear_weight = cast(x, dtype), cast(linear_weight, dtype)
        linear_bias = None if linear_bias is None else cast(linear_bias, dtype)
        out_dtype = loss_dtype(x.dtype)
    check_shapes(x, linear_weight, target, linear_bias, weight)
    loss = torch.ops.interfuse.linear_cross_entropy.default(
        x if x.dim() == 2 else x.reshape(-1, x.shape[-1]),
        linear_weight,
        target.reshape(-1).to(torch.int64),
        linear_bias,
        None if weight is None else weight.to(loss_dtype(x.dtype)),
        *params.as_args(),
        [],
    )[0]
    if not params.is_number:
        loss = loss.reshape(target.shape)
    return loss.to(out_dtype)


def _split(args: Sequence[Any]) -> tuple[Tensors, CrossEntropyParams]:
    count = transforms.TENSOR_COUNT
    return Tensors(*args[:count]), CrossEntropyParams(*args[count : count + PARAM_COUNT])


def _run(*args: Any) -> Results:
    (t, params), mask = _split(args), args[-1]
    problem = check(t, params)
    check_mask(problem, mask)
    return choose(IMPLEMENTATIONS, problem, params.backend).run(problem, t, mask)


def _split_backward(args: Sequence[Any]) -> tuple[Tensor, Tensors, Tensor, CrossEntropyParams, Any]:
    count = transforms.TENSOR_COUNT
    params = CrossEntropyParams(*args[count + 2 : count + 2 + PARAM_COUNT])
    return args[0], Tensors(*args[1 : count + 1]), args[count + 1], params, args[-1]


def _run_backward(*args: Any) -> Gradients:
    grad_loss, t, lse, params, mask = _split_backward(args)
    problem = check(t, params)
    check_saved(problem, grad_loss, lse, mask)
    return choose(IMPLEMENTATIONS, problem, params.backend).run_backward(problem, grad_loss, t, lse, mask)


def _fake(*args: Any) -> Results:
    (t, params), mask = _split(args), args[-1]
    problem = check(t, params)
    check_mask(problem, mask)
    return empty_results(problem, mask)


def _fake_backward(*args: Any) -> Gradients:
    grad_loss, t, lse, params, mask = _split_backward(args)
    problem = check(t, params)
    check_saved(problem, grad_loss, lse, mask)
    return empty_gradients(problem, mask)


_TENSORS = "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight"
_PARAMETERS = "str reduction, int ignore_index, float label_smoothing, str backend, bool[] mask"
_GRADIENTS = "Tensor grad_input, Tensor grad_weight, Tensor grad_bias"

_library = torch.library.Library("interfuse", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library.define(
    f"linear_cross_entropy({_TENSORS}, {_PARAMETERS}) -> (Tensor loss, Tensor lse, {_GRADIENTS})", tags=_tags
)
_library.define(
    f"linear_cross_entropy_backward(Tensor grad_loss, {_TENSORS}, Tensor lse, {_PARAMETERS}) -> "
    f"({_GRADIENTS})",
    tags=_tags,
)
_library.impl("linear_cross_entropy", _run, "CompositeExplicitAutograd")
_library.impl("linear_cross_entropy_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("interfuse::linear_cross_entropy", _fake, lib=_library)
torch.library.register_fake("interfuse::linear_cross_entropy_backward", _fake_backward, lib=_library)
_OPS = (
    torch.ops.interfuse.linear_cross_entropy.default,
    torch.ops.interfuse.linear_cross_entropy_backward.default,
)
transforms.register_autograd(_library, *_OPS)
transforms.register_vmap(_library, *_OPS)
pairs.register(_library)
