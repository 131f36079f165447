"""Wrong arguments give sentences: what was given, what is allowed, what to do; and never a crash."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from interfuse import _native
from interfuse.dispatch import BackendError
from interfuse.nn.losses import LinearCrossEntropyLoss
from interfuse.ops.losses import linear_cross_entropy

X, WEIGHT, BIAS = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
TARGET = torch.tensor([0, 4, 2])

WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "weight's shape": ((X, WEIGHT.T, TARGET), {}, "linear_weight must have shape (classes, 4)"),
    "no classes": ((X, WEIGHT[:0], TARGET), {}, "linear_weight must have shape (classes, 4)"),
    "no features": ((X[:, :0], WEIGHT, TARGET), {}, "at least one feature in its last dimension"),
    "target's shape": ((X, WEIGHT, TARGET[:2]), {}, "shape but for its last dimension, (3,); got (2,)"),
    "probabilities": ((X, WEIGHT, torch.rand(3, 5)), {}, "in int64; got torch.float32. For probabilities"),
    "target's type": ((X, WEIGHT, TARGET > 1), {}, "in int64; got torch.bool"),
    "integers": ((X.int(), WEIGHT.int(), TARGET), {}, "dtype must be float32, bfloat16, float16 or float64"),
    "two dtypes": ((X, WEIGHT.double(), TARGET), {}, "input and linear_weight must have one dtype"),
    "bias's dtype": ((X, WEIGHT, TARGET), {"linear_bias": BIAS.double()}, "linear_bias must have one dtype"),
    "bias's shape": ((X, WEIGHT, TARGET), {"linear_bias": BIAS[:4]}, "linear_bias must have shape (5,)"),
    "class weights' shape": ((X, WEIGHT, TARGET), {"weight": BIAS[:4]}, "weight must have shape (5,)"),
    "class weights' gradient": ((X, WEIGHT, TARGET), {"weight": BIAS.clone().requires_grad_()},
                                "are constants and get no gradient; pass weight.detach()"),
    "two devices": ((X, WEIGHT.to("meta"), TARGET), {}, "must be on one device; got cpu and meta"),
    "sparse": ((X.to_sparse(), WEIGHT, TARGET), {}, "input must be a dense tensor"),
    "reduction": ((X, WEIGHT, TARGET), {"reduction": "max"}, "must be one of none, mean, sum; got 'max'"),
    "reduction's type": ((X, WEIGHT, TARGET), {"reduction": None}, "one of none, mean, sum; got None"),
    "ignore_index": ((X, WEIGHT, TARGET), {"ignore_index": 0.5}, "ignore_index must be an integer; got 0.5"),
    "smoothing": ((X, WEIGHT, TARGET), {"label_smoothing": 1.5}, "between 0 and 1; got 1.5"),
    "smoothing's type": ((X, WEIGHT, TARGET), {"label_smoothing": "a"}, "label_smoothing must be a number"),
    "backend": ((X, WEIGHT, TARGET), {"backend": "cuda"}, "backend must be one of native, triton, reference"),
    "too large a label": ((X, WEIGHT, TARGET + 1), {}, "target of row 1 is 5; allowed are 0 to 4, and -100"),
    "a negative label": ((X, WEIGHT, TARGET - 1), {}, "target of row 0 is -1; allowed are 0 to 4, and -100"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_sentences(name: str) -> None:
    arguments, keywords, sentence = WRONG[name]
    with pytest.raises(ValueError, match=re.escape(sentence)) as raised:
        linear_cross_entropy(*arguments, **keywords)
    assert str(raised.value).endswith(".")


def test_types() -> None:
    with pytest.raises(TypeError, match="target must be a torch tensor; got list"):
        linear_cross_entropy(X, WEIGHT, [0, 1, 2])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="linear_bias must be a torch tensor; got float"):
        linear_cross_entropy(X, WEIGHT, TARGET, linear_bias=1.0)  # type: ignore[arg-type]


def test_a_backend_that_cannot_gives_its_reason() -> None:
    with pytest.raises(
        BackendError, match=r"compute in float32 and bfloat16; the tensors are torch\.float64"
    ):
        linear_cross_entropy(X.double(), WEIGHT.double(), TARGET, backend="native")
    with pytest.raises(BackendError, match="Triton kernels run on a GPU"):
        linear_cross_entropy(X, WEIGHT, TARGET, backend="triton")


OP = torch.ops.interfuse.linear_cross_entropy.default
BACKWARD = torch.ops.interfuse.linear_cross_entropy_backward.default
PARAMETERS = ("mean", -100, 0.0, "")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"input": X.view(3, 2, 2)}, "linear_weight must have shape (classes, 2)"),
        ({"target": TARGET.int()}, "int64 targets; got (3, 4) and torch.int32"),
        ({"mask": [True]}, "none at all; got 1"),
        ({"mask": [True] * 3}, "asks for the gradient of linear_bias, and there is none"),
        ({"weight": BIAS.double()}, "takes class weights in torch.float32; got torch.float64"),
    ],
)
def test_the_registered_op_checks_too(change: dict[str, Any], sentence: str) -> None:
    given = {"input": X, "target": TARGET, "weight": None, "mask": [], **change}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        OP(given["input"], WEIGHT, given["target"], None, given["weight"], *PARAMETERS, given["mask"])


@pytest.mark.parametrize(
    ("grad_loss", "lse", "mask", "sentence"),
    [
        (torch.ones(3), torch.ones(3), [True, True, False], "grad_loss must have shape ()"),
        (torch.ones(()), torch.ones(2), [True, True, False], "lse must have shape (3,)"),
        (torch.ones(()), torch.ones(3), [], "the backward op's mask has an entry for input"),
    ],
)
def test_the_backward_op_checks_what_was_saved(
    grad_loss: torch.Tensor, lse: torch.Tensor, mask: list[bool], sentence: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        BACKWARD(grad_loss, X, WEIGHT, TARGET, None, None, lse, *PARAMETERS, mask)


def test_the_module_says_what_it_takes() -> None:
    with pytest.raises(
        ValueError, match=r"a torch.nn.Linear and a torch.nn.CrossEntropyLoss.*; got Bilinear"
    ):
        LinearCrossEntropyLoss.from_torch(nn.Bilinear(2, 3, 4))
    with pytest.raises(ValueError, match="got Linear, NLLLoss"):
        LinearCrossEntropyLoss.from_torch(nn.Linear(2, 3), nn.NLLLoss())  # type: ignore[arg-type]


def test_the_core_says_what_it_takes() -> None:
    with pytest.raises(ValueError, match="reduction is 'max'; allowed are 'none', 'mean', 'sum'"):
        _native.CrossEntropyDesc("float32", 1, 1, 1, 1, "max", 0, 0.0)
    desc = _native.CrossEntropyDesc("float32", 1, 0, 1, 1, "sum", 0, 0.0)
    with pytest.raises(ValueError, match="classes is 0; allowed is 1 to"):
        _native.cross_entropy_forward(desc, [1] * 5, 1, 1, [0, 0, 0], 1)
    desc = _native.CrossEntropyDesc("float32", 1, 1, 1, 1, "sum", 0, 0.0)
    with pytest.raises(ValueError, match="null pointer"):
        _native.cross_entropy_forward(desc, [0] * 5, 1, 1, [0, 0, 0], 1)
