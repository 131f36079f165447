"""The losses' named cases: one list for the tests, the benchmark and the command line."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """Cross-entropy of a linear layer."""

    name: str
    rows: int
    features: int
    classes: int
    bias: bool = True
    reduction: str = "mean"
    label_smoothing: float = 0.0
    weighted: bool = False  # classes have weights
    ignored: int = 0  # of the first rows, how many do not count
    dtype: torch.dtype = torch.float32
    bench: str = ""  # "bar": a row that carries the bars; "further": a row beside them; "": not timed


BARS = (Case("vocabulary-20k", 2048, 256, 20_000, bench="bar"),)

# What else people run.
FURTHER = (
    Case("vocabulary-20k-smooth", 2048, 256, 20_000, label_smoothing=0.1, bench="further"),
    Case("vocabulary-50k-b256", 256, 512, 50_257, bias=False, bench="further"),
    Case("captions-b64", 64, 512, 10_000, ignored=20, bench="further"),
    Case("vocabulary-20k-bf16", 2048, 256, 20_000, dtype=torch.bfloat16, bench="further"),
)

REDUCTIONS = ("none", "mean", "sum")

# Tails of rows, features and classes, sizes of one, several chunks of rows, no rows, rows that do not count.
SMALL = (
    *(
        Case(f"tails-{rows}-{features}-{classes}", rows, features, classes)
        for rows, features, classes in (
            (1, 1, 2), (1, 37, 5), (3, 16, 10), (15, 17, 131), (16, 64, 132), (17, 63, 133), (64, 130, 300),
            (81, 3, 17), (130, 33, 40), (520, 20, 29), (70, 12, 70_001),
        )
    ),
    *(
        Case(f"settings-{reduction}-{smoothing}-{weighted}", 37, 20, 150, reduction=reduction,
             label_smoothing=smoothing, weighted=weighted, ignored=3)
        for reduction in REDUCTIONS for smoothing in (0.0, 0.2, 1.0) for weighted in (False, True)
    ),
    # Enough for matrix units, with tails.
    Case("units-130-70-4001", 130, 70, 4001, ignored=5),
    Case("units-530-65-1003", 530, 65, 1003, reduction="none", label_smoothing=0.1, weighted=True),
    Case("no-bias", 20, 20, 9, bias=False),
    Case("no-bias-none", 20, 20, 9, bias=False, reduction="none"),
    Case("no-rows-sum", 0, 12, 6, reduction="sum"),
    Case("no-rows-none", 0, 12, 6, reduction="none"),
    Case("one-class", 5, 12, 1),
    Case("nothing-counts-sum", 5, 12, 7, reduction="sum", ignored=5),
)  # fmt: skip


@dataclass(frozen=True)
class PairCase:
    """A loss of two tensors of one shape, its mean."""

    name: str
    loss: str  # bce_with_logits, mse, contrastive or info_nce
    rows: int
    features: int
    dtype: torch.dtype = torch.float32
    bench: str = "further"  # "beside": timed with the rows that carry bars, though it carries none


PAIRS = (
    PairCase("bce-256x10000", "bce_with_logits", 256, 10_000, bench="beside"),
    PairCase("mse-256x10000", "mse", 256, 10_000),
    PairCase("contrastive-4096x512", "contrastive", 4096, 512, bench="beside"),
    PairCase("info-nce-256x128", "info_nce", 256, 128, bench="beside"),
    PairCase("info-nce-2048x256", "info_nce", 2048, 256, bench="beside"),
    PairCase("bce-64x1000", "bce_with_logits", 64, 1000),
    PairCase("mse-64x1000", "mse", 64, 1000),
    PairCase("contrastive-64x16", "contrastive", 64, 16),
    PairCase("info-nce-1024x256", "info_nce", 1024, 256),
    PairCase("info-nce-4096x256", "info_nce", 4096, 256),
    PairCase("bce-256x10000-bf16", "bce_with_logits", 256, 10_000, torch.bfloat16),
)

CASES = (*BARS, *FURTHER, *SMALL)
