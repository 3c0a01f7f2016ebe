"""The contenders of `benchmarks.stall` without Instep: ``python -m benchmarks.stall_by_torch FOLDER``, started by
torchrun, or as one replica of torchft, whose number REPLICA says.

Each process writes its pid, and a line with the monotonic clock after each step; under torchrun rank 0 saves every so
many steps, and all go on from there when they are started again.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._C._distributed_c10d import TCPStore
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate

from benchmarks.stall_work import EVERY, MICROBATCHES, recipe
from instep.data.cursor import Cursor
from instep.randomness import key, seed_all


class Work:
    """The recipe's model, optimizer and samples, and a rank's microbatches of each step."""

    def __init__(self, rank: int, size: int):
        torch.set_num_threads(1)
        made = self._made = recipe()
        seed_all(key(made.seed, "model"))
        self.module: Any = made.model.build()
        self.optimizer: Any = made.optimizer.build(self.module.parameters())
        self._samples = made.data.build().train
        self._cursor = Cursor(samples=len(self._samples), batch=made.batch, microbatches=MICROBATCHES, seed=made.seed)
        self._own = range(rank * MICROBATCHES // size, (rank + 1) * MICROBATCHES // size)

    def backward(self, step: int, syncing: Any) -> None:
        """The gradients of the own microbatches; `syncing(last)` comes before each one's forward."""
        for microbatch in self._own:
            syncing(microbatch == self._own[-1])
            tokens = default_collate([self._samples[index] for index in self._cursor.microbatch(step, microbatch)])
            logits = self.module(tokens[:, :-1])
            (F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / len(self._own)).backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._made.clip_norm or torch.inf)


def under_torchrun(folder: Path) -> None:
    """One rank, in its present life."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    work, saved, step = Work(rank, size), folder / "saved.pt", 0
    if saved.exists():
        step, weights, state = torch.load(saved)
        work.module.load_state_dict(weights)
        work.optimizer.load_state_dict(state)
    plain, work.module = work.module, DistributedDataParallel(work.module)
    with (folder / f"{rank}.steps").open("a", buffering=1) as stamps:
        while True:
            work.optimizer.zero_grad(set_to_none=True)
            work.backward(step, lambda last: setattr(work.module, "require_backward_grad_sync", last))
            work.optimizer.step()
            step += 1
            stamps.write(f"{step} {time.monotonic()}\n")
            if step % EVERY == 0 and rank == 0:
                torch.save((step, plain.state_dict(), work.optimizer.state_dict()), folder / "new.pt")
                (folder / "new.pt").rename(saved)


def as_replica(folder: Path) -> None:
    """One of torchft's, after its example: all computes again each step, and nobody loads a file."""
    import torchft  # type: ignore[import-not-found]  # of an environment of its own

    replica, size = int(os.environ["REPLICA"]), int(os.environ["REPLICAS"])
    work = Work(replica, size)
    plain, optimizer = work.module, work.optimizer

    def take(state: dict[str, Any]) -> None:
        plain.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    manager = torchft.Manager(
        pg=torchft.ProcessGroupGloo(timeout=timedelta(seconds=5)), min_replica_size=1, load_state_dict=take,
        state_dict=lambda: {"model": plain.state_dict(), "optimizer": optimizer.state_dict()},
        replica_id=f"replica-{replica}-", timeout=timedelta(seconds=30), rank=0, world_size=1, store_addr="localhost",
        store_port=store.port, hostname="localhost",
    )  # fmt: skip
    work.module = torchft.DistributedDataParallel(manager, plain)
    managed = torchft.Optimizer(manager, optimizer)
    (folder / f"{replica}.pid").write_text(str(os.getpid()))
    with (folder / f"{replica}.steps").open("a", buffering=1) as stamps:
        while True:
            managed.zero_grad()
            work.backward(manager.current_step(), lambda last: setattr(work.module, "require_backward_grad_sync", last))
            managed.step()
            stamps.write(f"{manager.current_step()} {time.monotonic()}\n")


if __name__ == "__main__":
    (as_replica if "REPLICA" in os.environ else under_torchrun)(Path(sys.argv[1]))
