"""Wrong arguments give sentences: what was given, what is allowed, what to do; and never a crash."""

from __future__ import annotations

import re
from typing import Any

import conv_pool_oracle as oracle
import pytest
import torch
from cases.conv_pool import EDGES

from interfuse.dispatch import BackendError
from interfuse.nn import ConvPool1d, ConvPool2d
from interfuse.ops import conv_pool

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

OP = torch.ops.interfuse.conv_pool.default
BACKWARD = torch.ops.interfuse.conv_pool_backward.default
CASE = next(case for case in EDGES if case.name == "relu-max")


def randn(*shape: int, **kwargs: Any) -> torch.Tensor:
    return torch.randn(shape, **kwargs)


ARGUMENTS = {
    "zero stride": ({"stride": 0}, "stride must be at least 1 in every dimension; got (0, 0)"),
    "three strides": ({"stride": (1, 1, 1)}, "stride must be an integer or 2 integers"),
    "float stride": ({"stride": 1.5}, "stride must be an integer or 2 integers"),
    "negative padding": ({"padding": -1}, "padding must be at least 0"),
    "padding name": ({"padding": "full"}, "padding must be 'same', 'valid', an integer"),
    "same with stride": ({"padding": "same", "stride": 2}, "padding='same' needs stride 1"),
    "zero dilation": ({"dilation": 0}, "dilation must be at least 1"),
    "zero groups": ({"groups": 0}, "groups must be at least 1; got 0"),
    "groups": ({"groups": 2}, "takes 10 input channels"),
    "float groups": ({"groups": 1.0}, "groups must be an integer"),
    "padding mode": ({"padding_mode": "mirror"}, "padding_mode must be one of zeros, reflect"),
    "reflect too far": ({"padding_mode": "reflect", "padding": 9}, "pads at most 8 for 9 elements"),
    "circular too far": ({"padding_mode": "circular", "padding": 10}, "pads at most 9 for 9 elements"),
    "activation": ({"activation": "mish"}, "activation must be one of none, relu"),
    "activation type": ({"activation": torch.relu}, "activation must be a name or None"),
    "slope": ({"activation": "leaky_relu", "negative_slope": "steep"}, "negative_slope must be a number"),
    "infinite slope": ({"negative_slope": float("inf")}, "negative_slope must be a finite number"),
    "pool": ({"pool": "min"}, "pool must be one of none, max, avg"),
    "zero window": ({"pool": "max", "pool_size": 0}, "pool_size must be at least 1"),
    "zero pool stride": ({"pool": "avg", "pool_stride": 0}, "pool_stride must be at least 1"),
    "pool padding": ({"pool": "max", "pool_padding": 2}, "pool_padding must be at most half of pool_size"),
    "large window": ({"pool": "max", "pool_size": 20}, "fewer than the pooling window's 20"),
    "large kernel": ({"dilation": 5}, "fewer than the kernel's 11 (size 3, dilation 5)"),
    "backend name": ({"backend": "cudnn"}, "backend must be one of native, triton, reference, or None"),
}


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name: str, grad: bool) -> None:
    arguments, sentence = ARGUMENTS[name]
    x, weight, bias = oracle.tensors(CASE)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        conv_pool(x, weight.requires_grad_(grad), bias, **arguments)


TENSORS = {
    "input dimensions": ((randn(5, 9), randn(4, 5, 3, 3)), "takes an input of 4 dimensions"),
    "weight dimensions": ((randn(2, 5), randn(4, 5)), "the weight must have 3, 4 or 5 dimensions"),
    "1-d weight": ((randn(2, 5, 9, 9), randn(4, 5, 3)), "a 1-d convolution takes an input of 3 dimensions"),
    "channels": ((randn(2, 4, 9, 9), randn(4, 5, 3, 3)), "takes 5 input channels; the input's shape is"),
    "bias shape": ((randn(2, 5, 9, 9), randn(4, 5, 3, 3), randn(5)), "the bias must have shape (4,)"),
    "bias dimensions": ((randn(2, 5, 9, 9), randn(4, 5, 3, 3), randn(4, 1)), "the bias must have shape (4,)"),
    "weight dtype": (
        (randn(2, 5, 9, 9), randn(4, 5, 3, 3).bfloat16()),
        "must have one dtype; got torch.float32",
    ),
    "bias dtype": (
        (randn(2, 5, 9, 9), randn(4, 5, 3, 3), randn(4).double()),
        "input and bias must have one dtype",
    ),
    "integers": (
        (torch.ones(2, 5, 9, 9, dtype=torch.int64), torch.ones(4, 5, 3, 3, dtype=torch.int64)),
        "dtype must be float32, bfloat16, float16 or float64; got torch.int64",
    ),
    "complex": (
        (randn(2, 5, 9, 9, dtype=torch.complex64), randn(4, 5, 3, 3, dtype=torch.complex64)),
        "dtype must be float32",
    ),
    "no channels": ((randn(2, 0, 9, 9), randn(4, 0, 3, 3)), "channels and kernel must not be empty"),
    "no outputs": ((randn(2, 5, 9, 9), randn(0, 5, 3, 3)), "channels and kernel must not be empty"),
    "empty kernel": ((randn(2, 5, 9, 9), randn(4, 5, 0, 3)), "channels and kernel must not be empty"),
    "empty plane": ((randn(2, 5, 0, 9), randn(4, 5, 1, 1)), "spatial dimension 0 has 0 elements"),
    "small plane": ((randn(2, 5, 2, 9), randn(4, 5, 3, 3)), "fewer than the kernel's 3"),
    "devices": ((randn(2, 5, 9, 9), torch.empty(4, 5, 3, 3, device="meta")), "must be on one device"),
    "bias device": (
        (randn(2, 5, 9, 9), randn(4, 5, 3, 3), torch.empty(4, device="meta")),
        "must be on one device",
    ),
    "sparse": ((randn(2, 5, 9, 9).to_sparse(), randn(4, 5, 3, 3)), "must be a dense tensor; got layout"),
    "sparse bias": (
        (randn(2, 5, 9, 9), randn(4, 5, 3, 3), randn(4).to_sparse()),
        "the bias must be a dense tensor",
    ),
    "mkldnn": ((randn(2, 5, 9, 9).to_mkldnn(), randn(4, 5, 3, 3)), "must be a dense tensor; got layout"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name: str) -> None:
    tensors, sentence = TENSORS[name]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        conv_pool(*tensors)


def test_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="the input must be a torch tensor; got ndarray"):
        conv_pool(torch.zeros(1, 1, 3, 3).numpy(), torch.zeros(1, 1, 1, 1))
    with pytest.raises(TypeError, match="the weight must be a torch tensor; got list"):
        conv_pool(torch.zeros(1, 1, 3, 3), [1.0])
    with pytest.raises(TypeError, match="the bias must be a torch tensor; got float"):
        conv_pool(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 1, 1), 0.5)


