"""optimize() and chains that begin before the module they are about: a concatenation that only a linear layer
reads, and an embedding that only a recurrent module reads."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import tolerance
import torch
import torch.nn.functional as F
from explained import rows
from torch import Tensor, nn

import interfuse

pytestmark = pytest.mark.usefixtures("any_size")


class Fusion(nn.Module):
    """Three modalities joined in every way that a forward is written in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(12, 6)
        self.score = nn.Linear(18, 5, bias=False)
        self.out = nn.Linear(17, 3)

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        z = torch.sigmoid(self.gate(torch.cat([a, b], dim=-1)))
        parts = (z, b, c)
        x = torch.concat(parts, -1)
        y = self.score(x)
        both = torch.cat((F.relu(y), z, c), 1)
        return self.out(both)


def three(rows: int = 4) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(rows)
    return tuple(torch.randn(rows, 6, generator=draw) for _ in range(3))


class Tagger(nn.Module):
    """Words into a recurrence, with a state from elsewhere."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 12, padding_idx=0)
        self.rnn = kind(12, 20, **{"batch_first": True, **settings})
        self.head = nn.Linear(20 * (1 + self.rnn.bidirectional), 5)

    def forward(self, ids: Tensor, hx: Any = None) -> Tensor:
        x = self.embedding(ids)
        y, _ = self.rnn(x, hx)
        return self.head(y)


def ids(*shape: int) -> Tensor:
    return torch.randint(50, shape or (3, 9), generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, *given: Any) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in given]
    wanted = [*(x for x in leaves if x.requires_grad), *model.parameters()]
    return list(torch.autograd.grad(model(*leaves).square().mean(), wanted))


def trained(model: nn.Module) -> nn.Module:
    """With every site in training too, as if that had been measured to pay."""
    for module in model.modules():
        for bound in interfuse.rewrite.bound.bound_methods(module):
            for site in bound.sites.values():
                site.training = True
    return model


@pytest.mark.parametrize("make", [Fusion, Tagger, lambda: Tagger(nn.GRU, num_layers=2, bidirectional=True)])
def test_same_answers_and_gradients(make: Any) -> None:
    plain = make()
    given = three() if isinstance(plain, Fusion) else (ids(),)
    own = gradients(plain, *given)
    fused = interfuse.optimize(copy.deepcopy(plain))
    with torch.no_grad():
        y, truth = (
            fused(*given),
            copy.deepcopy(plain).double()(*(x.double() if x.is_floating_point() else x for x in given)),
        )
    assert tolerance.error(y, truth) <= tolerance.FLOAT32_DEFAULT
    names = ["gate", "out", "score"] if isinstance(plain, Fusion) else ["embedding"]
    assert [rows(fused)[name].kernel for name in names] == ["native"] * len(names)
    assert list(fused.state_dict()) == list(plain.state_dict())
    for ours, theirs in zip(gradients(fused, *given), own, strict=True):
        assert tolerance.error(ours, theirs) <= tolerance.FLOAT32_GRADIENT
    for ours, theirs in zip(gradients(trained(fused), *given), own, strict=True):
        assert tolerance.error(ours, theirs) <= tolerance.FLOAT32_GRADIENT
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        with torch.no_grad():
            assert torch.equal(other(*given), y)
        assert [r.site for r in interfuse.explain(other).fused] == [
            r.site for r in interfuse.explain(fused).fused
        ]
    interfuse.restore(fused)
    assert all("forward" not in module.__dict__ for module in fused.modules())
    assert torch.equal(fused(*given), plain(*given))


def test_the_row_of_padding_gets_no_gradient() -> None:
    model = trained(interfuse.optimize(Tagger()))
    grad = gradients(model, torch.zeros(2, 4, dtype=torch.long))[0]
    assert grad.shape == (50, 12)
    assert not grad.any()


def test_in_an_nn_sequential() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 12), nn.GRU(12, 20))
    expected = model(ids())
    interfuse.optimize(model)
    with torch.no_grad():
        got = model(ids())
    for ours, theirs in zip(got, expected, strict=True):
        assert tolerance.error(ours, theirs) <= tolerance.FLOAT32_DEFAULT
    assert rows(model)["0"].kernel == "native"


@pytest.mark.parametrize("shape", [(3, 9), (9,)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_and_states(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    plain = Tagger()
    fused = interfuse.optimize(copy.deepcopy(plain))
    hx = tuple(torch.randn(1, *shape[:-1], 20) for _ in range(2))
    with torch.no_grad():
        ours, theirs = fused(ids(*shape).to(dtype), hx), plain(ids(*shape).to(dtype), hx)
    assert tolerance.error(ours, theirs) <= tolerance.FLOAT32_DEFAULT
    assert rows(fused)["embedding"].kernel == "native"
    assert rows(fused)["rnn"].kernel != "native"  # it was never called by itself


@torch.no_grad()
def test_what_changes_later_is_honoured() -> None:
    plain, seen = Tagger(), []
    fused = interfuse.optimize(copy.deepcopy(plain))
    x = ids()
    before = fused(x)
    for module in (fused.embedding, fused.rnn):
        handle = module.register_forward_hook(lambda *_: seen.append("hook"))
        assert tolerance.error(fused(x), before) <= tolerance.FLOAT32_DEFAULT
        handle.remove()
    assert seen == ["hook", "hook"]
    fused.embedding.weight.mul_(2)
    plain.embedding.weight.mul_(2)
    assert tolerance.error(fused(x), plain(x)) <= tolerance.FLOAT32_DEFAULT
    fused.embedding.max_norm = 0.5
    plain.embedding.max_norm = 0.5
    assert tolerance.error(fused(x), plain(x)) <= tolerance.FLOAT32_DEFAULT
    assert torch.equal(fused.embedding.weight, plain.embedding.weight)  # renormed in place
    model = interfuse.optimize(Fusion()).double()
    given = [t.double() for t in three()]
    assert torch.equal(model(*given), interfuse.restore(copy.deepcopy(model))(*given))


@torch.no_grad()
def test_ids_outside_the_table_raise_torchs_own_error() -> None:
    model = interfuse.optimize(Tagger())
    with pytest.raises(IndexError, match="index out of range in self"):
        model(torch.full((2, 3), 50))


@torch.no_grad()
def test_under_autocast() -> None:
    for plain, given in ((Fusion(), three()), (Tagger(), (ids(),)), (Tagger(nn.GRU), (ids(),))):
        fused = interfuse.optimize(copy.deepcopy(plain))
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = fused(*given), plain(*given)
        assert ours.dtype == theirs.dtype
        assert tolerance.error(ours, theirs) <= 8 * tolerance.BFLOAT16  # several layers' roundings in each


@torch.no_grad()
def test_parts_that_only_torch_joins() -> None:
    class Join(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 3)

        def forward(self, parts: Any, dim: int) -> Tensor:
            return F.relu(self.fc(torch.cat(parts, dim)))

    model = interfuse.optimize(Join())
    plain = interfuse.restore(copy.deepcopy(model))
    a, b = torch.randn(2, 3, 5), torch.randn(2, 3, 3)
    for parts, dim in (
        ([torch.randn(2, 8), torch.randn(3, 8)], 0),
        ([torch.randn(2, 1, 8), torch.randn(2, 2, 8)], 1),
        ([torch.empty(0), torch.randn(2, 8)], 1),
        ([a, b.bfloat16()], -1),
    ):
        assert torch.equal(model(parts, dim), plain(parts, dim))
    with pytest.raises((RuntimeError, ValueError), match="non-empty"):
        model([], 0)
    assert "not what the kernels take" in rows(model)["fc"].reason
    assert tolerance.error(model((a, b), 2), plain((a, b), 2)) <= tolerance.FLOAT32_DEFAULT
    assert rows(model)["fc"].kernel == "native"


class Left(nn.Module):
    """Chains that begin with a concatenation or an embedding, and may not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = (nn.Linear(8, 8) for _ in range(4))
        self.words = nn.ModuleDict({name: nn.Embedding(20, 8) for name in ("twice", "between", "kept")})
        self.rnn = nn.GRU(8, 8)

    def forward(self, a: Tensor, ids: Tensor) -> Tensor:
        x = torch.cat([a, a], dim=0)
        x = self.first(x)
        y = torch.cat([a[:, :4], a[:, 4:]], dim=1)
        z = self.second(y) + y
        z = self.third(torch.cat([z[:, :4], z[:, 4:]], dim=int(z.dim() - 1)))
        w = torch.cat([z[:, :4], z[:, 4:]], dim=1)
        w = torch.dropout(w, 0.5, self.training)
        w = self.fourth(w)
        t = self.words["twice"](ids)
        u = self.rnn(t)[0] + t
        v = self.rnn(torch.tanh(self.words["between"](ids)))[0]
        self.state = self.words["kept"](ids)
        return x.sum() + w.sum() + (u + v + self.rnn(self.state)[0]).sum()


