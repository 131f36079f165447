"""Public architectures as their authors write them, before and after optimize().

`interfuse bench zoo` prints the table; `pytest bench/zoo.py --benchmark-enable` runs each case under
pytest-benchmark.
"""

from __future__ import annotations

from typing import Any

import torch
from interfuse.bench.pytest_rows import pytest_generate_tests, test_inference, test_training  # noqa: F401
from interfuse.bench.report import Bar, speedup
from interfuse.bench.roofline import Cost
from interfuse.cases.zoo import ENTRIES, Entry
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import interfuse

# "interfuse": with example inputs, which measures every site; "interfuse_optimized": without.
PROVIDERS = ("interfuse", "interfuse_optimized", "eager")
BENCHMARKED = PROVIDERS  # by pytest-benchmark
TOGETHER = True  # in one process, one after the other: it is torch's threads that all of them run on
SCALE = 4  # of widths and batch, over those of the tests


def names(further: bool, quick: bool) -> list[str]:
    return [f"{name}{'@tiny' if quick else ''}" for name in ENTRIES]


def workload(name: str) -> ZooWorkload:
    """By name; 'NAME@tiny' is the same model as the tests have it."""
    plain, _, variant = name.partition("@")
    if plain not in ENTRIES:
        raise ValueError(f"There is no model '{plain}' in the zoo.")
    return ZooWorkload(plain, ENTRIES[plain], 1 if variant == "tiny" else SCALE)


class ZooWorkload:
    """One model in evaluation, whose outputs float64 can check; its training step has no dropout."""

    dtype = torch.float32
    channels_last = None
    mask = None

    def __init__(self, name: str, entry: Entry, scale: int) -> None:
        self.name, self.entry, self.scale = name, entry, scale
        inputs = [f"input{i}" for i, x in enumerate(self.inputs()) if x.is_floating_point()]
        self.gradients = [*inputs, *(name for name, _ in self.module().named_parameters())]

    def why_not(self, provider: str) -> str | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"kernel": "native", "scale": self.scale, "bar": True}

    def tiny(self) -> ZooWorkload:
        return ZooWorkload(self.name, self.entry, 1)

    def module(self) -> nn.Module:
        return self.entry.build(self.scale)[0].eval().requires_grad_()

    def inputs(self) -> list[Tensor]:
        return list(self.entry.build(self.scale)[1])

    def ours(self, module: nn.Module) -> nn.Module:
        return interfuse.optimize(module, self.inputs(), seconds=2)

    def ours_optimized(self, module: nn.Module) -> nn.Module:
        return interfuse.optimize(module)

    def cost(self, training: bool) -> Cost:
        """What torch counts of convolutions and products (not of recurrent layers); every weight once."""
        module = self.module()
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            module(*self.inputs())
        times = 3 if training else 1
        weights = sum(p.numel() for p in module.parameters())
        return Cost(times * counted.get_total_flops(), times * 4 * weights)

    def onnx(self, module: nn.Module) -> bytes:
        raise NotImplementedError("The zoo is compared with itself, not with other runtimes.")


NOT_SLOWER = 0.97
WAYS = {"interfuse": "with example inputs", "interfuse_optimized": "without"}


def bars(report: dict[str, Any]) -> list[Bar]:
    """No model is slower than it was, however it was optimised: the lowest ratio of all stands for them."""
    found = []
    for provider, way in WAYS.items():
        for mode in ("inference", "training"):
            ratios = {row["case"]: speedup(row, mode, provider, ["eager"]) for row in report["rows"]}
            least = min(ratios, key=lambda case: ratios[case] or 0.0)  # one without a figure is the least
            name = f"{mode}, optimised {way}: the lowest of {len(ratios)} models, {least}, over eager"
            found.append(Bar(name, NOT_SLOWER, ratios[least], at_least=True))
    return found
