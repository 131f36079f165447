"""optimize() and torch.nn.MultiheadAttention: replaced whole, inside any model, with all around it intact."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import tolerance
import torch
from explained import rows
from torch import Tensor, nn

import interfuse
from interfuse.nn import _attention_block
from interfuse.rewrite import attention

BOUND = tolerance.FLOAT32_ATTENTION_GRADIENT


pytestmark = pytest.mark.usefixtures("any_size")


class Reader(nn.Module):
    """Words look at an image's patches: attention, residual, norm, a layer."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 4, **{"batch_first": True, **settings})
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 3)

    def forward(self, words: Tensor, patches: Tensor, padding: Tensor | None = None) -> Tensor:
        y, _ = self.attention(words, patches, patches, key_padding_mask=padding, need_weights=False)
        return self.head(self.norm(words + y))


def words_and_patches() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(3, 7, 16, generator=random), torch.randn(3, 11, 16, generator=random)


PADDING = torch.arange(11) >= torch.tensor([[11], [4], [9]])


def row(model: nn.Module, name: str = "attention") -> Any:
    return rows(model)[name]


def close(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert tolerance.error(a, b) <= BOUND


def loss(y: Tensor) -> Tensor:
    """Not a square, whose sum over a normed row does not depend on anything."""
    return (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum()


def gradients(model: nn.Module, *args: Any) -> list[Tensor]:
    model.zero_grad()
    loss(model(*args)).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "settings", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"bias": False}, {"batch_first": False}]
)
@pytest.mark.parametrize("padded", [False, True])
def test_same_answers_and_gradients(settings: dict[str, Any], padded: bool) -> None:
    model = Reader(**settings)
    fused = interfuse.optimize(copy.deepcopy(model))
    given = words_and_patches()
    if not model.attention.batch_first:
        given = tuple(t.transpose(0, 1) for t in given)
    padding = PADDING if padded else None
    close([fused(*given, padding)], [model(*given, padding)])
    close(gradients(fused, *given, padding), gradients(model, *given, padding))
    assert row(fused).fused
    assert row(fused).kernel == "native"


@pytest.mark.parametrize(
    "keywords",
    [{}, {"average_attn_weights": False}, {"attn_mask": torch.ones(7, 11, dtype=torch.bool).triu(3)},
     {"need_weights": False, "attn_mask": torch.ones(7, 11, dtype=torch.bool).triu(1), "is_causal": True}],
)  # fmt: skip
def test_the_modules_own_arguments(keywords: dict[str, Any]) -> None:
    plain = Reader().attention
    fused = interfuse.optimize(copy.deepcopy(plain))
    query, key = words_and_patches()
    ours, theirs = fused(query, key, key, **keywords), plain(query, key, key, **keywords)
    close(ours[:1], theirs[:1])
    assert (ours[1] is None) == (theirs[1] is None)
    if theirs[1] is not None:
        close(ours[1:], theirs[1:])
    positional = (None, False, keywords.get("attn_mask"))
    close(fused(query, key, key, *positional)[:1], theirs[:1])


def test_everything_around_it_stays() -> None:
    model = Reader()
    given = words_and_patches()
    expected = model(*given)
    keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
    seen: list[str] = []
    model.attention.register_forward_hook(lambda *_: seen.append("hook"))
    interfuse.optimize(model)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == types
    close([model(*given)], [expected])
    assert seen == ["hook"]
    interfuse.restore(model)
    assert "forward" not in model.attention.__dict__
    assert torch.equal(model(*given), expected)


@pytest.mark.parametrize("where", ["forward_hook", "forward_pre_hook"])
def test_hooks_inside_the_module_stay_as_torch_has_them(where: str) -> None:
    """torch.nn.MultiheadAttention never calls its out_proj: a hook there never runs, with ours neither."""
    model = Reader()
    seen: list[str] = []
    getattr(model.attention.out_proj, f"register_{where}")(lambda *_: seen.append(where))
    given = words_and_patches()
    expected = model(*given)
    interfuse.optimize(model)
    close([model(*given)], [expected])
    assert seen == []


def test_weights_that_change_are_the_ones_that_are_used() -> None:
    model = Reader().eval()
    fused = interfuse.optimize(copy.deepcopy(model))
    given = words_and_patches()
    with torch.no_grad():
        fused(*given)
        for m in (model, fused):
            m.attention.in_proj_weight.mul_(0.5)
            m.attention.out_proj.weight.data[3] += 1
        close([fused(*given)], [model(*given)])
        fused.attention.out_proj.weight = nn.Parameter(torch.zeros(16, 16))
        y, _ = fused.attention(given[0], given[1], given[1])
        assert torch.equal(y, fused.attention.out_proj.bias.expand(3, 7, 16))


def test_a_module_in_two_places_is_one_site_and_tied_weights_stay_tied() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.left = nn.MultiheadAttention(16, 4, batch_first=True)
            self.right = self.left
            self.tied = nn.MultiheadAttention(16, 4, batch_first=True)
            self.tied.in_proj_weight = self.left.in_proj_weight

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.left(x, y, y)[0] - self.right(x, x, x)[0] * self.tied(x, y, y)[0]

    model = Both()
    given = words_and_patches()
    expected, wanted = model(*given), gradients(model, *given)
    interfuse.optimize(model)
    assert len(interfuse.explain(model).fused) == 2
    assert model.tied.in_proj_weight is model.left.in_proj_weight
    close([model(*given)], [expected])
    close(gradients(model, *given), wanted)


def test_copies_and_pickles_hold_their_own() -> None:
    fused = interfuse.optimize(Reader().eval())
    given = words_and_patches()
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert other.attention.__dict__["forward"].owner is other.attention
        assert torch.equal(other(*given), fused(*given))


