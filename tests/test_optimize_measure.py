"""optimize() with example inputs: what is verified, what is timed, and what is kept of it.

Times are put in by the tests, so that nothing here hangs on a stopwatch; one test alone looks at real
ones.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from explained import rows
from models_zoo import ZOO
from torch import Tensor, nn

import interfuse
from interfuse.rewrite import conv_pool, measure
from interfuse.rewrite.bound import RewrittenMethod
from interfuse.rewrite.conv_pool import ConvPool

if TYPE_CHECKING:
    from collections.abc import Callable

Times = list[tuple[float, float]]

pytestmark = pytest.mark.usefixtures("any_size")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Times:
    """The times that measuring finds, in the order in which it asks; the last one for ever. Each way to do
    the work still runs once, so that what breaks still breaks."""
    times: Times = [(2.0, 1.0)]

    def in_turns(plain: Callable[[], object], fused: Callable[[], object], *rest: Any) -> tuple[float, float]:
        plain()
        fused()
        return times.pop(0) if len(times) > 1 else times[0]

    monkeypatch.setattr(measure, "in_turns", in_turns)
    return times


def kernel(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Puts something behind the kernel, in float32: the float64 truth stays true."""
    run = ConvPool.run

    def changed(pattern: ConvPool, call: Any) -> Tensor:
        y = run(pattern, call)
        return change(y) if y.dtype == torch.float32 else y

    monkeypatch.setattr(ConvPool, "run", changed)


