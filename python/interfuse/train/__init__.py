"""Training and evaluation of the models on the data, or of any module on Samples: docs/models.md."""

from interfuse.train.curves import plot
from interfuse.train.evaluation import Evaluation, accuracy, confusion_matrix, evaluate, retrieval_recall
from interfuse.train.loop import Epoch, History, cross_entropy, fit
from interfuse.train.regimes import parts_of

__all__ = [
    "Epoch",
    "Evaluation",
    "History",
    "accuracy",
    "confusion_matrix",
    "cross_entropy",
    "evaluate",
    "fit",
    "parts_of",
    "plot",
    "retrieval_recall",
]
