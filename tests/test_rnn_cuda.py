"""The CUDA kernel of rnn without a GPU: how it shares out the work, what it refuses, what it takes.

Its results are checked in test_rnn_triton.py, beside those of the Triton kernels.
"""

from __future__ import annotations

import ctypes
import json
from contextlib import nullcontext
from typing import Any

import cuda_resources
import pytest
import torch

from interfuse.dispatch import BackendError
from interfuse.ops import _rnn_cuda as cuda
from interfuse.ops._rnn_problem import RnnProblem
from interfuse.ops.rnn import rnn

H200 = cuda.Device(90, 132, 227 << 10)
A100 = cuda.Device(80, 108, 163 << 10)
RTX = cuda.Device(89, 128, 99 << 10)  # no clusters, and little shared memory


def problem(**changes: Any) -> RnnProblem:
    sizes = {
        "cell": "lstm", "layers": 1, "directions": 1, "bias": True, "batch_first": False, "batch": 8,
        "steps": 5, "input_size": 4, "hidden_size": 512, "proj_size": 0, "vocabulary": 0,
        "dtype": torch.bfloat16, "device": torch.device("cuda"), "ragged": False, "states": False,
        "weight_dtype": None, "save": False,
    }  # fmt: skip
    return RnnProblem(**{**sizes, **changes})


@pytest.fixture(autouse=True)
def _built() -> None:
    if not cuda.LIBRARY.exists():
        pytest.skip("this build has no CUDA library: nvcc was not found when it was made")


def shared_out(device: cuda.Device, backward: bool = False, tf32: bool = False, **changes: Any) -> cuda.Team:
    return cuda.team(cuda.spec_of(problem(**changes), tf32), backward, device)


@pytest.mark.parametrize(
    ("hidden", "cell", "dtype", "expected"),
    [
        (128, "lstm", torch.bfloat16, [(1, 1), (1, 1)]),  # in one block's registers
        (256, "lstm", torch.bfloat16, [(4, 1), (4, 1)]),
        (512, "lstm", torch.bfloat16, [(16, 1), (16, 1)]),
        (512, "gru", torch.float16, [(16, 1), (16, 1)]),
        (1024, "lstm", torch.bfloat16, [(16, 2), (16, 4)]),  # more than a cluster can hold
        (256, "lstm", torch.float32, [(8, 1), (8, 1)]),
        (512, "lstm", torch.float32, [(16, 2)]),  # backwards four times the states go from block to block
        (16, "rnn_tanh", torch.float32, [(1, 1), (1, 1)]),
    ],
)
def test_hopper_keeps_the_weights_in_as_few_blocks_as_hold_them(
    hidden: int, cell: str, dtype: torch.dtype, expected: list[tuple[int, int]]
) -> None:
    for backward, blocks in enumerate(expected):
        found = shared_out(H200, bool(backward), hidden_size=hidden, cell=cell, dtype=dtype)
        assert (found.cluster, found.clusters) == blocks
        assert found.shared_bytes <= H200.shared_bytes
        assert found.teams * found.cluster * found.clusters <= H200.multiprocessors or found.clusters == 1
    if len(expected) == 1:
        with pytest.raises(cuda.CudaError, match="do not fit"):
            shared_out(H200, True, hidden_size=hidden, cell=cell, dtype=dtype)


@pytest.mark.parametrize("device", [A100, RTX])
def test_without_clusters_blocks_meet_through_global_memory(device: cuda.Device) -> None:
    found = shared_out(device, hidden_size=512, batch=400)
    assert found.cluster == 1
    assert found.clusters > 1
    assert found.teams * found.clusters <= device.multiprocessors
    assert found.shared_bytes <= device.shared_bytes
    assert found.workspace_bytes > 4 * 512 * 512 * 2


def test_crowds_are_taken_by_wider_teams() -> None:
    assert shared_out(H200, batch=8).columns == 8
    assert shared_out(H200, batch=4096).columns == 16


@pytest.mark.parametrize(
    ("changes", "device", "words"),
    [
        ({"hidden_size": 8192}, H200, "do not fit on this device"),
        ({}, cuda.Device(75, 72, 64 << 10), "7.5"),
        ({"hidden_size": 0}, H200, "hidden_size is 0"),
        ({"directions": 3}, H200, "directions is 3"),
        ({"batch": 2**40, "steps": 2**20}, H200, "2^48"),
    ],
)
def test_refusals_are_sentences(changes: dict[str, int], device: cuda.Device, words: str) -> None:
    with pytest.raises(cuda.CudaError) as refusal:
        shared_out(device, **changes)
    assert words in str(refusal.value)
    assert str(refusal.value).endswith(".")