def test_example_inputs_are_verified_and_timed() -> None:
    model = Reader(dropout=0.3)
    given = words_and_patches()
    expected = model.eval()(*given)
    interfuse.optimize(model.eval(), given, seconds=0.2)
    found = row(model)
    assert found.inference is not None
    assert found.training is not None
    close([model(*given)], [expected])


def test_dropout_in_training_is_torchs() -> None:
    model = Reader(dropout=0.5)
    given = words_and_patches()
    torch.manual_seed(3)
    expected = model(*given)
    interfuse.optimize(model)
    torch.manual_seed(3)
    assert torch.equal(model(*given), expected)
    close([model.eval()(*given)], [interfuse.restore(model)(*given)])


def test_the_encoder_layers_fast_path_goes_on() -> None:
    """torch.nn.TransformerEncoderLayer reads its attention's weights itself in inference, and calls it in
    training."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    x = words_and_patches()[0]
    expected, wanted = model(x), gradients(model, x)
    with torch.no_grad():
        plain = model.eval()(x)
    interfuse.optimize(model.train())
    close([model(x)], [expected])
    close(gradients(model, x), wanted)
    with torch.no_grad():
        close([model.eval()(x)], [plain])


def test_compiles_to_one_graph() -> None:
    model = Reader()
    given = words_and_patches()
    expected, wanted = model(*given), gradients(model, *given)
    interfuse.optimize(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close([compiled(*given)], [expected])
    model.zero_grad()
    loss(compiled(*given)).backward()
    close([p.grad for p in model.parameters()], wanted)


class Mine(nn.MultiheadAttention):
    pass


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: nn.utils.parametrizations.weight_norm(m.attention, "in_proj_weight"), "parametrised"),
        (lambda m: nn.utils.parametrizations.weight_norm(m.attention.out_proj, "weight"), "parametrised"),
        (lambda m: setattr(m, "attention", Mine(16, 4, batch_first=True)), "not exactly"),
        (lambda m: m.double(), "float64"),
    ],
)  # fmt: skip
def test_what_is_left_alone_says_why(change: Any, reason: str) -> None:
    model = Reader()
    change(model)
    given = [t.to(model.head.weight.dtype) for t in words_and_patches()]
    expected = model(*given)
    interfuse.optimize(model)
    assert torch.equal(model(*given), expected)
    assert not row(model).fused
    assert reason in row(model).reason


def test_ours_is_not_replaced_again() -> None:
    model = nn.Sequential(interfuse.nn.MultiheadAttention(16, 4))
    assert interfuse.explain(interfuse.optimize(model)).rows == []


def test_a_row_that_attends_to_nothing_gives_the_bias_and_finite_gradients() -> None:
    """The one difference from torch, which gives NaN."""
    model = interfuse.optimize(Reader())
    given = words_and_patches()
    nothing = torch.ones_like(PADDING)
    y, _ = model.attention(given[0], given[1], given[1], key_padding_mask=nothing)
    torch.testing.assert_close(y, model.attention.out_proj.bias.expand_as(y), rtol=0, atol=0)
    assert all(g.isfinite().all() for g in gradients(model, *given, nothing))


def test_wrong_inputs_raise_torchs_own_errors() -> None:
    plain, fused = Reader(), interfuse.optimize(Reader())
    query, key = words_and_patches()
    for wrong in ((query[..., :8], key), (query, key[:2]), (query.double(), key), (query[0, 0], key)):
        with pytest.raises(Exception) as theirs:
            plain(*wrong)
        with pytest.raises(type(theirs.value)):
            fused(*wrong)


def test_autocast_keeps_the_models_dtypes() -> None:
    model = Reader().eval()
    given = words_and_patches()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(*given)
        interfuse.optimize(model)
        got = model(*given)
    assert got.dtype == expected.dtype
    assert tolerance.error(got, expected.float()) < 2e-2


def test_few_scores_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(_attention_block, "_MATRIX_UNITS", False)
    model = interfuse.optimize(Reader())
    random = torch.Generator().manual_seed(1)
    words, patches = torch.randn(2, 300, 16, generator=random), torch.randn(2, 300, 16, generator=random)
    with torch.no_grad():
        model(*words_and_patches())
        (refusal,) = row(model).why_not
        assert refusal == "native: torch's own module is as fast for attention of 924 scores in inference"
        model(words, patches)
        assert row(model).kernel == "native"
        model(words, words_and_patches()[1][:2])  # fewer keys, of a query seen before
        assert "of 26400 scores" in row(model).why_not[0]
    model(words, patches).sum().backward()
    assert row(model).kernel == "native"
    with torch.no_grad():
        model(words, words)
    assert "for self-attention of 720000 scores" in row(model).why_not[0]


def test_few_scores_are_one_call_where_there_are_matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(_attention_block, "_MATRIX_UNITS", True)
    monkeypatch.setattr(attention, "LEAST_WIDTH_AT_ONCE", 16)
    plain = Reader().eval()
    model = interfuse.optimize(copy.deepcopy(plain))
    words, patches = (torch.cat([t] * 8) for t in words_and_patches())
    made = []
    forward = _attention_block.attention_block_forward
    monkeypatch.setattr(
        _attention_block, "attention_block_forward", lambda *args: (made.append(1), forward(*args))
    )
    with torch.no_grad():
        assert tolerance.error(model(words, patches), plain(words, patches)) <= BOUND
        assert row(model).kernel == "native"
        assert len(made) == 1
        model(words[:4], patches[:4])  # fewer rows than the core makes at once
        assert "of 1232 scores in inference" in row(model).why_not[0]
    model(words, patches)
    assert "scores in training" in row(model).why_not[0]
    assert len(made) == 1
