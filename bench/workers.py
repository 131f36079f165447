"""Runs every provider alone in a process of its own and asks them in turn for timings.

A thread pool that spins while it waits slows whoever runs beside it several times over, so a worker that is
not being asked is stopped (SIGSTOP) until its next turn. Nobody's own settings are touched for that.

    python -m interfuse.bench.workers '{"op": "conv_pool", "case": ..., "provider": ..., ...}'

is one worker. It reads a command a line on stdin and answers each with a line of JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# glibc gives memory above its trim threshold back to the system at every free and takes it again, page by
# page, at the next allocation. With these settings it keeps it. (mallopt refuses an mmap threshold above
# 32 MiB, so mmap is switched off for malloc altogether.)
KEEP_HEAP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """One provider on one case, with everything that its process needs to know."""

    op: str
    case: str
    provider: str
    threads: int
    keep_heap: bool = False

    def environment(self) -> dict[str, str]:
        env = dict(os.environ)
        env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = str(self.threads)
        # Inductor otherwise starts a pool of compilers that outlives the compilation.
        env["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        env["OPENVINO_TELEMETRY_DISABLE"] = "1"
        for name in KEEP_HEAP:
            env.pop(name, None)
        if self.keep_heap:
            env.update(KEEP_HEAP)
        return env


class Worker:
    """The driver's end of one worker process."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        # A file and not a pipe: nobody reads what libraries print there until a worker has died.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (close() closes it)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "interfuse.bench.workers", json.dumps(dataclasses.asdict(spec))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=spec.environment(),
        )
        self._running = True

    def ask(self, **command: Any) -> dict[str, Any]:
        self.send(**command)
        return self.answer()

    def send(self, **command: Any) -> None:
        self._resume()
        stdin = self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # a dead worker's answer tells of what it died
            if stdin is not None:
                stdin.write(json.dumps(command) + "\n")
                stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next answer; the first one of all says whether the provider can run the case. Then it rests."""
        stdout = self._process.stdout
        line = stdout.readline() if stdout is not None else ""
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            tail = " | ".join(self._errors.read().strip().splitlines()[-4:])
            return {"failed": f"its process ended with code {code} and said: {tail or 'nothing'}"}
        self._pause()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.kill()  # which also ends a process that is stopped
        self._process.communicate()
        self._errors.close()

    def _pause(self) -> None:
        if hasattr(signal, "SIGSTOP") and self._running:
            self._process.send_signal(signal.SIGSTOP)
            self._running = False

    def _resume(self) -> None:
        if not self._running:
            self._process.send_signal(signal.SIGCONT)
            self._running = True


@contextlib.contextmanager
def started(
    specs: list[Spec], commands: list[dict[str, Any]]
) -> Iterator[list[tuple[Worker, dict[str, Any]]]]:
    """Workers with their answers to `commands` (the last one's, or the first that says why not or failed).

    Two are made at a time: importing and compiling takes more memory and cores than the timing does. They all
    end on the way out, whatever happened in between.
    """
    workers: list[tuple[Worker, dict[str, Any]]] = []
    try:
        for i in range(0, len(specs), 2):
            pair = [Worker(spec) for spec in specs[i : i + 2]]
            workers += [(worker, {}) for worker in pair]
            answers = [worker.answer() for worker in pair]
            for command in commands:
                able = [k for k, answer in enumerate(answers) if not {"why_not", "failed"} & answer.keys()]
                for k in able:
                    pair[k].send(**command)
                for k in able:
                    answers[k] = {**answers[k], **pair[k].answer()}
            workers[i:] = zip(pair, answers, strict=True)
        yield workers
    finally:
        for worker, _ in workers:
            worker.close()


# --- inside the worker ------------------------------------------------------------------------------------


def sample(step: Callable[[], object], seconds: float) -> dict[str, Any]:
    """Median and spread of one call of `step`, from as many calls as fit into `seconds` (never fewer than 3).

    Calls shorter than 20 us are timed in groups, or the clock's own cost would count.
    """
    cpu = time.process_time()
    warm_until = time.perf_counter() + min(0.1, seconds / 4)
    calls = 0
    begin = time.perf_counter()
    while calls < 2 or time.perf_counter() < warm_until:
        step()
        calls += 1
    each = (time.perf_counter() - begin) / calls
    group = max(1, int(20e-6 / each))
    times: list[float] = []
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < end:
            t0 = time.perf_counter()
            for _ in range(group):
                step()
            times.append((time.perf_counter() - t0) / group)
    finally:
        gc.enable()
    return {
        "median": statistics.median(times),
        "low": min(times),
        "calls": len(times) * group,
        "cpu": time.process_time() - cpu,
    }


def between(call: Callable[[], object], kernel: Callable[[], object], seconds: float) -> dict[str, float]:
    """What a call takes beside its kernel, from samples of both in turn: medians over five pairs."""
    pairs, cpu = [], 0.0
    for _ in range(5):
        samples = sample(call, seconds / 10), sample(kernel, seconds / 10)
        pairs.append(tuple(s["median"] for s in samples))
        cpu += sum(s["cpu"] for s in samples)
    columns = zip(*((c, k, c - k) for c, k in pairs), strict=True)
    medians = map(statistics.median, columns)
    return {**dict(zip(("call", "kernel", "overhead"), medians, strict=True)), "cpu": cpu}


def _die_with_parent() -> None:
    """A stopped process does not see its stdin close, so the kernel is asked to end it with its driver."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _reply(stream: TextIO, answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


def main(argument: str) -> int:
    _die_with_parent()
    # Libraries print to stdout as they like; the answers go to a copy of it that nobody else knows.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = Spec(**json.loads(argument))
    from interfuse.bench import peers

    try:
        workload = importlib.import_module(f"interfuse.bench.{spec.op}").workload(spec.case)
        session = peers.Session(workload, peers.PROVIDERS[spec.provider], spec.threads)
        _reply(answers, session.prepare())
        for line in sys.stdin:
            _reply(answers, session.command(json.loads(line)))
    except Exception as error:  # whatever a peer raises is its answer, and is printed as such
        text = traceback.format_exc(limit=-3)
        _reply(answers, {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300], "trace": text})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