def block() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ZOO)
def test_every_model_of_the_zoo(name: str, clock: Times) -> None:
    entry = ZOO[name]
    model, inputs = entry.build()
    model.train()
    plain = copy.deepcopy(model)
    with torch.random.fork_rng():
        interfuse.optimize(model, inputs, seconds=0)
    found = rows(model)
    for site in entry.fused:
        assert found[site].fused or "did not reach" in found[site].reason, found[site]
        if found[site].fused:
            assert found[site].inference is not None
            assert found[site].kernel.startswith("native")
    for (key, value), (other, expected) in zip(
        model.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert key == other
        assert torch.equal(value, expected)
    assert all(p.grad is None for p in model.parameters())
    torch.manual_seed(3)
    got = model(*inputs)
    torch.manual_seed(3)
    torch.testing.assert_close(got, plain(*inputs), rtol=1e-4, atol=1e-4)


def test_slower_sites_are_taken_off(clock: Times) -> None:
    clock[:] = [(1.0, 1.5), (1.0, 1.2), (1.0, 1.0)]
    model = interfuse.optimize(block(), X)
    (row,) = interfuse.explain(model).rows
    assert not row.fused
    assert "as fast, or faster" in row.reason
    assert row.inference == (1.0, 1.5)
    assert row.training == (1.0, 1.2)
    assert "forward" not in model.__dict__
    interfuse.optimize(model)  # without inputs it does not forget
    assert "forward" not in model.__dict__
    clock[:] = [(2.0, 1.0)]
    interfuse.optimize(model, X)
    assert rows(model)["0"].fused


@pytest.mark.parametrize("faster", ["inference", "training"])
def test_inference_and_training_are_decided_apart(
    faster: str, clock: Times, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock[:] = [(2.0, 1.0), (1.0, 2.0)] if faster == "inference" else [(1.0, 2.0), (2.0, 1.0)]
    clock.append((1.0, 0.9))
    model = interfuse.optimize(block(), X)
    (row,) = interfuse.explain(model).rows
    assert row.fused
    assert row.reason == f"in {faster} only"
    fused: list[bool] = []
    kernel(monkeypatch, lambda y: (fused.append(True), y)[1])
    with torch.no_grad():
        model(X)
    assert bool(fused) is (faster == "inference")
    fused.clear()
    model(X).sum().backward()
    assert bool(fused) is (faster == "training")


def test_frozen_models_are_not_timed_in_training(clock: Times) -> None:
    model = interfuse.optimize(block().requires_grad_(False), X)
    (row,) = interfuse.explain(model).rows
    assert row.fused
    assert row.training is None
    assert row.reason == "in inference only"


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "values": (lambda y: y * 1.001, "its error against float64 is 1.0e-03"),
    "nan": (lambda y: torch.where(y == y.max(), torch.nan, y), "its error against float64 is inf"),
    "gradients": (lambda y: y.detach() + 1.5 * (y - y.detach()), "its gradient's error against float64"),
    "layout": (lambda y: y.to(memory_format=torch.channels_last), "with strides"),
    "shape": (lambda y: y[:, :, 1:], "where the model gives torch.float32 (2, 8, 8, 8)"),
}


@pytest.mark.parametrize(("change", "reason"), WRONG.values(), ids=WRONG)
def test_a_kernel_that_is_wrong_is_not_kept(
    change: Callable[[Tensor], Tensor], reason: str, clock: Times, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel(monkeypatch, change)
    model = interfuse.optimize(block(), X)
    (row,) = interfuse.explain(model).rows
    assert not row.fused
    assert reason in row.reason
    assert "forward" not in model.__dict__


def test_lone_convolutions_only_if_measured_faster(clock: Times) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    interfuse.optimize(model)
    assert not rows(model)["0"].fused
    interfuse.optimize(model, X)
    assert rows(model)["0"].fused
    expected = copy.deepcopy(model)
    interfuse.restore(expected)
    torch.testing.assert_close(model(X), expected(X), rtol=1e-4, atol=1e-5)


def test_the_model_as_a_whole_decides_last(clock: Times) -> None:
    clock[:] = [(2.0, 1.0), (2.0, 1.0), (1.0, 1.1)]
    model = interfuse.optimize(block(), X)
    (row,) = interfuse.explain(model).rows
    assert not row.fused
    assert "as a whole is not faster with the fused sites (1.1e+03 ms against 1e+03 ms)" in row.reason
    assert "forward" not in model.__dict__


def test_a_training_step_as_a_whole_decides_over_training(clock: Times) -> None:
    clock[:] = [(2.0, 1.0), (2.0, 1.0), (1.0, 0.9), (1.0, 1.1)]
    model = interfuse.optimize(block(), X)
    (row,) = interfuse.explain(model).rows
    assert row.fused
    assert row.reason == "in inference only"
    clock[:] = [(1.0, 2.0), (2.0, 1.0), (1.0, 1.0), (1.0, 1.1)]
    interfuse.optimize(model, X)
    (row,) = interfuse.explain(model).rows
    assert not row.fused
    assert "as a whole is not faster in training with the fused sites (1.1e+03 ms" in row.reason
    assert "forward" not in model.__dict__


def test_what_torch_trains_faster_is_still_tried_in_inference(clock: Times) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, (3, 16)), nn.ReLU())  # as wide as its input
    x = torch.randn(2, 1, 9, 16)
    interfuse.optimize(model, x)
    (row,) = interfuse.explain(model).rows
    assert row.fused
    assert row.training is None
    assert row.reason == "in inference only"
    expected = F.relu(F.conv2d(x, model[0].weight, model[0].bias))
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_has_no_backward_is_still_optimised(clock: Times) -> None:
    class Overwritten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block()

        def forward(self, x: Tensor) -> Tensor:
            y = torch.exp(self.block(x))
            kept = y * y
            y.zero_()
            return kept

    model = Overwritten()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(X).sum().backward()
    interfuse.optimize(model, X)
    assert rows(model)["block.0"].fused


