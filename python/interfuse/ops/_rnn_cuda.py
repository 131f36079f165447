"""The CUDA C++ kernels as an implementation of rnn: they walk through time, Triton's do the rest.

The library is loaded when it is first asked for. It says itself which sizes a device can hold.
"""

from __future__ import annotations

import ctypes
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from interfuse import _native
from interfuse.ops import _rnn_triton as triton

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from interfuse.kernels.rnn_launches import Walk, WalkBack
    from interfuse.ops._rnn_problem import Four, RnnProblem

LIBRARY = Path(_native.__file__).parent / "libinterfuse_cuda.so"
CELLS = {"rnn_tanh": 0, "rnn_relu": 1, "lstm": 2, "gru": 3}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Layers overlap in parts of the steps: not shorter, since a launch loads its weights, and not more.
LEAST_STEPS, MOST_PARTS = 64, 8

reserve_row = triton.reserve_row


class Spec(ctypes.Structure):
    """interfuse_cuda_rnn_spec of csrc/interfuse_cuda.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("cell", "dtype", "tf32", "directions")),
        *((name, ctypes.c_int64) for name in ("batch", "steps", "hidden_size")),
        ("token_strides", ctypes.c_int64 * 2),
        ("part", ctypes.c_int64 * 2),
    )


class Team(ctypes.Structure):
    """interfuse_cuda_rnn_team."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("cluster", "clusters", "threads", "columns")),
        *((name, ctypes.c_int64) for name in ("teams", "shared_bytes", "workspace_bytes")),
    )


class Device(ctypes.Structure):
    """interfuse_cuda_device."""

    _fields_ = (
        ("compute_capability", ctypes.c_int32),
        ("multiprocessors", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int64),
    )


class ForwardArrays(ctypes.Structure):
    """interfuse_cuda_rnn_forward_arrays."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            "pre", "w_hh", "b_hn", "h0", "c0", "lengths", "y", "hn", "cn", "gates", "state", "carry",
        )
    )  # fmt: skip


class BackwardArrays(ctypes.Structure):
    """interfuse_cuda_rnn_backward_arrays."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            "grad_y", "grad_hn", "grad_cn", "w_hh", "h0", "c0", "lengths", "y", "gates", "state", "grads",
            "grad_h0", "grad_c0", "carry",
        )
    )  # fmt: skip


class CudaError(RuntimeError):
    """A CUDA kernel could not be launched."""


