"""attention and attention_pool against float64, in every shape, mask and layout; and how they run."""

from __future__ import annotations

from random import Random

import attention_oracle as oracle
import pytest
import tolerance
import torch
import torch.nn.functional as F
from cases.attention import EDGES, Case
from processes import check_forked_child, check_instruction_set
from threads import check_threads_at_once, same

from interfuse import _native
from interfuse.ops._attention_pool import attention_pool
from interfuse.ops.attention import attention
from interfuse.reference.attention import pool

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

BY_NAME = {case.name: case for case in EDGES}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def name_of(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EDGES, ids=name_of)
def test_values_and_weights_of_named_cases(case: Case, dtype: torch.dtype) -> None:
    call = oracle.make(case, dtype)
    _, y, _, weights = call.truth()
    ours, ours_weights = call.run(return_weights=True)
    assert tolerance.error(ours, y) <= tolerance.attention(dtype)
    assert tolerance.error(ours_weights, weights) <= tolerance.attention(dtype)
    assert torch.equal(call.run(), ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", EDGES, ids=name_of)
def test_gradients_of_named_cases(case: Case, dtype: torch.dtype) -> None:
    leaves, y, _, _ = oracle.make(case, dtype).truth()
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    truth = torch.autograd.grad(y, leaves, grad.double())
    for ours, theirs in zip(oracle.gradients(case, dtype)[1:], truth, strict=True):
        assert ours.dtype == dtype
        if not theirs.any():  # one key: the weights cannot change, and rounding is all that is left
            assert ours.norm() <= tolerance.attention_gradient(dtype) * grad.norm()
        else:
            assert tolerance.error(ours, theirs) <= tolerance.attention_gradient(dtype)


def random_case(seed: int) -> Case:
    random = Random(seed)
    kv_heads = random.randint(1, 3)
    return Case(
        f"seed-{seed}",
        batch=random.randint(2, 3),
        heads=kv_heads * random.randint(1, 3),
        queries=random.choice([random.randint(1, 31), random.randint(32, 150)]),
        keys=random.choice([random.randint(8, 31), random.randint(32, 300), random.randint(500, 600)]),
        head_dim=random.choice([random.randint(1, 16), random.randint(17, 90)]),
        kv_heads=kv_heads,
        value_dim=random.randint(1, 90),
        mask=random.choice(["", "", "boolean", "additive", "padding", "per-head", "empty-rows"]),
        ragged=random.random() < 0.5,
        causal=random.random() < 0.5,
    )


@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(seed: int) -> None:
    case = random_case(seed)
    leaves, y, _, _ = oracle.make(case).truth()
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    truth = [y, *torch.autograd.grad(y, leaves, grad.double())]
    for ours, theirs in zip(oracle.gradients(case), truth, strict=True):
        assert tolerance.error(ours, theirs) <= tolerance.attention_gradient(torch.float32), case


@pytest.mark.parametrize("name", ["bar-like", "two-blocks", "tails", "grouped", "long", "many-tiles"])
def test_the_error_is_at_most_twice_torchs(name: str) -> None:
    call = oracle.make(BY_NAME[name])
    leaves, y, _, _ = call.truth()
    k, v = (t.repeat_interleave(call.q.shape[1] // t.shape[1], 1) for t in (call.k, call.v))
    theirs = F.scaled_dot_product_attention(call.q, k, v)
    assert tolerance.error(call.run(), y) <= tolerance.TIMES_TORCH * tolerance.error(theirs, y)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    truth = torch.autograd.grad(y, leaves, grad.double())
    torch_leaves = [t.detach().clone().requires_grad_() for t in (call.q, call.k, call.v)]
    q, k, v = torch_leaves
    k, v = (t.repeat_interleave(call.q.shape[1] // t.shape[1], 1) for t in (k, v))
    theirs = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), torch_leaves, grad)
    for ours, other, exact in zip(oracle.gradients(BY_NAME[name])[1:], theirs, truth, strict=True):
        assert tolerance.error(ours, exact) <= tolerance.TIMES_TORCH * tolerance.error(other, exact)


@pytest.mark.parametrize("layout", ["heads-first", "batch-first", "length-first", "strided", "expanded"])
def test_any_strides(layout: str) -> None:
    call = oracle.make(BY_NAME["everything"])

    def lay(t: torch.Tensor) -> torch.Tensor:
        match layout:
            case "heads-first":
                return t.contiguous()
            case "length-first":
                return t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
            case "strided":
                wide = torch.full((*t.shape[:3], 2 * t.shape[3]), float("nan"))
                wide[..., ::2] = t
                return wide[..., ::2]
        return t

    if layout == "expanded":
        call.k, call.v = (t[:1].expand(t.shape) for t in (call.k, call.v))
    _, y, _, _ = call.truth()
    call.q, call.k, call.v = lay(call.q), lay(call.k), lay(call.v)
    ours = call.run()
    assert tolerance.error(ours, y) <= tolerance.attention(torch.float32)
    if layout in ("heads-first", "batch-first", "length-first"):
        order = sorted(range(4), key=lambda d: -call.q.stride(d))
        assert order == sorted(range(4), key=lambda d: -ours.stride(d))


def test_what_lies_beyond_the_lengths_is_never_read() -> None:
    call = oracle.make(BY_NAME["ragged-grouped"])
    clean = [t.clone() for t in (call.q, call.k, call.v)]
    for b in range(4):
        call.q[b, :, int(call.q_lengths[b]) :] = float("nan")
        call.k[b, :, int(call.kv_lengths[b]) :] = float("nan")
        call.v[b, :, int(call.kv_lengths[b]) :] = float("inf")
    leaves = call.leaves()
    y = call.run()
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    call.q, call.k, call.v = clean
    leaves = call.leaves()
    expected = call.run()
    for ours, theirs in zip(
        (y, *grads), (expected, *torch.autograd.grad(expected, leaves, torch.ones_like(y))), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_rows_that_attend_to_nothing_are_zero_with_finite_gradients() -> None:
    call = oracle.make(BY_NAME["empty-rows"])
    leaves = call.leaves()
    y, weights = call.run(return_weights=True)
    assert torch.equal(y[:, :, ::3], torch.zeros_like(y[:, :, ::3]))
    assert torch.equal(weights[:, :, ::3], torch.zeros_like(weights[:, :, ::3]))
    for grad in torch.autograd.grad(y.sum(), leaves):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("name", ["plain", "long"])
def test_nan_and_infinity_stay_in_their_rows(name: str, where: str, value: float) -> None:
    call = oracle.make(BY_NAME[name])
    clean, clean_weights = call.run(return_weights=True)
    getattr(call, where)[0, 1, 4, 2] = value
    _, y, _, weights = call.truth()
    ours, ours_weights = call.run(return_weights=True)
    for a, b, undisturbed in ((ours, y, clean), (ours_weights, weights, clean_weights)):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a[b.isinf()], b[b.isinf()].float())
        finite = b.isfinite()
        assert tolerance.error(a[finite], b[finite]) <= tolerance.attention(torch.float32)
        assert torch.equal(a[:, 0], undisturbed[:, 0])  # the other head


@pytest.mark.parametrize("where", ["q", "v"])
@pytest.mark.parametrize("name", ["plain", "long"])
def test_gradients_of_nan_and_infinity_are_those_of_the_reference(name: str, where: str) -> None:
    """On matrix units such a head is computed again by the vector units; nobody else's gradients change."""
    call = oracle.make(BY_NAME[name])
    leaves = call.leaves()
    clean = torch.autograd.grad(call.run().sum(), leaves)
    with torch.no_grad():
        getattr(call, where)[0, 1, 4, 2] = float("inf")
    ours = torch.autograd.grad(call.run().sum(), leaves)
    truth_leaves, y, _, _ = call.truth()
    truth = torch.autograd.grad(y.sum(), truth_leaves)
    for a, b, undisturbed in zip(ours, truth, clean, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        finite = b.isfinite()
        assert tolerance.error(a[finite], b[finite]) <= tolerance.attention(torch.float32)
        assert torch.equal(a[:, 0], undisturbed[:, 0])  # the other head
    assert any(a.isnan().any() for a in ours)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    call = oracle.make(BY_NAME["two-blocks"])
    call.q, call.k = 40 * call.q, 40 * call.k
    _, y, _, _ = call.truth()
    # A score of 10,000 is known to a thousandth, and so is its exponential.
    assert tolerance.error(call.run(), y) <= 1e-2


@pytest.mark.parametrize("both", [False, True], ids=["weights", "both"])
def test_gradient_of_the_returned_weights(both: bool) -> None:
    call = oracle.make(BY_NAME["everything"])
    truth_leaves, y, _, weights = call.truth()
    grad = torch.randn(weights.shape, generator=torch.Generator().manual_seed(3))
    truth = torch.autograd.grad(
        (y.sum() if both else 0) + (weights * grad).sum(), truth_leaves, materialize_grads=True
    )
    leaves = call.leaves()
    y, weights = call.run(return_weights=True)
    ours = torch.autograd.grad(
        (y.sum() if both else 0) + (weights * grad).sum(), leaves, materialize_grads=True
    )
    for a, b in zip(ours, truth, strict=True):
        assert tolerance.error(a, b) <= tolerance.attention_gradient(torch.float32)


def test_a_mask_that_requires_a_gradient_gets_it() -> None:
    call = oracle.make(BY_NAME["plain"])
    bias = torch.randn(13, 21, requires_grad=True)
    y = call.run(mask=bias)
    expected = F.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=bias)
    assert tolerance.error(y, expected) <= tolerance.attention(torch.float32)
    ours, theirs = (torch.autograd.grad(t.square().sum(), bias)[0] for t in (y, expected))
    assert tolerance.error(ours, theirs) <= tolerance.attention_gradient(torch.float32)
    with pytest.raises(RuntimeError, match="gradient of the mask"):
        call.run(mask=bias, backend="native")


def test_dropout_zeroes_weights_and_keeps_their_mean() -> None:
    call = oracle.make(BY_NAME["two-blocks"])
    torch.manual_seed(0)
    _, weights = call.run(dropout_p=0.25, return_weights=True)
    _, whole = call.run(return_weights=True)
    kept = weights != 0
    assert 0.7 < kept.float().mean() < 0.8
    assert torch.allclose(weights[kept], whole[kept] / 0.75, rtol=1e-5)
    with pytest.raises(RuntimeError, match="no dropout"):
        call.run(dropout_p=0.25, backend="native")


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    "name", ["bar-like", "two-blocks", "long", "grouped", "one-kv-head", "ragged-grouped", "everything"]
)
def test_threads_do_not_change_the_values(name: str, threads: int) -> None:
    torch.set_num_threads(1)
    alone = oracle.gradients(BY_NAME[name])
    torch.set_num_threads(threads)
    several = oracle.gradients(BY_NAME[name])
    assert torch.equal(several[0], alone[0])
    for ours, one in zip(several, alone, strict=True):
        # The gradient of q is summed in parts where there are few heads.
        assert tolerance.error(ours, one) <= tolerance.attention_gradient(torch.float32)
    for _ in range(2):
        assert same(oracle.gradients(BY_NAME[name]), several)


def test_several_python_threads_at_once() -> None:
    names = ("grouped", "causal", "everything")
    jobs = [(BY_NAME[name], torch.float32, seed) for seed in range(4) for name in names]
    check_threads_at_once(oracle.gradients, jobs)


WORK = """
from interfuse.ops.attention import attention
q, k, v = (torch.randn(2, 4, n, 16, requires_grad=True) for n in (40, 90, 90))
def work():
    y = attention(q, k, v)
    return [t.detach().numpy() for t in (y, *torch.autograd.grad(y, (q, k, v), torch.ones_like(y)))]
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forked_child_computes(when: str) -> None:
    check_forked_child(WORK, when, atol=1e-5)


@pytest.mark.parametrize("isa", _native.info()["isas"])
def test_every_instruction_set(isa: str) -> None:
    """The tests of values, in a process whose kernels were forced to a lower instruction set."""
    check_instruction_set(
        isa, "tests/test_attention.py", "-k",
        "named_cases or any_strides or never_read or nothing or pool or nan or twice",
    )  # fmt: skip


# ---- attention pooling


def pool_inputs(
    dtype: torch.dtype, ragged: bool, sizes: tuple[int, int, int, int] = (3, 21, 37, 18)
) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    batch, steps, width, hidden = sizes
    x = torch.randn(batch, steps, width, generator=random)
    weight, bias = torch.randn(hidden, width, generator=random) / 4, torch.randn(hidden, generator=random)
    tensors = [x, weight, bias, torch.randn(hidden, generator=random)]
    lengths = torch.tensor([steps, 0, steps // 2])[:batch] if ragged else None
    return [*(t.to(dtype) for t in tensors), lengths]


@pytest.mark.parametrize("sizes", [(3, 21, 37, 18), (1, 1, 1, 1), (2, 130, 64, 32), (0, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pool(dtype: torch.dtype, ragged: bool, sizes: tuple[int, int, int, int]) -> None:
    *tensors, lengths = pool_inputs(dtype, ragged, sizes)
    leaves = [t.requires_grad_() for t in tensors]
    y, weights = attention_pool(*leaves, lengths=lengths, return_weights=True)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    hidden = F.linear(
        *(t.detach() for t in tensors[:3])
    ).double()  # in the dtype's own product, as the op takes it
    hidden = F.linear(*exact[:3]) + (hidden - F.linear(*exact[:3])).detach()
    truth, true_weights = pool(exact[0], hidden, exact[3], lengths)
    assert tolerance.error(y, truth) <= tolerance.attention(dtype)
    assert tolerance.error(weights, true_weights) <= tolerance.attention(dtype)
    if dtype == torch.float16:
        return
    grads = (torch.randn(y.shape).to(dtype), torch.randn(weights.shape).to(dtype))
    ours = torch.autograd.grad((y, weights), leaves, grads)
    theirs = torch.autograd.grad((truth, true_weights), exact, [g.double() for g in grads])
    for a, b in zip(ours, theirs, strict=True):
        assert tolerance.error(a, b) <= tolerance.attention_gradient(dtype)


def test_pool_reads_nothing_beyond_the_lengths() -> None:
    *tensors, lengths = pool_inputs(torch.float32, True)
    expected = attention_pool(*tensors, lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        tensors[0][b, length:] = float("nan")
    assert torch.equal(attention_pool(*tensors, lengths=lengths), expected)


def test_pool_is_what_it_says_in_torch() -> None:
    x, weight, bias, context, _ = pool_inputs(torch.float32, False)
    weights = torch.softmax(torch.tanh(x @ weight.T + bias) @ context, 1)
    assert (
        tolerance.error(attention_pool(x, weight, bias, context), (weights.unsqueeze(-1) * x).sum(1)) <= 1e-6
    )


def test_the_reference_and_torch_agree() -> None:
    """The truth itself, against torch's own attention in float64."""
    call = oracle.make(BY_NAME["additive"], torch.float64)
    expected = F.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=call.mask)
    assert tolerance.error(attention(call.q, call.k, call.v, call.mask), expected) <= tolerance.FLOAT64
