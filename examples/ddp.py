"""Distributed data parallel training of an optimised model, each process on its share of every batch.

torchrun --nproc-per-node 2 examples/ddp.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import interfuse
from interfuse import data, models

STEPS, BATCH = 200, 32


def main() -> str | None:
    dist.init_process_group("gloo")  # with GPUs: "nccl", and a device for each rank
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = models.image_text_fusion(
        (3, 24, 24), 2, vocabulary=32, embedding=16, hidden=32, channels=(8, 16, 16), width=64, layers="torch"
    )
    parallel = DistributedDataParallel(interfuse.optimize(model))  # optimize first, then wrap
    optimizer = torch.optim.Adam(parallel.parameters(), 3e-3)
    samples = data.image_text(STEPS * BATCH, vocabulary=32)
    for step in range(STEPS):
        share = samples[torch.arange(step * BATCH + rank, (step + 1) * BATCH, world)]
        loss = F.cross_entropy(parallel(*share.inputs), share.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mean = loss.detach() / world
    dist.all_reduce(mean)
    # Gloo's thread must have let go of `mean`, which takes the interpreter's lock, before the model is freed:
    # that joins the thread with the lock held (torch 2.13), and a process that is slow here would hang.
    dist.barrier()
    dist.destroy_process_group()
    if rank != 0:
        return None
    fused = len(interfuse.explain(model).fused)
    return f"{world} processes, {fused} fused sites, loss of the last step {float(mean):.3f}"


if __name__ == "__main__":
    line = main()
    if line:
        print(line)
