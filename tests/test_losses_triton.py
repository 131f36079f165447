"""linear_cross_entropy's Triton kernels against float64.

Compiled on a GPU, interpreted everywhere (triton_runs.py). Sizes are tiny because the interpreter takes
milliseconds an operation.
"""

from __future__ import annotations

from dataclasses import replace

import losses_oracle as oracle
import pytest
import tolerance
import torch
from cases.losses import REDUCTIONS, Case
from triton_runs import DEVICE, by_host, on_device, run_interpreted

from interfuse.ops._losses_problem import CrossEntropyParams, CrossEntropyProblem

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

pytest.importorskip("triton", reason="triton is not installed.")

# Several chunks of rows, parts of the classes, and tails of every size.
CASES = {
    **{f"plain-{r}": Case("plain", 20, 9, 40, reduction=r, ignored=2) for r in REDUCTIONS},
    **{
        f"smooth-{r}": Case("smooth", 18, 17, 35, reduction=r, label_smoothing=0.2, weighted=True)
        for r in REDUCTIONS
    },
    "weighted": Case("weighted", 5, 8, 33, weighted=True, ignored=1),
    "smooth": Case("smooth", 5, 8, 33, label_smoothing=1.0, bias=False),
    "one": Case("one", 1, 1, 2),
    "no-rows": Case("no-rows", 0, 8, 5, reduction="sum"),
    "bf16": Case("bf16", 20, 19, 40, dtype=torch.bfloat16),
    "f16": Case("f16", 20, 19, 40, dtype=torch.float16, label_smoothing=0.1),
}
# Roundings of 11 bits: of the logits' gradient, which the two products read, and of the result.
FLOAT16_GRADIENT = 8 * 2.0**-11


@on_device
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name: str) -> None:
    case = CASES[name]
    drawn = oracle.tensors(case)
    there = oracle.Drawn(*(None if t is None else t.to(DEVICE) for t in drawn)).training()
    loss = oracle.run(case, there, backend="triton")
    grads = torch.autograd.grad(loss, there.leaves(), oracle.grad_loss(loss.cpu()).to(DEVICE))
    truth = oracle.truth(case, drawn)
    assert tolerance.error(loss.cpu(), truth[0]) <= tolerance.output(case.dtype)
    bound = FLOAT16_GRADIENT if case.dtype == torch.float16 else tolerance.gradient(case.dtype)
    for ours, right in zip(grads, truth[1:], strict=True):
        assert tolerance.error(ours.cpu(), right) <= bound


@on_device
def test_strides_nan_and_labels_that_are_no_class() -> None:
    drawn = oracle.tensors(Case("strides", 6, 9, 40, reduction="none"))
    there = oracle.Drawn(*(None if t is None else t.to(DEVICE) for t in drawn))
    wide = torch.full((6, 18), float("nan"), device=DEVICE)
    wide[:, ::2] = there.input
    case = Case("strides", 6, 9, 40, reduction="none")
    plain = oracle.run(case, there, backend="triton")
    assert torch.equal(oracle.run(case, there._replace(input=wide[:, ::2]), backend="triton"), plain)
    there.input[1, 3] = float("nan")
    there.target[2] = 40
    losses = oracle.run(case, there, backend="triton")
    assert losses.isnan().tolist() == [False, True, True, False, False, False]


def problem() -> CrossEntropyProblem:
    return CrossEntropyProblem(
        CrossEntropyParams(), 5, 40, 9, torch.float32, torch.device("cuda"), has_bias=True
    )


@by_host
def test_why_not() -> None:
    from interfuse.kernels import losses as kernels

    assert "the tensors are on the CPU" in kernels.why_not(replace(problem(), device=torch.device("cpu")))
    assert "the tensors are torch.float64" in kernels.why_not(replace(problem(), dtype=torch.float64))


@by_host
@pytest.mark.slow
def test_the_interpreter_agrees() -> None:
    run_interpreted(__file__, at_least=len(CASES) + 1)
