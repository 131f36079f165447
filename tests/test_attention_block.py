"""A module's attention in inference as one call of the core, against the same made product by product."""

from __future__ import annotations

from typing import Any

import pytest
import tolerance
import torch
from threads import check_threads_at_once
from torch import nn
from torch.func import functional_call, vmap
from torch.profiler import profile

from interfuse.bounded_cache import BoundedCache
from interfuse.nn import CrossAttention, MultiheadAttention, _attention_block

pytestmark = [pytest.mark.usefixtures("poisoned_outputs"), pytest.mark.native]

BATCH, QUERIES, KEYS, WIDTH, HEADS = 4, 40, 56, 64, 2


class Calls:
    """How often the core was called for a whole block, the first time and again."""

    first = 0
    again = 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Counted, and taken on processors without matrix units too."""
    counted = Calls()
    forward, again = _attention_block.attention_block_forward, _attention_block.again

    def count_first(*args: Any) -> None:
        counted.first += 1
        forward(*args)

    def count_again(*args: Any) -> torch.Tensor | None:
        found = again(*args)
        counted.again += found is not None
        return found

    monkeypatch.setattr(_attention_block, "_MATRIX_UNITS", True)
    monkeypatch.setattr(_attention_block, "_recent", BoundedCache(16))  # ids return, and are remembered
    monkeypatch.setattr(_attention_block, "attention_block_forward", count_first)
    monkeypatch.setattr(_attention_block, "again", count_again)
    return counted


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> int:
    torch.set_num_threads(request.param)
    return request.param


def module(**settings: Any) -> MultiheadAttention:
    torch.manual_seed(0)
    made = MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **settings}).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    query, context = (torch.randn(BATCH, n, WIDTH, generator=random) for n in (QUERIES, KEYS))
    return query, context


def by_parts(made: MultiheadAttention, *args: Any, **arguments: Any) -> torch.Tensor:
    """What the module gives where a gradient is wanted: the same products, one after the other."""
    with torch.enable_grad():
        return made(*args, need_weights=False, **arguments)[0].detach()


def close(y: torch.Tensor, expected: torch.Tensor) -> bool:
    return tolerance.error(y, expected) <= tolerance.FLOAT32_ATTENTION


def masks(kind: str) -> dict[str, Any]:
    random = torch.Generator().manual_seed(2)
    mask = torch.rand(QUERIES, KEYS, generator=random) < 0.3
    mask[:, 0] = False
    padding = torch.arange(KEYS) >= torch.tensor([[56], [3], [31], [1]])
    return {
        "none": {},
        "lengths": {"key_padding_mask": padding},
        "one-short": {"key_padding_mask": torch.arange(KEYS) >= torch.tensor([[56], [56], [56], [50]])},
        "holes": {"key_padding_mask": padding.flip(1)},
        "boolean": {"attn_mask": mask},
        "additive": {"attn_mask": torch.randn(QUERIES, KEYS, generator=random)},
        "per-head": {"attn_mask": torch.randn(BATCH * HEADS, QUERIES, KEYS, generator=random)},
        "both": {"attn_mask": mask, "key_padding_mask": padding},
        "causal": {"attn_mask": torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1), "is_causal": True},
    }[kind]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "kind",
    ["none", "lengths", "one-short", "holes", "boolean", "additive", "per-head", "both", "causal"],
)
def test_one_call_gives_what_the_products_give(calls: Calls, kind: str, bias: bool, threads: int) -> None:
    made, (query, context) = module(bias=bias), inputs()
    expected = by_parts(made, query, context, context, **masks(kind))
    with torch.no_grad():
        for _ in range(2):
            y, weights = made(query, context, context, need_weights=False, **masks(kind))
            assert weights is None
            assert close(y, expected)
    assert (calls.first, calls.again) == ((1, 1) if kind == "none" else (2, 0))


def test_queries_keys_and_values_of_one_tensor(calls: Calls, threads: int) -> None:
    made, (query, _) = module(), inputs()
    expected = by_parts(made, query, query, query)
    with torch.no_grad():
        assert close(made(query, query, query, need_weights=False)[0], expected)
        # The same shapes, but now two tensors.
        other = query.flip(0)
        assert close(made(query, other, other, need_weights=False)[0], by_parts(made, query, other, other))
    assert (calls.first, calls.again) == (1, 1)


def test_the_bits_do_not_depend_on_the_number_of_threads(calls: Calls) -> None:
    made, (query, context) = module(), inputs()
    found = []
    with torch.inference_mode():
        for count in (1, 2, 4):  # each divides the batch evenly
            torch.set_num_threads(count)
            found.append(made(query, context, context, need_weights=False)[0])
    assert calls.first + calls.again == 3
    # Rows of an entry are multiplied with those of its neighbours; no sum reaches over two of them.
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("layout", ["rows-apart", "repeated", "transposed", "sequence-first", "unbatched"])
def test_layouts(calls: Calls, layout: str) -> None:
    made, (query, context) = module(batch_first=layout != "sequence-first"), inputs()
    if layout == "rows-apart":
        query, context = (torch.cat([t, t], -1)[..., :WIDTH] for t in (query, context))
    elif layout == "repeated":
        context = context[:1].expand(BATCH, -1, -1)
    elif layout == "transposed":
        query, context = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, context))
    elif layout == "sequence-first":
        query, context = query.transpose(0, 1), context.transpose(0, 1)
    elif layout == "unbatched":
        query, context = query.reshape(-1, WIDTH), context[0]
    expected = by_parts(made, query, context, context)
    with torch.no_grad():
        for _ in range(2):
            assert close(made(query, context, context, need_weights=False)[0], expected)
    taken = calls.first + calls.again
    assert taken == (2 if layout in ("rows-apart", "unbatched") else 0)


@pytest.mark.parametrize(
    "settings", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": WIDTH, "vdim": WIDTH // 2}], ids=str
)
def test_modules_that_are_more_than_a_block(calls: Calls, settings: dict[str, Any]) -> None:
    made, (query, context) = module(**settings), inputs()
    value = context[..., : settings.get("vdim", WIDTH)]
    expected = by_parts(made, query, context, value)
    with torch.no_grad():
        assert close(made(query, context, value, need_weights=False)[0], expected)
    assert (calls.first, calls.again) == (0, 0)


def test_calls_that_are_more_than_a_block(calls: Calls) -> None:
    """After one that was: what the core remembers is not taken for another call."""
    made, (query, context) = module(dropout=0.5), inputs()
    with torch.no_grad():
        y = made(query, context, context, need_weights=False)[0]
        assert calls.first == 1
        assert made(query, context, context)[1] is not None
        made.train()
        assert not close(made(query, context, context, need_weights=False)[0], y)
        made.eval()
        assert close(made(query, context, context.clone(), need_weights=False)[0], y)
        with torch.autocast("cpu", torch.bfloat16):
            assert made(query, context, context, need_weights=False)[0].dtype == torch.bfloat16
        with profile() as seen:
            made(query, context, context, need_weights=False)
        assert any(event.name == "aten::linear" for event in seen.events() or ())
        stacked = vmap(lambda q: made(q, context, context, need_weights=False)[0])(query[None])
        assert close(stacked[0], y)
        made.add_zero_attn = True
        assert not close(made(query, context, context, need_weights=False)[0], y)
        made.add_zero_attn = False
        made.num_heads *= 2
        assert not close(made(query, context, context, need_weights=False)[0], y)
        made.num_heads //= 2
        made.double()
        assert (
            made(query.double(), context.double(), context.double(), need_weights=False)[0].dtype
            == torch.float64
        )
        made.float()
        assert (calls.first, calls.again) == (2, 0)  # one more of twice the heads
    leaf = query.clone().requires_grad_()
    made(leaf, context, context, need_weights=False)[0].sum().backward()
    assert leaf.grad is not None


def test_weights_as_they_are_now(calls: Calls) -> None:
    made, (query, context) = module(), inputs()
    given = (query, context, context)
    with torch.no_grad():
        made(*given, need_weights=False)
        made.out_proj.weight.mul_(2)
        made.in_proj_weight.data[: WIDTH // 2] = 0
        assert close(made(*given, need_weights=False)[0], by_parts(made, *given))
        assert calls.again == 1
        others = {name: torch.randn_like(t) for name, t in made.named_parameters()}
        kwargs = {"need_weights": False}
        y = functional_call(made, others, given, kwargs)[0]
        with torch.enable_grad():
            expected = functional_call(
                made, {n: t.requires_grad_() for n, t in others.items()}, given, kwargs
            )[0]
        assert close(y, expected.detach())
        short = {**others, "in_proj_weight": others["in_proj_weight"][:-1]}
        with pytest.raises(RuntimeError):
            functional_call(made, short, given, kwargs)


def test_several_python_threads_at_once(calls: Calls) -> None:
    made, (query, context) = module(), inputs()

    def run(query: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (made(query, context, context, need_weights=False)[0],)

    check_threads_at_once(run, [(query + i, context[:, : KEYS - i % 3].contiguous()) for i in range(16)])
    assert calls.first + calls.again > 0


def test_infinities_pass_as_by_parts(calls: Calls) -> None:
    made, (query, context) = module(), inputs()
    context[1, 3, 5] = float("inf")
    expected = by_parts(made, query, context, context)
    with torch.no_grad():
        y = made(query, context, context, need_weights=False)[0]
    assert calls.first == 1
    assert expected[1].isnan().all()
    assert torch.equal(y.isnan(), expected.isnan())
    assert close(y[0], expected[0])


def test_hooks_are_called(calls: Calls) -> None:
    made, (query, context) = module(), inputs()
    seen = []
    made.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        for _ in range(2):
            made(query, context, context, need_weights=False)
    assert len(seen) == 2
    assert (calls.first, calls.again) == (1, 1)


# ---- CrossAttention


def cross(**settings: Any) -> CrossAttention:
    torch.manual_seed(0)
    made = CrossAttention(WIDTH, 24, **{"heads": 4, "kv_heads": 2, "head_dim": 32, **settings}).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def cross_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    query, context = inputs()
    return query, context[..., :24]  # rows apart


def cross_by_parts(made: CrossAttention, *args: Any, **arguments: Any) -> torch.Tensor:
    with torch.enable_grad():
        y = made(*args, **arguments)
    assert isinstance(y, torch.Tensor)
    return y.detach()


@pytest.mark.parametrize("arguments", [{}, {"causal": True}, {"context_lengths": [56, 0, 31, 1]}], ids=str)
@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"kv_heads": None}], ids=str)
def test_cross_attention_in_one_call(
    calls: Calls, settings: dict[str, Any], arguments: dict[str, Any], threads: int
) -> None:
    made, given = cross(**settings), cross_inputs()
    expected = cross_by_parts(made, *given, **arguments)
    with torch.no_grad():
        for _ in range(2):
            assert close(made(*given, **arguments), expected)
    assert (calls.first, calls.again) == ((2, 0) if "context_lengths" in arguments else (1, 1))


def test_cross_attentions_that_are_more_than_a_block(calls: Calls) -> None:
    made, (query, context) = cross(dropout=0.5), cross_inputs()
    seen: list[int] = []
    with torch.no_grad():
        y = made(query, context)
        assert calls.first == 1
        assert close(made(query, context, mask=torch.ones(QUERIES, KEYS, dtype=torch.bool)), y)
        assert close(made(query, context, query_lengths=[QUERIES] * BATCH), y)
        assert close(made(query, context, return_weights=True)[0], y)
        hook = made.k_proj.register_forward_pre_hook(lambda *_: seen.append(1))
        made(query, context)
        hook.remove()
        hook = made.q_proj.register_forward_hook(lambda *_: seen.append(1))
        made(query, context)
        hook.remove()
        assert seen
        with torch.autocast("cpu", torch.bfloat16):
            assert made(query, context).dtype == torch.bfloat16
        made.train()
        assert not close(made(query, context), y)
        made.eval()
        made.out_proj = nn.Sequential(made.out_proj, nn.ReLU())
        assert close(made(query, context), y.relu())
        assert (calls.first, calls.again) == (1, 0)
        made.out_proj = made.out_proj[0]
        assert close(made(query, context), y)
        assert calls.again == 1
        for lengths in ([KEYS + 1] * BATCH, [KEYS] * (BATCH + 1)):
            with pytest.raises(ValueError, match="lengths"):
                made(query, context, context_lengths=lengths)
        made.v_proj = nn.Linear(24, 3)
        with pytest.raises((ValueError, RuntimeError)):
            made(query, context)
