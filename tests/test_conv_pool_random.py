"""Random problems (hypothesis): whatever torch computes, conv_pool computes, forward and backward."""

from __future__ import annotations

import conv_pool_oracle as oracle
import pytest
import tolerance
import torch
from cases.conv_pool import Case
from hypothesis import given, settings
from hypothesis import strategies as st

import interfuse
from interfuse.activations import ACTIVATIONS
from interfuse.ops import conv_pool
from interfuse.ops._conv_pool_problem import pooled_size

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("poisoned_outputs")]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A problem that torch takes: sizes are made large enough for the kernel and the window drawn before."""
    spatial = draw(st.sampled_from([1, 2, 2, 3]))
    small = {1: 4, 2: 3, 3: 2}[spatial]

    def each(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(spatial))

    common = draw(st.booleans())  # the shapes that the fast paths take come up half the time
    kernel = (3,) * spatial if common else each(1, small + 1)
    stride = (1,) * spatial if common else each(1, 3)
    dilation = (1,) * spatial if common else each(1, 2)
    padding: str | tuple[int, ...] = each(0, 2)
    if stride == (1,) * spatial and draw(st.integers(0, 3)) == 0:
        padding = draw(st.sampled_from(["same", "valid"]))
    groups = 1 if common else draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 36 if common else 7))
    out_channels = groups * draw(st.integers(1, 36 if common else 9))
    arguments = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "negative_slope": draw(st.sampled_from([0.0, 0.01, 0.3, 1.5])),
        "pool": draw(st.sampled_from(["none", "max", "max", "avg"])),
        "pool_size": (1,) * spatial,
    }
    if arguments["pool"] != "none":
        size = (2,) * spatial if common else each(1, small)
        arguments |= {
            "pool_size": size,
            "pool_stride": None if common else each(1, 3),
            "pool_padding": tuple(draw(st.integers(0, k // 2)) for k in size),
            "ceil_mode": draw(st.booleans()),
            "count_include_pad": draw(st.booleans()),
        }
    sizes = []
    for d in range(spatial):
        extent = dilation[d] * (kernel[d] - 1) + 1
        if isinstance(padding, str):
            inside = extent - 1 if padding == "same" else 0
        else:
            inside = 2 * padding[d]
        window = arguments["pool_size"][d]
        if not (spatial == 3 and arguments["pool"] == "avg"):  # torch's avg_pool3d forgets its padding here
            window -= 2 * arguments.get("pool_padding", (0,) * spatial)[d]
        least = max(1, extent + (max(1, window) - 1) * stride[d] - inside)
        sizes.append(least + draw(st.integers(0, {1: 40, 2: 12, 3: 5}[spatial])))
    batch = draw(st.integers(1, 3))
    return Case(
        "random",
        (batch, channels, *sizes),
        (out_channels, channels // groups, *kernel),
        arguments,
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
    )


@settings(max_examples=250)
@given(cases(), st.booleans(), st.sampled_from(["default", "highest"]))
def test_forward(case: Case, channels_last: bool, precision: str) -> None:
    x, weight, bias = oracle.tensors(case, case.dtype, channels_last)
    with interfuse.precision(precision):
        y = conv_pool(x, weight, bias, **case.arguments)
    truth = oracle.truth(x, weight, bias, **case.arguments)
    assert tolerance.error(y, truth) <= tolerance.output(case.dtype, precision)


@settings(max_examples=150)
@given(cases(), st.booleans())
def test_gradients(case: Case, channels_last: bool) -> None:
    tensors = oracle.tensors(case, case.dtype, channels_last)
    grad_y = oracle.clear_gradient(case, *tensors, noise=1e-4)
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = conv_pool(*leaves, **case.arguments)
    ours = torch.autograd.grad(y, [t for t in leaves if t is not None], grad_y)
    for gradient, truth in zip(ours, oracle.gradients(*tensors, grad_y, case.arguments), strict=True):
        assert tolerance.error(gradient, truth) <= tolerance.gradient(case.dtype)


@settings(max_examples=150)
@given(cases(), st.booleans())
def test_integers_are_exact(case: Case, channels_last: bool) -> None:
    x, weight, bias = oracle.integers(case)
    if channels_last and x.dim() > 3:
        x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    arguments = {**case.arguments, "activation": "relu"}
    with interfuse.precision("highest"):
        y = conv_pool(x, weight, bias, **arguments)
    truth = oracle.truth(x, weight, bias, **arguments)
    assert torch.equal(y, truth.float())


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9), st.data(), st.booleans())
def test_pooled_size_is_torchs(size: int, window: int, stride: int, data: st.DataObject, ceil: bool) -> None:
    padding = data.draw(st.integers(0, window // 2))
    ours = pooled_size(size, window, stride, padding, ceil)
    pool = torch.nn.MaxPool1d(window, stride, padding, ceil_mode=ceil)
    try:
        torchs = pool(torch.zeros(1, 1, size)).shape[-1]
    except RuntimeError:
        torchs = 0
    assert max(ours, 0) == torchs
