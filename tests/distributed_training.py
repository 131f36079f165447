"""Started by torchrun in test_distributed.py: two processes train an optimised model, each on half of every
batch, and end with the weights of one process on the whole batches. Prints how far apart they are."""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import interfuse
from interfuse import data, models

STEPS, BATCH = 3, 8


def whole(p: Tensor) -> Tensor:
    return p.full_tensor() if isinstance(p, DTensor) else p


def train(model: nn.Module, samples: data.Samples, rank: int, world: int) -> list[Tensor]:
    # Plain SGD: Adam would divide differences of rounding by gradients that are nearly zero.
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(STEPS):
        share = samples[torch.arange(step * BATCH + rank, (step + 1) * BATCH, world)]
        optimizer.zero_grad()
        F.cross_entropy(model(*share.inputs), share.labels).backward()
        optimizer.step()
    return [whole(p).detach() for p in model.parameters()]


def wrapped(model: nn.Module, kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for encoder in model.encoders:
        fully_shard(encoder, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main(kinds: list[str]) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = models.image_text_fusion(
        (3, 24, 24), 2, vocabulary=32, embedding=16, hidden=32, channels=(8, 16, 16), width=64, layers="torch"
    )
    interfuse.optimize(model)
    samples = data.image_text(STEPS * BATCH, vocabulary=32)
    before = [p.detach().clone() for p in model.parameters()]
    alone = train(copy.deepcopy(model), samples, 0, 1)
    moved = max(float((a - b).abs().max()) for a, b in zip(alone, before, strict=True))
    for kind in kinds:
        found = train(wrapped(copy.deepcopy(model), kind), samples, rank, world)
        error = max(float((a - b).abs().max()) for a, b in zip(found, alone, strict=True))
        if rank == 0:
            print(kind, len(interfuse.explain(model).fused), moved, error)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
