"""The command line: `interfuse doctor`, `demo`, `bench OP` and `explain TARGET`."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


OPS = ("conv_pool", "linear", "rnn", "attention", "losses", "models", "zoo")  # those with a file in bench/


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return int(arguments.run(arguments))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="interfuse", description="Fused kernels for multimodal models in PyTorch."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor", help="versions, instruction sets, threads, and back ends with reasons"
    )
    doctor.set_defaults(run=run_doctor)

    demo = commands.add_parser("demo", help="CNN blocks and fusion models in torch and in interfuse")
    demo.add_argument("--size", type=int, default=224, help="height and width of the images (default 224)")
    demo.add_argument("--batch", type=int, default=8, help="images at once (default 8)")
    demo.add_argument("--seconds", type=float, default=0.5, help="of timing for each figure (default 0.5)")
    demo.add_argument("--quick", action="store_true", help="hardly any training: shows that it works")
    demo.set_defaults(run=run_demo)

    bench = commands.add_parser("bench", help="an op, or whole models, against the peers that are installed")
    bench.add_argument("op", nargs="?", choices=OPS, default=OPS[0], help="default: the first")
    bench.add_argument(
        "--check", action="store_true", help="exit with status 1 where a bar is missed, and name it"
    )
    bench.add_argument("--all", action="store_true", help="the further rows too, not only those with bars")
    bench.add_argument(
        "--quick", action="store_true", help="tiny cases and little timing: shows that it works"
    )
    bench.add_argument(
        "--sweep", action="store_true", help="instead: is any class slower than torch's own modules?"
    )
    bench.add_argument("--case", action="append", metavar="NAME", help="only this case (may be repeated)")
    bench.add_argument(
        "--provider", action="append", metavar="NAME", help="only this provider (may be repeated)"
    )
    bench.add_argument("--inference-only", action="store_true", help="leave training and its memory out")
    bench.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    bench.add_argument(
        "--patience", type=int, default=3, help="takes a figure again so often while others use the machine"
    )
    bench.set_defaults(run=run_bench)

    explain = commands.add_parser("explain", help="what becomes of each part of a model, and why")
    explain.add_argument(
        "target",
        metavar="TARGET",
        help="package.module:name or path/to/script.py:name, a model or what gives one when it is called",
    )
    explain.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SIZES",
        help="an argument of the model, as 1x3x64x64 or 1x20:int64 (may be repeated); with them "
        "each site is verified and timed",
    )
    explain.set_defaults(run=run_explain)

    for command in (demo, bench):
        command.add_argument("--threads", type=int, help="default: the physical cores of this machine")
        command.add_argument(
            "--out",
            type=pathlib.Path,
            default=pathlib.Path("out"),
            help="folder for JSON and plot (default out/)",
        )
    for command in (doctor, demo, bench, explain):
        command.add_argument("--json", action="store_true", help="print JSON instead of text")
    return top


def run_doctor(arguments: argparse.Namespace) -> int:
    from interfuse import doctor

    found = doctor.examine()
    print(json.dumps(found, indent=1) if arguments.json else doctor.text(found))
    return 1 if doctor.problems(found) else 0


def run_demo(arguments: argparse.Namespace) -> int:
    from interfuse import demo

    return demo.run(
        size=arguments.size,
        batch=arguments.batch,
        seconds=arguments.seconds,
        threads=arguments.threads,
        out=arguments.out,
        as_json=arguments.json,
        quick=arguments.quick,
    )


def run_bench(arguments: argparse.Namespace) -> int:
    import importlib

    from interfuse.bench import compare, report, roofline
    from interfuse.terminal import Progress

    if arguments.quick and arguments.check:
        print(
            "--check judges real timings, which --quick does not make; leave one of them out.",
            file=sys.stderr,
        )
        return 2
    op = importlib.import_module(f"interfuse.bench.{arguments.op}")
    if arguments.sweep:
        return run_sweep(arguments, op)
    cases = choose(
        "case", op.names(arguments.all, arguments.quick), op.names(True, arguments.quick), arguments.case
    )
    providers = choose("provider", list(op.PROVIDERS), list(op.PROVIDERS), arguments.provider)
    if cases is None or providers is None:
        return 2
    settings = compare.Settings(
        threads=arguments.threads or roofline.machine()["cores"],
        rounds=2 if arguments.quick else arguments.rounds,
        seconds=0.02 if arguments.quick else 0.15,
        patience=0 if arguments.quick else arguments.patience,
        training=not arguments.inference_only,
        kept_heap=not arguments.quick,
        providers=tuple(providers),
    )
    with Progress(compare.parts(len(cases), settings)) as progress:
        result = compare.run(arguments.op, cases, settings, progress.step)
    bars = [] if arguments.quick else op.bars(result)
    result["bars"] = [{"name": b.name, "limit": b.limit, "measured": b.measured, "met": b.met} for b in bars]
    stem = arguments.out / f"bench_{arguments.op}"
    report.save_json(result, stem.with_suffix(".json"))
    no_plot = report.save_plot(result, stem.with_suffix(".png"))
    print(json.dumps(result, indent=1) if arguments.json else report.text(result, bars))
    print(no_plot or f"Wrote {stem}.json and {stem}.png.", file=sys.stderr)
    missed = [bar for bar in bars if not bar.met]
    for bar in missed if arguments.check else []:
        print(bar.sentence(), file=sys.stderr)
    return 1 if arguments.check and missed else 0


def run_sweep(arguments: argparse.Namespace, op: Any) -> int:
    from interfuse.bench import roofline, sweep

    if not hasattr(op, "sweep_rows"):
        print(f"{arguments.op} has no sweep; leave --sweep out.", file=sys.stderr)
        return 2
    names = [case.name for case in op.cases.SWEEP]
    if choose("case", names, names, arguments.case) is None:
        return 2
    threads = arguments.threads or roofline.machine()["cores"]
    found = list(op.sweep_rows(arguments.case, arguments.quick, not arguments.inference_only, threads))
    print(json.dumps([vars(row) for row in found], indent=1) if arguments.json else sweep.text(found))
    return 1 if arguments.check and any(row.slower for row in found) else 0


def run_explain(arguments: argparse.Namespace) -> int:
    import dataclasses

    from interfuse import named_model

    try:
        found = named_model.explanation(arguments.target, arguments.input)
    except named_model.NotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    rows = [dataclasses.asdict(row) | {"verdict": row.verdict} for row in found.rows]
    as_json = {"model": found.model, "fused": len(found.fused), "rows": rows}
    print(json.dumps(as_json, indent=1) if arguments.json else found)
    return 0


def choose(kind: str, default: list[str], known: list[str], asked: list[str] | None) -> list[str] | None:
    """The names asked for, or the default; None, with a sentence on stderr, where one does not exist."""
    for name in asked or []:
        if name not in known:
            print(f"There is no {kind} '{name}'; there are: {', '.join(known)}.", file=sys.stderr)
            return None
    return asked or default


if __name__ == "__main__":
    sys.exit(main())
