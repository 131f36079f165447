"""`interfuse doctor`: what is installed, what this machine can do, which back ends can run and why not."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
from typing import TYPE_CHECKING, Any

import torch

import interfuse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interfuse.dispatch import Implementation

PEERS = ("onnx", "onnxruntime", "openvino", "matplotlib", "pytest-benchmark")


def examine() -> dict[str, Any]:
    return {
        "versions": {
            "interfuse": interfuse.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version(name) for name in ("numpy", "triton")},
        },
        "system": f"{platform.system()} {platform.machine()}",
        "native": native(),
        "threads": {
            "torch": torch.get_num_threads(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "openmp_runtimes": openmp_runtimes(),
        },
        "precision": interfuse.get_precision(),
        "backends": backends(),
        "bench": {name: version(name) for name in PEERS},
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def native() -> dict[str, Any]:
    try:
        from interfuse import _native
    except ImportError as error:
        return {"reason": f"The compiled core cannot be imported: {error}"}
    return dict(_native.info())


def backends() -> dict[str, list[dict[str, str | None]]]:
    """For each op and device every implementation of its table, with None or why it cannot run here."""
    from interfuse.ops import _attention_checks as attention_checks
    from interfuse.ops import _conv_pool_checks as conv_pool_checks
    from interfuse.ops import _linear_checks as linear_checks
    from interfuse.ops import _rnn_checks as rnn_checks
    from interfuse.ops._linear_problem import LinearParams
    from interfuse.ops._losses_pairs_ops import CONTRASTIVE, ELEMENTWISE
    from interfuse.ops._losses_problem import CrossEntropyParams, CrossEntropyProblem, PairProblem
    from interfuse.ops.attention import IMPLEMENTATIONS as attention  # noqa: N811
    from interfuse.ops.conv_pool import IMPLEMENTATIONS as conv_pool  # noqa: N811
    from interfuse.ops.linear import IMPLEMENTATIONS as linear  # noqa: N811
    from interfuse.ops.losses import IMPLEMENTATIONS as losses  # noqa: N811
    from interfuse.ops.rnn import IMPLEMENTATIONS as rnn  # noqa: N811

    options = conv_pool_checks.Options(
        1, 0, 1, 1, "zeros", "relu", 0.01, "max", 2, None, 0, False, True, None
    )
    parameters = conv_pool_checks.resolve((3, 3), options, interfuse.get_precision())
    image, kernels = torch.empty(1, 3, 8, 8), torch.empty(8, 3, 3, 3)
    sequence, weights = torch.empty(3, 1, 8), [torch.empty(32, 8), torch.empty(32, 8)]
    lstm = rnn_checks.RnnParams("lstm")
    pair = PairProblem(torch.float32, torch.device("cpu"))
    head = torch.empty(1, 1, 4, 8)
    heads = attention_checks.Inputs(head, head, head, None, None, None)
    plainly = attention_checks.resolve(head, False, None, None)
    plain: dict[str, tuple[Sequence[Implementation], Any]] = {
        "conv_pool": (conv_pool, conv_pool_checks.check(image, kernels, None, parameters, save=False)),
        "linear": (
            linear,
            linear_checks.check([sequence], weights[0], None, None, LinearParams(), save=False),
        ),
        "losses": (
            losses,
            CrossEntropyProblem(CrossEntropyParams(), 3, 32, 8, torch.float32, torch.device("cpu"), False),
        ),
        "binary_cross_entropy_with_logits": (ELEMENTWISE, pair),
        "contrastive_loss": (CONTRASTIVE, pair),
        "rnn": (rnn, rnn_checks.check(sequence, None, None, None, None, weights, lstm, save=False)),
        "attention": (attention, attention_checks.check(heads, plainly, weights=False, save=False)),
    }
    rows: dict[str, list[dict[str, str | None]]] = {}
    for op, (implementations, example) in plain.items():
        for device in ("cpu", "cuda"):
            problem = dataclasses.replace(example, device=torch.device(device))
            no_device = None
            if device == "cuda" and not torch.cuda.is_available():
                no_device = "torch finds no CUDA device here."
            for implementation in implementations:
                reason = no_device or implementation.why_not(problem)
                rows.setdefault(op, []).append(
                    {"backend": implementation.name, "device": device, "reason": reason}
                )
    return rows


def openmp_runtimes() -> list[str]:
    """File names of the OpenMP runtimes in this process. Two that spin on the same cores slow each other."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
    except OSError:
        return []
    return sorted(
        {os.path.basename(p) for p in paths if re.match(r"lib(gomp|iomp5|omp)\b", os.path.basename(p))}
    )


def problems(found: dict[str, Any]) -> list[str]:
    """What is wrong with this installation, each in a sentence that says what to do."""
    wrong = []
    if "reason" in found["native"]:
        wrong.append(
            f"{found['native']['reason']} Install interfuse again; without the core everything runs in torch."
        )
    runtimes = found["threads"]["openmp_runtimes"]
    if len(runtimes) > 1:
        wrong.append(
            f"This process holds {len(runtimes)} OpenMP runtimes ({', '.join(runtimes)}), whose threads wait "
            "for each other's cores. Use a torch and an interfuse that link the same one."
        )
    return wrong


def text(found: dict[str, Any]) -> str:
    lines = [", ".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items())]
    lines.append(found["system"])
    core = found["native"]
    if "reason" not in core:
        lines.append(
            f"native core: instruction set {core['isa']} (compiled: {', '.join(core['isas'])}), "
            f"{core['compiler']}, CUDA kernels {'compiled' if core['cuda_built'] else 'not compiled'}"
        )
    threads = found["threads"]
    runtimes = ", ".join(threads["openmp_runtimes"]) or "none found"
    lines.append(
        f"threads: {threads['torch']} of {threads['cpus']} CPUs (torch.set_num_threads); OpenMP: {runtimes}"
    )
    lines.append(f"precision: {found['precision']}")
    for op, rows in found["backends"].items():
        lines.append(f"back ends of {op}:")
        lines += [f"  {row['backend']} on {row['device']}: {row['reason'] or 'ready'}" for row in rows]
    absent = [name for name, found_version in found["bench"].items() if found_version is None]
    lines.append(
        f"benchmark peers not installed: {', '.join(absent)} (`pip install 'interfuse[bench]'`)"
        if absent
        else "benchmark peers: all installed"
    )
    wrong = problems(found)
    lines.append("Everything is in order." if not wrong else "\n".join(f"PROBLEM: {line}" for line in wrong))
    return "\n".join(lines)
