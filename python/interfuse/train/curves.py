"""The course of a training as a picture."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from interfuse.train.loop import History


def plot(history: History | Mapping[str, History], path: str | pathlib.Path) -> str | None:
    """Writes a PNG of the losses and accuracies by epoch, of one training or of several by name.

    Returns the sentence why not where matplotlib is missing.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return "No plot was written: matplotlib is not installed; `pip install 'interfuse[bench]'` brings it."
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    many = {"": history} if not hasattr(history, "items") else history
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for i, (name, one) in enumerate(many.items()):
        x, colour = [e.epoch for e in one.epochs], f"C{i}"
        above.plot(x, [e.loss for e in one.epochs], color=colour, label=f"{name} training".strip())
        if any(e.validation_loss is not None for e in one.epochs):
            seen = [e.validation_loss for e in one.epochs]
            above.plot(x, seen, "--", color=colour, label=f"{name} validation".strip())
        if any(e.accuracy is not None for e in one.epochs):
            below.plot(x, [e.accuracy for e in one.epochs], "--", color=colour, label=name or "validation")
    above.set_ylabel("loss")
    below.set_ylabel("validation accuracy")
    below.set_ylim(0.0, 1.02)
    below.set_xlabel("epoch")
    above.legend()
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return None
