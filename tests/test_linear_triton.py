"""linear's Triton kernels against the float64 reference.

Compiled on a GPU, interpreted everywhere (triton_runs.py). Sizes are tiny because the interpreter takes
milliseconds an operation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import linear_oracle as oracle
import pytest
import tolerance
import torch
from cases.linear import ACTIVATIONS, Case
from triton_runs import DEVICE, by_host, on_device, run_interpreted

from interfuse.ops._linear_checks import check
from interfuse.ops.linear import linear, quantize_weight

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

pytest.importorskip("triton", reason="triton is not installed.")

HALF, BRAIN = torch.float16, torch.bfloat16
# Two roundings of 11 bits, one of the gradient before the activation and one of the result.
FLOAT16_GRADIENT = 8 * 2.0**-11

CASES = {
    **{name: Case(name, (5,), (9, 6), (7,), (name,)) for name in ACTIVATIONS},
    "tails": Case("tails", (18,), (17, 1), (19,), ("relu",)),
    "four": Case("four", (3,), (4, 5, 6, 7), (3,), ("tanh",)),
    "leading": Case("leading", (2, 3), (8,), (5,), ("gelu",), bias=False),
    "wide-softmax": Case("wide-softmax", (2,), (8,), (37,), ("softmax",)),
    "no-rows": Case("no-rows", (0,), (8,), (5,), ("relu",)),
    "bf16": Case("bf16", (5,), (20, 3), (18,), ("silu",), dtype=BRAIN),
    "bf16-softmax": Case("bf16-softmax", (4,), (20,), (18,), ("softmax",), dtype=BRAIN),
    "f16": Case("f16", (5,), (20, 3), (18,), ("sigmoid",), dtype=HALF),
}


@on_device
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name: str) -> None:
    case = CASES[name]
    tensors = oracle.tensors(case)
    flat = [t.to(DEVICE).requires_grad_() for t in oracle.leaves(*tensors)]
    y = linear(*oracle.parts(flat, len(case.widths)), case.activations[0], backend="triton")
    truth = oracle.truth(*tensors, oracle.params(case))
    assert tolerance.error(y.cpu(), truth) <= tolerance.output(case.dtype, "highest")
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    grads = torch.autograd.grad(y, flat, grad_y.to(DEVICE))
    bound = FLOAT16_GRADIENT if case.dtype == HALF else tolerance.gradient(case.dtype)
    for ours, right in zip(grads, oracle.true_gradients(*tensors, oracle.params(case), grad_y), strict=True):
        assert tolerance.error(ours.cpu(), right) <= bound


@on_device
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
def test_weights_in_fewer_bits(dtype: torch.dtype) -> None:
    inputs, weight, bias = oracle.tensors(Case("compact", (4,), (19, 3), (6,), ("relu",)))
    small, scale = quantize_weight(weight) if dtype == torch.int8 else (weight.bfloat16(), None)
    whole = small.double() if scale is None else small.double() * scale.double().unsqueeze(1)
    truth = oracle.truth(inputs, whole, bias, oracle.params(CASES["relu"]))
    given = [t if t is None else t.to(DEVICE) for t in (small, bias, scale)]
    y = linear([x.to(DEVICE) for x in inputs], given[0], given[1], "relu", scale=given[2], backend="triton")
    assert tolerance.error(y.cpu(), truth) <= tolerance.FLOAT32_HIGHEST


@on_device
def test_strides_and_nan() -> None:
    wide, weight = torch.randn(4, 30, device=DEVICE), torch.randn(10, 6, device=DEVICE).T
    x = wide[:, ::3]
    assert tolerance.error(linear(x, weight, backend="triton"), x.double() @ weight.double().T) <= 1e-6
    x = x.clone()
    x[1, 2] = float("nan")
    for name in ("relu", "softmax"):
        y = linear(x, weight, None, name, backend="triton")
        assert bool(y[1].isnan().all())
        assert not bool(y[0].isnan().any())


def problem(**changes: Any) -> Any:
    inputs, weight, bias = oracle.tensors(CASES["relu"])
    made = check(inputs, weight, bias, None, oracle.params(CASES["relu"]), True)
    return replace(made, device=torch.device("cuda"), **changes)


@by_host
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"widths": (1,) * 5}, "take up to 4 inputs; this call has 5"),
        ({"dtype": torch.float64, "weight_dtype": torch.float64}, "the tensors are torch.float64"),
        ({"weight_dtype": torch.bfloat16}, "train weights of the inputs' dtype"),
        ({"device": torch.device("cpu")}, "the tensors are on the CPU"),
    ],
)
def test_why_not(changes: dict[str, Any], sentence: str) -> None:
    from interfuse.kernels import linear as kernels

    assert sentence in kernels.why_not(replace(problem(), **changes))


@by_host
@pytest.mark.slow
def test_the_interpreter_agrees() -> None:
    run_interpreted(__file__, at_least=len(CASES) + 3)
