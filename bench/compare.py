"""One comparison: every case, every provider in its own process, rounds interleaved, medians as ratios."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from interfuse.bench import noise, peers, roofline, workers

import interfuse
from interfuse import _native

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Settings:
    threads: int
    rounds: int = 5
    seconds: float = 0.15  # of timing for one provider in one round
    patience: int = 3  # how often a figure is taken again while others use the machine
    training: bool = True
    kept_heap: bool = True  # time torch's providers a second time with a malloc that keeps its memory
    providers: tuple[str, ...] = ("interfuse", "eager")  # those of the op's PROVIDERS that are wanted

    def specs(self, op: str, case: str) -> list[workers.Spec]:
        """One worker for each provider, and a second one where malloc's habit may be what is measured."""
        plain = [workers.Spec(op, case, name, self.threads) for name in self.providers]
        if not self.kept_heap:
            return plain
        kept = [
            dataclasses.replace(spec, keep_heap=True)
            for spec in plain
            if peers.PROVIDERS[spec.provider].package == "torch" or spec.provider == "interfuse"
        ]
        return plain + kept


Report = dict[str, Any]
Tick = Callable[[str], None]
Answered = list[tuple[Any, dict[str, Any]]]  # workers, or what stands for them here, with their answers


def run(op: str, cases: Sequence[str], settings: Settings, tick: Tick = lambda label: None) -> Report:
    """The report of a whole comparison; `tick` hears of every finished part (see `parts`)."""
    module = importlib.import_module(f"interfuse.bench.{op}")
    together = getattr(module, "TOGETHER", False)
    settings = dataclasses.replace(settings, kept_heap=settings.kept_heap and not together)
    peak = roofline.measure(settings.threads)
    tick("machine peak")
    report: Report = {
        "schema": SCHEMA,
        "op": op,
        "machine": roofline.machine(),
        "versions": {"interfuse": interfuse.__version__, "torch": torch.__version__},
        "isa": _native.info()["isa"],
        "peak": dataclasses.asdict(peak),
        "settings": dataclasses.asdict(settings),
        "together": together,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            truth = os.path.join(folder, f"{case}.pt")
            torch.save(peers.truth(module.workload(case), settings.training), truth)
            start = here if together else workers.started
            report["rows"].append(compare(op, case, truth, settings, peak, report["versions"], start, tick))
    # A whole model has no single call of the core to set itself against.
    case = getattr(module, "OVERHEAD_CASE", None)
    report["overhead"] = {} if case is None else overhead(op, case, settings)
    report["summary"] = summary(report["rows"])
    return report


def parts(cases: int, settings: Settings) -> int:
    """How often `run` calls its tick."""
    return 1 + cases * (2 + settings.rounds * (2 if settings.training else 1))


def compare(
    op: str,
    case: str,
    truth: str,
    settings: Settings,
    peak: roofline.Peak,
    versions: dict[str, str],
    start: Callable[..., contextlib.AbstractContextManager[Answered]],
    tick: Tick,
) -> Report:
    workload = importlib.import_module(f"interfuse.bench.{op}").workload(case)
    row: Report = {"case": case, **workload.describe(), "missing": {}, "errors": {}}
    commands = [{"do": "build", "truth": truth, "train": settings.training}]
    specs = []
    for spec in settings.specs(op, case):
        reason = peers.PROVIDERS[spec.provider].why_not(workload)
        if reason:  # a process would take seconds to say the same
            row["missing"][spec.provider] = reason
        else:
            specs.append(spec)
    with start(specs, commands) as started:
        tick(f"{case}: built")
        able: list[Any] = []
        for worker, answer in started:
            name = worker.spec.provider
            reason = answer.get("why_not") or answer.get("failed")
            if reason:
                row["missing"][name] = reason
                continue
            able.append(worker)
            versions[peers.PROVIDERS[name].package] = answer["version"]
            row["errors"].setdefault(name, answer["errors"])
        modes = ["inference", "training"] if settings.training else ["inference"]
        for mode in modes:
            trains = [w for w in able if mode == "inference" or peers.PROVIDERS[w.spec.provider].trains]
            times = interleaved(
                trains, mode, settings, row["missing"], lambda r, m=mode: tick(f"{case}: {m} {r}")
            )
            cost = workload.cost(training=mode == "training")
            row[mode] = {"others": disturbance(times), **judged(times, cost, peak)}
    if settings.training and start is workers.started:
        row["memory"] = memory(op, case, settings)
    tick(f"{case}: memory")
    return row


@dataclasses.dataclass
class Here:
    """A provider in this very process, where all run on torch's threads and none spins beside another."""

    spec: workers.Spec
    session: peers.Session

    def ask(self, **command: Any) -> dict[str, Any]:
        return self.session.command(command)


@contextlib.contextmanager
def here(specs: Sequence[workers.Spec], commands: Sequence[dict[str, Any]]) -> Iterator[Answered]:
    """What `workers.started` gives, without processes of their own."""
    found: Answered = []
    for spec in specs:
        workload = importlib.import_module(f"interfuse.bench.{spec.op}").workload(spec.case)
        session = peers.Session(workload, peers.PROVIDERS[spec.provider], spec.threads)
        answer = session.prepare()
        for command in commands:
            answer |= session.command(command)
        found.append((Here(spec, session), answer))
    yield found


def interleaved(
    able: Iterable[Any], mode: str, settings: Settings, missing: dict[str, str], tick: Tick
) -> dict[str, dict[str, Any]]:
    """{provider: {"default" or "kept_heap": spread of the rounds' medians}}, every provider once a round."""
    rounds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    able = list(able)
    for turn in range(settings.rounds):
        # Each round starts with another provider, so that none always runs behind the same one.
        for worker in [*able[turn % max(1, len(able)) :], *able[: turn % max(1, len(able))]]:
            name, heap = worker.spec.provider, "kept_heap" if worker.spec.keep_heap else "default"
            if name in missing:
                continue
            answer = noise.ask(worker, settings.patience, do=mode, seconds=settings.seconds)
            if "failed" in answer:
                missing[name] = answer["failed"]
                continue
            rounds.setdefault((name, heap), []).append(answer)
        tick(f"round {turn + 1}")
    times: dict[str, dict[str, Any]] = {}
    for (name, heap), answers in rounds.items():
        times.setdefault(name, {})[heap] = {
            **roofline.spread([answer["median"] for answer in answers]),
            "others": [answer["others"] for answer in answers],
        }
    return times


def disturbance(times: dict[str, dict[str, Any]]) -> float | None:
    """The share of the machine that others had while the most disturbed provider was timed."""
    shares = [entry["others"] for heaps in times.values() for entry in heaps.values()]
    if not shares or any(share is None for rounds in shares for share in rounds):
        return None
    return max(statistics.median(rounds) for rounds in shares)


def judged(times: dict[str, dict[str, Any]], cost: roofline.Cost, peak: roofline.Peak) -> Report:
    """The best peer in its better variant against interfuse as it is installed, under malloc's defaults."""
    result: Report = {"times": times}
    theirs = {
        (name, heap): values["median"]
        for name, heaps in times.items()
        if not peers.PROVIDERS[name].ours
        for heap, values in heaps.items()
    }
    if theirs:
        best = min(theirs, key=lambda key: theirs[key])
        result["best_peer"] = {"provider": best[0], "heap": best[1], "median": theirs[best]}
    if "interfuse" in times:
        median = times["interfuse"]["default"]["median"]
        result["roofline"] = peak.roofline(cost, median)
        if theirs:
            result["ratio"] = min(theirs.values()) / median
    return result


def memory(op: str, case: str, settings: Settings) -> Report:
    """Peak extra memory of one training step, for us and for both forms of eager, each in a fresh process."""
    names = [name for name in ("interfuse", "eager", "channels_last") if name in settings.providers]
    specs = [workers.Spec(op, case, name, settings.threads) for name in names]
    with workers.started(specs, [{"do": "memory"}]) as started:
        return {worker.spec.provider: answer for worker, answer in started}


def overhead(op: str, case: str, settings: Settings) -> Report:
    """What a call costs beside its kernel, in a process of its own."""
    with workers.started([workers.Spec(op, case, "interfuse", settings.threads)], []) as started:
        worker, answer = started[0]
        if not {"why_not", "failed"} & answer.keys():
            answer = noise.ask(worker, settings.patience, do="overhead", seconds=10 * settings.seconds)
        return {"case": case, **answer}


def summary(rows: Sequence[Report]) -> Report:
    """Geometric means over the rows that carry the bars, by mode."""
    means: Report = {}
    for mode in ("inference", "training"):
        ratios = [row[mode]["ratio"] for row in rows if row["bar"] and "ratio" in row.get(mode, {})]
        if ratios:
            means[mode] = {
                "geometric_mean": geometric_mean(ratios),
                "lowest": min(ratios),
                "rows": len(ratios),
            }
    return means


def geometric_mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).log().mean().exp())
