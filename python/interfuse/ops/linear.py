"""linear: a dense layer over one or more inputs that are never concatenated, and its activation, as one op.

From top to bottom: the public functions, the table of implementations, the registered ops and their fake
kernels. Autograd and vmap stand in _linear_transforms.py, errors in _linear_checks.py, the short way of eager
calls in _linear_eager.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from interfuse.autocast import autocast_dtype, cast
from interfuse.dispatch import Implementation, choose
from interfuse.ops import _linear_eager as eager
from interfuse.ops import _linear_native as native
from interfuse.ops import _linear_transforms as transforms
from interfuse.ops import _linear_triton as triton
from interfuse.ops._linear_checks import (
    Inputs,
    Options,
    as_list,
    check,
    check_saved,
    check_types,
    fail,
    op_problem,
    resolve,
)
from interfuse.ops._linear_problem import PARAM_COUNT, LinearParams, Two, empty_gradients, empty_outputs
from interfuse.reference import linear as reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# In order of preference; the reference runs everything.
IMPLEMENTATIONS = (
    Implementation("native", native.why_not, native.run, native.run_backward),
    Implementation("triton", triton.why_not, triton.run, triton.run_backward),
    Implementation("reference", lambda problem: None, reference.run, reference.run_backward),
)


def linear(
    inputs: Inputs,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    negative_slope: float = 0.01,
    scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """activation(torch.cat(inputs, -1) @ weight^T + bias), without the concatenation.

    Args:
        inputs: a tensor (..., width), or several of equal shapes but for their widths.
        weight: (out_features, sum of the widths), as torch.nn.Linear's; of the inputs' dtype. For inference
            it may also be bfloat16, or int8 with a scale (see `quantize_weight`): few rows take as long as
            the weight's bytes take to read.
        bias: (out_features,) or None.
        activation: None, "relu", "leaky_relu" (with negative_slope), "gelu", "gelu_tanh", "silu", "tanh",
            "sigmoid", or "softmax" over the last dimension.
        scale: (out_features,) float32, of an int8 weight; a constant, it gets no gradient.
        backend: None to choose the fastest, or "native", "triton" or "reference"; one that cannot run the
            call raises its reason.
    """
    arguments = (activation, negative_slope, backend)
    if not torch.compiler.is_dynamo_compiling():
        y = eager.run(inputs, weight, bias, scale, arguments)
        if y is not None:
            return y
    return run_op(inputs, weight, bias, scale, Options(*arguments))


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """An int8 weight and its scale, one for each output: each row's largest element becomes 127."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise fail(
            f"quantize_weight takes a floating-point matrix; got {weight.dtype} of shape "
            f"{tuple(weight.shape)}."
        )
    rows = weight.detach().float()
    largest = rows.abs().amax(1)
    if not bool(torch.isfinite(largest).all()):
        raise fail("quantize_weight takes finite numbers; this weight holds an infinity or a NaN.")
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (rows / scale.unsqueeze(1)).round().to(torch.int8), scale


def run_op(
    inputs: Inputs, weight: Tensor, bias: Tensor | None, scale: Tensor | None, options: Options
) -> Tensor:
    """The long way: what comes before the registered op, and the op."""
    tensors = as_list(inputs)
    check_types(weight, bias, scale)
    params = resolve(options)
    dtype = autocast_dtype(weight.device)
    if dtype is not None:
        tensors = [cast(x, dtype) for x in tensors]
        weight, bias = cast(weight, dtype), None if bias is None else cast(bias, dtype)
    return torch.ops.interfuse.linear.default(tensors, weight, bias, scale, *params.as_args(), False)[0]


def _params(args: Sequence[Any]) -> LinearParams:
    return LinearParams(*args[:PARAM_COUNT])


def _run(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, scale: Tensor | None, *args: Any
) -> Two:
    problem = op_problem(inputs, weight, bias, scale, _params(args), bool(args[-1]))
    implementation = choose(IMPLEMENTATIONS, problem, problem.params.backend)
    return implementation.run(problem, inputs, weight, bias, scale)


def _run_backward(
    grad_y: Tensor,
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    y: Tensor | None,
    pre: Tensor,
    *args: Any,
) -> list[Tensor]:
    problem, mask = op_problem(inputs, weight, bias, scale, _params(args), save=True), args[-1]
    check_saved(problem, grad_y, y, pre, mask)
    implementation = choose(IMPLEMENTATIONS, problem, problem.params.backend)
    return implementation.run_backward(problem, grad_y, inputs, weight, bias, scale, y, pre, mask)


def _fake(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, scale: Tensor | None, *args: Any
) -> Two:
    return empty_outputs(check(inputs, weight, bias, scale, _params(args), bool(args[-1])))


def _fake_backward(
    grad_y: Tensor,
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    y: Tensor | None,
    pre: Tensor,
    *args: Any,
) -> list[Tensor]:
    problem, mask = check(inputs, weight, bias, scale, _params(args), save=True), args[-1]
    check_saved(problem, grad_y, y, pre, mask)
    return empty_gradients(problem, mask)


_TENSORS = "Tensor[] inputs, Tensor weight, Tensor? bias, Tensor? scale"
_PARAMETERS = "str activation, float negative_slope, str backend"

_library = torch.library.Library("interfuse", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library.define(f"linear({_TENSORS}, {_PARAMETERS}, bool save) -> (Tensor y, Tensor pre)", tags=_tags)
_library.define(
    f"linear_backward(Tensor grad_y, {_TENSORS}, Tensor? y, Tensor pre, {_PARAMETERS}, bool[] mask) "
    "-> Tensor[]",
    tags=_tags,
)
_library.impl("linear", _run, "CompositeExplicitAutograd")
_library.impl("linear_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("interfuse::linear", _fake, lib=_library)
torch.library.register_fake("interfuse::linear_backward", _fake_backward, lib=_library)
_OPS = (torch.ops.interfuse.linear.default, torch.ops.interfuse.linear_backward.default)
transforms.register_autograd(_library, *_OPS)
transforms.register_vmap(_library, *_OPS)
