"""Contenders that train a tiny model in one process: ``python -m benchmarks.small KIND OPTIONS``.

OPTIONS: the fields of `benchmarks.work.Options` as JSON. KIND: plain (a loop of torch's own), accelerate, fabric or
instep. Each takes batches of 32 rows of a TensorDataset, shuffled in every epoch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import instep
from benchmarks.gate import Gate
from benchmarks.work import SEED, Options

ROWS, BATCH = 4096, 32


def mlp() -> nn.Module:
    """26,122 weights."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def rows() -> TensorDataset:
    """[ROWS, 64] float32 and [ROWS] int64."""
    generator = torch.Generator().manual_seed(SEED)
    return TensorDataset(torch.randn(ROWS, 64, generator=generator), torch.randint(10, (ROWS,), generator=generator))


class GatedClasses:
    """Cross-entropy over classes, with a gate before the forward of each step."""

    def __init__(self, address: str):
        self._gate, self._forwards = Gate(address), -1

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            if self._forwards >= 0:  # the first is the engine's look at the objective
                self._gate.tick()
            self._forwards += 1
        x, y = batch
        return F.cross_entropy(model(x), y, reduction="sum")


def by_instep(options: Options) -> None:
    """`instep.train`, one worker, one microbatch a step."""
    recipe = instep.Recipe(
        model="benchmarks.small:mlp",
        objective={"use": "benchmarks.small:GatedClasses", "args": {"address": options.address}},
        data="benchmarks.small:rows",
        optimizer={"use": "torch.optim:AdamW", "args": {"lr": 1e-3, "fused": True}},
        batch=BATCH,
        microbatches=1,
        steps=options.steps,
        seed=SEED,
    )
    instep.train(recipe, team=instep.Team(checkpoint_every=10_000_000), out=Path(options.folder, "run"))


def by_torch(options: Options, kind: str) -> None:
    """The usual loop over a DataLoader, alone or as the libraries of that name have it."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model: Any = mlp()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    loader: Any = DataLoader(rows(), BATCH, shuffle=True)
    backward: Any = Tensor.backward
    if kind == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        backward = accelerator.backward
    elif kind == "fabric":
        from lightning_fabric import Fabric

        fabric = Fabric(accelerator="cpu", devices=1)
        fabric.launch()
        model, optimizer = fabric.setup(model, optimizer)
        loader = fabric.setup_dataloaders(loader)
        backward = fabric.backward
    gate = Gate(options.address)
    for _, (x, y) in zip(range(options.steps), _forever(loader), strict=False):
        gate.tick()
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()


def _forever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


if __name__ == "__main__":
    told = Options(**json.loads(sys.argv[2]))
    by_instep(told) if sys.argv[1] == "instep" else by_torch(told, sys.argv[1])
