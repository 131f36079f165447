"""interfuse: fused kernels for multimodal models, behind torch's own interfaces."""

import torch  # noqa: F401  (first: its OpenMP runtime is the one that the native core then shares)

from interfuse import data, memory, models, nn, ops, train
from interfuse.numerics import get_precision, precision, set_precision
from interfuse.optimize import explain, optimize, restore
from interfuse.torch_state import offer_backend

__version__ = "0.1.0"

offer_backend("interfuse", "interfuse.rewrite.graph:backend")  # torch.compile(model, backend="interfuse")

__all__ = [
    "__version__",
    "data",
    "explain",
    "get_precision",
    "memory",
    "models",
    "nn",
    "ops",
    "optimize",
    "precision",
    "restore",
    "set_precision",
    "train",
]
