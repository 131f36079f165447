"""The benchmark's machinery: processes rest, answers are checked, losses and absences are told."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import os
import pathlib
import sys
import time
from typing import Any

import pytest
import torch
from interfuse.bench import (
    compare,
    conv_pool,
    gpu,
    losses,
    models,
    noise,
    peers,
    report,
    rnn,
    roofline,
    sweep,
    workers,
    zoo,
)

from interfuse import cli, terminal

QUICK = conv_pool.names(further=False, quick=True)[0]


def spec(provider: str, case: str = QUICK) -> workers.Spec:
    return workers.Spec("conv_pool", case, provider, threads=1)


# --- processes ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads the state of a process from /proc")
def test_a_worker_is_stopped_between_its_turns_and_gone_afterwards() -> None:
    with workers.started([spec("eager")], []) as [(worker, answer)]:
        assert answer == {"version": torch.__version__}
        pid = worker._process.pid
        assert state(pid) == "T"
        assert "failed" in worker.ask(do="inference", seconds=0.01)  # nothing was built yet
    assert not os.path.exists(f"/proc/{pid}")


def state(pid: int) -> str:
    """The letter of /proc/PID/stat, after the moment that a signal takes to arrive."""
    letter = ""
    for _ in range(100):
        letter = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if letter == "T":
            break
        time.sleep(0.01)
    return letter


def test_a_worker_that_fails_says_of_what() -> None:
    with workers.started([spec("eager", case="no-such-case")], []) as [(_, answer)]:
        assert "There is no case 'no-such-case'" in answer["failed"]


def test_a_worker_whose_process_dies_says_so() -> None:
    with workers.started([spec("eager")], []) as [(worker, _)]:
        worker._process.kill()
        worker._process.wait()
        assert "ended with code -9" in worker.ask(do="inference", seconds=0.01)["failed"]


def test_kept_heap_reaches_the_process_and_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert "MALLOC_TRIM_THRESHOLD_" not in spec("eager").environment()
    kept = workers.Spec("conv_pool", QUICK, "eager", threads=1, keep_heap=True).environment()
    assert int(kept["MALLOC_TRIM_THRESHOLD_"]) > 1 << 30


def test_sample_groups_short_calls_and_counts_them() -> None:
    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1

    timed = workers.sample(step, 0.01)
    assert 0 < timed["low"] <= timed["median"] < 1e-4
    assert 100 < timed["calls"] < calls


# --- noise -------------------------------------------------------------------------------------------------


class Scripted:
    """A worker whose answers and whose machine's counters are made up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, others: list[int]) -> None:
        self.asked, self.others = 0, others
        self.counters = (0, 0)
        monkeypatch.setattr(noise, "ticks", lambda: self.counters)
        monkeypatch.setattr(noise.time, "sleep", lambda seconds: None)

    def ask(self, **command: object) -> dict[str, float]:
        used = self.others[self.asked]
        self.asked += 1
        self.counters = (self.counters[0] + 100 - used, self.counters[1] + used)
        return {"median": float(self.asked), "cpu": 0.0}


