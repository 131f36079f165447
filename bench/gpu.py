"""interfuse's kernels on a CUDA device against torch's: eager, compiled, and as CUDA graphs.

    python -m interfuse.bench.gpu [--op rnn] [--case NAME] [--out out] [--json]

Times are CUDA events around a run of calls whose inputs rotate through more memory than the L2 cache holds,
so that no call finds its input there because the last one left it. The providers run in one process, in turn:
on a GPU they share no thread pools. `--device cpu` goes through the same motions without a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from interfuse.bench import peers
from interfuse.bench.gpu_peers import prepared, providers, rotating, training_step
from interfuse.bench.roofline import Cost, Peak

from interfuse.terminal import Progress, milliseconds, table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from interfuse.bench.gpu_peers import Inputs, Provider
    from interfuse.bench.peers import Workload
    from torch import Tensor, nn

OPS = ("conv_pool", "linear", "rnn", "attention", "sdpa", "losses", "models")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MODES = ("inference", "training")


class Pace(NamedTuple):
    """How long a run of calls is timed, how many calls at least and at most, and how many runs."""

    seconds: float
    least: int
    most: int
    rounds: int


PACES = {"cuda": Pace(0.02, 10, 2000, 5), "cpu": Pace(0, 1, 1, 1)}
WRONG = {
    torch.float32: 5e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}  # in float32 cuDNN uses TF32


def seconds_of(calls: Sequence[Callable[[], object]], count: int, device: str) -> float:
    """Of `count` calls, in turn."""
    if device == "cpu":
        start = time.perf_counter()
        for i in range(count):
            calls[i % len(calls)]()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for i in range(count):
        calls[i % len(calls)]()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def timed(calls: Sequence[Callable[[], object]], device: str) -> float:
    """Seconds a call, after a warm-up that also finds out how many calls make a run."""
    pace = PACES[device]
    seconds_of(calls, min(3, pace.most), device)
    count = min(5, pace.most)
    each = seconds_of(calls, count, device) / count
    count = max(pace.least, min(pace.most, int(pace.seconds / max(each, 1e-6))))
    return seconds_of(calls, count, device) / count


def peaks(device: str) -> dict[torch.dtype, Peak]:
    """By dtype: a large matrix product, and a copy that counts what it reads and what it writes."""
    n, megabytes = (8192, 2048) if device == "cuda" else (512, 64)
    source = torch.randn(megabytes << 18, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * 4 / timed([lambda: target.copy_(source)], device)
    found = {}
    for dtype in DTYPES.values():
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        found[dtype] = Peak(
            0, 2 * n**3 / timed([lambda a=a, b=b: a @ b], device), moved,  # type: ignore[misc]
            f"torch's product of {n} x {n} matrices (in float32, TF32 is "
            f"{'' if torch.backends.cuda.matmul.allow_tf32 else 'not '}allowed); copying {megabytes} MiB",
        )  # fmt: skip
    return found


def bound(cost: Cost, dtype: torch.dtype, peak: Peak) -> dict[str, Any]:
    """What no version could beat by much. A cost's bytes are those of float32."""
    moved = cost.bytes * dtype.itemsize // 4
    compute, memory = cost.operations / peak.operations, moved / peak.bytes
    return {
        "operations": cost.operations,
        "bytes": moved,
        "seconds": max(compute, memory),
        "by": "operations" if compute >= memory else "bytes",
    }


def measure(load: Workload, dtype: torch.dtype, device: str, peak: Peak) -> dict[str, Any]:
    exact = rotating(load, torch.float64, False, device)[0]
    truth = load.module().double().to(device)(*exact).detach()
    row: dict[str, Any] = {
        "case": load.name,
        "dtype": str(dtype).removeprefix("torch."),
        "roofline": {mode: bound(load.cost(mode == "training"), dtype, peak) for mode in MODES},
        "missing": {},
    }
    ready: dict[str, Ready] = {}
    for provider in providers(load, dtype, device):
        _note(
            row["missing"], provider.name, lambda p=provider: _get_ready(p, load, dtype, device, truth, ready)
        )  # type: ignore[misc]
    row["errors"] = {name: one.error for name, one in ready.items()}
    for mode in MODES:
        row[mode] = _times(mode, ready, row["missing"], device, truth)
    return row


class Ready(NamedTuple):
    provider: Provider
    module: nn.Module
    inputs: list[Inputs]
    dtype: torch.dtype
    error: float


def _note(missing: dict[str, str], name: str, attempt: Callable[[], None]) -> None:
    """Whatever a provider raises is why it is missing, and is printed."""
    try:
        attempt()
    except Exception as failure:
        missing[name] = _in_short(failure)