@cache
def library(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.interfuse_cuda_last_error.restype = ctypes.c_char_p
    pointer = ctypes.POINTER
    loaded.interfuse_cuda_rnn_plan.argtypes = (pointer(Spec), ctypes.c_int32, pointer(Device), pointer(Team))
    for name, arrays in (("forward", ForwardArrays), ("backward", BackwardArrays)):
        function = getattr(loaded, f"interfuse_cuda_rnn_{name}")
        function.argtypes = (pointer(Spec), pointer(arrays), ctypes.c_void_p, ctypes.c_void_p)
    return loaded


def _failure() -> str:
    message: bytes = library(LIBRARY).interfuse_cuda_last_error()
    return message.decode()


def _emulated() -> bool:
    """The tests' library, which executes the kernels on the CPU."""
    return "emulated" in LIBRARY.name


def spec_of(problem: RnnProblem, tf32: bool, steps: range | None = None) -> Spec:
    p = problem
    strides = (1, p.steps) if p.batch_first else (p.batch, 1)
    part = (0, 0) if steps is None or len(steps) == p.steps else (steps.start, steps.stop)
    return Spec(
        CELLS[p.cell], DTYPES[p.dtype], tf32, p.directions, p.batch, p.steps, p.hidden_size, strides, part
    )  # fmt: skip


def team(spec: Spec, backward: bool, device: Device | None = None) -> Team:
    """How the library shares out the work on the current device, or on one described; raises its refusal."""
    found = Team()
    if library(LIBRARY).interfuse_cuda_rnn_plan(spec, backward, device, found) != 0:
        raise CudaError(_failure())
    return found


def _multiprocessors(device: torch.device) -> int:
    from interfuse.kernels.launch import multiprocessors

    return multiprocessors(device)


def _tf32(problem: RnnProblem) -> bool:
    from interfuse.kernels.rnn_launches import arithmetic

    return arithmetic(problem) == "tf32"


def why_not(problem: RnnProblem) -> str | None:
    if problem.device.type != "cuda" and not _emulated():
        return f"the CUDA kernels run on a CUDA device; the tensors are on {problem.device}."
    if not LIBRARY.exists():
        return "this build has no CUDA kernels: nvcc was not found when it was made."
    reason = triton.why_not(problem)
    if reason is not None:
        return f"what surrounds the CUDA kernel is the Triton implementation's, and {reason}"
    if problem.proj_size:
        return "the CUDA kernel has no projections (proj_size); the Triton kernels do."
    try:
        with _current(problem.device):
            for backward in (False, True) if problem.save else (False,):
                team(spec_of(problem, _tf32(problem)), backward)
    except CudaError as refusal:
        return str(refusal)
    return None


def rather_not(problem: RnnProblem) -> str | None:
    return (
        "the CUDA kernel has never run on a GPU, only on the CPU in its tests; backend='cuda' asks for it, "
        f"and then {in_words(problem)}."
    )


def in_words(problem: RnnProblem) -> str:
    """What the problem gets on its device."""
    with _current(problem.device):
        shared_out = team(spec_of(problem, _tf32(problem)), False)
        parts = len(CudaWalks().parts(problem, False))
    words = f"{shared_out.cluster * shared_out.clusters} block(s)"
    if shared_out.clusters > 1:
        words += f" in {shared_out.clusters} clusters"
    words += f" hold a layer's recurrent weights for {shared_out.columns} sequences at a time"
    if parts > 1:
        words += f"; {problem.layers} layers work beside each other, {parts} parts of the steps"
    return words


def _current(device: torch.device) -> Any:
    return torch.cuda.device(device if device.type == "cuda" else -1)


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


class Memory(NamedTuple):
    """Of one layer's walk: what its parts hand on, and the library's workspace."""

    carry: Tensor | None
    workspace: Tensor


class CudaWalks:
    """On the tensors' device, which is the current one, and its current stream."""

    def parts(self, problem: RnnProblem, backward: bool) -> Sequence[range]:
        p = problem
        count = min(MOST_PARTS, p.steps // LEAST_STEPS)
        if p.layers == 1 or p.directions == 2 or count < 2:
            return [range(p.steps)]
        shared_out = team(spec_of(p, _tf32(p)), backward)
        blocks = shared_out.teams * shared_out.cluster
        # Clusters wait for nobody else; blocks that must all run at once could wait for another layer's.
        if shared_out.clusters > 1 or p.layers * blocks > _multiprocessors(p.device):
            return [range(p.steps)]
        cuts = [p.steps * i // count for i in range(count + 1)]
        return [range(*cut) for cut in pairwise(cuts)]

    def memory(self, problem: RnnProblem, backward: bool) -> Memory:
        p = problem
        carry = None
        if len(self.parts(p, backward)) > 1:
            carry = torch.empty((2, p.batch, p.hidden_size), dtype=torch.float32, device=p.device)
        size = team(spec_of(p, _tf32(p)), backward).workspace_bytes
        return Memory(carry, torch.empty(size, dtype=torch.uint8, device=p.device))

    def forward(self, problem: RnnProblem, walk: Walk, steps: range, memory: Memory) -> None:
        from interfuse.kernels.rnn_launches import new_gate_bias, side_by_side

        w, kept = walk, walk.kept
        weights, bias = side_by_side([run.w_hh for run in w.runs]), new_gate_bias(problem, w.runs)
        # What inference keeps as state is scratch of the Triton kernels.
        state = kept.state if problem.save else None
        arrays = (w.pre, weights, bias, w.h0, w.c0, w.lengths, kept.y, w.hn, w.cn, kept.gates, state,
                  memory.carry)  # fmt: skip
        _launch(problem, steps, ForwardArrays(*map(_address, arrays)), memory)

    def backward(self, problem: RnnProblem, walk: WalkBack, steps: range, memory: Memory) -> None:
        from interfuse.kernels.rnn_launches import side_by_side

        w, kept = walk, walk.kept
        arrays = (
            w.grad_y, w.grad_hn, w.grad_cn, side_by_side([run.w_hh for run in w.runs]), w.h0, w.c0, w.lengths,
            kept.y, kept.gates, kept.state, w.grads, w.grad_h0, w.grad_c0, memory.carry,
        )  # fmt: skip
        _launch(problem, steps, BackwardArrays(*map(_address, arrays)), memory)


def _launch(
    problem: RnnProblem, steps: range, arrays: ForwardArrays | BackwardArrays, memory: Memory
) -> None:
    device, backward = memory.workspace.device, isinstance(arrays, BackwardArrays)
    spec = spec_of(problem, _tf32(problem), steps)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    function = getattr(library(LIBRARY), f"interfuse_cuda_rnn_{'backward' if backward else 'forward'}")
    if function(spec, arrays, memory.workspace.data_ptr(), stream) != 0:
        raise CudaError(_failure())


def run(problem: RnnProblem, *inputs: Any) -> Four:
    from interfuse.kernels import rnn

    return rnn.run(problem, *inputs, walks=CudaWalks())


def run_backward(problem: RnnProblem, *arguments: Any) -> Sequence[Tensor | None]:
    from interfuse.kernels import rnn

    return rnn.run_backward(problem, *arguments, walks=CudaWalks())