def test_an_empty_batch_needs_nothing() -> None:
    assert shared_out(H200, batch=0).workspace_bytes == 0


def test_on_the_cpu_it_says_where_it_runs() -> None:
    assert cuda.why_not(problem(device=torch.device("cpu"))) == (
        "the CUDA kernels run on a CUDA device; the tensors are on cpu."
    )
    weights = [torch.zeros(4, 1), torch.zeros(4, 1)]
    with pytest.raises(BackendError, match="CUDA device"):
        rnn(torch.zeros(2, 1, 1), weights, cell="lstm", backend="cuda")


def on_an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    known = cuda.team
    monkeypatch.setattr(cuda, "team", lambda spec, backward: known(spec, backward, H200))
    monkeypatch.setattr(cuda, "_multiprocessors", lambda device: H200.multiprocessors)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 8),
        ({"steps": 200}, 3),
        ({"steps": 100}, 1),
        ({"layers": 1}, 1),
        ({"directions": 2}, 1),  # a layer needs both directions of the one before
        ({"batch": 4096}, 1),  # one layer alone fills the device
        ({"hidden_size": 1024}, 1),  # clusters that wait for each other
    ],
)
def test_layers_overlap_only_where_they_have_room(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, int], count: int
) -> None:
    on_an_h200(monkeypatch)
    given = problem(**{"layers": 2, "steps": 512, "hidden_size": 256, **changes})
    parts = cuda.CudaWalks().parts(given, backward=False)
    assert len(parts) == count
    assert [t for part in parts for t in part] == list(range(given.steps))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 128}, "1 block(s) hold a layer's recurrent weights for 8 sequences at a time."),
        (
            {"hidden_size": 256, "layers": 2, "steps": 512},
            "8 sequences at a time; 2 layers work beside each other, 8 parts of the steps.",
        ),
        ({"hidden_size": 1024}, "32 block(s) in 2 clusters hold a layer's recurrent"),
    ],
)
def test_what_a_shape_gets_is_said(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, int], words: str
) -> None:
    on_an_h200(monkeypatch)
    monkeypatch.setattr(cuda, "_current", lambda device: nullcontext())
    assert words in str(cuda.rather_not(problem(**changes)))


@pytest.mark.parametrize(
    ("part", "directions", "words"),
    [((3, 9), 1, "3 to 9 of 5 steps"), ((2, 2), 1, "2 to 2"), ((0, 2), 2, "in 2 directions")],
)
def test_parts_of_the_steps_are_checked(part: tuple[int, int], directions: int, words: str) -> None:
    spec = cuda.spec_of(problem(directions=directions), False)
    spec.part = part
    with pytest.raises(cuda.CudaError, match=words):
        cuda.team(spec, False, H200)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_device_launches_are_refused() -> None:
    address = ctypes.c_void_p(64).value
    spec, library = cuda.spec_of(problem(), False), cuda.library(cuda.LIBRARY)
    arrays = cuda.ForwardArrays(*(address for _ in cuda.ForwardArrays._fields_))
    assert library.interfuse_cuda_rnn_forward(spec, arrays, address, None) == 1
    assert "no CUDA device" in library.interfuse_cuda_last_error().decode()
    back = cuda.BackwardArrays(*(address for _ in cuda.BackwardArrays._fields_))
    assert library.interfuse_cuda_rnn_backward(spec, back, address, None) == 1
    assert "no CUDA device" in library.interfuse_cuda_last_error().decode()
    assert library.interfuse_cuda_rnn_forward(spec, cuda.ForwardArrays(), address, None) == 1
    assert "null pointer" in library.interfuse_cuda_last_error().decode()


def test_kernels_keep_everything_in_registers() -> None:
    """No stack, no spills, on every architecture that the library is built for; the record says how many."""
    tool = cuda_resources.cuobjdump()
    if tool is None:
        pytest.skip("there is no cuobjdump here.")
    found = cuda_resources.resources(tool)
    record = json.loads(cuda_resources.RECORD.read_text())
    assert found
    for architecture, kernels in found.items():
        recurrent = {name: sizes for name, sizes in kernels.items() if name.startswith("rnn_")}
        expected = {name for name in record[architecture] if name.startswith("rnn_")}
        assert set(recurrent) == expected, architecture
        assert len(recurrent) == 4 * (2 * 3 * 2 + 1)
        spilled = {name: sizes for name, sizes in recurrent.items() if sizes["stack"] or sizes["local"]}
        assert not spilled, (architecture, spilled)
