"""Which memory the native kernels touch: sentinels around every buffer, inputs left alone, misalignment."""

from __future__ import annotations

import conv_pool_oracle as oracle
import pytest
import tolerance
import torch
from cases.conv_pool import EDGES, Case

from interfuse import _native
from interfuse.ops import _conv_pool_native as native
from interfuse.ops._conv_pool_checks import check
from interfuse.ops._conv_pool_problem import ConvPoolProblem, empty_gradients, empty_outputs, memory_format

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("poisoned_outputs")]

CASES = [c for c in EDGES if c.arguments.get("padding_mode", "zeros") == "zeros" and c.name != "pool-256"]
GUARD = 257  # elements: odd, so that what lies between two guards is aligned to its element and no more
MARK = {torch.float32: 12345.0, torch.bfloat16: 12352.0, torch.uint8: 77}


def name_of(case: Case) -> str:
    return case.name


class Guarded:
    """A copy of a tensor's memory between two guards."""

    def __init__(self, t: torch.Tensor, guard: float) -> None:
        self.like, self.guard = t, guard
        self.room = torch.full((t.numel() + 2 * GUARD,), guard, dtype=t.dtype)
        self.memory.copy_(self.flat(t))

    @property
    def memory(self) -> torch.Tensor:
        return self.room[GUARD : GUARD + self.like.numel()]

    @staticmethod
    def flat(t: torch.Tensor) -> torch.Tensor:
        """The elements in the order of memory."""
        return t.as_strided((t.numel(),), (1,))

    def pointer(self) -> int:
        return self.memory.data_ptr() if self.like.numel() else 0

    def value(self) -> torch.Tensor:
        return self.memory.as_strided(self.like.shape, self.like.stride(), GUARD)

    def assert_kept(self) -> None:
        """The guards still hold what they held, bit for bit."""
        for side in (self.room[:GUARD], self.room[GUARD + self.like.numel() :]):
            expected = torch.full_like(side, self.guard)
            assert torch.equal(side.view(torch.uint8), expected.view(torch.uint8))


def prepare(case: Case, dtype: torch.dtype, layout: str) -> tuple[ConvPoolProblem, list[torch.Tensor]]:
    x, weight, bias = oracle.tensors(case, dtype, layout == "channels_last")
    problem = check(x, weight, bias, oracle.params(case), save=True)
    return problem, [x, weight] if bias is None else [x, weight, bias]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_nothing_outside_the_buffers_is_read_or_written(case: Case, dtype: torch.dtype, layout: str) -> None:
    """Around the inputs lie NaNs, which would spread; around the outputs, marks."""
    problem, tensors = prepare(case, dtype, layout)
    desc = native.make_desc(problem, tensors[0].stride())
    inputs = [Guarded(t, float("nan")) for t in tensors]
    x, weight, bias = (*inputs, None)[:3]
    outputs = [Guarded(t, MARK[t.dtype]) for t in empty_outputs(problem)]
    y, index, pre = outputs
    bias_pointer = bias.pointer() if bias else 0
    _native.conv_pool_forward(
        desc, x.pointer(), weight.pointer(), bias_pointer, y.pointer(), index.pointer(), pre.pointer(), 2
    )
    truth = oracle.truth(*tensors, **case.arguments)
    assert tolerance.error(y.value(), truth) <= tolerance.output(dtype)

    random = torch.Generator().manual_seed(3)
    grad = (
        torch.randn(truth.shape, generator=random).to(dtype).contiguous(memory_format=memory_format(problem))
    )
    grad_y = Guarded(grad, float("nan"))
    mask = (True, True, bias is not None)
    gradients = [Guarded(t, MARK[dtype]) for t in empty_gradients(problem, tensors[0], tensors[1], mask)]
    _native.conv_pool_backward(
        desc, grad_y.pointer(), x.pointer(), weight.pointer(), y.pointer(), index.pointer(), pre.pointer(),
        *(g.pointer() for g in gradients), 2)  # fmt: skip
    assert all(bool(g.value().isfinite().all()) for g in gradients)
    for guarded in (*inputs, *outputs, grad_y, *gradients):
        guarded.assert_kept()
    for guarded, before in zip((*inputs, grad_y), (*tensors, grad), strict=True):
        assert torch.equal(guarded.value(), before)


def test_the_guards_notice() -> None:
    guarded = Guarded(torch.zeros(4), 1.0)
    guarded.room[GUARD - 1] = 2.0
    with pytest.raises(AssertionError):
        guarded.assert_kept()


def test_garbage_is_there_to_be_noticed() -> None:
    assert bool(torch.empty(3).isnan().all())
    assert bool(torch.zeros(2).new_empty_strided((2, 2), (2, 1)).isnan().all())
    assert torch.empty(2, dtype=torch.uint8).tolist() == [0xA5, 0xA5]
