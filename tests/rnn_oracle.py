"""Recurrent layers by torch.nn alone, called as a user would: what the op is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tolerance
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from interfuse.ops.rnn import rnn

if TYPE_CHECKING:
    from cases.rnn import Case
    from torch import Tensor, nn

Results = dict[str, "Tensor"]


@dataclass
class Given:
    """The tensors of one call; what can have a gradient asks for one."""

    case: Case
    x: Tensor
    table: Tensor | None
    lengths: Tensor | None
    states: tuple[Tensor, ...]
    weights: dict[str, Tensor]

    def leaves(self) -> Results:
        named = {"table": self.table} if self.table is not None else {"x": self.x}
        return {**named, **dict(zip(("h0", "c0"), self.states, strict=False)), **self.weights}


def given(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Given:
    def leaf(t: Tensor) -> Tensor:
        return t.detach().to(dtype).requires_grad_()

    x, table = case.input(seed), case.table(seed)
    return Given(
        case,
        x if case.vocabulary else leaf(x),
        None if table is None else leaf(table),
        case.lengths(seed),
        tuple(leaf(t) for t in case.state(seed)),
        {name: leaf(p) for name, p in case.module(seed=seed).named_parameters()},
    )


def hx_of(states: tuple[Tensor, ...]) -> Any:
    return None if not states else states[0] if len(states) == 1 else states


def named(y: Tensor, last: Any) -> Results:
    states = last if isinstance(last, tuple) else (last,)
    return {"y": y, **dict(zip(("hn", "cn"), states, strict=False))}


def ours(g: Given, **options: Any) -> Results:
    case = g.case
    return named(
        *rnn(g.x, list(g.weights.values()), hx_of(g.states), cell=case.cell, bidirectional=case.bidirectional,
             batch_first=case.batch_first, lengths=g.lengths, table=g.table, **options))  # fmt: skip


def run_torch(module: nn.RNNBase, x: Tensor, states: tuple[Tensor, ...], lengths: Tensor | None) -> Results:
    if lengths is None:
        return named(*module(x, hx_of(states)))
    steps = x.shape[1 if module.batch_first else 0]
    packed = pack_padded_sequence(x, lengths, module.batch_first, enforce_sorted=False)
    y, last = module(packed, hx_of(states))
    return named(pad_packed_sequence(y, module.batch_first, total_length=steps)[0], last)


def truth(g: Given, dtype: torch.dtype = torch.float64) -> tuple[Results, Results]:
    """torch's own results from the same numbers in dtype, and the leaves of their gradients."""
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in g.leaves().items()}
    module = g.case.module().to(dtype)
    module.load_state_dict({name: leaves[name].detach() for name in g.weights})
    x = leaves["x"] if g.table is None else F.embedding(g.x, leaves["table"])
    states = tuple(leaves[name] for name in ("h0", "c0")[: len(g.states)])
    results = run_torch(module, x, states, g.lengths)
    return results, {**leaves, **dict(module.named_parameters())}


def gradients(results: Results, leaves: Results, seed: int = 0) -> Results:
    """Of a random weighting of all the results; the same one for the same seed, whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(
        (t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float32)).sum()
        for t in results.values()
    )
    found = torch.autograd.grad(total, list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def assert_close(found: Results, true: Results, bound: float) -> None:
    for name, t in true.items():
        error = tolerance.recurrent_error(found[name], t)
        assert error <= bound, f"{name}: error {error:.2e}, allowed {bound:.2e}"


def bounds(case: Case, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """For results and for gradients."""
    size = (case.steps, case.layers, case.hidden + max(case.inputs, case.hidden))
    return tolerance.recurrent(*size, dtype), tolerance.recurrent_gradient(*size, dtype)


def assert_right(case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """Results and gradients against float64, in training and in inference."""
    g = given(case, dtype)
    true, true_leaves = truth(g)
    result_bound, gradient_bound = bounds(case, dtype)
    found = ours(g, **options)
    assert all(t.dtype == dtype for t in found.values())
    assert_close(found, true, result_bound)
    with torch.no_grad():
        assert_close(ours(g, **options), true, result_bound)
    # The truth's leaves are the given ones in float64: the gradients have the given dtype's rounding alone.
    assert_close(gradients(found, g.leaves()), gradients(true, true_leaves), gradient_bound)
