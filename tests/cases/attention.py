"""attention's named cases: one list for the tests, the benchmark and the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Case:
    """Projected heads, and what restricts who attends to whom."""

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    kv_heads: int = 0  # 0: as many as heads
    value_dim: int = 0  # 0: head_dim
    mask: Literal["", "boolean", "additive", "padding", "per-head", "empty-rows"] = ""
    ragged: bool = False  # q_lengths and kv_lengths, with 0 and the whole among them
    causal: bool = False
    scale: float | None = None
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class ModuleCase:
    """A whole torch.nn.MultiheadAttention with its projections, as the benchmark times it."""

    name: str
    batch: int
    queries: int
    keys: int
    width: int = 256
    heads: int = 8
    lengths: tuple[int, ...] = ()  # of the keys; (): all of them
    dtype: torch.dtype = torch.float32
    bench: str = "bar"  # "bar": a row that carries the bars; "further": a row beside them


BARS = (
    ModuleCase("q64-kv196-b8", 8, 64, 196),
    ModuleCase("q512-kv2048-b2", 2, 512, 2048),
    ModuleCase("q512-kv2048-b2-ragged", 2, 512, 2048, lengths=(205, 2048)),
)

FURTHER = (
    ModuleCase("q1-kv1024-b8", 8, 1, 1024, bench="further"),
    ModuleCase("q128-kv128-b16", 16, 128, 128, bench="further"),
    ModuleCase("q512-kv512-b4-w512", 4, 512, 512, width=512, bench="further"),
    ModuleCase("q512-kv2048-b2-bf16", 2, 512, 2048, dtype=torch.bfloat16, bench="further"),
)

CASES = BARS + FURTHER

# For the tests alone: small, and each with something that a kernel gets wrong first.
EDGES = (
    Case("plain", 2, 3, 13, 21, 8),
    Case("bar-like", 1, 2, 64, 196, 32),
    Case("two-blocks", 1, 1, 30, 700, 32),
    Case("tails", 2, 2, 37, 65, 17, value_dim=33),
    Case("wide", 1, 1, 9, 40, 80, value_dim=136),
    Case("narrow-values", 1, 2, 14, 50, 24, value_dim=1),
    Case("grouped", 2, 6, 15, 33, 16, kv_heads=2),
    Case("one-kv-head", 3, 4, 25, 18, 8, kv_heads=1),
    Case("long", 1, 2, 70, 600, 32),
    Case("long-causal", 1, 3, 200, 300, 40, causal=True),
    Case("long-per-head", 2, 2, 33, 270, 64, value_dim=20, mask="per-head"),
    Case("long-empty-rows", 1, 2, 40, 290, 32, mask="empty-rows"),
    Case("many-tiles", 1, 4, 300, 40, 32, kv_heads=1),
    Case("one-of-each", 1, 1, 1, 1, 1),
    Case("one-query", 3, 2, 1, 100, 16),
    Case("one-key", 2, 2, 20, 1, 16),
    Case("no-keys", 2, 2, 5, 0, 8),
    Case("no-queries", 2, 2, 0, 5, 8),
    Case("empty-batch", 0, 2, 5, 6, 8),
    Case("scaled", 1, 2, 12, 19, 8, scale=1.0),
    Case("negative-scale", 1, 2, 12, 19, 8, scale=-0.7),
    Case("causal", 2, 2, 40, 40, 16, causal=True),
    Case("causal-wide", 1, 2, 20, 600, 16, causal=True),
    Case("causal-tall", 1, 2, 90, 30, 16, causal=True),
    Case("boolean", 2, 3, 30, 50, 16, mask="boolean"),
    Case("additive", 2, 3, 30, 50, 16, mask="additive"),
    Case("padding", 2, 3, 30, 50, 16, mask="padding"),
    Case("per-head", 2, 3, 30, 50, 16, mask="per-head"),
    Case("empty-rows", 2, 3, 30, 50, 16, mask="empty-rows"),
    Case("ragged", 4, 2, 30, 70, 16, ragged=True),
    Case("ragged-grouped", 4, 4, 17, 600, 24, kv_heads=2, ragged=True),
    Case("everything", 4, 4, 50, 150, 24, kv_heads=2, value_dim=40, mask="additive", ragged=True,
         causal=True),
)  # fmt: skip