def test_what_is_not_proven_is_left_alone() -> None:
    plain, a = Left().eval(), torch.randn(3, 8)
    model = interfuse.optimize(copy.deepcopy(plain))
    x = torch.randint(20, (5, 2))
    with torch.no_grad():
        assert tolerance.error(model(a, x), plain(a, x)) <= tolerance.FLOAT32_DEFAULT
    found = rows(model)
    assert [row.site for row in interfuse.explain(model).fused] == ["rnn"]
    for site, reason in {
        "first": "cat, which gives its input, does not join the last dimension",
        "words.twice": "read 2 times",
        "words.between": "tanh follows",
        "words.kept": "stored as self.state",
    }.items():
        assert reason in found[site].reason, (site, found[site].reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m.embedding, "max_norm", 1.0), "max_norm writes to the table"),
        (lambda m: setattr(m.embedding, "sparse", True), "sparse=True"),
        (lambda m: setattr(m.embedding, "scale_grad_by_freq", True), "scale_grad_by_freq"),
        (lambda m: m.embedding.register_forward_hook(lambda *_: None), "Embedding has hooks"),
        (lambda m: m.rnn.register_forward_pre_hook(lambda *_: None), "LSTM, which reads its rows, has hooks"),
        (lambda m: nn.utils.parametrizations.weight_norm(m.embedding), "parametrised"),
        (lambda m: setattr(m, "embedding", type("Mine", (nn.Embedding,), {})(50, 12)), "not exactly nn.Emb"),
    ],
)
def test_embeddings_that_are_left_alone(change: Any, reason: str) -> None:
    plain = Tagger()
    change(plain)
    model = interfuse.optimize(copy.deepcopy(plain))
    assert not rows(model)["embedding"].fused
    assert reason in rows(model)["embedding"].reason
    assert rows(model)["rnn"].fused
    for ours, theirs in zip(gradients(model, ids()), gradients(plain, ids()), strict=True):
        assert tolerance.error(ours.to_dense(), theirs.to_dense()) <= tolerance.FLOAT32_GRADIENT


