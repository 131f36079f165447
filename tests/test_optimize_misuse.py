"""Optimised models in wrong hands: what plain torch does with such inputs, the optimised model does too."""

from __future__ import annotations

import copy
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from interfuse.cases.zoo import ENTRIES
from torch import Tensor, nn

import interfuse

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("any_size")
BY_NAME = pytest.mark.parametrize("model", ENTRIES)

# Of values of about one. float16 and bfloat16 round differently where torch rounds between the calls of a
# chain and the fused kernel only at its end.
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}

Given = tuple[Tensor, ...]
Treatment = tuple["Callable[[nn.Module], nn.Module]", "Callable[[Given], Given]"]


def each(change: Callable[[Tensor], Tensor]) -> Callable[[Given], Given]:
    return lambda inputs: tuple(change(x) for x in inputs)


def floats(change: Callable[[Tensor], Tensor]) -> Callable[[Given], Given]:
    return each(lambda x: change(x) if x.is_floating_point() else x)


def as_it_is(value: Any) -> Any:
    return value


def gap(x: Tensor) -> Tensor:
    """The same values with a gap behind each row."""
    wide = x.new_zeros((*x.shape[:-1], x.shape[-1] + 3)) if x.dim() else x
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


TREATMENTS: dict[str, Treatment] = {
    "empty batch": (as_it_is, each(lambda x: x[:0])),
    "batch of one": (as_it_is, each(lambda x: x[:1])),
    "no batch": (as_it_is, each(lambda x: x[0])),
    "one more dimension": (as_it_is, floats(lambda x: x[None])),
    "too few features": (as_it_is, floats(lambda x: x[..., :-1])),
    "too few channels": (as_it_is, floats(lambda x: x[:, :-1])),
    "swapped": (as_it_is, floats(lambda x: x.transpose(-1, -2))),
    "laid out backwards": (as_it_is, each(lambda x: x.transpose(0, -1).contiguous().transpose(0, -1))),
    "with gaps": (as_it_is, each(gap)),
    "channels last": (as_it_is, each(channels_last)),
    "float64 inputs": (as_it_is, floats(Tensor.double)),
    "float16 inputs": (as_it_is, floats(Tensor.half)),
    "integers": (as_it_is, floats(Tensor.int)),
    "int32 ids": (as_it_is, each(lambda x: x if x.is_floating_point() else x.int())),
    "negative ids": (as_it_is, each(lambda x: x if x.is_floating_point() else -1 - x)),
    "complex": (as_it_is, floats(lambda x: x.to(torch.complex64))),
    "sparse": (as_it_is, floats(Tensor.to_sparse)),
    "NaN": (as_it_is, floats(lambda x: x.masked_fill(torch.arange(x.numel()).view(x.shape) == 0, torch.nan))),
    "float64": (nn.Module.double, floats(Tensor.double)),
    "float16": (nn.Module.half, floats(Tensor.half)),
    "bfloat16": (nn.Module.bfloat16, floats(Tensor.bfloat16)),
    "float16 model": (nn.Module.half, as_it_is),
    "meta": (lambda model: model.to("meta"), each(lambda x: x.to("meta"))),
}  # fmt: skip


# A packed sequence of which parts are missing: torch finds out step by step, ours on unpacking it.
OTHER_WORDS = {("deep_speech", "too few features")}


def outcome(model: nn.Module, inputs: Given) -> Tensor | Exception:
    try:
        return model(*inputs)
    except Exception as error:
        return error


def sentence(error: object) -> str:
    """Without addresses and the numbers of lines."""
    return re.sub(r"0x[0-9a-f]+|line \d+", "", f"{type(error).__name__}: {error}")


def assert_alike(ours: Tensor | Exception, theirs: Tensor | Exception) -> None:
    if isinstance(theirs, Exception) or isinstance(ours, Exception):
        assert sentence(ours) == sentence(theirs)
        return
    assert (ours.dtype, ours.device, ours.shape) == (theirs.dtype, theirs.device, theirs.shape)
    if ours.numel():
        steps = [i for i, size in enumerate(ours.shape) if size > 1]  # elsewhere a stride means nothing
        assert [ours.stride(i) for i in steps] == [theirs.stride(i) for i in steps]
    if not ours.is_meta:
        tolerance = CLOSE[ours.dtype]
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


@BY_NAME
def test_what_torch_does(model: str) -> None:
    plain, inputs = ENTRIES[model].build()
    optimised = interfuse.optimize(copy.deepcopy(plain.eval()))
    with torch.no_grad():
        optimised(*inputs)  # so that what it remembers is of other inputs
        for name, (on_model, on_inputs) in TREATMENTS.items():
            theirs = outcome(on_model(copy.deepcopy(plain)), on_inputs(inputs))
            ours = outcome(on_model(copy.deepcopy(optimised)), on_inputs(inputs))
            if (model, name) in OTHER_WORDS:
                assert type(ours) is type(theirs) is RuntimeError
                continue
            try:
                assert_alike(ours, theirs)
            except AssertionError as error:
                raise AssertionError(f"{model}, {name}: {error}") from error


@BY_NAME
def test_hooks_on_every_module_are_called_as_before(model: str) -> None:
    plain, inputs = ENTRIES[model].build()
    optimised = interfuse.optimize(copy.deepcopy(plain.eval()))
    calls: dict[nn.Module, list[tuple[str, str]]] = {plain: [], optimised: []}
    for one, seen in calls.items():
        for name, module in one.named_modules():

            def before(module: nn.Module, args: Any, name: str = name, seen: Any = seen) -> None:
                seen.append(("before", name))

            def after(module: nn.Module, args: Any, y: Any, name: str = name, seen: Any = seen) -> None:
                seen.append(("after", name))

            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
    with torch.no_grad():
        assert_alike(optimised(*inputs), plain(*inputs))
    assert calls[optimised] == calls[plain]


@pytest.mark.parametrize("model", ["crnn", "vqa", "clip", "two_stream"])
def test_threads_at_once_give_what_one_gives(model: str) -> None:
    optimised, inputs = ENTRIES[model].build()
    interfuse.optimize(optimised.eval())
    sizes = [3, 2, 1, 3]
    given = [tuple(x[:n] for x in inputs) for n in sizes]
    with torch.no_grad():
        alone = [optimised(*some) for some in given]

    def work(some: Given) -> list[Tensor]:
        with torch.no_grad():
            return [optimised(*some) for _ in range(5)]

    with ThreadPoolExecutor(len(given)) as pool:
        found = list(pool.map(work, given))
    for right, each_time in zip(alone, found, strict=True):
        for y in each_time:
            torch.testing.assert_close(y, right)
