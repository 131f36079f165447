"""torch.compile(model, backend="interfuse"): what it puts into a graph, and what it leaves alone."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from interfuse.cases.zoo import ENTRIES
from tolerance import FLOAT32_DEFAULT, FLOAT32_GRADIENT, MODEL, MODEL_GRADIENT, TIMES_TORCH, error
from torch import Tensor, fx, nn

from interfuse.ops.conv_pool import conv_pool
from interfuse.ops.linear import linear
from interfuse.ops.losses import linear_cross_entropy
from interfuse.rewrite import graph, losses


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Helpers, loops and functions, of which the graph shows nothing; a concatenation before a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)])
        self.pools = nn.ModuleList([nn.MaxPool2d(2), nn.AvgPool2d(2)])
        self.last = nn.Conv2d(8, 8, 1)
        self.joined = nn.Linear(8 + 5, 6)
        self.head = nn.Linear(6, 4)

    @staticmethod
    def block(conv: Any, pool: Any, x: Tensor) -> Tensor:
        return pool(F.relu(conv(x)))

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        for conv, pool in zip(self.convs, self.pools, strict=True):
            image = self.block(conv, pool, image)
        image = F.relu(F.max_pool2d(self.last(image), 2)).mean((2, 3))
        return self.head(torch.tanh(self.joined(torch.cat([image, features], dim=-1))))


def inputs(batch: int = 3) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, 20, 20, generator=draw), torch.randn(batch, 5, generator=draw)


def gradients(model: nn.Module, run: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in given]
    y = run(*leaves)
    weight = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)
    wanted = [x for x in (*leaves, *model.parameters()) if x.requires_grad]
    return y.detach(), list(torch.autograd.grad((y * weight).sum(), wanted))


def calls(found: fx.GraphModule, *ops: Any) -> list[Any]:
    return [node for node in found.graph.nodes if node.op == "call_function" and node.target in ops]


def captured(run: Any, *given: Tensor) -> fx.GraphModule:
    """The graph of a function, rewritten."""
    seen: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, example_inputs: Any) -> Any:
        graph.fuse(module)
        seen.append(module)
        return module.forward

    y = torch.compile(run, backend=keep, fullgraph=True)(*(x.clone() for x in given))
    expected = run(*(x.clone() for x in given))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    [module] = seen
    return module


def test_chains_that_only_a_graph_shows() -> None:
    module = captured(Net(), *inputs())
    fused = calls(module, conv_pool)
    assert [(n.kwargs["activation"], n.kwargs["pool"]) for n in fused] == [
        ("relu", "max"), ("relu", "avg"), ("relu", "max")]  # fmt: skip
    (joined,) = calls(module, linear)
    assert len(joined.args[0]) == 2
    assert joined.kwargs["activation"] == "tanh"
    assert len(calls(module, F.linear)) == 1  # the head
    assert not calls(module, torch.conv2d, torch.cat, F.relu, F.max_pool2d, torch.tanh)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_outputs_and_gradients_with_a_batch_that_varies() -> None:
    model = Net()
    compiled = torch.compile(model, backend="interfuse", fullgraph=True, dynamic=True)
    exact = copy.deepcopy(model).double()
    for batch in (3, 5):
        given = inputs(batch)
        got, own = gradients(model, compiled, given), gradients(model, model, given)
        truth = gradients(exact, exact, tuple(x.double() for x in given))
        assert error(got[0], truth[0]) <= max(MODEL, TIMES_TORCH * error(own[0], truth[0]))
        for mine, theirs, right in zip(got[1], own[1], truth[1], strict=True):
            assert error(mine, right) <= max(MODEL_GRADIENT, TIMES_TORCH * error(theirs, right))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("name", ["c3d", "squeezenet"])
def test_models_of_the_zoo(name: str) -> None:
    model, given = ENTRIES[name].build()
    model.eval()
    expected = copy.deepcopy(model).double()(*(x.double() for x in given))
    with torch.no_grad():
        y = torch.compile(model, backend="interfuse", fullgraph=True)(*given)
    assert error(y, expected) <= max(MODEL, TIMES_TORCH * error(model(*given), expected))


W, B = torch.randn(4, 3, 3, 3), torch.randn(4)
X = torch.randn(2, 3, 8, 8)


def read_twice(x: Tensor) -> Tensor:
    y = F.conv2d(x, W, B)
    return F.relu(y) + y.mean()


def something_between(x: Tensor) -> Tensor:
    y = F.conv2d(x, W, B)
    with torch.no_grad():
        z = F.relu(y)
    return z * 2


def returned(x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.conv2d(x, W, B)
    return F.relu(y), y


def changed_in_between(x: Tensor) -> Tensor:
    y = F.conv2d(x, W, B)
    x.add_(1)
    return F.relu(y) + x.mean()


def indices(x: Tensor) -> Tensor:
    y, at = F.max_pool2d(F.conv2d(x, W, B), 2, return_indices=True)
    return y + at


def double(x: Tensor) -> Tensor:
    return F.relu(F.conv2d(x.double(), W.double(), B.double()))


def smooth_after_pool(x: Tensor) -> Tensor:
    return torch.tanh(F.batch_norm(F.conv2d(x, W, B), torch.zeros(4), torch.ones(4)))


@pytest.mark.parametrize(
    "run",
    [read_twice, something_between, returned, changed_in_between, indices, double, smooth_after_pool],
    ids=lambda run: run.__name__,
)
def test_what_is_not_proven_is_left_alone(run: Any) -> None:
    module = captured(run, X)
    assert not calls(module, conv_pool)
    assert calls(module, torch.conv2d)


def test_part_of_a_chain() -> None:
    def tanh_behind_a_pool(x: Tensor) -> Tensor:
        return torch.tanh(F.max_pool2d(F.conv2d(x, W, B, stride=2), kernel_size=3, stride=1))

    module = captured(tanh_behind_a_pool, X)
    (fused,) = calls(module, conv_pool)
    assert fused.kwargs["pool"] == "max"
    assert "activation" not in fused.kwargs
    assert calls(module, torch.tanh)


def test_concatenations() -> None:
    weight, a, b = torch.randn(3, 10), torch.randn(2, 4), torch.randn(2, 6)

    def last(a: Tensor, b: Tensor) -> Tensor:
        return F.linear(torch.cat((a, b), 1), weight)

    def twice(a: Tensor, b: Tensor) -> Tensor:
        both = torch.cat((a, b), 1)
        return F.linear(both, weight) + both.sum()

    def rows(a: Tensor, b: Tensor) -> Tensor:
        return F.linear(torch.cat((a, b[:, :4])), weight[:, :4])

    assert len(calls(captured(last, a, b), linear)) == 1
    assert not calls(captured(twice, a, b), linear)
    assert not calls(captured(rows, a, b), linear)


CLASSES = losses.LEAST_CLASSES


class Language(nn.Module):
    """A head over a vocabulary, and the loss, as people write them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(12, CLASSES)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=3)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        logits = self.head(x)
        return self.loss(logits.view(-1, CLASSES), target.view(-1))