def test_an_embedding_without_a_recurrence_is_not_spoken_of() -> None:
    assert not interfuse.explain(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.ReLU())).rows[1:]


def test_example_inputs_measure_it() -> None:
    for model, given in ((Fusion(), three(64)), (Tagger(num_layers=2, dropout=0.3), (ids(),))):
        model.eval()
        expected = model(*given)
        interfuse.optimize(model.train(), given, seconds=0.2)
        name = "gate" if isinstance(model, Fusion) else "embedding"
        assert rows(model)[name].inference is not None
        assert rows(model)[name].training is not None
        assert tolerance.error(model.eval()(*given), expected) <= tolerance.FLOAT32_DEFAULT


class Overwritten(nn.Module):
    """What torch's concatenation copies may be overwritten before the backward; ours has not copied it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(6, 6), nn.Linear(12, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a = self.first(a)
        y = self.fc(torch.cat([a, b], 1))
        a.mul_(2)
        return y + a.sum()


def test_parts_that_are_overwritten_later(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, given = Overwritten(), three()[:2]
    own = gradients(plain, *given)
    without = interfuse.optimize(copy.deepcopy(plain))
    monkeypatch.setattr(interfuse.rewrite.measure, "in_turns", lambda *_: (2.0, 1.0))
    measured = interfuse.optimize(copy.deepcopy(plain), given, seconds=0)
    for model in (without, measured):
        row = rows(model)["fc"]
        assert row.fused
        assert "in inference only" in row.reason
        for ours, theirs in zip(gradients(model, *given), own, strict=True):
            assert tolerance.error(ours, theirs) <= tolerance.FLOAT32_GRADIENT


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiles_to_one_graph() -> None:
    for model, given in ((Fusion(), three()), (Tagger(nn.GRU), (ids(),))):
        expected = model(*given)
        interfuse.optimize(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert tolerance.error(compiled(*given), expected) <= tolerance.FLOAT32_DEFAULT
