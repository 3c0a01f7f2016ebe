"""What a plain loop under DistributedDataParallel comes to."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

WORLD = 2


def by_ddp(loop: Callable[[int], dict[str, Tensor]], folder: Path) -> dict[str, Tensor]:
    """What `loop` gives rank 0, called with the rank in two processes that are a group over gloo."""
    folder.mkdir(exist_ok=True)

    def process(rank: int) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store = f"file://{folder / 'store'}"
        dist.init_process_group("gloo", store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
        torch.set_num_threads(1)
        found = loop(rank)
        if rank == 0:
            torch.save(found, folder / "found.pt")
        dist.destroy_process_group()

    processes = [multiprocessing.get_context("fork").Process(target=process, args=(rank,)) for rank in range(WORLD)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(100)
        each.kill()
    assert [each.exitcode for each in processes] == [0, 0]
    found: dict[str, Tensor] = torch.load(folder / "found.pt", weights_only=True)
    return found
