"""conv_pool: convolution, bias, activation and pooling as one op.

From top to bottom: the public function, the table of implementations, the registered ops and their fake
kernels. Autograd and vmap stand in _conv_pool_transforms.py, errors in _conv_pool_checks.py, the
short way of eager inference in _conv_pool_eager.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interfuse import numerics
from interfuse.autocast import autocast_dtype, cast
from interfuse.dispatch import Implementation, choose
from interfuse.ops import _conv_pool_eager as eager
from interfuse.ops import _conv_pool_native as native
from interfuse.ops import _conv_pool_transforms as transforms
from interfuse.ops import _conv_pool_triton as triton
from interfuse.ops._conv_pool_checks import (
    IntOrInts,
    Options,
    check,
    check_batched,
    check_saved,
    fail,
    op_params,
    op_problem,
    resolve,
)
from interfuse.ops._conv_pool_preference import rather_not
from interfuse.ops._conv_pool_problem import ConvPoolParams, Three, empty_gradients, empty_outputs
from interfuse.reference import conv_pool as reference

if TYPE_CHECKING:
    from collections.abc import Sequence

# In order of preference; the reference runs everything.
IMPLEMENTATIONS = (
    Implementation("native", native.why_not, native.run, native.run_backward, rather_not=rather_not),
    Implementation("triton", triton.why_not, triton.run, triton.run_backward),
    Implementation("reference", lambda problem: None, reference.run, reference.run_backward),
)


def conv_pool(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: str | IntOrInts = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
    negative_slope: float = 0.01,
    pool: str | None = None,
    pool_size: IntOrInts = 2,
    pool_stride: IntOrInts | None = None,
    pool_padding: IntOrInts = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    backend: str | None = None,
) -> Tensor:
    """pool(activation(conv(input, weight) + bias)), in 1, 2 or 3 dimensions after the weight's shape.

    Every argument means what it means in torch's convNd, activation and pooling functions; the result is
    theirs up to rounding, with the first maximum winning a tie.

    Args:
        input: (batch, channels, *sizes), or (channels, *sizes) without a batch.
        weight: (out_channels, channels / groups, *kernel).
        bias: (out_channels,) or None.
        padding: numbers, "same" (with stride 1) or "valid".
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        activation: None, "relu", "leaky_relu" (with negative_slope), "gelu", "gelu_tanh", "silu", "tanh"
            or "sigmoid".
        pool: None, "max" or "avg", with pool_size, pool_stride (None: pool_size), pool_padding, ceil_mode
            and, for "avg", count_include_pad.
        backend: None to choose the fastest, or "native", "triton" or "reference"; one that cannot run the
            call raises its reason.
    """
    arguments = (
        stride, padding, dilation, groups, padding_mode, activation, negative_slope, pool, pool_size,
        pool_stride, pool_padding, ceil_mode, count_include_pad, backend)  # fmt: skip
    if not torch.compiler.is_dynamo_compiling():
        y = eager.run(input, weight, bias, arguments)
        if y is not None:
            return y
    return run_op(input, weight, bias, Options(*arguments))


def run_op(x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    """The long way: what comes before and after the registered op, and the op."""
    batched = check_batched(x, weight, bias)
    x = x if batched else x.unsqueeze(0)
    params = resolve(tuple(weight.shape[2:]), options, numerics.get_precision())
    if options.padding_mode != "zeros":
        x, params = pad_by_mode(x, params, options.padding_mode)
    x, weight, bias = autocast(x, weight, bias)
    y = torch.ops.interfuse.conv_pool.default(x, weight, bias, *params.as_args(), False)[0]
    return y if batched else y.squeeze(0)


def pad_by_mode(x: Tensor, params: ConvPoolParams, mode: str) -> tuple[Tensor, ConvPoolParams]:
    """Padding other than with zeros happens before the op, as in torch."""
    pads = params.padding
    if x.dim() != params.spatial + 2 or min(pads) < 0:
        return x, params  # the op says what is wrong
    for d in range(params.spatial):
        size, most = x.shape[2 + d], {"reflect": x.shape[2 + d] - 1, "circular": x.shape[2 + d]}.get(mode)
        if most is not None and max(pads[2 * d], pads[2 * d + 1]) > most:
            raise fail(
                f"padding_mode {mode!r} pads at most {most} for {size} elements (spatial dimension {d}); got "
                f"padding {pads[2 * d : 2 * d + 2]}. Use a smaller padding or padding_mode 'zeros'."
            )
    sides = [side for d in reversed(range(params.spatial)) for side in pads[2 * d : 2 * d + 2]]
    return F.pad(x, sides, mode=mode), replace(params, padding=(0, 0) * params.spatial)


def autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under autocast, what torch's convolutions do."""
    dtype = autocast_dtype(x.device)
    if dtype is None:
        return x, weight, bias
    return cast(x, dtype), cast(weight, dtype), None if bias is None else cast(bias, dtype)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Three:
    problem = op_problem(x, weight, bias, args, bool(args[-1]))
    implementation = choose(IMPLEMENTATIONS, problem, problem.params.backend)
    return implementation.run(problem, x, weight, bias)


def _torch_trains(x: Tensor, weight: Tensor, bias: Tensor | None, args: Sequence[Any]) -> bool:
    """Whether torch's own functions are chosen for their speed in training, so that torch should
    differentiate them too. Sizes that are still symbols are not asked: that would bind the graph to them."""
    if any(isinstance(size, torch.SymInt) for size in (*x.shape, *weight.shape)):
        return False
    problem = op_problem(x, weight, bias, args, save=True)
    free = not problem.params.backend
    return free and native.why_not(problem) is None and rather_not(problem) is not None


def _run_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor | None,
    index: Tensor,
    pre: Tensor,
    *args: Any,
) -> Three:
    problem = op_problem(x, weight, bias, args, save=True)
    check_saved(problem, grad_y, y, index, pre)
    implementation = choose(IMPLEMENTATIONS, problem, problem.params.backend)
    return implementation.run_backward(problem, grad_y, x, weight, bias, y, index, pre, args[-1])


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Three:
    return empty_outputs(check(x, weight, bias, op_params(args), bool(args[-1])))


def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor | None,
    index: Tensor,
    pre: Tensor,
    *args: Any,
) -> Three:
    problem = check(x, weight, bias, op_params(args), save=True)
    check_saved(problem, grad_y, y, index, pre)
    return empty_gradients(problem, x, weight, args[-1])


_PARAMETERS = (
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str activation, "
    "float negative_slope, str pool, SymInt[] pool_size, SymInt[] pool_stride, SymInt[] pool_padding, "
    "bool ceil_mode, bool count_include_pad, str precision, str backend"
)

_library = torch.library.Library("interfuse", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library.define(
    f"conv_pool(Tensor x, Tensor weight, Tensor? bias, {_PARAMETERS}, bool save) "
    "-> (Tensor y, Tensor index, Tensor pre)",
    tags=_tags,
)
_library.define(
    f"conv_pool_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias, Tensor? y, Tensor index, "
    f"Tensor pre, {_PARAMETERS}, bool[3] mask) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    tags=_tags,
)
_library.impl("conv_pool", _run, "CompositeExplicitAutograd")
_library.impl("conv_pool_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("interfuse::conv_pool", _fake, lib=_library)
torch.library.register_fake("interfuse::conv_pool_backward", _fake_backward, lib=_library)
_OPS = (torch.ops.interfuse.conv_pool.default, torch.ops.interfuse.conv_pool_backward.default)
transforms.register_autograd(_library, *_OPS, _torch_trains)
transforms.register_vmap(_library, *_OPS)
