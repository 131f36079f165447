"""Random problems (hypothesis): whatever torch computes, the losses compute, forward and backward."""

from __future__ import annotations

import losses_oracle as oracle
import pytest
import tolerance
import torch
from cases.losses import REDUCTIONS, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_oracle import draw, gradients, similarities

from interfuse.ops.losses import info_nce

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("poisoned_outputs")]

ROWS = st.one_of(st.integers(1, 70), st.integers(500, 600))
SIZES = st.integers(1, 140)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows = draw(ROWS)
    return Case(
        "random",
        rows,
        draw(SIZES),
        draw(st.integers(2, 400)),
        bias=draw(st.booleans()),
        reduction=draw(st.sampled_from(REDUCTIONS)),
        label_smoothing=draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        weighted=draw(st.booleans()),
        ignored=draw(st.integers(0, rows - 1)),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
    )


@settings(max_examples=120)
@given(cases(), st.integers(0, 5))
def test_cross_entropy(case: Case, seed: int) -> None:
    drawn = oracle.tensors(case, seed=seed)
    ours = drawn.training()
    found = oracle.with_gradients(oracle.run(case, ours), ours)
    for i, (mine, right) in enumerate(zip(found, oracle.truth(case, drawn), strict=True)):
        bound = tolerance.gradient(case.dtype) if i else tolerance.output(case.dtype)
        assert tolerance.error(mine, right) <= bound


# One feature over its length is a sign, whose gradient is nothing.
@settings(max_examples=120)
@given(
    ROWS,
    st.integers(2, 140),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.01, 0.07, 1.0]),
    st.sampled_from(REDUCTIONS),
)
def test_info_nce(
    rows: int, features: int, normalize: bool, symmetric: bool, temperature: float, reduction: str
) -> None:
    size = 1.0 if normalize else (temperature / features**0.5) ** 0.5
    xs = [draw(rows, features, seed=i, scale=size).requires_grad_() for i in range(2)]
    learned = torch.tensor(temperature).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (*xs, learned)]
    ours = gradients(
        info_nce(*xs, learned, normalize=normalize, symmetric=symmetric, reduction=reduction), [*xs, learned]
    )
    theirs = gradients(similarities(*xs, learned, normalize, symmetric, reduction), [*xs, learned])
    truth = gradients(similarities(*exact, normalize, symmetric, reduction), exact)
    for i, (mine, torchs, right) in enumerate(zip(ours, theirs, truth, strict=True)):
        slack = 4 if i == 3 else 1  # the temperature's gradient is a sum over all pairs, whose terms cancel
        bound = max(
            slack * tolerance.FLOAT32_GRADIENT, tolerance.TIMES_TORCH * tolerance.error(torchs, right)
        )
        assert tolerance.error(mine, right) <= bound
