"""A linear model on 40 samples: the smallest recipe."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from instep.randomness import key_of_step
from instep.recipe import Recipe


def regression(**changes: Any) -> Recipe:
    """A linear model on 40 samples."""
    fields: dict[str, Any] = {
        "model": lambda: nn.Linear(3, 1),
        "objective": squares,
        "data": numbers,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        "batch": 8,
        "microbatches": 4,
        "steps": 6,
    }
    return Recipe(**{**fields, **changes})


def numbers(count: int = 40, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 3, generator=generator), torch.randn(count, 1, generator=generator))


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum()


def held(file: Path, after: int) -> Callable[..., Tensor]:
    """`squares` that waits, after so many microbatches of a process, until there is this file."""
    done = [0]

    def waiting(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        done[0] += 1
        while done[0] > after and not file.exists():
            time.sleep(0.002)
        return squares(model, batch)

    return waiting


def waiting_in(step: int, microbatch: int, file: Path) -> Recipe:
    """`regression` of 3 steps, of which one microbatch is not computed before there is the file."""
    return waiting_for((step, microbatch, file), steps=3)


def waiting_for(*held: tuple[int, int, Path], steps: int) -> Recipe:
    """`regression`, of which these microbatches of these steps are not computed before there are their files."""
    files = {key_of_step(0, step, microbatch, "compute"): file for step, microbatch, file in held}

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        file = files.get(torch.initial_seed())
        while file is not None and not file.exists():
            time.sleep(0.002)
        return squares(model, batch)

    return regression(steps=steps, objective=objective)
