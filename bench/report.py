"""Turns a comparison into text, a plot, a JSON file, and the list of bars that it meets or misses."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from interfuse.bench import noise, peers

from interfuse.terminal import milliseconds, table

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Sequence

Report = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Bar:
    """One promise and what was measured. `measured` is None where the run did not measure it."""

    name: str
    limit: float
    measured: float | None
    at_least: bool

    @property
    def met(self) -> bool:
        if self.measured is None or math.isnan(self.measured):
            return False
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def sentence(self) -> str:
        wanted = f"{'at least' if self.at_least else 'at most'} {self.limit:g}"
        got = "not measured" if self.measured is None else f"measured {self.measured:.3g}"
        return f"{'met   ' if self.met else 'MISSED'}  {self.name}: {wanted}, {got}."


def text(report: Report, bars: Sequence[Bar] = ()) -> str:
    blocks = [heading(report)]
    for title, wanted in (("", True), (" (further rows, without bars)", False)):
        rows = [row for row in report["rows"] if row["bar"] is wanted]
        for mode in ("inference", "training"):
            with_mode = [row for row in rows if row.get(mode, {}).get("times")]
            if with_mode:
                blocks.append(f"{mode.capitalize()}{title}, ms\n{timings(with_mode, mode)}")
    blocks += [
        block
        for block in (verdict(report), missing(report), rooflines(report), memory(report), errors(report))
        if block
    ]
    if "overhead" in report.get("overhead", {}):
        blocks.append(overhead(report["overhead"]))
    noise = disturbed(report)
    if noise:
        blocks.append(noise)
    if bars:
        blocks.append("Bars\n" + "\n".join(bar.sentence() for bar in bars))
    return "\n\n".join(blocks)


def heading(report: Report) -> str:
    machine, peak, settings = report["machine"], report["peak"], report["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(report["versions"].items()))
    alone = "All ran in one process" if report["together"] else "Every provider ran alone in its own process"
    return (
        f"{report['op']} on {machine['processor']} ({machine['cores']} cores: {' '.join(machine['flags'])}), "
        f"{settings['threads']} threads, interfuse's instruction set: {report['isa']}\n"
        f"{versions}\n"
        f"machine peak: {peak['operations'] / 1e9:.0f} GFLOP/s, {peak['bytes'] / 1e9:.0f} GB/s "
        f"({peak['method']})\n"
        f"{alone}; medians of {settings['rounds']} interleaved rounds. "
        "cl: channels_last.\n"
        "a|b: under malloc's defaults | with a malloc that keeps its memory."
    )


def short(name: str) -> str:
    return name.replace("channels_last", "cl")


def timings(rows: Sequence[Report], mode: str) -> str:
    names = [name for name in peers.PROVIDERS if any(name in row[mode]["times"] for row in rows)]
    lines = []
    for row in rows:
        cells = [cell(row[mode]["times"].get(name)) for name in names]
        best = short(row[mode].get("best_peer", {}).get("provider", "none"))
        lines.append([row["case"], row["kernel"], *cells, best, ratio(row[mode].get("ratio"))])
    return table(["case", "kernel", *map(short, names), "best peer", "ratio"], lines, left=2)


def rooflines(report: Report) -> str:
    lines = [
        [
            row["case"],
            mode,
            f"{roof['operations'] / 1e9:.2f}",
            f"{roof['bytes'] / 1e6:.1f}",
            f"{roof['operations_per_second'] / 1e9:.0f}",
            f"{roof['share_of_peak_operations']:.0%}",
            f"{roof['bytes_per_second'] / 1e9:.1f}",
            f"{roof['share_of_peak_bandwidth']:.0%}",
            roof["bound"],
        ]
        for row in report["rows"]
        for mode in ("inference", "training")
        if (roof := row.get(mode, {}).get("roofline"))
    ]
    header = ["case", "", "GFLOP", "MB", "GFLOP/s", "of peak", "GB/s", "of peak", "bound by"]
    return (
        "Roofline: operations of the direct algorithm, bytes moved once, and what interfuse made of them\n"
        + table(header, lines, left=2)
        if lines
        else ""
    )


def cell(heaps: dict[str, Any] | None) -> str:
    if not heaps:
        return "-"
    return "|".join(milliseconds(heaps[heap]["median"]) for heap in ("default", "kept_heap") if heap in heaps)


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x" if value >= 1 else f"{value:.2f}x LOSS"


def verdict(report: Report) -> str:
    lines = []
    for mode in ("inference", "training"):
        judged = [(row["case"], row[mode]["ratio"]) for row in report["rows"] if "ratio" in row.get(mode, {})]
        lost = [f"{case} ({value:.2f}x)" for case, value in judged if value < 1]
        if judged:
            lines.append(
                f"{mode}: faster than the best peer on {len(judged) - len(lost)} of {len(judged)} rows"
                + (f"; slower on {', '.join(lost)}." if lost else ".")
            )
        mean = report["summary"].get(mode)
        if mean:
            lines.append(f"{mode}: geometric mean over the rows with bars {mean['geometric_mean']:.2f}x.")
    return "\n".join(lines)


def disturbed(report: Report) -> str:
    shares = [
        f"{row['case']} {mode} ({row[mode]['others']:.0%})"
        for row in report["rows"]
        for mode in ("inference", "training")
        if (row.get(mode, {}).get("others") or 0) > noise.TOO_MUCH
    ]
    if not shares:
        return ""
    return f"DISTURBED: others used the machine meanwhile, so do not quote these rows: {', '.join(shares)}."


def missing(report: Report) -> str:
    """Each absent provider once, with the cases it is absent from."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in report["rows"]:
        for name, reason in row["missing"].items():
            reasons.setdefault((name, reason), []).append(row["case"])
    lines = []
    for (name, reason), cases in reasons.items():
        where = "every case" if len(cases) == len(report["rows"]) else ", ".join(cases)
        lines.append(f"  {name} ({where}): {reason}")
    return "Not timed\n" + "\n".join(lines) if lines else ""


