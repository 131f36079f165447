"""How the losses of two tensors run: repeatably, in threads, after fork, on each ISA, in graphs."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import tolerance
import torch
from losses_oracle import contrastive, draw, gradients, similarities
from processes import check_forked_child, check_instruction_set
from threads import check_threads_at_once, same
from torch import Tensor, nn

from interfuse import _native
from interfuse.nn.losses import (
    BCEWithLogitsLoss,
    ContrastiveLoss,
    InfoNCELoss,
    LinearCrossEntropyLoss,
    ReconstructionLoss,
)
from interfuse.ops.losses import (
    binary_cross_entropy_with_logits,
    contrastive_loss,
    info_nce,
    reconstruction_loss,
)

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("poisoned_outputs")]


def labels(rows: int) -> Tensor:
    return (torch.arange(rows) % 2).float()


# The matrix of similarities kept and not, in one chunk of rows and several, enough for matrix units and not.
LOSSES: dict[str, tuple[tuple[int, int], Callable[..., Tensor]]] = {
    "bce": ((400, 90), lambda a, b: binary_cross_entropy_with_logits(a, b.detach().sigmoid())),
    "reconstruction": ((700, 500), lambda a, b: reconstruction_loss([a, a], [b.detach(), b.detach() + 1])),
    "contrastive": ((300, 40), lambda a, b: contrastive_loss(a, b, labels(300), 9.0)),
    "few rows": ((300, 40), info_nce),
    "two chunks": ((700, 75), lambda a, b: info_nce(a, b, 0.01)),
    "many rows": ((1100, 40), info_nce),
    "many rows, large": ((1100, 20), lambda a, b: info_nce(a, b, normalize=False, symmetric=False)),
}
by_name = pytest.mark.parametrize("name", LOSSES)


def everything(name: str, seed: int = 0) -> list[Tensor]:
    shape, loss = LOSSES[name]
    xs = [draw(*shape, seed=seed + i).requires_grad_() for i in range(2)]
    value = loss(*xs)
    found = torch.autograd.grad(value, xs, allow_unused=True)
    return [value.detach(), *(g for g in found if g is not None)]


@by_name
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_bitwise_the_same_again(name: str, threads: int) -> None:
    alone = everything(name)
    torch.set_num_threads(threads)
    first = everything(name)
    assert all(same(everything(name), first) for _ in range(3))
    for a, b in zip(first, alone, strict=True):
        assert tolerance.error(a, b) <= tolerance.FLOAT32_GRADIENT


def test_several_python_threads_at_once() -> None:
    check_threads_at_once(everything, [(name, seed) for seed in range(3) for name in LOSSES])


WORK = """
a, b = torch.randn(200, 60), torch.randn(200, 60)
ops = torch.ops.interfuse
def work():
    loss, lse, other = ops.info_nce.default(a, b, True, "native")
    grads = ops.info_nce_backward.default(torch.ones(200), a, b, lse, other, True, "native")
    return loss.numpy(), grads[0].numpy(), grads[1].numpy()
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forked_child_computes(when: str) -> None:
    check_forked_child(WORK, when, atol=1e-5)


@pytest.mark.parametrize("isa", _native.info()["isas"])
def test_every_instruction_set(isa: str) -> None:
    check_instruction_set(isa, "tests/test_losses_short.py")


