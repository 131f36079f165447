"""The launches of rnn that are compiled ahead of time, and the record of what they take.

    python tests/rnn_aot.py     # writes the record anew, after a kernel or a tile changed

The record stands in bench/results/triton_resources_rnn.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from aot import RECORDS, SHARED, compile_all, rows_of, used, write_record
from interfuse.kernels import rnn as kernels
from interfuse.kernels import rnn_launches as plan

from interfuse.ops._rnn_problem import RnnProblem, empty_outputs

if TYPE_CHECKING:
    from interfuse.kernels.launch import Launch

RECORD = RECORDS / "triton_resources_rnn.json"
WALKS = ("forward", "backward")
MATRIX = ("input_gates", *WALKS)  # those that multiply matrices
COPIES = ("previous_states", "dense_inputs")


@dataclass(frozen=True)
class Step:
    """A training step of one layer, of which some kernels are compiled."""

    cell: str
    hidden: int
    dtype: torch.dtype
    arithmetic: str = "ieee"
    directions: int = 1
    projection: int = 0
    batch: int = 32
    ids: bool = False
    plain: bool = False  # one step, no lengths, no initial states: arguments of None and 1 become constants
    kernels: tuple[str, ...] = WALKS

    def __str__(self) -> str:
        more = [f"x{self.directions}"] if self.directions > 1 else []
        more += [f"projection {self.projection}"] if self.projection else []
        more += [f"batch {self.batch}"] if self.batch != 32 else []
        more += ["plain"] if self.plain else []
        return " ".join([self.cell, str(self.hidden), str(self.dtype)[6:], self.arithmetic, *more])


BRAIN, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
STEPS = (
    Step("lstm", 128, BRAIN, ids=True, kernels=("input_gates", *WALKS, *COPIES)),
    Step("lstm", 64, SINGLE, "tf32", kernels=("input_gates", *WALKS)),
    Step("lstm", 128, SINGLE, kernels=("input_gates", *WALKS)),
    Step("gru", 128, BRAIN, directions=2),
    Step("rnn_tanh", 256, BRAIN),
    Step("rnn_relu", 128, SINGLE, "tf32"),
    Step("lstm", 512, BRAIN),
    Step("lstm", 512, BRAIN, batch=4096),
    Step("lstm", 512, SINGLE, "tf32"),
    Step("lstm", 300, HALF),
    Step("lstm", 512, BRAIN, projection=128),
    Step("gru", 512, BRAIN, directions=2),
    Step("gru", 512, SINGLE),
    Step("rnn_tanh", 1024, BRAIN),
    Step("lstm", 128, BRAIN, directions=2, plain=True),
    Step("gru", 1, SINGLE, batch=1, plain=True, kernels=("input_gates", *WALKS, *COPIES)),
)
ROWS = rows_of(STEPS)


def launches(step: Step) -> list[Launch]:
    """What a training step of ragged sequences would launch on a GPU, from tensors without memory."""
    p = RnnProblem(
        cell=step.cell, layers=1, directions=step.directions, bias=True, batch_first=False, batch=step.batch,
        steps=1 if step.plain else 100, input_size=64, hidden_size=step.hidden, proj_size=step.projection,
        vocabulary=1000 if step.ids else 0, dtype=step.dtype, device=torch.device("meta"),
        ragged=not step.plain, states=not step.plain, weight_dtype=None, save=True,
    )  # fmt: skip

    def empty(*shape: int, dtype: torch.dtype = p.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=p.device)

    tokens, lengths = p.batch * p.steps, empty(p.batch, dtype=torch.int64) if p.ragged else None
    x = empty(p.steps, p.batch, dtype=torch.int64) if step.ids else empty(p.steps, p.batch, p.input_size)
    y, hn, cn, reserve = empty_outputs(p, plan.reserve_row(p))
    states = (hn, cn if p.cell == "lstm" else None)
    given = states if p.states else (None, None)
    runs = plan.run_weights(p, [empty(*shape) for shape in p.weight_shapes()], 0)
    inputs = plan.first_inputs(p, x, empty(p.vocabulary, p.input_size) if step.ids else None)
    pre = empty(tokens * p.directions * p.gates * p.hidden_size, dtype=torch.float32)
    grads, grad_out = kernels.empty_token_gradients(p)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = step.arithmetic == "tf32"
    try:
        (layer,) = plan.kept(p, y, reserve)
        return [
            plan.input_launch(p, inputs, runs[0], 0, lengths, pre),
            plan.forward_launch(p, plan.Walk(runs, layer, pre, lengths, *given, *states)),
            plan.backward_launch(
                p, plan.WalkBack(runs, layer, lengths, *given, y, *given, grads, grad_out, *given)
            ),
            plan.previous_states_launch(p, y, lengths, given[0], torch.empty_like(y)),
            plan.dense_inputs_launch(p, inputs, lengths, empty(tokens, p.input_size)),
        ]
    finally:
        torch.backends.cudnn.allow_tf32 = before


def shared_limit(row: str) -> int:
    """Resident kernels are chosen by the device's shared memory; the rest runs on every GPU since Ampere."""
    step, kernel, _ = ROWS[row]
    resident = kernel in WALKS and launches(step)[1].kernel.__name__.startswith("resident")
    return plan.RESIDENT_BYTES + plan.BESIDE_RESIDENT_BYTES if resident else SHARED


def compile_row(row: str) -> dict[str, int]:
    step, kernel, architecture = ROWS[row]
    launch = next(launch for launch in launches(step) if launch.kernel.__name__.endswith(kernel))
    return used(launch, architecture)


if __name__ == "__main__":
    write_record(RECORD, compile_all(ROWS, compile_row))
