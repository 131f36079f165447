"""The training loop: every epoch the same samples in an order of its own, checked, written, resumable."""

from __future__ import annotations

import copy
import math
import pathlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from interfuse.data import Samples
from interfuse.terminal import Progress, table
from interfuse.train import checkpoints
from interfuse.train.evaluation import evaluate
from interfuse.train.regimes import Regime

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    Loss = Callable[[nn.Module, Samples], Tensor]


@dataclass(frozen=True)
class Epoch:
    """What is known after an epoch; the validation's figures are None without validation, and the accuracy
    where the model gives no logits (batch, classes)."""

    epoch: int
    learns: str
    loss: float
    validation_loss: float | None = None
    accuracy: float | None = None


@dataclass
class History:
    epochs: list[Epoch]
    stopped_early: bool = False
    best_epoch: int | None = None

    def text(self) -> str:
        rows = [
            [
                f"{e.epoch}",
                e.learns,
                f"{e.loss:.4f}",
                _figure(e.validation_loss, ".4f"),
                _figure(e.accuracy, ".1%"),
            ]
            for e in self.epochs
        ]
        return table(["epoch", "learns", "loss", "validation loss", "accuracy"], rows, left=2)


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def cross_entropy(model: nn.Module, samples: Samples) -> Tensor:
    """The loss of a classifier: of its logits."""
    return F.cross_entropy(model(*samples.inputs, **samples.named), samples.labels)


def order(samples: int, seed: int, epoch: int) -> Tensor:
    """The permutation of an epoch, which depends on nothing but seed and epoch."""
    mixed = (seed * 1_000_003 + epoch) % 2**63
    return torch.randperm(samples, generator=torch.Generator().manual_seed(mixed))


def fit(
    model: nn.Module,
    data: Samples,
    validation: Samples | None = None,
    *,
    epochs: int = 10,
    batch: int = 32,
    learning_rate: float = 1e-3,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    loss: Loss = cross_entropy,
    regime: str = "simultaneous",
    parts: Sequence[str] | None = None,
    patience: int | None = None,
    checkpoint: str | pathlib.Path | None = None,
    checkpoint_steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Trains the model in place.

    Args:
        optimizer: None for Adam with `learning_rate`; `scheduler` makes a step after every epoch.
        loss: of model and samples; the default is cross-entropy of the model's logits.
        regime: "simultaneous", all parts learn together; "serial", one after the other, the epochs divided
            among them; "mixed", serial in the first half and together in the second.
        parts: for serial and mixed: the names of the model's modules, in the order in which they learn (None:
            the model's children, those of a ModuleList one by one). Parameters outside all parts rest.
        patience: stop after so many epochs in a row without a better validation loss, and take the weights of
            the best epoch. Needs `validation`.
        checkpoint: a file that is written, atomically, after every epoch. Where it exists, training goes on
            from there, and ends as if it had never been interrupted, bit by bit.
        checkpoint_steps: write it after every so many steps of an epoch, too.
        seed: of the order of samples.
        progress: a bar on stderr, where that is a terminal.
    """
    if not isinstance(data, Samples):
        raise TypeError(
            f"fit takes interfuse.data.Samples, whose inputs, labels and names are together; got "
            f"{type(data).__name__}."
        )
    if not len(data):
        raise ValueError("there must be at least one sample to learn from; got none.")
    if epochs < 1 or batch < 1:
        raise ValueError(f"epochs and batch must be at least 1; got {epochs} and {batch}.")
    if checkpoint_steps is not None and (checkpoint is None or checkpoint_steps < 1):
        raise ValueError(
            "checkpoint_steps counts steps, at least 1, between writings of the checkpoint: it needs one."
        )
    if patience is not None and (validation is None or patience < 1):
        raise ValueError("patience counts epochs, at least 1, by the validation loss: it needs validation.")
    if optimizer is None:
        optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    plan = Regime(model, regime, parts, epochs)
    settings: dict[str, Any] = {"samples": len(data), "batch": batch, "regime": regime, "seed": seed}
    settings |= {"optimizer": type(optimizer).__name__, "scheduler": scheduler and type(scheduler).__name__}
    if regime != "simultaneous":
        settings["epochs"] = epochs  # which divides them among the parts
    state = checkpoints.State(model, optimizer, scheduler, settings)
    history, best = History([]), _Best()
    done, total = 0, 0.0  # of the epoch that was interrupted: its steps, and their loss
    if checkpoint is not None:
        pathlib.Path(checkpoint).parent.mkdir(parents=True, exist_ok=True)  # not after an epoch's work
        saved = checkpoints.load(checkpoint, state)
        if saved is not None:
            history = History([Epoch(**row) for row in saved["epochs"]], saved["stopped_early"])
            best, done, total = _Best(**saved["best"]), saved["step"], saved["total"]

    def write(step: int, total: float) -> None:
        if checkpoint is not None:
            rows = [asdict(e) for e in history.epochs]
            before = {"epochs": rows, "stopped_early": history.stopped_early, "best": vars(best)}
            checkpoints.save(checkpoint, state, step=step, total=total, **before)

    steps = math.ceil(len(data) / batch)
    with Progress((epochs - len(history.epochs)) * steps - done if progress else 0) as bar:
        for epoch in range(len(history.epochs), epochs):
            if history.stopped_early:
                break
            batches = order(len(data), seed, epoch).split(batch)
            with plan.learning(epoch):
                model.train()
                for step, rows in enumerate(batches[done:], done + 1):
                    value = _step(model, data[rows], optimizer, loss)
                    total += value * len(rows)
                    bar.step(f"epoch {epoch}, loss {value:.4f}")
                    if checkpoint_steps is not None and step % checkpoint_steps == 0 and step < steps:
                        write(step, total)
            mean = total / len(data)
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"the loss of epoch {epoch} is {mean}: lower the learning rate, or look for NaN in "
                    "the data."
                )
            done, total = 0, 0.0
            if scheduler is not None:
                scheduler.step()
            found = None if validation is None else evaluate(model, validation, loss=loss)
            row = Epoch(epoch, plan.name(epoch), mean)
            if found is not None:
                row = Epoch(epoch, plan.name(epoch), mean, found.loss, found.accuracy)
            history.epochs.append(row)
            if patience is not None and found is not None:
                best.look(model, epoch, found.loss)
                history.stopped_early = epoch - best.epoch >= patience
            write(0, 0.0)
    if best.weights is not None:
        model.load_state_dict(best.weights)
        history.best_epoch = best.epoch
    return history


def _step(model: nn.Module, part: Samples, optimizer: torch.optim.Optimizer, loss: Loss) -> float:
    """One step, and its loss."""
    optimizer.zero_grad()  # to None: what does not learn now is passed over by the optimizer
    value = loss(model, part)
    value.backward()
    optimizer.step()
    return value.item()


@dataclass
class _Best:
    """The weights of the lowest validation loss so far."""

    epoch: int = -1
    loss: float = math.inf
    weights: dict[str, Any] | None = None

    def look(self, model: nn.Module, epoch: int, loss: float) -> None:
        if loss < self.loss:
            self.epoch, self.loss, self.weights = epoch, loss, copy.deepcopy(model.state_dict())