def test_a_valid_call_before_a_wrong_one_changes_nothing() -> None:
    """Caches are keyed by everything that is checked."""
    x, weight, bias = oracle.tensors(CASE)
    conv_pool(x, weight, bias)
    for wrong in (
        (x, weight.bfloat16(), bias),
        (x, weight, bias[:-1]),
        (x, weight[:, 1:], bias),
        (x.double(), weight, bias),
    ):
        with pytest.raises(ValueError, match="conv_pool: "):
            conv_pool(*wrong)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_backend_asked_for_by_name_gives_its_reason(backend: str) -> None:
    x, weight, bias = (t.double() for t in oracle.tensors(CASE))
    with pytest.raises(BackendError, match=f"backend '{backend}' was asked for, but cannot run this: .+\\.$"):
        conv_pool(x, weight, bias, backend=backend)


def test_a_window_beyond_one_byte_is_refused_by_name() -> None:
    x, weight = torch.zeros(1, 1, 20, 20), torch.zeros(1, 1, 1, 1)
    with pytest.raises(BackendError, match="a window has at most 255 elements; this one has 256"):
        conv_pool(x, weight, pool="max", pool_size=16, backend="native")


def test_the_op_called_directly_is_checked_too() -> None:
    x, weight, bias = oracle.tensors(CASE)
    params = list(oracle.params(CASE).as_args())
    for position, value, sentence in (
        (0, [1], "a 2-d weight needs 2 strides"),
        (1, [1, 1], "padding must have 4 entries"),
        (0, [0, 1], "stride must be at least 1"),
        (4, "mish", "activation must be"),
        (12, "low", "precision must be one of"),
    ):
        wrong = [*params[:position], value, *params[position + 1 :]]
        with pytest.raises(ValueError, match=sentence):
            OP(x, weight, bias, *wrong, False)


def test_the_backward_op_called_directly_is_checked_too() -> None:
    """It hands pointers of what the caller passes to the kernel."""
    x, weight, bias = oracle.tensors(CASE)
    params = oracle.params(CASE).as_args()
    y, index, pre = OP(x, weight, bias, *params, True)
    mask = [True, True, True]
    right = {
        "grad_y": torch.ones_like(y),
        "x": x,
        "weight": weight,
        "bias": bias,
        "y": None,
        "index": index,
        "pre": pre,
    }
    assert BACKWARD(*right.values(), *params, mask)[0].shape == x.shape
    for name, wrong in (
        ("grad_y", right["grad_y"][:1]),
        ("grad_y", right["grad_y"].double()),
        ("index", index[:, 1:]),
        ("index", index.to(torch.int64)),
        ("pre", torch.zeros(3)),
        ("index", index.to("meta")),
    ):
        with pytest.raises(ValueError, match=f"the backward op's {name} must have shape"):
            BACKWARD(*{**right, name: wrong}.values(), *params, mask)


def test_the_backward_op_asks_for_y_where_it_needs_it() -> None:
    case = next(case for case in EDGES if case.name == "tanh-max")
    x, weight, bias = oracle.tensors(case)
    params = oracle.params(case).as_args()
    y, index, pre = OP(x, weight, bias, *params, True)
    with pytest.raises(ValueError, match="needs the output y"):
        BACKWARD(torch.ones_like(y), x, weight, bias, None, index, pre, *params, [True, True, True])


def test_modules() -> None:
    with pytest.raises(ValueError, match="activation must be None or one of"):
        ConvPool2d(3, 4, 3, activation="mish")
    with pytest.raises(ValueError, match="pool must be None or one of"):
        ConvPool2d(3, 4, 3, pool="min")
    with pytest.raises(ValueError, match="kernel_size must be an integer or 1 integers"):
        ConvPool1d(3, 4, (3, 3))
    with pytest.raises(ValueError, match="takes an input of 4 dimensions"):
        ConvPool2d(3, 4, 3)(torch.zeros(3))
    with pytest.raises(TypeError, match="unexpected keyword argument 'pool_sise'"):
        ConvPool2d(3, 4, 3, pool_sise=2)
