"""MultiheadAttention against torch's own, argument by argument; CrossAttention and AttentionPool."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import tolerance
import torch
from torch import nn
from torch.testing._internal.common_modules import module_db

from interfuse.nn import AttentionPool, CrossAttention, MultiheadAttention
from interfuse.ops.attention import attention

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

BOUND = tolerance.FLOAT32_ATTENTION_GRADIENT


def close(ours: Any, theirs: Any, bound: float = BOUND) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    if isinstance(ours, (tuple, list)):
        return all(close(a, b, bound) for a, b in zip(ours, theirs, strict=True))
    return tolerance.error(ours, theirs) <= bound


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch-first": {"batch_first": True},
    "widths": {"kdim": 10, "vdim": 14, "batch_first": True},
    "no-bias": {"bias": False},
    "bias-kv": {"add_bias_kv": True},
    "zero-attn": {"add_zero_attn": True, "batch_first": True},
    "all": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 10, "vdim": 14},
    "dropout": {"dropout": 0.3},
}


def pair(settings: dict[str, Any]) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 4, **settings).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = MultiheadAttention(24, 4, **settings).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(settings: dict[str, Any], batch: int = 3) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    widths = (24, settings.get("kdim", 24), settings.get("vdim", 24))
    shapes = [(batch, n, w) for n, w in zip((7, 11, 11), widths, strict=True)]
    tensors = [torch.randn(shape, generator=random) for shape in shapes]
    return tensors if settings.get("batch_first") else [t.transpose(0, 1).contiguous() for t in tensors]


def masks(kind: str) -> dict[str, Any]:
    random = torch.Generator().manual_seed(2)
    padding = torch.arange(11) >= torch.tensor([[11], [4], [9]])
    attn = torch.rand(7, 11, generator=random) < 0.3
    attn[:, 0] = padding[:, 0] = False
    additive = torch.randn(7, 11, generator=random)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "holes": {"key_padding_mask": padding.flip(1) & (torch.arange(11) > 0)},
        "float-padding": {"key_padding_mask": torch.randn(3, 11, generator=random)},
        "boolean": {"attn_mask": attn},
        "additive": {"attn_mask": additive},
        "per-head": {"attn_mask": torch.randn(12, 7, 11, generator=random)},
        "both": {"attn_mask": attn, "key_padding_mask": padding},
        "causal": {"attn_mask": torch.ones(7, 11, dtype=torch.bool).triu(1), "is_causal": True},
    }[kind]


KINDS = ("none", "padding", "holes", "float-padding", "boolean", "additive", "per-head", "both", "causal")


@pytest.mark.parametrize("weights", [False, True, "each"], ids=["alone", "averaged", "each"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_as_torchs(name: str, kind: str, weights: bool | str) -> None:
    theirs, ours = pair(SETTINGS[name])
    arguments = {**masks(kind), "need_weights": bool(weights), "average_attn_weights": weights != "each"}
    tensors = inputs(SETTINGS[name])
    results = []
    for module in (theirs, ours):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y, w = module(*leaves, **arguments)
        loss = y.square().sum() + (0 if w is None else w.square().sum())
        grads = torch.autograd.grad(loss, [*leaves, *module.parameters()])
        with torch.no_grad():
            inference = module(*tensors, **arguments)
        results.append([y, w, grads, inference])
    assert close(results[1], results[0])


@pytest.mark.parametrize("same", ["all", "key-value"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_one_tensor_in_several_places(same: str, batch_first: bool) -> None:
    theirs, ours = pair({"batch_first": batch_first})
    query, key, _ = inputs({"batch_first": batch_first})
    given = (query,) * 3 if same == "all" else (query, key, key)
    assert close(ours(*given), theirs(*given))


@pytest.mark.parametrize("name", ["plain", "all", "widths"])
def test_without_a_batch(name: str) -> None:
    theirs, ours = pair(SETTINGS[name])
    tensors = [t.squeeze(0 if SETTINGS[name].get("batch_first") else 1) for t in inputs(SETTINGS[name], 1)]
    padding = torch.arange(11) >= 6
    for arguments in (
        {},
        {"key_padding_mask": padding},
        {"need_weights": False},
        {"average_attn_weights": False},
    ):
        ours_results, theirs_results = ours(*tensors, **arguments), theirs(*tensors, **arguments)
        assert close(ours_results, theirs_results)


def test_a_query_that_attends_to_nothing_gives_the_output_bias() -> None:
    _, ours = pair({"batch_first": True})
    tensors = [t.requires_grad_() for t in inputs({"batch_first": True})]
    padding = torch.zeros(3, 11, dtype=torch.bool)
    padding[1] = True
    y, weights = ours(*tensors, key_padding_mask=padding)
    assert torch.equal(y[1], ours.out_proj.bias.expand(7, 24))
    assert not weights[1].any()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.sum(), tensors))


def test_dropout_runs_in_training_alone() -> None:
    _, ours = pair({"dropout": 0.5})
    tensors = inputs({})
    assert torch.equal(ours(*tensors)[0], ours(*tensors)[0])
    ours.train()
    y, weights = ours(*tensors, average_attn_weights=False)
    assert not torch.equal(y, ours(*tensors)[0])
    assert 0.3 < (weights == 0).float().mean() < 0.7


def test_the_state_and_its_class() -> None:
    theirs, ours = pair(SETTINGS["all"])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert isinstance(ours, nn.MultiheadAttention)
    for module in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert close(module(*inputs(SETTINGS["all"])), theirs(*inputs(SETTINGS["all"])))


@pytest.mark.parametrize("name", SETTINGS)
def test_from_torch_shares_the_parameters(name: str) -> None:
    theirs, _ = pair(SETTINGS[name])
    ours = MultiheadAttention.from_torch(theirs)
    assert ours.training == theirs.training
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert all(a is b for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert close(ours(*inputs(SETTINGS[name])), theirs(*inputs(SETTINGS[name])))


def test_from_torch_takes_no_subclass() -> None:
    with pytest.raises(ValueError, match="no subclass, whose forward could differ"):
        MultiheadAttention.from_torch(MultiheadAttention(4, 2))


ERRORS = {
    "3 dimensions, or 2 without a batch": lambda m, q, k, v: m(q[0], k, v),
    "query's last dimension must be 24": lambda m, q, k, v: m(q[..., :8], k, v),
    "module's dtype, torch.float32; got torch.float64, torch.float32": lambda m, q, k, v: m(q.double(), k, v),
    "one length, and all three one batch size": lambda m, q, k, v: m(q, k, v[:, :3]),
    "key_padding_mask must have shape (3, 11)": lambda m, q, k, v: m(
        q, k, v, torch.zeros(3, 7, dtype=torch.bool)
    ),
    "key_padding_mask must be boolean": lambda m, q, k, v: m(q, k, v, torch.zeros(3, 11, dtype=torch.int32)),
    "attn_mask must have shape (7, 11) or (12, 7, 11)": lambda m, q, k, v: m(
        q, k, v, attn_mask=torch.zeros(11, 7)
    ),
    "is_causal is a hint about attn_mask": lambda m, q, k, v: m(q, k, v, is_causal=True),
}


@pytest.mark.parametrize("sentence", ERRORS)
def test_errors_are_full_sentences(sentence: str) -> None:
    _, ours = pair({"batch_first": True})
    with pytest.raises(ValueError) as raised:
        ERRORS[sentence](ours, *inputs({"batch_first": True}))
    assert sentence in str(raised.value)
    assert str(raised.value).endswith(".")


MODULE_INFO = next(info for info in module_db if info.module_cls is nn.MultiheadAttention)


@pytest.mark.parametrize("training", [False, True])
def test_torchs_module_database(training: bool) -> None:
    """The inputs that torch tests its own module with, through its own class and ours."""
    samples = MODULE_INFO.module_inputs_func(
        MODULE_INFO, device="cpu", dtype=torch.float32, requires_grad=False, training=training
    )
    seen = 0
    for sample in samples:
        made, call = sample.constructor_input, sample.forward_input
        theirs = nn.MultiheadAttention(*made.args, **made.kwargs).train(training)
        ours = MultiheadAttention(*made.args, **made.kwargs).train(training)
        ours.load_state_dict(theirs.state_dict())
        if theirs.dropout and training:
            continue
        assert close(ours(*call.args, **call.kwargs), theirs(*call.args, **call.kwargs)), sample.desc
        seen += 1
    assert seen > 8


# ---- CrossAttention and AttentionPool


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_cross_attention_is_its_parts(kv_heads: int | None) -> None:
    torch.manual_seed(0)
    module = CrossAttention(24, 10, heads=4, kv_heads=kv_heads)
    query, context = torch.randn(3, 7, 24), torch.randn(3, 11, 10)
    lengths = [11, 0, 5]
    y, weights = module(query, context, context_lengths=lengths, return_weights=True)
    q = module.q_proj(query).unflatten(-1, (4, 6)).transpose(1, 2)
    k, v = (p(context).unflatten(-1, (-1, 6)).transpose(1, 2) for p in (module.k_proj, module.v_proj))
    parts, expected = attention(
        q, k, v, kv_lengths=torch.tensor(lengths), return_weights=True, backend="reference"
    )
    assert close((y, weights), (module.out_proj(parts.transpose(1, 2).flatten(2)), expected))
    with torch.no_grad():  # which projects the rows that are there alone
        assert close(module(query, context, context_lengths=torch.tensor(lengths)), y)


@pytest.mark.parametrize("bias", [False, True])
def test_nothing_beyond_a_contexts_length_matters(bias: bool) -> None:
    module = CrossAttention(24, 10, heads=4, bias=bias)
    query, context = torch.randn(3, 7, 24), torch.randn(3, 11, 10)
    changed = context.clone()
    for b, length in enumerate((11, 0, 5)):
        changed[b, length:] = float("nan")
    with torch.no_grad():
        first, second = (module(query, c, context_lengths=[11, 0, 5]) for c in (context, changed))
    assert torch.equal(first, second)


def test_cross_attentions_lengths_mask_and_dropout() -> None:
    module = CrossAttention(8, heads=2, dropout=0.5)
    x, context = torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    module.eval()
    y = module(x, context, query_lengths=[5, 2], mask=torch.ones(5, 6).tril().bool())
    assert close(y, module(x, context, query_lengths=[5, 2], causal=True))
    assert torch.equal(y[1, 2:], module.out_proj.bias.expand(3, 8))
    module.train()
    assert not torch.equal(module(x, context), module(x, context))


def test_attention_pool_learns_where_to_look() -> None:
    torch.manual_seed(0)
    module = AttentionPool(4)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(150):
        x = torch.randn(32, 9, 4)
        target = (x * torch.softmax(4 * x[..., :1], 1)).sum(1)  # the mean, weighted by the first feature
        loss = (module(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        plain = (x.mean(1) - target).square().mean()
    assert loss < 0.5 * plain


def test_attention_pool_takes_lengths_as_integers() -> None:
    module = AttentionPool(4, 3)
    x = torch.randn(2, 5, 4)
    y, weights = module(x, [5, 2], return_weights=True)
    assert close(y, module(x, torch.tensor([5, 2])))
    assert not weights[1, 2:].any()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["none", "padding", "holes", "both", "causal"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_whole_step_of_autograd_is_what_the_op_and_products_give(
    kind: str, batch_first: bool, bias: bool
) -> None:
    """Output and gradients of all inputs and parameters, the context given once; ragged, few rows real."""
    theirs, ours = pair({"batch_first": batch_first, "bias": bias})
    query, context, _ = inputs({"batch_first": batch_first})
    arguments = {**masks(kind), "need_weights": False}
    if kind == "padding":
        arguments["key_padding_mask"] = torch.arange(11) >= torch.tensor([[11], [1], [3]])
    found = []
    for module in (theirs, ours):
        for _ in range(2):  # what is kept from call to call must not change what comes back
            leaves = [t.clone().requires_grad_() for t in (query, context)]
            y, _ = module(leaves[0], leaves[1], leaves[1], **arguments)
            grads = torch.autograd.grad(y.square().sum(), [*leaves, *module.parameters()])
        with torch.no_grad():
            found.append([y, grads, module(query, context, context, **arguments)[0]])
    assert close(found[1], found[0])


@pytest.mark.parametrize("lengths", [None, (90, 20)], ids=["whole", "padded"])
def test_the_whole_steps_error_is_at_most_twice_torchs(lengths: tuple[int, ...] | None) -> None:
    """With rows enough for the matrix units in every product."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(96, 3, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    x, c, grad = torch.randn(2, 70, 96), torch.randn(2, 90, 96), torch.randn(2, 70, 96)
    padding = None if lengths is None else torch.arange(90) >= torch.tensor(lengths)[:, None]

    def results(module: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x.clone(), c.clone())]
        y = module(leaves[0], leaves[1], leaves[1], padding, need_weights=False)[0]
        grads = torch.autograd.grad(y, [*leaves, *module.parameters()], grad.to(dtype))
        return [y, *grads]

    ours = results(MultiheadAttention.from_torch(theirs), torch.float32)
    plain = results(theirs, torch.float32)
    truth = results(copy.deepcopy(theirs).double(), torch.float64)
    for a, b, exact in zip(ours, plain, truth, strict=True):
        assert tolerance.error(a, exact) <= tolerance.TIMES_TORCH * tolerance.error(b, exact)