@by_name
def test_writing_to_an_input_before_backward_is_an_error(name: str) -> None:
    shape, loss = LOSSES[name]
    xs = [draw(*shape, seed=i).requires_grad_() for i in range(2)]
    value = loss(*xs)
    with torch.no_grad():
        xs[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def check_error(shape: tuple[int, int], ours: Callable[..., Tensor], torchs: Callable[..., Tensor]) -> None:
    """The loss and its gradients are at most twice as far from float64's as torch's are."""
    xs = [draw(*shape, seed=i).requires_grad_() for i in range(2)]
    exact = [x.detach().double().requires_grad_() for x in xs]
    truth = gradients(torchs(*exact), exact)
    results = zip(gradients(ours(*xs), xs), gradients(torchs(*xs), xs), truth, strict=True)
    for mine, theirs, right in results:
        assert tolerance.error(mine, right) <= tolerance.beside_torch(tolerance.error(theirs, right))


@pytest.mark.parametrize("rows", [60, 1100])
@pytest.mark.parametrize("temperature", [0.07, 0.01])
@pytest.mark.parametrize("symmetric", [False, True])
def test_error_of_info_nce_is_at_most_twice_torchs(rows: int, temperature: float, symmetric: bool) -> None:
    check_error(
        (rows, 64),
        lambda a, b: info_nce(a, b, temperature, symmetric=symmetric),
        lambda a, b: similarities(a, b, temperature, True, symmetric, "mean"),
    )


def test_error_of_contrastive_is_at_most_twice_torchs() -> None:
    check_error(
        (300, 100),
        lambda a, b: contrastive_loss(a, b, labels(300), 15.0),
        lambda a, b: contrastive(a, b, labels(300).to(a.dtype), 15.0, "mean"),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("rows", [9, 1030])
@pytest.mark.parametrize("normalize", [False, True])
def test_what_is_not_finite_stays_so(value: float, rows: int, normalize: bool) -> None:
    """In the rows' own losses; torch's finite losses are finite here, too, and equal."""
    a, b = draw(rows, 40), draw(rows, 40, seed=1)
    a[4, 3] = value
    ours = info_nce(a, b, normalize=normalize, symmetric=False, reduction="none")
    torchs = similarities(a.double(), b.double(), 0.07, normalize, False, "none")
    assert torch.equal(ours.isfinite(), torchs.isfinite())
    assert tolerance.error(ours[ours.isfinite()], torchs[ours.isfinite()]) <= tolerance.FLOAT32_GRADIENT
    both = info_nce(a, b, normalize=normalize, reduction="none")
    assert not both[4].isfinite()


class Losses(nn.Module):
    """All modules of losses, in a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([InfoNCELoss(learned=True), ContrastiveLoss(2.0), InfoNCELoss(0.2)])
        self.words = LinearCrossEntropyLoss(6, 30, label_smoothing=0.1)
        self.bce, self.rebuilt = BCEWithLogitsLoss(pos_weight=torch.full((6,), 2.0)), ReconstructionLoss()

    def forward(self, a: Tensor, b: Tensor, target: Tensor) -> Tensor:
        chosen, apart, fixed = self.parts
        rebuilt = self.rebuilt([a, b], [b.detach(), a.detach()])
        named = fixed(a, b) + self.words(a, target.long())
        return named + chosen(a, b) + apart(a, b, target) + self.bce(a, b.detach().sigmoid()) + rebuilt


def arguments(rows: int) -> tuple[Any, ...]:
    return draw(rows, 6), draw(rows, 6, seed=1), labels(rows)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic: bool) -> None:
    torch._dynamo.reset()
    module = Losses()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5, 8):
        results = []
        for run in (compiled, module):
            a, b, target = arguments(rows)
            leaves = [a.requires_grad_(), b.requires_grad_(), *module.parameters()]
            results.append(gradients(run(a, b, target), leaves))
        for mine, theirs in zip(*results, strict=True):
            assert tolerance.error(mine, theirs) <= tolerance.FLOAT32_GRADIENT


def test_export() -> None:
    rows = torch.export.Dim("rows", min=2)
    module = Losses()
    program = torch.export.export(module, arguments(4), dynamic_shapes=({0: rows},) * 3)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    for name in ("info_nce", "contrastive_loss", "elementwise_loss"):
        assert f"interfuse.{name}.default" in targets
    given = arguments(9)
    assert tolerance.error(program.module()(*given), module(*given)) <= tolerance.FLOAT32_DEFAULT


def test_modules_are_copied_and_pickled(tmp_path: Any) -> None:
    module, given = Losses(), arguments(5)
    torch.save(module, tmp_path / "losses.pt")
    loaded = torch.load(tmp_path / "losses.pt", weights_only=False)
    for other in (copy.deepcopy(module), loaded):
        assert torch.equal(other(*given), module(*given))
