"""optimize() and recurrent modules: replaced whole, inside any model, with everything around them intact."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from explained import rows
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import interfuse

TYPES = (nn.RNN, nn.LSTM, nn.GRU)


class Tagger(nn.Module):
    """Embedding, a recurrent stack, and a layer on its outputs and its last state."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 12)
        self.rnn = kind(12, 20, **{"batch_first": True, **settings})
        self.head = nn.Linear(20 * (1 + self.rnn.bidirectional), 5)

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        if lengths is not None:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            y, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
            return self.head(y)
        y, state = self.rnn(x)
        last = state[0] if isinstance(state, tuple) else state
        return self.head(y).sum(1) + last[-1].mean()


def ids() -> Tensor:
    return torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(1))


def rnn_row(model: nn.Module, name: str = "rnn") -> Any:
    return rows(model)[name]


def gradients(model: nn.Module, *args: Any) -> list[Tensor]:
    model.zero_grad()
    model(*args).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}])
@pytest.mark.parametrize("lengths", [None, torch.tensor([9, 2, 5])])
def test_same_answers_and_gradients(
    kind: type[nn.RNNBase], settings: dict[str, Any], lengths: Tensor | None
) -> None:
    model = Tagger(kind, **settings)
    fused = interfuse.optimize(copy.deepcopy(model))
    x = ids()
    torch.testing.assert_close(fused(x, lengths), model(x, lengths), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(fused, x, lengths), gradients(model, x, lengths), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    row = rnn_row(fused)
    assert row.fused
    assert row.kernel == "native"


def test_everything_around_it_stays() -> None:
    model = Tagger(num_layers=2)
    keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
    seen: list[str] = []
    model.rnn.register_forward_hook(lambda *_: seen.append("hook"))
    interfuse.optimize(model)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == types
    model(ids())
    assert seen == ["hook"]
    interfuse.restore(model)
    assert "forward" not in model.rnn.__dict__


def test_weights_that_change_are_the_ones_that_are_used() -> None:
    model = Tagger().eval()
    fused = interfuse.optimize(copy.deepcopy(model))
    with torch.no_grad():
        fused(ids())
        for m in (model, fused):
            m.rnn.weight_hh_l0.mul_(0.5)
            m.rnn.weight_ih_l0.data[3] += 1
        torch.testing.assert_close(fused(ids()), model(ids()), rtol=1e-5, atol=1e-6)


def test_a_module_in_two_places_is_one_site() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.left = nn.GRU(6, 8, batch_first=True)
            self.right = self.left

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.left(x)[0].sum(1) - self.right(y)[0].sum(1)

    model = Siamese()
    x, y = torch.randn(2, 5, 6), torch.randn(2, 7, 6)
    expected = model(x, y)
    interfuse.optimize(model)
    assert len(interfuse.explain(model).fused) == 1
    torch.testing.assert_close(model(x, y), expected, rtol=1e-5, atol=1e-6)


def test_copies_and_pickles_hold_their_own() -> None:
    fused = interfuse.optimize(Tagger().eval())
    x = ids()
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert other.rnn.__dict__["forward"].owner is other.rnn
        torch.testing.assert_close(other(x), fused(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", TYPES)
def test_example_inputs_are_verified_and_timed(kind: type[nn.RNNBase]) -> None:
    model = Tagger(kind, num_layers=2, dropout=0.3)
    expected = model.eval()(ids())
    interfuse.optimize(model.train(), ids(), seconds=0.2)
    row = rnn_row(model)
    assert row.inference is not None
    assert row.training is not None
    torch.testing.assert_close(model.eval()(ids()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("examples", [None, (ids(),)])
def test_rounded_weights_in_inference_alone(examples: Any) -> None:
    model = Tagger(num_layers=2)
    with torch.no_grad():
        exact = model(ids())
    wanted = gradients(model, ids())
    fused = interfuse.optimize(copy.deepcopy(model), examples, dtype=torch.bfloat16, seconds=0.1)
    for ours, theirs in zip(gradients(fused, ids()), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        error = (fused(ids()) - exact).norm() / exact.norm()
    assert error < 1e-2
    if rnn_row(fused).fused:
        assert error > 1e-7  # they were rounded
    interfuse.restore(fused)
    with torch.no_grad():
        assert torch.equal(fused(ids()), exact)


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be None or torch.bfloat16"):
        interfuse.optimize(Tagger(), dtype=torch.float16)


def test_dropout_between_layers_draws_in_training_alone() -> None:
    model = interfuse.optimize(Tagger(num_layers=2, dropout=0.5))
    x = ids()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("kind", TYPES)
def test_compiles_to_one_graph(kind: type[nn.RNNBase]) -> None:
    model = Tagger(kind, num_layers=2)
    x = ids()
    expected, wanted = model(x), gradients(model, x)
    interfuse.optimize(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-6)
    model.zero_grad()
    compiled(x).square().mean().backward()
    for p, grad in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")
def test_plain_modules_still_break_the_graph() -> None:
    """Letting torch.compile see ours must not make it unroll torch's own."""
    interfuse.optimize(Tagger())
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    model, x = Tagger().eval(), ids()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    assert len(graphs) > 1
    assert max(len(graph.graph.nodes) for graph in graphs) < 20


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: nn.utils.parametrizations.weight_norm(m.rnn, "weight_hh_l0"), "parametrised"),
        (lambda m: setattr(m, "rnn", type("Mine", (nn.LSTM,), {})(12, 20, batch_first=True)), "not exactly"),
    ],
)  # fmt: skip
def test_what_is_left_alone_says_why(change: Any, reason: str) -> None:
    model = Tagger()
    change(model)
    expected = model(ids())
    interfuse.optimize(model)
    torch.testing.assert_close(model(ids()), expected, rtol=0, atol=0)
    row = rnn_row(model)
    assert not row.fused
    assert reason in row.reason


def test_float64_is_left_to_torch() -> None:
    model = Tagger().double()
    expected = model(ids())
    interfuse.optimize(model)
    assert torch.equal(model(ids()), expected)


def test_cells_are_named() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(x)

    row = rnn_row(Loop(), "cell")
    assert not row.fused
    assert "one step" in row.reason


def test_wrong_inputs_raise_torchs_own_errors() -> None:
    model = interfuse.optimize(nn.Sequential(nn.LSTM(4, 4)))
    with pytest.raises((RuntimeError, ValueError), match=r"input.size\(-1\)|input_size"):
        model(torch.randn(3, 2, 5))
    with pytest.raises(ValueError, match="2D or 3D"):
        model(torch.randn(3))


def test_autocast_keeps_the_models_dtypes() -> None:
    for kind in TYPES:
        model = Tagger(kind).eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = model.rnn(model.embedding(ids()))[0]
            interfuse.optimize(model)
            got = model.rnn(model.embedding(ids()))[0]
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