def test_the_whole_step_takes_one_tensor_for_all_and_can_be_differentiated_twice() -> None:
    theirs, ours = pair({"batch_first": True})
    found = []
    for module, weights in ((theirs, True), (ours, False)):  # torch's fused form has no second derivative
        x = inputs({"batch_first": True})[0].requires_grad_()
        y, _ = module(x, x, x, need_weights=weights)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append([first, torch.autograd.grad(first.square().sum(), [x, *module.parameters()])])
    assert close(found[1], found[0], 10 * BOUND)  # a derivative of what carries the first bound's error


def test_the_whole_step_keeps_nothing_that_another_call_would_change() -> None:
    _, ours = pair({"batch_first": True})
    query, context, _ = inputs({"batch_first": True})
    expected = ours(query, context, context, need_weights=False)[0].clone()
    leaf = context.clone().requires_grad_()
    y, _ = ours(query, leaf, leaf, need_weights=False)
    with torch.no_grad():
        ours(-query, 2 * context, 2 * context, need_weights=False)
    assert close(y, expected)
    first = torch.autograd.grad(y.sum(), leaf, retain_graph=True)[0].clone()
    with torch.no_grad():
        ours(-query, 2 * context, 2 * context, need_weights=False)
    assert torch.equal(torch.autograd.grad(y.sum(), leaf)[0], first)


