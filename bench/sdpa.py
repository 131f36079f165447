"""Attention alone, without projections, against each of torch's implementations of it: rows for GPUs.

Read by bench/gpu.py; on the CPU, `interfuse bench attention` times the whole module.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from interfuse.bench.roofline import Cost
from interfuse.bench.rows import names_of, workload_of
from torch import Tensor, nn

from interfuse.ops import attention


@dataclass(frozen=True)
class Case:
    """Heads are of 64 elements."""

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    ragged: bool = False  # contexts of 10 to 100 % of the keys

    def lengths(self) -> Tensor | None:
        if not self.ragged:
            return None
        return torch.linspace(self.keys / 10, self.keys, self.batch).round().long()


CASES = (
    Case("q64-kv196", 64, 8, 64, 196),
    Case("q512-kv512", 16, 8, 512, 512),
    Case("q512-kv4096", 8, 8, 512, 4096),
    Case("q4096-kv4096", 4, 8, 4096, 4096),
    Case("q64-kv196-ragged", 64, 8, 64, 196, ragged=True),
    Case("q512-kv4096-ragged", 8, 8, 512, 4096, ragged=True),
)
HEAD = 64


class Torch(nn.Module):
    """scaled_dot_product_attention; lengths become the mask that it takes."""

    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, self.mask)


class Ours(nn.Module):
    def __init__(self, lengths: Tensor | None) -> None:
        super().__init__()
        self.lengths = lengths

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, kv_lengths=self.lengths)


class SdpaWorkload:
    """What bench/gpu.py asks of a workload."""

    channels_last = None
    dtype = torch.float32
    sdpa = True

    def __init__(self, case: Case) -> None:
        self.case, self.name = case, case.name

    def tiny(self) -> SdpaWorkload:
        return SdpaWorkload(replace(self.case, batch=2, heads=2, queries=8, keys=20))

    def module(self) -> nn.Module:
        lengths = self.case.lengths()
        if lengths is None:
            return Torch(None)
        return Torch((torch.arange(self.case.keys) < lengths[:, None])[:, None, None])

    def ours(self, module: nn.Module) -> nn.Module:
        return Ours(self.case.lengths())

    def inputs(self) -> list[Tensor]:
        case, draw = self.case, torch.Generator().manual_seed(2)
        return [
            torch.randn(case.batch, case.heads, length, HEAD, generator=draw)
            for length in (case.queries, case.keys, case.keys)
        ]

    def cost(self, training: bool) -> Cost:
        """Two products over the keys that exist, five more of a backward that computes the weights again."""
        case, lengths = self.case, self.case.lengths()
        keys = case.batch * case.keys if lengths is None else int(lengths.sum())
        product = 2 * case.heads * case.queries * keys * HEAD
        elements = case.heads * HEAD * (2 * case.batch * case.queries + 2 * keys)
        return Cost((7 if training else 2) * product, (3 if training else 1) * 4 * elements)


def names(further: bool, quick: bool) -> list[str]:
    return names_of(CASES, quick)


def workload(name: str) -> SdpaWorkload:
    """By name; 'NAME@tiny' is the same case with few queries and keys."""
    return workload_of(name, CASES, "among the rows of attention alone", SdpaWorkload)
