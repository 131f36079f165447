"""The second half of `interfuse demo`: fusion models in torch and in interfuse, and a task that needs both
modalities."""

from __future__ import annotations

import copy
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import interfuse
from interfuse import data, models, train
from interfuse.demo_timing import ROUNDS, in_turn, largest_error, training_step
from interfuse.terminal import Progress, milliseconds, table

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable

CLASSES = 10
FRAMES, STEPS, FEATURES, VOCABULARY = 22, 64, 40, 10_000
WAYS = ("torch", "optimize", "interfuse")


def cases(size: int, batch: int) -> list[tuple[str, Callable[[str], nn.Module], tuple[Tensor, ...]]]:
    """Each model by name, how it is made of "fused" or "torch" layers, and its inputs."""
    side, edge = min(size, 128), min(size, 112)
    image_text = (torch.randn(batch, 3, side, side), torch.randint(VOCABULARY, (batch, STEPS)))
    video_audio = (torch.randn(1, 3, FRAMES, edge, edge), torch.randn(1, 100, FEATURES))
    return [
        (
            f"image + text, {batch}x3x{side}x{side}",
            lambda layers: models.image_text_fusion(
                (3, side, side), CLASSES, vocabulary=VOCABULARY, layers=layers
            ),
            image_text,
        ),
        (
            f"video + audio, 1x3x{FRAMES}x{edge}x{edge}",
            lambda layers: models.video_audio_fusion(
                (3, FRAMES, edge, edge), CLASSES, audio_features=FEATURES, layers=layers
            ),
            video_audio,
        ),
    ]


def compare(size: int, batch: int, seconds: float) -> list[dict[str, Any]]:
    """Each model in plain torch, the same through optimize(), and made of fused modules with its weights."""
    rows: list[dict[str, Any]] = []
    made = cases(size, batch)
    with Progress(2 * ROUNDS * len(made)) as progress:
        for name, make, inputs in made:
            plain = make("torch")
            optimised, fused = interfuse.optimize(copy.deepcopy(plain)), make("fused")
            fused.load_state_dict(plain.state_dict())
            ways = dict(zip(WAYS, (plain, optimised, fused), strict=True))
            exact = copy.deepcopy(plain).double()
            with torch.no_grad():
                truth = exact(*(x.double() if x.is_floating_point() else x for x in inputs))
                errors = {way: largest_error(model(*inputs), truth) for way, model in ways.items()}
                calls: dict[str, Callable[[], object]] = {
                    way: partial(model, *inputs) for way, model in ways.items()
                }
                times = in_turn(calls, seconds, partial(progress.step, name))
            rows.append({"model": name, "mode": "inference", "times": times, "errors": errors})
            steps = {way: training_step(model, *inputs) for way, model in ways.items()}
            times = in_turn(steps, seconds, partial(progress.step, name))
            rows.append({"model": name, "mode": "training step", "times": times})
    for row in rows:
        row["ratio"] = row["times"]["torch"] / row["times"]["interfuse"]
    return rows


def learn(samples: int, epochs: int) -> tuple[list[dict[str, Any]], dict[str, train.History]]:
    """A label that neither picture nor sentence decides, learned from either alone and from both."""
    small: dict[str, Any] = {"channels": (8, 16, 16), "width": 64}
    text: dict[str, Any] = {"vocabulary": 32, "embedding": 16, "hidden": 32, "num_layers": 1}
    first, held_out = data.image_text(samples, vocabulary=32, seed=1).split(samples * 4 // 5)
    made: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
        "image alone": (lambda: models.cnn((3, 24, 24), 2, **small), ("image",)),
        "text alone": (lambda: models.rnn((None,), 2, **text), ("text",)),
        "image + text": (
            lambda: models.image_text_fusion((3, 24, 24), 2, **small, **text),
            ("image", "text"),
        ),
    }
    rows, histories = [], {}
    for name, (make, inputs) in made.items():
        torch.manual_seed(0)
        begin = time.perf_counter()
        histories[name] = train.fit(
            make(), first.only(*inputs), held_out.only(*inputs), epochs=epochs, learning_rate=3e-3
        )
        last = histories[name].epochs[-1]
        rows.append({"seen": name, "accuracy": last.accuracy, "seconds": time.perf_counter() - begin})
    return rows, histories


def run(size: int, batch: int, seconds: float, curves: pathlib.Path, quick: bool) -> dict[str, Any]:
    """The figures of both; the courses of learning go to the file `curves`, where matplotlib is installed."""
    compared = compare(size, batch, seconds)
    learned, histories = learn(*((40, 1) if quick else (1000, 6)))
    train.plot(histories, curves)
    return {"models": compared, "learning": learned}


def text(result: dict[str, Any]) -> str:
    header = ["", "", "torch, ms", "optimize(), ms", "fused, ms", "ratio", "torch's error", "fused error"]
    lines = []
    for row in result["models"]:
        errors = [f"{row['errors'][way]:.1e}" if "errors" in row else "" for way in ("torch", "interfuse")]
        times = [milliseconds(row["times"][way]) for way in WAYS]
        lines.append([row["model"], row["mode"], *times, f"{row['ratio']:.2f}x", *errors])
    learned = [[row["seen"], f"{row['accuracy']:.1%}", f"{row['seconds']:.1f}"] for row in result["learning"]]
    return (
        "Fusion models: plain torch, the same through optimize(), and built of fused modules.\n"
        "The ratio is torch's time over that of the fused modules.\n\n"
        + table(header, lines, left=2)
        + "\n\nA label that neither modality decides, on samples not seen in training (guessing: 50 %).\n\n"
        + table(["learned from", "accuracy", "seconds"], learned)
    )
