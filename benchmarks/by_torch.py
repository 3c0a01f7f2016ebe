"""The contenders without Instep's engine: ``python -m benchmarks.by_torch OPTIONS``, the fields of `Options` as JSON.

With more than one worker, DistributedDataParallel over gloo; with one, a plain PyTorch loop, which may wait for others
after every step without giving them anything. Weights, batches and optimizer are those of the Instep contender.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate

from benchmarks.gate import Gate
from benchmarks.parts import text
from benchmarks.work import MODEL, SAMPLES, SEED, Options
from instep.data.cursor import Cursor
from instep.models import GPT
from instep.optimizers import adamw
from instep.randomness import key, seed_all
from instep.transport.memory import mark, wait_for


def main(options: Options) -> None:
    """Trains, and leaves the objective of the last step."""
    if "RANK" in os.environ:  # under torchrun
        _ddp_worker(int(os.environ["RANK"]), options)
    elif options.workers > 1:
        spawn(_ddp_worker, args=(options,), nprocs=options.workers)
    else:
        torch.set_num_threads(1)
        _loop(options, min(options.own, default=0), _model(), options.own or range(options.microbatches))


def _ddp_worker(rank: int, options: Options) -> None:
    torch.set_num_threads(1)
    store = None if "RANK" in os.environ else f"file://{options.folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=options.workers)
    share = options.microbatches // options.workers
    module = DistributedDataParallel(_model(), **options.ddp)
    _loop(options, rank, module, range(rank * share, (rank + 1) * share))
    dist.destroy_process_group()


def _model() -> nn.Module:
    seed_all(key(SEED, "model"))  # the weights that Instep's recipe starts from
    return GPT(**MODEL)


def _loop(options: Options, rank: int, module: nn.Module, own: Sequence[int]) -> None:
    samples, gate, optimizer = text(), Gate(options.address), adamw(module.parameters())
    batch = SAMPLES * options.microbatches
    cursor = Cursor(samples=len(samples), batch=batch, microbatches=options.microbatches, seed=SEED)
    objective, slow_s, wait = 0.0, 0.0, _barrier(options)
    for step in range(options.steps):
        gate.tick()
        optimizer.zero_grad(set_to_none=True)
        objective = 0.0
        for microbatch in own:
            tokens = default_collate(samples.__getitems__(cursor.microbatch(step, microbatch)))
            with _unsynced(module) if microbatch != own[-1] else nullcontext():
                began = time.thread_time()
                time.sleep(slow_s)
                logits = module(tokens[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / len(own)
                loss.backward()
                if rank == options.workers - 1:  # the main thread's own time, without waiting for the other workers
                    slow_s = (options.slow - 1) * (time.thread_time() - began)
            objective += loss.item()
        optimizer.step()
        wait(step + 1)
    options.leave(rank, objective=objective)


def _barrier(options: Options) -> Callable[[int], None]:
    """What a plain loop calls after a step, with the number of steps it has done."""
    if not options.in_step:
        return lambda done: None
    path = Path(options.folder, "marks")
    with path.open("ab") as file:
        file.truncate(8 * options.in_step)
    marks = np.memmap(path, np.int64, "r+")

    def wait(done: int) -> None:
        mark(marks, options.own[0] * options.in_step // options.microbatches, done)
        wait_for(marks, done)

    return wait


def _unsynced(module: nn.Module) -> AbstractContextManager[Any]:
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


if __name__ == "__main__":
    main(Options(**json.loads(sys.argv[1])))