def test_a_disturbed_figure_is_taken_again_until_it_is_calm(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Scripted(monkeypatch, [60, 40, 5, 0])
    answer = noise.ask(worker, patience=3, do="inference")  # type: ignore[arg-type]
    assert (answer["median"], answer["others"], worker.asked) == (3.0, 0.05, 3)


def test_patience_ends_with_the_least_disturbed_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Scripted(monkeypatch, [60, 40, 50])
    answer = noise.ask(worker, patience=2, do="inference")  # type: ignore[arg-type]
    assert (answer["median"], answer["others"], worker.asked) == (2.0, 0.4, 3)


def test_ones_own_work_is_no_noise() -> None:
    second = os.sysconf("SC_CLK_TCK")
    assert noise.share_of_others((0, 0), (second, 3 * second), own_seconds=3.0) == 0
    assert noise.share_of_others((0, 0), (second, 3 * second), own_seconds=1.0) == 0.5


@pytest.mark.skipif(sys.platform != "linux", reason="reads the machine's counters from /proc")
def test_the_machines_counters_grow() -> None:
    before = noise.ticks()
    time.sleep(0.1)
    after = noise.ticks()
    assert before is not None
    assert after is not None
    assert sum(after) > sum(before)


# --- peers -------------------------------------------------------------------------------------------------


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "onnxruntime is not installed" in str(
        peers.PROVIDERS["onnxruntime"].why_not(conv_pool.workload(QUICK))
    )
    assert peers.PROVIDERS["eager"].why_not(conv_pool.workload(QUICK)) is None


EVERY = [
    *((conv_pool, name, provider) for name in conv_pool.names(further=True, quick=True)
      for provider in ("interfuse", "interfuse_channels_last", "onnxruntime", "openvino")),
    *((rnn, name, provider) for name in rnn.names(further=False, quick=True)
      for provider in ("interfuse", "interfuse_half_weights", "onnxruntime", "openvino")),
    (rnn, "ragged-b32@tiny", "interfuse_padded"),
    *((models, name, provider) for name in ("image-text-b8@tiny", "video-audio-b4@tiny")
      for provider in ("interfuse", "interfuse_optimized", "interfuse_half_weights", "channels_last",
                       "onnxruntime", "openvino")),
    *((zoo, name, "interfuse_optimized") for name in ("crnn@tiny", "clip@tiny", "late_fusion@tiny")),
    (zoo, "film@tiny", "interfuse"),
    *((losses, name, provider) for name in losses.names(further=True, quick=True)
      for provider in ("interfuse", "torch_fused")),
]  # fmt: skip


@pytest.mark.parametrize(("op", "name", "provider"), EVERY, ids=[f"{n}-{p}" for _, n, p in EVERY])
def test_every_provider_computes_what_torch_computes(op: Any, name: str, provider: str) -> None:
    workload, chosen = op.workload(name), peers.PROVIDERS[provider]
    reason = chosen.why_not(workload)
    if reason:
        pytest.skip(reason)
    built = chosen.build(workload, 1)
    truth = peers.truth(workload, train=provider == "interfuse")
    wrong = peers.WRONG[chosen.weights or workload.dtype]
    with torch.no_grad():
        assert peers.relative_error(built.tensor(built.infer()), truth["output"]) < wrong
    if provider == "interfuse" and built.train is not None:
        for gradient, right in zip(built.train(), truth["gradients"], strict=True):
            assert peers.relative_error(gradient, right) < wrong


def test_nothing_is_timed_whose_answer_is_wrong(tmp_path: pathlib.Path) -> None:
    workload = conv_pool.workload(QUICK)
    truth = peers.truth(workload, train=False)
    truth["output"] += 1
    torch.save(truth, tmp_path / "truth.pt")
    session = peers.Session(workload, peers.PROVIDERS["eager"], torch.get_num_threads())
    assert "its output is wrong" in session.build(str(tmp_path / "truth.pt"), train=False)["failed"]


def test_an_error_with_a_nan_is_infinite() -> None:
    assert peers.relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2).double()) == float("inf")


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_peak_memory_sees_what_a_step_held_and_gave_back() -> None:
    megabytes = 64

    def step() -> None:
        block = torch.ones(megabytes << 18)  # float32
        del block

    # The kernel adds up each thread's pages in batches, hence the two megabytes of slack below.
    assert megabytes - 2 <= peers.peak_of(step) / 2**20 < megabytes + 16


# --- roofline ----------------------------------------------------------------------------------------------


def test_cost_of_a_known_case() -> None:
    first = conv_pool.workload(conv_pool.names(further=False, quick=False)[0])
    assert first.case.name == "first-224"
    cost = first.cost(training=False)
    assert cost.operations == 2 * 222 * 222 * 64 * 3 * 9
    assert cost.bytes == 4 * (3 * 224 * 224 + 64 * 27 + 64 + 64 * 111 * 111)
    assert first.cost(training=True).operations == 3 * cost.operations


def test_roofline_says_what_binds() -> None:
    peak = roofline.Peak(threads=1, operations=100.0, bytes=10.0, method="made up")
    shares = peak.roofline(roofline.Cost(operations=50, bytes=20), seconds=4.0)
    assert shares["bound"] == "bytes"
    assert shares["share_of_peak_operations"] == 0.125
    assert shares["share_of_bound"] == shares["share_of_peak_bandwidth"] == 0.5


def test_machine_peak_is_measured() -> None:
    peak = roofline.measure(1)
    assert 1e9 < peak.operations < 1e13
    assert 1e8 < peak.bytes < 1e13


def test_the_machine_is_described_without_names_or_paths() -> None:
    text = json.dumps(roofline.machine())
    assert os.uname().nodename not in text
    assert "/" not in text.replace("http://", "")


# --- reports -----------------------------------------------------------------------------------------------


def made_up(ours: float, eager: float, eager_kept: float) -> dict[str, object]:
    def spread(value: float) -> dict[str, object]:
        return {"median": value, "low": value, "high": value, "rounds": [value]}

    times = {
        "interfuse": {"default": spread(ours)},
        "eager": {"default": spread(eager), "kept_heap": spread(eager_kept)},
    }
    peak = roofline.Peak(threads=1, operations=1e9, bytes=1e9, method="made up")
    return compare.judged(times, roofline.Cost(1, 1), peak)


