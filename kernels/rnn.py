"""rnn on a GPU: what the op calls to run the Triton kernels, and when it cannot.

rnn_launches.py lists the launches of a problem, rnn_kernels.py and rnn_backward_kernels.py hold the kernels.
Nothing here waits for the device: lengths and ids are read by kernels alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from interfuse.kernels import rnn_launches as plan
from interfuse.kernels import rnn_overlap
from interfuse.kernels.launch import device_why_not, on_device_of

from interfuse.ops._rnn_problem import empty_outputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from interfuse.ops._rnn_problem import Four, RnnProblem

# Weights are indexed with 32 bits.
MOST_WEIGHTS = 2**31 - 2**24

reserve_row = plan.reserve_row


class Walks(Protocol):
    """What walks through time, a layer and some steps at a call."""

    def parts(self, problem: RnnProblem, backward: bool) -> Sequence[range]:
        """The steps, cut where another layer may go on beside; in their order, also backwards."""

    def memory(self, problem: RnnProblem, backward: bool) -> Any:
        """What the walk through one layer needs beside its tensors, of whatever kind."""

    def forward(self, problem: RnnProblem, walk: plan.Walk, steps: range, memory: Any) -> None: ...

    def backward(self, problem: RnnProblem, walk: plan.WalkBack, steps: range, memory: Any) -> None: ...


class _TritonWalks:
    """All steps at once."""

    def parts(self, problem: RnnProblem, backward: bool) -> Sequence[range]:
        return [range(problem.steps)]

    def memory(self, problem: RnnProblem, backward: bool) -> Any:
        return None

    def forward(self, problem: RnnProblem, walk: plan.Walk, steps: range, memory: Any) -> None:
        plan.forward_launch(problem, walk).run()

    def backward(self, problem: RnnProblem, walk: plan.WalkBack, steps: range, memory: Any) -> None:
        plan.backward_launch(problem, walk).run()


TRITON = _TritonWalks()


def why_not(problem: RnnProblem) -> str | None:
    """The sentence that says why these kernels cannot run the problem, or None."""
    reason = device_why_not(problem.device, problem.dtype)
    if reason is not None:
        return reason
    rows = problem.directions * problem.gates * problem.hidden_size
    most = rows * max(problem.input_size, problem.directions * problem.output_size)
    if most > MOST_WEIGHTS:
        return (
            f"the Triton kernels index a layer's weights with 32 bits, which allows {MOST_WEIGHTS} elements; "
            f"a layer here has {most}."
        )
    return None


def run(
    problem: RnnProblem,
    x: Tensor,
    table: Tensor | None,
    lengths: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    walks: Walks = TRITON,
) -> Four:
    """(y, hn, cn, reserve) as the registered op returns them."""
    p = problem
    y, hn, cn, reserve = empty_outputs(p, reserve_row(p))
    with on_device_of(x):
        layers = plan.kept(p, y, reserve) if p.save else plan.scratch(p, y)
        pre = torch.empty(
            p.batch * p.steps * p.directions * p.gates * p.hidden_size, dtype=torch.float32, device=p.device
        )
        first = plan.first_inputs(p, x, table)
        if p.ragged:
            for layer in layers:
                zero_past_the_ends(layer)
        memories = [walks.memory(p, False) for _ in layers]

        def work(number: int, steps: range) -> None:
            inputs = first if number == 0 else plan.inner_inputs(p, layers[number - 1].y, number)
            runs = plan.run_weights(p, weights, number)
            for direction, run in enumerate(runs):
                # Of these steps, the layer before needs `pre` no more.
                plan.input_launch(p, inputs, run, direction, lengths, pre, steps).run()
            own = slice(number * p.directions, (number + 1) * p.directions)
            states = (h0[own] if h0 is not None else None, c0[own] if c0 is not None else None)
            final = (hn[own], cn[own] if p.cell == "lstm" else None)
            walk = plan.Walk(runs, layers[number], pre, lengths, *states, *final)
            walks.forward(p, walk, steps, memories[number])

        rnn_overlap.run(rnn_overlap.tasks_of(range(p.layers), walks.parts(p, False), work), p.device)
    return y, hn, cn, reserve


def zero_past_the_ends(layer: plan.Kept) -> None:
    """Where no step comes: y is zero by contract, and what products over all tokens read must be finite."""
    layer.y.zero_()
    if layer.middle is not None:
        layer.middle.zero_()


def run_backward(
    problem: RnnProblem,
    grad_y: Tensor | None,
    grad_hn: Tensor | None,
    grad_cn: Tensor | None,
    x: Tensor,
    table: Tensor | None,
    lengths: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor,
    reserve: Tensor,
    mask: Sequence[bool],
    walks: Walks = TRITON,
) -> list[Tensor | None]:
    """Gradients of x (or of the table's rows that x chose), h0, c0 and the weights; None where not wanted."""
    p = problem
    found: list[Tensor | None] = [None] * len(mask)
    for place, states in ((1, h0), (2, c0)):
        if mask[place] and states is not None:
            found[place] = torch.empty_like(states)
    with on_device_of(x):
        layers, parts = plan.kept(p, y, reserve), walks.parts(p, True)
        grad = None if grad_y is None else grad_y.contiguous()  # of what the next layer gave
        at_work: dict[int, _LayerBack] = {}

        def begin(number: int) -> None:
            nonlocal grad
            own = slice(number * p.directions, (number + 1) * p.directions)
            h0_, c0_, hn_, cn_, *out = (
                None if t is None else t[own].contiguous() for t in (h0, c0, grad_hn, grad_cn, *found[1:3])
            )
            cn_ = cn_ if p.cell == "lstm" else None
            runs, (grads, grad_out) = plan.run_weights(p, weights, number), empty_token_gradients(p)
            walk = plan.WalkBack(
                runs, layers[number], lengths, h0_, c0_, grad, hn_, cn_, grads, grad_out, *out
            )
            below = (p.batch * p.steps, p.layer_input(number))
            wanted = number > 0 or mask[0]
            grad = torch.empty(below, dtype=p.dtype, device=p.device) if wanted else None
            at_work[number] = _LayerBack(walk, walks.memory(p, True), input_weights(p, runs), grad)

        def work(number: int, steps: range) -> None:
            layer = at_work[number]
            walks.backward(p, layer.walk, steps, layer.memory)
            if layer.below is not None:
                input_gradient(p, layer.input_weights, layer.walk.grads, steps, layer.below)

        def finish(number: int) -> None:
            walk = at_work.pop(number).walk
            flat = slice(*(3 + n * p.directions * p.weights_per_run for n in (number, number + 1)))
            if not any(mask[flat]):
                return
            if number == 0:
                inputs = plan.first_inputs(p, x, table)
            else:
                inputs = plan.inner_inputs(p, layers[number - 1].y, number)
            rows = input_rows(p, inputs, lengths)
            every = weight_gradients(p, rows, walk)
            found[flat] = [grad if yes else None for grad, yes in zip(every, mask[flat], strict=True)]

        # Layers that do not overlap need not have their gradients in memory at the same time.
        downwards = list(reversed(range(p.layers)))
        for together in [downwards] if len(parts) > 1 else [[number] for number in downwards]:
            for number in together:
                begin(number)
            rnn_overlap.run(rnn_overlap.tasks_of(together, parts[::-1], work), p.device)
            for number in together:
                finish(number)
    if grad is not None:
        found[0] = grad.view(p.sequence_shape(p.input_size))
    return found


@dataclass(frozen=True)
class _LayerBack:
    """A layer on its way back through time."""

    walk: plan.WalkBack
    memory: Any
    input_weights: list[Tensor]
    below: Tensor | None  # the gradient of its input


def empty_token_gradients(problem: RnnProblem) -> tuple[Tensor, Tensor | None]:
    """For gradients before the gates (tokens, directions, slots * hidden), and of projections."""
    p = problem
    make = torch.zeros if p.ragged else torch.empty  # no kernel writes past the ends

    def rows(size: int) -> Tensor:
        return make((p.batch * p.steps, p.directions, size), dtype=p.dtype, device=p.device)

    return rows((4 if p.gates > 1 else 1) * p.hidden_size), rows(p.proj_size) if p.proj_size else None


def input_rows(problem: RnnProblem, inputs: plan.Inputs, lengths: Tensor | None) -> Tensor:
    """The input as (tokens, size) in one piece, zero past the ends; where it is that already, itself."""
    p = problem
    shape = (p.batch * p.steps, inputs.size)
    dense = (inputs.inner * inputs.size, inputs.size)
    in_one_piece = inputs.ids is None and inputs.x_strides == dense
    if in_one_piece and (lengths is None or inputs.ends_are_zero):
        return inputs.x.view(shape)
    out = torch.empty(shape, dtype=p.dtype, device=p.device)
    plan.dense_inputs_launch(p, inputs, lengths, out).run()
    return out


def at_inputs(problem: RnnProblem, grads: Tensor, direction: int) -> Tensor:
    """One direction's gradients at the input's side of the gates, as (tokens, gates * hidden)."""
    return grads[:, direction, : problem.gates * problem.hidden_size]


def at_states(problem: RnnProblem, grads: Tensor, direction: int) -> Tensor:
    """The same at the recurrent side."""
    return grads[:, direction, -problem.gates * problem.hidden_size :]


def input_weights(problem: RnnProblem, runs: Sequence[plan.RunWeights]) -> list[Tensor]:
    """Each direction's, with rows as the token gradients have them: a GRU's gates stand there as n r z."""
    p = problem
    return [run.w_ih.roll(p.hidden_size, 0) if p.cell == "gru" else run.w_ih for run in runs]


def input_gradient(
    problem: RnnProblem, weights: Sequence[Tensor], grads: Tensor, steps: range, out: Tensor
) -> None:
    """These steps of out (tokens, input): products over the gates, added over the directions in order."""
    p, to = problem, plan.at_steps(problem, out, steps)
    first = plan.at_steps(p, at_inputs(p, grads, 0), steps)
    if to.dim() == 3:  # one product for each sequence
        torch.bmm(first, weights[0].expand(p.batch, -1, -1), out=to)
        return
    torch.mm(first, weights[0], out=to)
    if p.directions == 2:
        torch.addmm(to, at_inputs(p, grads, 1), weights[1], out=to)


def weight_gradients(problem: RnnProblem, rows: Tensor, walk: plan.WalkBack) -> list[Tensor]:
    """Of a layer's parameters, in their flat order: products and sums over all tokens."""
    p, grads, grad_out, layer = problem, walk.grads, walk.grad_out, walk.kept
    before = torch.empty((p.batch * p.steps, p.directions, p.output_size), dtype=p.dtype, device=grads.device)
    plan.previous_states_launch(p, layer.y, walk.lengths, walk.h0, before).run()
    found = []
    for direction in range(p.directions):
        left, right = at_inputs(p, grads, direction), at_states(p, grads, direction)
        w_ih, w_hh = left.t() @ rows, right.t() @ before[:, direction]
        b_ih, b_hh = left.sum(0), right.sum(0)
        if p.cell == "gru":
            w_ih, b_ih = w_ih.roll(-p.hidden_size, 0), b_ih.roll(-p.hidden_size, 0)
        found += [w_ih, w_hh]
        if p.bias:
            found += [b_ih, b_hh]
        if grad_out is not None and layer.middle is not None:
            middle = layer.middle.view(before.shape[0], p.directions, p.hidden_size)
            found.append(grad_out[:, direction].t() @ middle[:, direction])
    return found
