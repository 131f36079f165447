"""How good a model is: loss, accuracy, who is taken for whom, and what is found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from interfuse.terminal import table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from interfuse.data import Samples


@dataclass(frozen=True)
class Evaluation:
    """confusion[i, j]: how many samples of class i were taken for class j. None, as the accuracy, where the
    model's output or the labels are not those of a classifier."""

    loss: float
    accuracy: float | None
    confusion: Tensor | None

    def text(self) -> str:
        if self.accuracy is None or self.confusion is None:
            return f"loss {self.loss:.4f}"
        classes = range(len(self.confusion))
        rows = [[f"is {i}", *(str(int(n)) for n in self.confusion[i])] for i in classes]
        confusion = table(["", *(f"taken for {j}" for j in classes)], rows)
        return f"loss {self.loss:.4f}, accuracy {self.accuracy:.1%}\n\n{confusion}"


@torch.no_grad()
def evaluate(
    model: nn.Module,
    samples: Samples,
    *,
    batch: int = 128,
    loss: Callable[[nn.Module, Samples], Tensor] | None = None,
) -> Evaluation:
    """In evaluation mode; each module's own mode is as before afterwards. loss: None for cross-entropy."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    total, confusion = 0.0, None
    try:
        for part in (samples[i : i + batch] for i in range(0, len(samples), batch)):
            if loss is not None:
                total += loss(model, part).item() * len(part)
            if part.labels.dim() == 1:
                logits = model(*part.inputs, **part.named)
                total += F.cross_entropy(logits, part.labels).item() * len(part) if loss is None else 0.0
                found = confusion_matrix(logits, part.labels, samples.classes)
                confusion = found if confusion is None else confusion + found
    finally:
        for module, mode in modes:
            module.training = mode
    accuracy = None if confusion is None else float(confusion.trace() / confusion.sum())
    return Evaluation(total / len(samples), accuracy, confusion)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of samples whose largest logit is the label's."""
    return float((logits.argmax(-1) == labels).double().mean())


def confusion_matrix(logits: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(classes, classes) counts: row the label, column what it was taken for."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            "a confusion matrix is made from logits (samples, classes) and labels (samples,); got shapes "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    pairs = labels * classes + logits.argmax(1)
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def retrieval_recall(queries: Tensor, keys: Tensor, at: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """How often the key of the same row is among the k nearest of each query, by cosine; for each k of `at`.

    Keys that are equally near count as found before the right one.
    """
    if queries.dim() != 2 or queries.shape != keys.shape or not len(queries):
        raise ValueError(
            "queries and keys must be two matrices of one shape, whose rows belong together, at least one; "
            f"got {tuple(queries.shape)} and {tuple(keys.shape)}."
        )
    likeness = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T
    right = likeness.diagonal().unsqueeze(1)
    before = (likeness >= right).sum(1) - 1
    return {k: float((before < k).double().mean()) for k in at}