def words(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    target = torch.randint(CLASSES, (batch, 4), generator=generator)
    return torch.randn(batch, 4, 12, generator=generator), target.index_fill_(1, torch.tensor([2]), 3)


def test_logits_that_only_a_cross_entropy_reads() -> None:
    module = captured(Language(), *words(3))
    (fused,) = calls(module, linear_cross_entropy)
    assert fused.kwargs["label_smoothing"] == 0.1
    assert fused.kwargs["ignore_index"] == 3
    assert not calls(module, F.linear, F.cross_entropy)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_loss_and_its_gradients_with_a_batch_that_varies() -> None:
    model = Language()
    compiled = torch.compile(model, backend="interfuse", fullgraph=True, dynamic=True)
    exact = copy.deepcopy(model).double()
    for batch in (3, 5):
        x, target = words(batch)
        loss, found = gradients(model, compiled, (x, target))
        truth, right = gradients(exact, exact, (x.double(), target))
        assert error(loss, truth) <= FLOAT32_DEFAULT
        for mine, theirs in zip(found, right, strict=True):
            assert error(mine, theirs) <= FLOAT32_GRADIENT


def test_other_cross_entropies_are_left_alone() -> None:
    x, weight, target = torch.randn(5, 12), torch.randn(CLASSES, 12), torch.randint(CLASSES, (5,))

    def beside_logits(x: Tensor) -> Any:
        logits = F.linear(x, weight)
        return F.cross_entropy(logits, target) + logits.mean()

    def of_changed_logits(x: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight) / 2, target)

    def of_few_classes(x: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight[:100]), target % 100)

    def of_probabilities(x: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), torch.full((5, CLASSES), 1 / CLASSES))

    def transposed(x: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).T, target[:1].expand(CLASSES) % 5)

    def in_float64(x: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x.double(), weight.double()), target)

    def with_a_step_between(x: Tensor) -> Tensor:
        logits = F.linear(x, weight)
        x.add_(1)
        return F.cross_entropy(logits, target)

    for run in (
        beside_logits, of_changed_logits, of_few_classes, of_probabilities, transposed, in_float64,
        with_a_step_between,
    ):  # fmt: skip
        assert not calls(captured(run, x), linear_cross_entropy), run.__name__
        torch._dynamo.reset()


def test_it_is_found_by_name() -> None:
    """In a process that has imported interfuse and looked nothing up yet; nothing of it is loaded before."""
    code = (
        "import sys, interfuse; from torch._dynamo import lookup_backend; place = 'interfuse.rewrite.graph'; "
        "assert place not in sys.modules; found = lookup_backend('interfuse'); "
        "assert found is sys.modules[place].backend"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
