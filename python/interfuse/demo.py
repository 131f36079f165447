"""`interfuse demo`: the documented stack of CNN blocks in torch and in interfuse, side by side; then, in
demo_fusion.py, the fusion models.

Both run in this process, on the same pool of threads, in turn. `interfuse bench` is the stricter comparison:
with every peer, each alone in a process of its own.
"""

from __future__ import annotations

import copy
import json
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import interfuse
from interfuse import demo_fusion
from interfuse.demo_timing import ROUNDS, in_turn, largest_error, training_step
from interfuse.models import cnn_blocks, smallest_size
from interfuse.terminal import Progress, milliseconds, table

if TYPE_CHECKING:
    import pathlib


def run(
    size: int,
    batch: int,
    seconds: float,
    threads: int | None,
    out: pathlib.Path,
    as_json: bool,
    quick: bool = False,
) -> int:
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    plain = cnn_blocks()
    least = smallest_size(len(plain))
    if size < least or batch < 1:
        print(
            f"The demo needs images of at least {least} pixels (--size) and a batch of at least 1.",
            file=sys.stderr,
        )
        return 2
    result = compare(plain, torch.randn(batch, 3, size, size), seconds)
    out.mkdir(parents=True, exist_ok=True)
    result |= demo_fusion.run(size, batch, seconds, out / "demo_learning.png", quick)
    no_plot = plot(result, out / "demo.png")
    (out / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1) if as_json else f"{text(result)}\n\n{demo_fusion.text(result)}")
    written = f"{out / 'demo.json'}, {out / 'demo.png'} and {out / 'demo_learning.png'}"
    print(no_plot or f"Wrote {written}.", file=sys.stderr)
    return 0


def compare(plain: nn.Sequential, x: Tensor, seconds: float) -> dict[str, Any]:
    """Each block on the output of those before it, then the whole stack, then a training step of it."""
    fused = interfuse.optimize(copy.deepcopy(plain))
    exact = copy.deepcopy(plain).double()
    with torch.no_grad():
        inputs = [x]
        for block in plain:
            inputs.append(block(inputs[-1]))
    parts = [
        *((block_name(block), block, fused[i], exact[i], inputs[i]) for i, block in enumerate(plain)),
        ("the whole stack", plain, fused, exact, x),
    ]
    rows: list[dict[str, Any]] = []
    with Progress((len(parts) + 1) * ROUNDS) as progress:
        for name, theirs, ours, truth, given in parts:
            with torch.no_grad():
                right = truth(given.double())
                errors = {
                    "torch": largest_error(theirs(given), right),
                    "interfuse": largest_error(ours(given), right),
                }
                steps = {"torch": partial(theirs, given), "interfuse": partial(ours, given)}
                times = in_turn(steps, seconds, partial(progress.step, name))
            rows.append({"part": name, "times": times, "errors": errors})
        step = {"torch": training_step(plain, x), "interfuse": training_step(fused, x)}
        times = in_turn(step, seconds, partial(progress.step, "a training step"))
        rows.append({"part": "a training step of the stack", "times": times})
    for row, site in zip(rows, interfuse.explain(fused).rows, strict=False):
        row["kernel"] = site.kernel
    for row in rows:
        row["ratio"] = row["times"]["torch"] / row["times"]["interfuse"]
    return {
        "input": list(x.shape),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "interfuse": interfuse.__version__,
        "rows": rows,
    }


def block_name(block: nn.Module) -> str:
    conv = next(block.children())
    return f"block {conv.in_channels} -> {conv.out_channels}" if isinstance(conv, nn.Conv2d) else "block"


def text(result: dict[str, Any]) -> str:
    header = ["", "torch, ms", "interfuse, ms", "ratio", "torch's error", "interfuse's error"]
    lines = []
    for row in result["rows"]:
        errors = [f"{row['errors'][name]:.1e}" if "errors" in row else "" for name in ("torch", "interfuse")]
        times = [milliseconds(row["times"][name]) for name in ("torch", "interfuse")]
        lines.append([row["part"], *times, f"{row['ratio']:.2f}x", *errors])
    shape = "x".join(map(str, result["input"]))
    return (
        f"CNN blocks on a {shape} input, {result['threads']} threads; medians of calls in turn.\n"
        "Errors: the largest difference from float64, relative to the largest value.\n\n"
        + table(header, lines)
        + "\n\n" + "\n".join(f"{row['part']}: {row['kernel']}" for row in result["rows"] if "kernel" in row)
    )


def plot(result: dict[str, Any], path: pathlib.Path) -> str | None:
    """Writes a PNG; the sentence why not where matplotlib is missing."""
    try:
        import matplotlib as mpl
    except ImportError:
        return "No plot was written: matplotlib is not installed; `pip install 'interfuse[bench]'` brings it."
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    named = [(row["part"], row["times"]) for row in result["rows"]]
    named += [(f"{row['model']}\n{row['mode']}", row["times"]) for row in result["models"]]
    ways = {"torch": "torch", "optimize": "torch's, through optimize()", "interfuse": "interfuse"}
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.8 * len(named)), layout="constrained")
    for k, (way, label) in enumerate(ways.items()):
        there = [(i, times) for i, (_, times) in enumerate(named) if way in times]
        shares = [times[way] / times["torch"] for _, times in there]
        bars = axis.barh([i + 0.27 * (k - 1) for i, _ in there], shares, height=0.25, label=label)
        axis.bar_label(bars, [f"{milliseconds(times[way])} ms" for _, times in there], padding=3)
    axis.set_yticks(range(len(named)), [name for name, _ in named])
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel("time of a call, as a share of torch's")
    shape = "x".join(map(str, result["input"]))
    axis.set_title(f"CNN blocks, {shape}, and fusion models, {result['threads']} threads")
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return None