def test_the_better_variant_of_a_peer_counts() -> None:
    judged = made_up(ours=1.0, eager=4.0, eager_kept=2.0)
    assert judged["ratio"] == 2.0
    assert judged["best_peer"] == {"provider": "eager", "heap": "kept_heap", "median": 2.0}


def test_a_loss_is_called_a_loss() -> None:
    assert report.ratio(0.5) == "0.50x LOSS"
    rows = [{"case": "slow", "bar": True, "inference": made_up(2.0, 1.0, 1.0)}]
    text = report.verdict({"rows": rows, "summary": compare.summary(rows)})
    assert "faster than the best peer on 0 of 1 rows; slower on slow (0.50x)" in text


def test_a_disturbed_row_is_reported() -> None:
    rows = [
        {"case": "calm", "inference": {"others": 0.05}},
        {"case": "loud", "inference": {"others": 0.5}, "training": {"others": 0.01}},
        {"case": "unknown", "inference": {"others": None}},
    ]
    assert report.disturbed({"rows": rows[:1]}) == ""
    assert report.disturbed({"rows": rows}).endswith("do not quote these rows: loud inference (50%).")


@pytest.mark.parametrize(
    ("measured", "at_least", "met"),
    [(2.0, True, True), (1.9, True, False), (2.0, False, True), (2.1, False, False), (None, True, False),
     (None, False, False), (float("nan"), False, False)],
)  # fmt: skip
def test_a_bar_is_met_or_missed(measured: float | None, at_least: bool, met: bool) -> None:
    bar = report.Bar("speed", 2.0, measured, at_least)
    assert bar.met is met
    assert bar.sentence().startswith("met" if met else "MISSED")


@pytest.mark.parametrize(
    ("op", "case"),
    [("conv_pool", QUICK), ("rnn", "ragged-b32@tiny"), ("attention", "q512-kv2048-b2-ragged@tiny"),
     ("models", "image-text-b1@tiny")],
)  # fmt: skip
def test_a_quick_run_of_the_command(
    op: str, case: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", op, "--quick", "--case", case, "--threads", "1", "--out", str(tmp_path)]
    for provider in ("interfuse", "eager", "onnxruntime"):
        arguments += ["--provider", provider]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / f"bench_{op}.json").read_text())
    [row] = saved["rows"]
    assert row["case"] == case
    assert {"interfuse", "eager"} <= row["inference"]["times"].keys()
    assert {"onnxruntime"} <= row["inference"]["times"].keys() | row["missing"].keys()
    assert row["training"]["times"].keys() == {"interfuse", "eager"}
    assert 0 < row["errors"]["interfuse"]["output"] < 1e-4
    assert row["inference"]["ratio"] > 0
    for heading in ("Inference, ms", "Training, ms", "Error of the output", "machine peak"):
        assert heading.lower() in printed.lower()
    if op == "models":  # no single call of the core does what a model does
        assert saved["overhead"] == {}
    else:
        assert saved["overhead"]["call"] > 0
        assert "Call overhead" in printed


def test_the_zoo_is_compared_with_itself(tmp_path: pathlib.Path) -> None:
    arguments = ["bench", "zoo", "--quick", "--case", "vqa@tiny", "--threads", "1", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    saved = json.loads((tmp_path / "bench_zoo.json").read_text())
    bars = zoo.bars(saved)
    assert [bar.name.split(":")[0] for bar in bars] == [
        f"{mode}, optimised {way}"
        for way in ("with example inputs", "without")
        for mode in ("inference", "training")
    ]
    for bar in bars:
        assert "vqa@tiny" in bar.name
        assert bar.measured is not None
        assert bar.measured > 0
    slow = copy.deepcopy(saved["rows"][0]) | {"case": "slow"}
    slow["inference"]["times"]["interfuse_optimized"]["default"]["median"] *= 100
    saved["rows"].append(slow)
    bar = zoo.bars(saved)[2]
    assert "slow" in bar.name
    assert not bar.met
    del saved["rows"][0]["training"]
    assert [bar.met for bar in zoo.bars(saved)][1::2] == [False, False]


def test_a_quick_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "conv_pool", "--sweep", "--quick", "--threads", "1", "--case"]
    assert cli.main([*arguments, "patches-4x4"]) == 0
    printed = capsys.readouterr().out
    forms = ("contiguous float32 max-pooled", "channels_last float32")
    assert all(words in printed for words in (*forms, "inference", "training", "of 8 rows"))
    assert cli.main([*arguments, "patches-4x4", "--json", "--inference-only"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 4
    assert cli.main([*arguments, "nonsense"]) == 2
    assert cli.main(["bench", "rnn", "--sweep"]) == 2
    assert "rnn has no sweep" in capsys.readouterr().err


def test_a_sweep_calls_a_loss_a_loss() -> None:
    row = sweep.Row("a", 1, "contiguous", "float32", False, False, eager=90e-6, ours=100e-6)
    assert row.slower
    assert "SLOWER" in row.cells()
    tiny = sweep.Row("a", 1, "contiguous", "float32", False, False, eager=10e-6, ours=14e-6)
    assert not tiny.slower
    assert "1 of 2 rows are slower" in sweep.text([row, tiny])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--case", "nonsense"], "There is no case 'nonsense'; there are: "),
     (["--provider", "nonsense"], "There is no provider 'nonsense'; there are: "),
     (["--quick", "--check"], "--check judges real timings")],
)  # fmt: skip
def test_wrong_arguments_are_explained(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "conv_pool", *arguments]) == 2
    assert sentence in capsys.readouterr().err


