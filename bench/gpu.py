"""The Triton kernels on a CUDA device against cuDNN: eager, channels_last and torch.compile.

    python -m interfuse.bench.gpu [--op rnn] [--out out] [--json]

Times are CUDA events around a run of calls whose inputs rotate through more memory than the L2 cache holds,
so that no call finds its input there because the last one left it. The providers run in one process, in turn:
on a GPU they share no thread pools.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import statistics
import sys
from typing import TYPE_CHECKING, Any

import torch
from interfuse.bench import peers
from torch import Tensor, nn

from interfuse.terminal import Progress, milliseconds, table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from interfuse.bench.peers import Workload

OPS = ("conv_pool", "linear", "rnn", "attention")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDS = 5
WRONG = {
    torch.float32: 5e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}  # in float32 cuDNN uses TF32


def providers(load: Workload, dtype: torch.dtype) -> dict[str, tuple[nn.Module, bool]]:
    """{name: (module, whether its input is channels_last)}, all with the same parameters."""
    plain = load.module().to("cuda", dtype)
    last = load.module().to("cuda", dtype)
    last = last.to(memory_format=load.channels_last) if load.channels_last else last
    fused = load.ours(load.module().to("cuda", dtype))
    lengths = getattr(fused, "lengths", None)
    if lengths is not None:  # where the kernels read them; torch packs by lengths on the CPU
        fused.lengths = lengths.to("cuda")
    found = {
        "interfuse": (fused, False),
        "interfuse_channels_last": (fused, True),
        "eager": (plain, False),
        "channels_last": (last, True),
        "compile": (torch.compile(last, dynamic=False), True),
        "compile_max_autotune": (torch.compile(last, dynamic=False, mode="max-autotune"), True),
    }
    for backend in getattr(load, "gpu_backends", ()):
        other: Any = load
        made = other.ours_on(load.module().to("cuda", dtype), backend)
        made.lengths = None if made.lengths is None else made.lengths.to("cuda")
        found[f"interfuse_{backend}"] = (made, False)
    if load.channels_last is None:
        del found["interfuse_channels_last"], found["channels_last"]
    return found


Inputs = list[Tensor]  # of one call


def rotating(load: Workload, dtype: torch.dtype, channels_last: bool) -> list[Inputs]:
    """Copies of the inputs that together are twice as large as the L2 cache, and at least two."""
    xs = [x.to("cuda", dtype if x.is_floating_point() else None) for x in load.inputs()]
    if channels_last and load.channels_last:
        xs = [x.contiguous(memory_format=load.channels_last) for x in xs]
    cache = torch.cuda.get_device_properties(xs[0].device).L2_cache_size
    copies = max(2, -(-2 * cache // sum(x.numel() * x.element_size() for x in xs)))
    return [[x.clone() for x in xs] for _ in range(min(copies, 64))]


def milliseconds_a_call(step: Callable[..., object], inputs: list[Inputs], calls: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for i in range(calls):
        step(*inputs[i % len(inputs)])
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / calls


def training_step(module: nn.Module, inputs: Inputs) -> Callable[..., object]:
    parameters = list(module.parameters())
    grad_y = torch.ones_like(module(*inputs))

    def step(*inputs: Tensor) -> object:
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        wanted = [*(leaf for leaf in leaves if leaf.requires_grad), *parameters]
        return torch.autograd.grad(module(*leaves), wanted, grad_y)

    return step


def measure(load: Workload, dtype: torch.dtype, tick: Callable[[str], None]) -> dict[str, Any]:
    truth = load.module().double().to("cuda")(*rotating(load, torch.float64, False)[0]).detach()
    row: dict[str, Any] = {
        "case": load.name,
        "dtype": str(dtype).removeprefix("torch."),
        "missing": {},
        "errors": {},
    }
    ready: dict[str, tuple[nn.Module, list[Inputs]]] = {}
    for name, (module, last) in providers(load, dtype).items():
        try:
            inputs = rotating(load, dtype, last)
            with torch.no_grad():
                error = peers.relative_error(module(*inputs[0]), truth)
            if error <= WRONG[dtype]:
                ready[name] = (module, inputs)
                row["errors"][name] = error
            else:
                row["missing"][name] = f"its output is wrong: relative error {error:.1e} against float64."
        except Exception as failure:  # whatever a provider raises is why it is missing, and is printed
            row["missing"][name] = f"{type(failure).__name__}: {failure}".splitlines()[0][:300]
        tick(f"{load.name} {row['dtype']}: {name}")
    for mode in ("inference", "training"):
        times: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for name, (module, inputs) in ready.items():
                if mode == "inference":
                    with torch.no_grad():
                        times.setdefault(name, []).append(timed(module, inputs))
                else:
                    times.setdefault(name, []).append(timed(training_step(module, inputs[0]), inputs))
        row[mode] = {
            name: {"median": statistics.median(t), "low": min(t), "rounds": t} for name, t in times.items()
        }
    return row


def timed(step: Callable[..., object], inputs: list[Inputs]) -> float:
    """Seconds a call: enough calls for 20 ms, after a warm-up that also finds out how many those are."""
    milliseconds_a_call(step, inputs, 3)
    each = milliseconds_a_call(step, inputs, 5)
    return milliseconds_a_call(step, inputs, max(10, min(2000, int(20 / max(each, 1e-3))))) / 1e3


def text(report: dict[str, Any]) -> str:
    blocks = [f"{report['op']} on {report['device']}, torch {report['torch']}, CUDA {report['cuda']}"]
    columns = list(dict.fromkeys(name for row in report["rows"] for name in row["errors"]))
    for mode in ("inference", "training"):
        lines = []
        for row in report["rows"]:
            medians = {name: entry["median"] for name, entry in row[mode].items()}
            ours = min((t for name, t in medians.items() if name.startswith("interfuse")), default=None)
            theirs = min((t for name, t in medians.items() if not name.startswith("interfuse")), default=None)
            ratio = f"{theirs / ours:.2f}x" if ours and theirs else "-"
            cells = [milliseconds(medians[name]) if name in medians else "-" for name in columns]
            lines.append([f"{row['case']} {row['dtype']}", *cells, ratio])
        blocks.append(f"{mode.capitalize()}, ms\n" + table(["case", *columns, "ratio"], lines))
    for row in report["rows"]:
        blocks += [
            f"not timed: {row['case']} {row['dtype']}, {name}: {why}" for name, why in row["missing"].items()
        ]
    return "\n\n".join(blocks)


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(
        prog="python -m interfuse.bench.gpu", description=(__doc__ or "").split("\n")[0]
    )
    options.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder for the JSON")
    options.add_argument("--op", action="append", choices=OPS, help="not all of them")
    options.add_argument("--case", action="append", help="not the bars' rows; with one --op")
    options.add_argument("--json", action="store_true", help="print JSON instead of text")
    arguments = options.parse_args(argv)
    if not torch.cuda.is_available():
        print("There is no CUDA device that torch can use here, so nothing was timed.", file=sys.stderr)
        return 2
    ops = arguments.op or OPS
    if arguments.case and len(ops) > 1:
        options.error("--case names rows of one op; add --op.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for op in ops:
        report = run(op, arguments.case)
        (arguments.out / f"bench_gpu_{op}.json").write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(report, indent=1) if arguments.json else text(report))
    return 0


def run(op: str, cases: Sequence[str] | None) -> dict[str, Any]:
    bench = importlib.import_module(f"interfuse.bench.{op}")
    only_here = getattr(bench, "gpu_names", list)()
    cases = cases or [*bench.names(further=False, quick=False), *only_here]
    rows = []
    with Progress(len(cases) * len(DTYPES) * 6) as progress:
        for name in cases:
            for dtype in DTYPES:
                torch.compiler.reset()
                rows.append(measure(bench.workload(name), dtype, progress.step))
    return {
        "op": op,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rows": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
