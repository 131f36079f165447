"""An optimised model under torch.compile: one graph, the fused calls in it, the rest Inductor's.

python examples/torch_compile.py
"""

from __future__ import annotations

import torch

import interfuse
from interfuse import models


def main(backend: str = "inductor") -> str:
    torch.manual_seed(0)
    # Made of torch's own modules: a model as people have it.
    model = models.image_text_fusion((3, 32, 32), 4, vocabulary=100, layers="torch").eval()
    images, ids = torch.randn(2, 3, 32, 32), torch.randint(100, (2, 12))
    with torch.no_grad():
        expected = model(images, ids)
        interfuse.optimize(model)  # before torch.compile
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        error = float((compiled(images, ids) - expected).abs().max())
    return f"compiled to one graph with {len(interfuse.explain(model).fused)} fused sites; off by {error:.1e}"


if __name__ == "__main__":
    print(main())
