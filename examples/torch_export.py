"""An optimised model through torch.export: written to a file, read back, run on another batch size.

python examples/torch_export.py
"""

from __future__ import annotations

import pathlib
import tempfile

import torch

import interfuse
from interfuse import models


def main() -> str:
    torch.manual_seed(0)
    model = interfuse.optimize(
        models.image_text_fusion((3, 32, 32), 4, vocabulary=100, layers="torch").eval()
    )
    images, ids = torch.randn(2, 3, 32, 32), torch.randint(100, (2, 12))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images, ids), dynamic_shapes={"inputs": ({0: batch}, {0: batch})})

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "fusion.pt2"
        torch.export.save(program, path)
        # Another process needs `import interfuse` before this line: it registers the ops of the program.
        loaded = torch.export.load(path)

    ops = {str(node.target) for node in loaded.graph.nodes if "interfuse" in str(node.target)}
    images, ids = torch.randn(5, 3, 32, 32), torch.randint(100, (5, 12))
    with torch.no_grad():
        error = float((loaded.module()(images, ids) - model(images, ids)).abs().max())
    return f"exported, loaded and run with {len(ops)} kinds of fused ops; off by {error:.1e}"


if __name__ == "__main__":
    print(main())
