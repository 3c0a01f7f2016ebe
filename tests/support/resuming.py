"""A small run to be prolonged, resumed with changes and replayed, in this process."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from instep.data import Data
from instep.objectives import objective
from instep.recipe import Recipe, Team
from instep.recipe_files import read_saved
from instep.record.folder import RunFolder
from instep.record.resuming import recorded, resumed
from support.harness import Client, Outcome, train_here
from support.serving import replayed

SAMPLES = 48


@objective
def distance(model: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return (model(x)[:, 0] - y).square().sum()


def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 4, generator=generator)
    return Data(TensorDataset(x, x.sum(1)), TensorDataset(x[:16], -x[:16].sum(1)))


def linear() -> nn.Module:
    return nn.Linear(4, 1)


def recipe(**fields: Any) -> Recipe:
    defaults: dict[str, Any] = {
        "model": linear, "objective": distance, "data": data, "batch": 8, "microbatches": 4, "steps": 12,
        "optimizer": functools.partial(torch.optim.Adam, lr=0.05), "name": "resuming",
    }  # fmt: skip
    return Recipe(**{**defaults, **fields})


def begin(path: Path, given: Recipe, team: Team, steps: int) -> Outcome:
    """A run of so many steps, to be prolonged."""
    return train_here(dataclasses.replace(given, steps=steps), team, path)


def go_on(
    path: Path, given: Recipe, team: Team, skip: tuple[int, ...] = (), *, steps: int = 0, client: Client | None = None
) -> Outcome:
    """As `instep.train(given, resume=path, skip_samples=skip)`, in this process."""
    folder = RunFolder.open(path)
    table = read_saved(folder.recipe_path)
    table.pop("team")
    given = dataclasses.replace(given, steps=steps or given.steps)
    changed, _ = resumed(folder, given, table, skip)
    return train_here(changed, team, path, resume=True, client=client)


def again(path: Path, given: Recipe) -> Any:
    table = read_saved(RunFolder(path).recipe_path)
    table.pop("team")
    return replayed(recorded(RunFolder(path), given, table), path)