# --- on a GPU ----------------------------------------------------------------------------------------------


def test_the_gpu_benchmark_says_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "There is no CUDA device" in capsys.readouterr().err


def test_the_gpu_table_names_what_was_not_timed() -> None:
    times = {"interfuse": {"median": 1e-3}, "eager": {"median": 3e-3}}
    row = {
        "case": "first-224",
        "dtype": "float16",
        "errors": {"interfuse": 1e-4, "eager": 1e-4},
        "missing": {"compile": "RuntimeError: no compiler"},
        "inference": times,
        "training": times,
    }
    row["roofline"] = {mode: {"seconds": 5e-4, "by": "bytes"} for mode in ("inference", "training")}
    text = gpu.text({"op": "conv_pool", "device": "a GPU", "torch": "2", "cuda": "13", "rows": [row]})
    assert "3.00x" in text
    assert "50% by bytes" in text
    assert "not timed: first-224 float16, compile: RuntimeError: no compiler" in text


GPU_CASES = [
    ("conv_pool", "small-32@tiny"),
    ("linear", "head-b1@tiny"),
    ("rnn", "audio-b1@tiny"),
    ("attention", "q512-kv2048-b2-ragged@tiny"),
    ("sdpa", "q512-kv4096-ragged@tiny"),
    ("losses", "vocabulary-20k@tiny"),
    ("models", "image-text-b1@tiny"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "case"), GPU_CASES)
def test_the_gpu_benchmark_times_a_case(tmp_path: pathlib.Path, op: str, case: str) -> None:
    rows = timed_on("cuda", tmp_path, op, case)
    assert all({"interfuse", "interfuse_graph", "eager_graph"} <= row["training"].keys() for row in rows)


@pytest.mark.parametrize(("op", "case"), GPU_CASES)
def test_the_gpu_benchmark_is_rehearsed_without_a_gpu(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, op: str, case: str
) -> None:
    """All that it does but CUDA's events and graphs; torch.compile would take most of the time."""
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    timed_on("cpu", tmp_path, op, case)


def timed_on(device: str, folder: pathlib.Path, op: str, case: str) -> list[dict[str, Any]]:
    assert gpu.main(["--device", device, "--op", op, "--case", case, "--out", str(folder)]) == 0
    report = json.loads((folder / f"bench_gpu_{op}.json").read_text())
    assert [row["dtype"] for row in report["rows"]] == list(gpu.DTYPES)
    for row in report["rows"]:
        timed = {"interfuse", "eager"} & row["training"].keys()
        assert timed == {"interfuse", "eager"} or device == "cpu", row["missing"]
        assert row["dtype"] != "float32" or len(timed) == 2, row["missing"]
        assert all(row["roofline"][mode]["seconds"] > 0 for mode in ("inference", "training"))
    return report["rows"]


# --- what it prints with -----------------------------------------------------------------------------------


def test_table_aligns() -> None:
    assert terminal.table(["a", "b"], [["xx", "1"], ["y", "22"]]) == "a    b\n--  --\nxx   1\ny   22"


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_shows_on_a_terminal_only() -> None:
    for stream, shown in ((io.StringIO(), False), (Tty(), True)):
        with terminal.Progress(2, stream) as progress:
            progress.step("half way")
        assert ("1/2" in stream.getvalue() and "half way" in stream.getvalue()) is shown
