"""Wrong arguments give sentences: what was given, what is allowed, what to do; and never a crash."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from interfuse import _native
from interfuse.dispatch import BackendError
from interfuse.nn.linear import CompactLinear, DenseChain, FusionLinear
from interfuse.ops.linear import linear, quantize_weight

X, Y = torch.randn(3, 4), torch.randn(3, 2)
WEIGHT, BIAS = torch.randn(5, 6), torch.randn(5)

WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "no inputs": (([], WEIGHT), {}, "at least one input is needed; got an empty list"),
    "columns": (([X, X], WEIGHT), {}, "the weight must have shape (out_features, 8), 8 being the inputs'"),
    "weight of one dimension": (([X], BIAS), {}, "the weight must have shape (out_features, 4)"),
    "rows": (([X, Y[:2]], WEIGHT), {}, "one shape but for the last dimension; got (3, 4) and (2, 2)"),
    "a number": (([torch.tensor(1.0)], WEIGHT), {}, "in its last dimension; input 0 has shape ()"),
    "no columns": (([X, Y[:, :0]], WEIGHT), {}, "at least one column in its last dimension; input 1"),
    "integers": (([X.int()], WEIGHT), {}, "dtype must be float32, bfloat16, float16 or float64"),
    "two dtypes": (([X, Y.double()], WEIGHT), {}, "all inputs must have one dtype"),
    "two devices": (([X, Y.to("meta")], WEIGHT), {}, "all inputs must be on one device; got cpu and meta"),
    "weight's dtype": (([X, Y], WEIGHT.double()), {}, "or be bfloat16 or int8; got torch.float64"),
    "weight's device": (([X, Y], WEIGHT.to("meta")), {}, "inputs and weight must be on one device"),
    "bias's dtype": (([X, Y], WEIGHT, BIAS.double()), {}, "inputs and bias must have one dtype"),
    "bias's shape": (([X, Y], WEIGHT, BIAS[:4]), {}, "the bias must have shape (5,), one entry for each row"),
    "sparse": (([X.to_sparse(), Y], WEIGHT), {}, "input 0 must be a dense tensor"),
    "int8 alone": (([X, Y], WEIGHT.to(torch.int8)), {}, "an int8 weight needs its scale"),
    "scale alone": (([X, Y], WEIGHT), {"scale": BIAS}, "no other weight has one"),
    "scale's dtype": (([X, Y], WEIGHT.to(torch.int8)), {"scale": BIAS.double()}, "the scale must be float32"),
    "activation": (([X, Y], WEIGHT), {"activation": "swish"}, "activation must be one of none, relu"),
    "activation's type": (([X, Y], WEIGHT), {"activation": 3}, "activation must be a name or None; got 3"),
    "slope": (([X, Y], WEIGHT), {"negative_slope": float("inf")}, "negative_slope must be a finite number"),
    "slope's type": (([X, Y], WEIGHT), {"negative_slope": "a"}, "negative_slope must be a number"),
    "backend": (([X, Y], WEIGHT), {"backend": "cuda"}, "backend must be one of native, triton, reference"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_sentences(name: str) -> None:
    arguments, keywords, sentence = WRONG[name]
    with pytest.raises(ValueError, match=re.escape(sentence)) as raised:
        linear(*arguments, **keywords)
    assert str(raised.value).endswith(".")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((3, WEIGHT), "inputs must be a tensor or a list of tensors; got int"),
        (([X, 2], WEIGHT), "every input must be a torch tensor; got int"),
        (([X, Y], 2), "the weight must be a torch tensor; got int"),
        (([X, Y], WEIGHT, 2.0), "the bias must be a torch tensor; got float"),
    ],
)
def test_what_is_no_tensor(arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(TypeError, match=re.escape(sentence)):
        linear(*arguments)


def test_a_backend_asked_for_says_why_not() -> None:
    with pytest.raises(BackendError, match=r"compute in float32 and bfloat16; the inputs are torch\.float64"):
        linear(X.double(), WEIGHT[:, :4].double(), backend="native")
    with pytest.raises(BackendError, match="Triton kernels run on a GPU"):
        linear(X, WEIGHT[:, :4], backend="triton")
    half = WEIGHT[:, :4].bfloat16().requires_grad_()
    with pytest.raises(BackendError, match="train weights of the inputs' dtype"):
        linear(X, half, backend="native")


def test_the_backward_op_reads_what_the_forward_left() -> None:
    backward = torch.ops.interfuse.linear_backward.default
    rest = ("relu", 0.01, "", [True, True, True])
    nothing = X.new_empty(0)
    with pytest.raises(ValueError, match="needs the output y"):
        backward(torch.randn(3, 5), [X], WEIGHT[:, :4], None, None, None, nothing, *rest)
    with pytest.raises(ValueError, match=re.escape("grad_y must have shape (3, 5)")):
        backward(torch.randn(3, 4), [X], WEIGHT[:, :4], None, None, torch.randn(3, 5), nothing, *rest)
    with pytest.raises(ValueError, match="mask has an entry for each input"):
        backward(
            torch.randn(3, 5), [X], WEIGHT[:, :4], None, None, torch.randn(3, 5), nothing, *rest[:3], [True]
        )


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: FusionLinear([], 3), "in_features must be a positive integer, or one for each input"),
        (lambda: FusionLinear([4, 0], 3), "in_features must be a positive integer"),
        (lambda: FusionLinear(4, 3, activation="swish"), "activation must be None or one of"),
        (lambda: FusionLinear.from_torch(nn.Bilinear(2, 2, 2)), "takes a torch.nn.Linear and no subclass"),
        (lambda: FusionLinear.from_torch(nn.Linear(6, 2), in_features=[2, 3]), "add up to the Linear's 6"),
        (lambda: FusionLinear.from_torch(nn.Linear(6, 2), nn.Softmax(0)), "over the last dimension"),
        (lambda: FusionLinear.from_torch(nn.Linear(6, 2), nn.Mish()), "the activation must be ReLU"),
        (lambda: DenseChain(nn.Linear(2, 2)), "layer 0 is a Linear"),
        (lambda: DenseChain(FusionLinear(2, 3), FusionLinear(4, 3)), "one input of 3 columns"),
        (lambda: DenseChain.from_torch([nn.ReLU(), nn.Linear(2, 2)]), "got a ReLU in another place"),
        (lambda: CompactLinear(nn.Linear(2, 2)), "takes a FusionLinear; got Linear"),
        (lambda: CompactLinear(FusionLinear(2, 2), torch.float16), "torch.bfloat16; got torch.float16"),
        (lambda: quantize_weight(torch.randn(3)), "takes a floating-point matrix"),
        (lambda: quantize_weight(torch.full((2, 2), float("nan"))), "takes finite numbers"),
    ],
)  # fmt: skip
def test_modules(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()


def desc(**changes: Any) -> _native.LinearDesc:
    given: dict[str, Any] = {
        "dtype": "float32", "weight_dtype": "float32", "rows": 3, "out_features": 5, "widths": [4],
        "row_strides": [4], "activation": "none", "negative_slope": 0.01, "save": False}  # fmt: skip
    return _native.LinearDesc(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dtype": "float16"}, "dtype is 'float16'; allowed are 'float32', 'bfloat16'"),
        ({"rows": -1}, "rows is -1; allowed is 0 to"),
        ({"out_features": 0}, "out_features is 0; allowed is 1 to"),
        ({"widths": [], "row_strides": []}, "inputs is 0; allowed is 1 to"),
        ({"widths": [0]}, "the width of an input is 0"),
        ({"row_strides": [-1]}, "the row stride of an input is -1"),
        ({"row_strides": []}, "1 widths and 0 row strides were given"),
        ({"activation": "swish"}, "activation is 'swish'; allowed are"),
        ({"weight_dtype": "int8", "save": True}, "is for inference"),
        ({"rows": 1 << 39, "out_features": 1 << 20}, "are too large together; split the rows"),
    ],
)
def test_the_core_checks_what_it_is_given(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        desc(**changes)


def test_the_core_refuses_null_pointers_and_chains_that_do_not_fit() -> None:
    y = torch.empty(3, 5)
    for arguments in (([X.data_ptr()], 0, 0, 0, y.data_ptr()), ([0], WEIGHT.data_ptr(), 0, 0, y.data_ptr())):
        with pytest.raises(ValueError, match="null pointer"):
            _native.linear_forward(desc(), *arguments, 0, 1)
    with pytest.raises(ValueError, match="2 input addresses were given; this plan has 1"):
        _native.linear_forward(desc(), [1, 2], WEIGHT.data_ptr(), 0, 0, y.data_ptr(), 0, 1)
    with pytest.raises(ValueError, match="an int8 weight needs its scale"):
        _native.linear_forward(
            desc(weight_dtype="int8"), [X.data_ptr()], WEIGHT.data_ptr(), 0, 0, y.data_ptr(), 0, 1
        )
    weights = [(WEIGHT.data_ptr(), 0, 0)] * 2
    with pytest.raises(ValueError, match="layer 1 of the chain does not take what layer 0 gives"):
        _native.linear_chain([desc(), desc()], [X.data_ptr()], weights, y.data_ptr(), 1)
    with pytest.raises(ValueError, match="2 layers and 1 of these"):
        _native.linear_chain([desc(), desc()], [X.data_ptr()], weights[:1], y.data_ptr(), 1)
    with pytest.raises(ValueError, match="use save = 0"):
        _native.linear_chain([desc(save=True)], [X.data_ptr()], weights[:1], y.data_ptr(), 1)
    with pytest.raises(ValueError, match="backward needs a plan with save = 1"):
        _native.linear_backward(desc(), 1, [1], 1, 0, 0, [0], 0, 0, 1)
