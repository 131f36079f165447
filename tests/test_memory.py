"""Kept memory: the next step gets the block of the last one, and nobody can tell but by the clock."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from interfuse import memory, ops

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.native

LARGE = (600, 1000)  # 2.4 MB in float32


@pytest.fixture(autouse=True)
def _nothing_idle() -> Iterator[None]:
    limit = memory.stats().limit
    memory.release()
    yield
    memory.set_limit(limit)
    memory.release()


def needs_keeping() -> None:
    """Skips the rest where nothing is kept."""
    before = memory.stats().again
    for _ in range(2):
        kept()
    if memory.stats().again == before:
        pytest.skip("under the address sanitizer nothing is kept")


def kept(fill: float = 0.0) -> Tensor:
    return memory.empty(LARGE, dtype=torch.float32).fill_(fill)


def layer() -> tuple[Tensor, nn.Parameter]:
    return torch.randn(2, LARGE[1]), nn.Parameter(torch.randn(LARGE) / 30)


def step(x: Tensor, weight: nn.Parameter) -> None:
    ops.linear(x, weight, activation="relu").square().sum().backward()


def test_the_gradient_is_the_block_and_the_next_step_has_it_again() -> None:
    x, weight = layer()
    needs_keeping()
    live = memory.stats().live
    places = set()
    for _ in range(3):
        weight.grad = None
        step(x, weight)
        assert weight.grad is not None
        places.add(weight.grad.data_ptr())
        # One block is live: autograd took the gradient as it is, without a copy.
        assert weight.grad.nbytes <= memory.stats().live - live < weight.grad.nbytes + 2**20
        assert weight.grad.data_ptr() % 64 == 0
    assert len(places) == 1
    weight.grad = None
    assert memory.stats().live == live


def test_gradients_are_added_and_zeroed_in_place() -> None:
    x, weight = layer()
    step(x, weight)
    assert weight.grad is not None
    first = weight.grad.clone()
    step(x, weight)
    torch.testing.assert_close(weight.grad, 2 * first)
    optimizer = torch.optim.SGD([weight], 0.1)
    place = weight.grad.data_ptr()
    optimizer.zero_grad(set_to_none=False)
    step(x, weight)
    assert weight.grad.data_ptr() == place
    assert torch.equal(weight.grad, first)


def linear_op_step(x: Tensor, weight: Tensor) -> Tensor:
    """The long way, through the dispatcher."""
    y: Tensor = torch.ops.interfuse.linear([x], weight, None, None, "gelu", 0.01, "", False)[0]
    return y


def conv_step(x: Tensor, weight: Tensor) -> Tensor:
    return ops.conv_pool(x, weight, activation="gelu", padding=1, pool="max", backend="native")


def channels_last_step(x: Tensor, weight: Tensor) -> Tensor:
    return conv_step(x.contiguous(memory_format=torch.channels_last), weight)


def rnn_step(x: Tensor, *weights: Tensor) -> Tensor:
    return ops.rnn(x, list(weights), cell="gru", backend="native")[0]


def cross_entropy_step(x: Tensor, weight: Tensor) -> Tensor:
    return ops.linear_cross_entropy(x, weight, torch.arange(x.shape[0]))


STEPS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "linear": (lambda x, w: ops.linear(x, w, activation="gelu"), [(600, 700), (500, 700)]),
    "linear-op": (linear_op_step, [(600, 700), (500, 700)]),
    "conv_pool": (conv_step, [(2, 16, 96, 96), (32, 16, 3, 3)]),
    "channels_last": (channels_last_step, [(2, 16, 96, 96), (32, 16, 3, 3)]),
    "rnn": (rnn_step, [(64, 64, 80), (384, 80), (384, 128), (384,), (384,)]),
    "attention": (lambda q, k, v: ops.attention(q, k, v, backend="native"), [(2, 4, 600, 64)] * 3),
    "cross_entropy": (cross_entropy_step, [(400, 700), (1500, 700)]),
    "bce": (lambda x, y: ops.binary_cross_entropy_with_logits(x, y.detach()), [(600, 700), (600, 700)]),
}


def results(name: str) -> list[Tensor]:
    run, shapes = STEPS[name]
    random = torch.Generator().manual_seed(1)
    tensors = [(torch.randn(s, generator=random) / 8).requires_grad_() for s in shapes]
    y = run(*tensors)
    y.square().sum().backward()
    return [y.detach(), *(t.grad for t in tensors if t.grad is not None)]


@pytest.mark.parametrize("name", STEPS)
def test_what_a_block_held_before_is_in_no_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "KEPT_FROM", 1 << 62)
    expected = results(name)
    monkeypatch.undo()
    before = memory.stats()
    first = results(name)
    after = memory.stats()
    assert after.fresh > before.fresh, "nothing of this step is kept"
    sizes = {t.shape for t in first if t.nbytes >= memory.KEPT_FROM}
    del first
    made = []
    for shape in sizes:
        made += [memory.empty(shape, dtype=torch.float32).fill_(float("nan")) for _ in range(3)]
    del made
    for found, right in zip(results(name), expected, strict=True):
        assert torch.equal(found, right)


def test_no_step_leaks() -> None:
    live = memory.stats().live
    for name in STEPS:
        results(name)
    gc.collect()
    assert memory.stats().live == live


def test_it_is_a_tensor_like_any_other(tmp_path: Any) -> None:
    t = kept(3.0)
    assert torch.equal(copy.deepcopy(t), t)
    buffer = io.BytesIO()
    torch.save(t, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), t)
    assert torch.equal(pickle.loads(pickle.dumps(t)), t)
    array = t.numpy()
    view = t.view(-1)[10:20]
    assert torch.from_dlpack(t).data_ptr() == t.data_ptr()
    del t
    kept(5.0)  # what views and arrays look at is still in use
    assert bool((view == 3).all())
    assert bool((array == 3).all())
    assert type(view) is Tensor
    shared = kept(2.0).share_memory_()
    assert shared.is_shared()
    assert bool((shared == 2).all())


def test_what_inference_returns_can_be_resized() -> None:
    x, weight = torch.randn(600, 700), torch.randn(1000, 700)
    fresh = memory.stats()
    with torch.no_grad():
        y = ops.linear(x, weight)
    assert memory.stats() == fresh
    assert y.resize_(1200, 1000).shape == (1200, 1000)
    with pytest.raises(RuntimeError, match="not resizable"):
        kept().resize_(2000, 2000)


@pytest.mark.parametrize(
    ("shape", "dtype", "form"),
    [
        ((2, 64, 50, 60), torch.float32, torch.channels_last),
        ((1, 64, 8, 60, 60), torch.bfloat16, torch.channels_last_3d),
        ((2, 1, 1000, 1000), torch.uint8, torch.channels_last),
        ((600, 1000), torch.float16, torch.contiguous_format),
        ((600, 1000), torch.float64, torch.contiguous_format),
    ],
)
def test_it_has_the_layout_of_torchs_own(
    shape: tuple[int, ...], dtype: torch.dtype, form: torch.memory_format
) -> None:
    live = memory.stats().live
    t = memory.empty(shape, dtype=dtype, memory_format=form)
    like = torch.empty(shape, dtype=dtype, memory_format=form)
    assert (t.shape, t.stride(), t.dtype) == (like.shape, like.stride(), like.dtype)
    assert memory.stats().live >= live + t.nbytes
    assert not t.requires_grad
    assert t.is_leaf
    assert t._version == 0


def test_small_ones_other_dtypes_and_what_modes_see_are_torchs() -> None:
    before = memory.stats()
    memory.empty((100,), dtype=torch.float32)
    memory.empty(LARGE, dtype=torch.int64)
    memory.empty(LARGE, dtype=torch.float32, device=torch.device("meta"))
    with FakeTensorMode():
        assert type(memory.empty(LARGE, dtype=torch.float32)) is not Tensor
    assert memory.stats() == before


def test_compiled_functions_and_transforms_train_the_same() -> None:
    x, weight = layer()
    step(x, weight)
    expected = weight.grad

    def loss(w: Tensor) -> Tensor:
        return ops.linear(x, w, activation="relu").square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(weight.detach()), expected)
    weight.grad = None
    torch.compile(loss, backend="aot_eager", fullgraph=True)(weight).backward()
    torch.testing.assert_close(weight.grad, expected)


def test_threads_give_back_what_others_took() -> None:
    x, weight = layer()
    step(x, weight)
    expected = weight.grad
    assert expected is not None
    passed: list[Tensor] = []

    def work(_: int) -> None:
        for _ in range(20):
            own = nn.Parameter(weight.detach())
            step(x, own)
            assert own.grad is not None
            assert torch.equal(own.grad, expected)
            passed.append(own.grad)
            if len(passed) > 3:
                passed.pop(0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


class Kept(torch.utils.data.Dataset[np.ndarray[Any, Any]]):
    """Its workers read memory of their parent and make their own."""

    def __init__(self) -> None:
        self.mine = kept(4.0)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return (self.mine + kept(float(index))).sum().item()


@pytest.mark.skipif(sys.platform != "linux", reason="its workers are forked")
def test_forked_workers_keep_memory_of_their_own() -> None:
    data = Kept()
    kept()  # idle when the workers are forked
    loader = torch.utils.data.DataLoader(data, num_workers=2, multiprocessing_context="fork")
    count = LARGE[0] * LARGE[1]
    assert [int(value) for value in loader] == [count * (4 + i) for i in range(4)]
    assert bool((data.mine == 4).all())


def test_the_limit_and_release() -> None:
    needs_keeping()
    kept()
    idle = memory.stats().idle
    assert idle >= 4 * LARGE[0] * LARGE[1]
    assert memory.release() == idle
    assert memory.stats().idle == 0
    memory.set_limit(0)
    kept()
    assert memory.stats().idle == 0
    for wrong in (-1, True, 1.5):
        with pytest.raises(ValueError, match="number of bytes"):
            memory.set_limit(wrong)  # type: ignore[arg-type]


def test_no_memory_is_said_in_a_sentence() -> None:
    needs_keeping()  # the address sanitizer ends a process that asks for too much
    with pytest.raises(MemoryError, match="no memory for a tensor of 4611686018427387904 bytes"):
        memory.empty((1 << 30, 1 << 30), dtype=torch.float32)


SCRIPT = """
import torch, interfuse
from interfuse import memory
weight = torch.nn.Parameter(torch.randn(600, 1000))
interfuse.ops.linear(torch.randn(2, 1000), weight).sum().backward()
print(memory.stats().limit)
torch.kept = [weight, weight.grad, memory.empty((600, 1000), dtype=torch.float32)]
"""


def run_script(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_tensors_may_outlive_the_module() -> None:
    done = run_script()
    assert (done.returncode, done.stderr) == (0, "")


def test_the_environment_sets_the_limit() -> None:
    assert run_script(INTERFUSE_KEPT_MEMORY="123").stdout == "123\n"
    assert "INTERFUSE_KEPT_MEMORY is a number of bytes" in run_script(INTERFUSE_KEPT_MEMORY="2GB").stderr