def test_parameters_without_a_gradient_get_none() -> None:
    _, ours = pair({"batch_first": True})
    query, context, _ = inputs({"batch_first": True})
    ours.in_proj_weight.requires_grad_(False)
    ours(query, context, context, need_weights=False)[0].sum().backward()
    assert ours.in_proj_weight.grad is None
    assert ours.in_proj_bias.grad is not None
    assert ours.out_proj.weight.grad is not None


@pytest.mark.parametrize("unpack", ["strided", "transposed-storage", "as-it-was"])
def test_saved_tensors_that_come_back_in_another_form(unpack: str) -> None:
    """The kernels read by pointer: what a user's hook gives back must be looked at."""
    _, ours = pair({"batch_first": True})
    query, context, _ = inputs({"batch_first": True})

    def back(t: torch.Tensor) -> torch.Tensor:
        if unpack == "strided":
            return torch.stack([t, torch.full_like(t, 7)], -1)[..., 0]
        return t.mT.contiguous().mT if unpack == "transposed-storage" and t.dim() > 1 else t

    plain, _ = ours(query, context, context, need_weights=False)
    wanted = torch.autograd.grad(plain.sum(), ours.parameters())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), back):
        y, _ = ours(query, context, context, need_weights=False)
        loss = y.sum()
    assert close(torch.autograd.grad(loss, ours.parameters()), wanted)


def test_several_gradients_at_once() -> None:
    _, ours = pair({"batch_first": True})
    query, context, _ = inputs({"batch_first": True})
    leaf = context.requires_grad_()
    y, _ = ours(query, leaf, leaf, need_weights=False)
    each = torch.randn(2, *y.shape, generator=torch.Generator().manual_seed(4))
    (found,) = torch.autograd.grad(y, leaf, each, retain_graph=True, is_grads_batched=True)
    assert close(found, torch.stack([torch.autograd.grad(y, leaf, g, retain_graph=True)[0] for g in each]))