def test_the_whole_model_is_timed_without_the_time_of_rewriting_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods are compiled once before, however often they are put on and taken off."""
    builds: list[str] = []
    build = RewrittenMethod._build

    def counted(method: RewrittenMethod) -> None:
        builds.append(method.method)
        build(method)

    def in_turns(plain: Callable[[], object], fused: Callable[[], object], *rest: Any) -> tuple[float, float]:
        for _ in range(3):
            plain()
            fused()
        return 2.0, 1.0

    monkeypatch.setattr(RewrittenMethod, "_build", counted)
    monkeypatch.setattr(measure, "in_turns", in_turns)
    model, inputs = ZOO["functional"].build()
    interfuse.optimize(model, inputs)
    assert len(interfuse.explain(model).fused) == 4
    assert len(builds) == 3  # to try the sites, for the whole model, and for what is kept


class Inputs(nn.Module):
    """Positional and keyword arguments, a branch that examples may not reach, and a write to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)
        self.b = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, other: Tensor | None = None, *, scale: float = 1.0) -> dict[str, Tensor]:
        x.mul_(scale)
        if other is None:
            return {"a": F.relu(self.a(x))}
        return {"b": F.relu(self.b(other)) * scale}


def test_forms_of_example_inputs(clock: Times) -> None:
    for examples, reached in ((X, "a"), ([X], "a"), ((X, X), "b"), ({"x": X, "other": X, "scale": 2.0}, "b")):
        before = X.clone()
        model = interfuse.optimize(Inputs(), examples)
        assert torch.equal(X, before)
        found = rows(model)
        assert found[reached].fused
        other = found["b" if reached == "a" else "a"]
        assert not other.fused
        assert other.reason == "the example inputs did not reach it"


def test_calls_that_no_kernel_takes(clock: Times) -> None:
    model = block().double()
    interfuse.optimize(model, X.double())
    assert "not a call that the kernels take" in rows(model)["0"].reason
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.MaxPool2d(17, 1))
    x = torch.randn(1, 3, 20, 20)
    interfuse.optimize(model, x)
    row = rows(model)["0"]
    assert row.fused or "no kernel takes it" in row.reason
    torch.testing.assert_close(model(x), nn.Sequential(*model)(x), rtol=1e-4, atol=1e-5)


def test_an_error_in_the_model_leaves_it_as_it_was(clock: Times) -> None:
    model = block().append(nn.Linear(3, 3))
    before = {name: set(m.__dict__) for name, m in model.named_modules()}
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        interfuse.optimize(model, X)
    assert before == {name: set(m.__dict__) for name, m in model.named_modules()}


def test_restore_and_copies(clock: Times) -> None:
    model = interfuse.optimize(block(), X)
    other = copy.deepcopy(model)
    assert rows(other)["0"].inference == rows(model)["0"].inference == (2.0, 1.0)
    interfuse.restore(model)
    assert not [name for name in model.__dict__ if "interfuse" in name]
    assert rows(model)["0"].inference is None
    assert rows(other)["0"].fused


def test_the_printed_table(clock: Times) -> None:
    model, inputs = ZOO["functional"].build()
    text = str(interfuse.explain(interfuse.optimize(model, inputs)))
    assert text.startswith("Functional: 4 of 4 sites fused")
    words = " ".join(text.split())
    for part in ("conv1", "Conv2d -> relu -> MaxPool2d", "native", "inference 2e+03 -> 1e+03 ms"):
        assert part in words
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.slow
def test_with_a_real_clock() -> None:
    model, inputs = ZOO["vgg"].build()
    interfuse.optimize(model.eval(), inputs, seconds=0.5)
    for row in interfuse.explain(model).rows:
        assert row.inference is not None
        faster = row.inference[1] < row.inference[0]
        assert faster or not row.fused or row.reason == "in training only"


def test_small_convolutions_train_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small convolutions without a pool train by torch's own functions, call after call; nothing else."""
    monkeypatch.setattr(conv_pool, "LEAST_PRODUCTS", 64_000_000)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Tanh(), nn.MaxPool2d(2))
    model, x = interfuse.optimize(copy.deepcopy(plain)), torch.randn(2, 3, 12, 12)
    for _ in range(3):
        y = model(x)
        first, second = interfuse.explain(model).rows
        assert "less than 64 million products" in first.verdict
        assert second.kernel.startswith("native")
    torch.testing.assert_close(y, plain(x), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        model(x)
    assert all(row.kernel.startswith("native") for row in interfuse.explain(model).rows)