def memory(report: Report) -> str:
    rows = [
        row for row in report["rows"] if any("first" in entry for entry in row.get("memory", {}).values())
    ]
    if not rows:
        return ""
    names = list(rows[0]["memory"])
    lines = [
        [row["case"], *(megabytes(row["memory"].get(name, {})) for name in names), share_of_eager(row)]
        for row in rows
    ]
    return "Peak extra memory of a training step, MB (first step | a later one)\n" + table(
        ["case", *names, "share of eager's"], lines
    )


def megabytes(entry: dict[str, Any]) -> str:
    return f"{entry['first'] / 1e6:.1f}|{entry['later'] / 1e6:.1f}" if "first" in entry else "-"


def speedup(row: Report, mode: str, ours: str = "interfuse", theirs: Sequence[str] = ()) -> float | None:
    """How many times as long the best peer takes, of all or of those named."""
    times = row.get(mode, {}).get("times", {})
    if "default" not in times.get(ours, {}):
        return None
    named = theirs or [name for name in times if not peers.PROVIDERS[name].ours]
    others = [spread["median"] for name in named for spread in times.get(name, {}).values()]
    return float(min(others) / times[ours]["default"]["median"]) if others else None


def mean_speedup(report: Report, mode: str, names: Sequence[str]) -> float | None:
    """The geometric mean over the best peer of each row with a bar; None where one of these is missing."""
    measured = {row["case"] for row in report["rows"] if "ratio" in row.get(mode, {})}
    return report["summary"][mode]["geometric_mean"] if measured.issuperset(names) else None


def of_both(entries: dict[str, Any], what: str) -> tuple[float | None, float | None]:
    """One of the figures that a row has of each provider: ours, and eager's."""
    ours, eager = (entries.get(provider, {}).get(what) for provider in ("interfuse", "eager"))
    return ours, eager


def over_eager(entries: dict[str, Any], what: str) -> float | None:
    ours, eager = of_both(entries, what)
    return ours / eager if ours is not None and eager else None


def memory_share(row: Report) -> float | None:
    """Our larger peak over eager's smaller one."""
    entries = row.get("memory", {})
    if "first" not in entries.get("interfuse", {}) or "first" not in entries.get("eager", {}):
        return None
    ours, eager = entries["interfuse"], entries["eager"]
    return float(max(ours["first"], ours["later"]) / min(eager["first"], eager["later"]))


def share_of_eager(row: Report) -> str:
    share = memory_share(row)
    return "-" if share is None else f"{share:.2f}"


def errors(report: Report) -> str:
    rows = [row for row in report["rows"] if row["errors"]]
    names = [name for name in peers.PROVIDERS if any(name in row["errors"] for row in rows)]
    lines = [
        [row["case"], *(scientific(row["errors"].get(name, {}).get("output")) for name in names)]
        for row in rows
    ]
    if not lines:
        return ""
    return "Error of the output against float64, relative Frobenius\n" + table(
        ["case", *map(short, names)], lines
    )


def scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def overhead(entry: Report) -> str:
    return (
        f"Call overhead at batch 1 ({entry['case']}): {entry['call'] * 1e6:.2f} us for the op, "
        f"{entry['kernel'] * 1e6:.2f} us for the kernel alone, {entry['overhead'] * 1e6:.2f} us between them."
    )


def save_json(report: Report, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def save_plot(report: Report, path: pathlib.Path) -> str | None:
    """Writes a PNG of the times relative to interfuse's; the sentence why not where matplotlib is missing."""
    try:
        import matplotlib as mpl
    except ImportError:
        return "No plot was written: matplotlib is not installed; `pip install 'interfuse[bench]'` brings it."
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (mode, [row for row in report["rows"] if "roofline" in row.get(mode, {})])
        for mode in ("inference", "training")
    ]
    panels = [(mode, rows) for mode, rows in panels if rows]
    if not panels:
        return "No plot was written: interfuse was not timed on any row."
    longest = max(len(rows) for _, rows in panels)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6 * len(panels), 2 + 0.9 * longest), squeeze=False, layout="constrained"
    )
    names = [name for name in peers.PROVIDERS if name != "interfuse"]
    legend: dict[str, Any] = {}
    for axis, (mode, rows) in zip(axes[0], panels, strict=True):
        for k, name in enumerate(names):
            places, lengths = [], []
            for i, row in enumerate(rows):
                heaps = row[mode]["times"].get(name)
                if heaps:
                    best = min(entry["median"] for entry in heaps.values())
                    places.append(i + (k + 0.5) / len(names) * 0.84 - 0.42)
                    lengths.append(best / row[mode]["times"]["interfuse"]["default"]["median"] - 1)
            if places:
                bars = axis.barh(places, lengths, left=1, height=0.8 / len(names), label=name, color=f"C{k}")
                legend.setdefault(name, bars)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(range(len(rows)), [row["case"] for row in rows])
        axis.invert_yaxis()
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xlabel("its time over interfuse's (left of 1: interfuse loses)")
        axis.set_title(f"{report['op']}, {mode}, {report['settings']['threads']} threads")
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=5, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return None