def _in_short(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".splitlines()[0][:300]


def _get_ready(
    provider: Provider,
    load: Workload,
    dtype: torch.dtype,
    device: str,
    truth: Tensor,
    ready: dict[str, Ready],
) -> None:
    inputs = rotating(load, dtype, provider.channels_last, device)
    module = provider.make()
    with torch.no_grad(), provider.around():
        error = _checked(module(*inputs[0]), truth, dtype)
    ready[provider.name] = Ready(provider, module, inputs, dtype, error)


def _checked(y: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    error = peers.relative_error(y, truth)
    if not error <= WRONG[dtype]:
        raise ValueError(f"its output is wrong: relative error {error:.1e} from float64.")
    return error


def _times(
    mode: str, ready: dict[str, Ready], missing: dict[str, str], device: str, truth: Tensor
) -> dict[str, Any]:
    calls: dict[str, list[Callable[[], Any]]] = {}

    def get_calls(name: str, one: Ready) -> None:
        with torch.set_grad_enabled(mode == "training"), one.provider.around():
            step = one.module if mode == "inference" else training_step(one.module, one.inputs[0])
            its = prepared(one.provider, step, one.inputs)
            if mode == "inference":  # also as it is timed: a graph may have captured something else
                _checked(its[0](), truth, one.dtype)
        calls[name] = its

    for name, one in ready.items():
        _note(missing, f"{name} ({mode})", lambda name=name, one=one: get_calls(name, one))  # type: ignore[misc]
    times: dict[str, list[float]] = {}
    with torch.set_grad_enabled(mode == "training"):
        for _ in range(PACES[device].rounds):
            for name, its in calls.items():
                times.setdefault(name, []).append(timed(its, device))
    return {name: {"median": statistics.median(t), "low": min(t), "rounds": t} for name, t in times.items()}


def text(report: dict[str, Any]) -> str:
    blocks = [f"{report['op']} on {report['device']}, torch {report['torch']}, CUDA {report['cuda']}"]
    columns = list(dict.fromkeys(name for row in report["rows"] for name in row["errors"]))
    for mode in MODES:
        lines = []
        for row in report["rows"]:
            medians = {name: entry["median"] for name, entry in row[mode].items()}
            ours = min((t for name, t in medians.items() if name.startswith("interfuse")), default=None)
            theirs = min((t for name, t in medians.items() if not name.startswith("interfuse")), default=None)
            ratio = f"{theirs / ours:.2f}x" if ours and theirs else "-"
            floor = row["roofline"][mode]
            share = f"{floor['seconds'] / ours:.0%} by {floor['by']}" if ours else "-"
            cells = [milliseconds(medians[name]) if name in medians else "-" for name in columns]
            lines.append([f"{row['case']} {row['dtype']}", *cells, ratio, share])
        header = ["case", *columns, "ratio", "of the roofline"]
        blocks.append(f"{mode.capitalize()}, ms\n" + table(header, lines))
    for row in report["rows"]:
        blocks += [
            f"not timed: {row['case']} {row['dtype']}, {name}: {why}" for name, why in row["missing"].items()
        ]
    return "\n\n".join(blocks)


def versions(device: str) -> dict[str, Any]:
    try:
        import triton

        of_triton = triton.__version__
    except ImportError:
        of_triton = None
    found = {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda, "triton": of_triton}
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["cudnn"] = torch.backends.cudnn.version()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split(
                "\n"
            )[0]
        except (OSError, subprocess.CalledProcessError) as failure:
            found["driver"] = f"unknown: {_in_short(failure)}"
    return found


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(
        prog="python -m interfuse.bench.gpu", description=(__doc__ or "").split("\n")[0]
    )
    options.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder for the JSON")
    options.add_argument("--op", action="append", choices=OPS, help="not all of them")
    options.add_argument("--case", action="append", help="not the bars' rows; with one --op")
    options.add_argument("--dtype", action="append", choices=DTYPES, help="not all three")
    options.add_argument("--device", choices=PACES, default="cuda", help="cpu: a rehearsal, without a GPU")
    options.add_argument("--json", action="store_true", help="print JSON instead of text")
    arguments = options.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device that torch can use here, so nothing was timed.", file=sys.stderr)
        return 2
    ops = arguments.op or OPS
    if arguments.case and len(ops) > 1:
        options.error("--case names rows of one op; add --op.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    peak = peaks(arguments.device)
    for op in ops:
        file = arguments.out / f"bench_gpu_{op}.json"
        dtypes = [DTYPES[name] for name in arguments.dtype or DTYPES]
        report = run(op, arguments.case, dtypes, arguments.device, peak, file)
        print(json.dumps(report, indent=1) if arguments.json else text(report), flush=True)
    return 0


def run(
    op: str,
    cases: Sequence[str] | None,
    dtypes: Sequence[torch.dtype],
    device: str,
    peak: dict[torch.dtype, Peak],
    file: pathlib.Path,
) -> dict[str, Any]:
    """The file is written after every row: what was measured is there if the machine's time runs out."""
    bench = importlib.import_module(f"interfuse.bench.{op}")
    only_here = getattr(bench, "gpu_names", list)()
    cases = cases or [*bench.names(further=False, quick=False), *only_here]
    of_device = {str(dtype).removeprefix("torch."): vars(p) for dtype, p in peak.items()}
    report: dict[str, Any] = {"op": op, **versions(device), "peaks": of_device, "rows": []}
    with Progress(len(cases) * len(dtypes)) as progress:
        for name in cases:
            for dtype in dtypes:
                torch.compiler.reset()
                load = bench.workload(name)
                report["rows"].append(measure(load, dtype, device, peak[dtype]))
                file.write_text(json.dumps(report, indent=1) + "\n")
                progress.step(f"{name} {str(dtype).removeprefix('torch.')}")
    return report


if __name__ == "__main__":
    sys.exit(main())
