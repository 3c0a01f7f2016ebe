"""Small models whose own forwards write their parameters, and the loop that trains them whole batch by whole batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from instep.data import Data
from instep.data.cursor import Cursor
from instep.randomness import key, seed_all
from instep.recipe import Recipe
from instep.worker.replica import Replica


class Lookup(nn.Module):
    """An embedding whose rows are scaled down, in place, when a forward reads one of a norm above 1."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(12, 4, max_norm=1.0)
        self.head = nn.Linear(4, 3)
        with torch.no_grad():
            self.rows.weight.mul_(4 / self.rows.weight.norm(dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rows(x))
        return out


class Forced(nn.Module):
    """Forced weight normalisation (EDM2): in training, each forward makes the rows of its weight unit vectors.

    `late`: not in so many first steps. `past`: past autograd, through ``.data``. `swaps`: by giving it other memory.
    `evaluation`: in evaluation too.
    """

    def __init__(self, late: int = 0, past: bool = False, swaps: bool = False, evaluation: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.weight = nn.Parameter(torch.randn(3, 6))
        self.late, self.past, self.swaps, self.evaluation = late, past, swaps, evaluation
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.step += 1
        if int(self.step) > self.late if self.training else self.evaluation:
            unit = F.normalize(self.weight.detach(), dim=1)
            if self.swaps:
                self.weight.data = unit
            elif self.past:
                self.weight.data.copy_(unit)
            else:
                with torch.no_grad():
                    self.weight.copy_(unit)
        return F.linear(torch.tanh(self.first(x)), F.normalize(self.weight, dim=1))


class Teacher(nn.Module):
    """A frozen part follows the trained one, as a moving average that each training forward takes a step of."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(4, 3), nn.Linear(4, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                    mine.lerp_(theirs, 0.1)
        out: Tensor = self.student(x) - 0.5 * self.teacher(x)
        return out


class Torn(nn.Module):
    """Writes what depends on the samples, so that no two microbatches agree."""

    def __init__(self, late: int = 0) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3))
        self.late = late
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.step += 1
        if self.training and int(self.step) > self.late:
            with torch.no_grad():
                self.scale.copy_(1 + 0.1 * y.mean(0))
        out: Tensor = y * self.scale.clone()
        return out


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum()


def numbers(count: int = 44) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(count, 4, generator=generator), torch.randn(count, 3, generator=generator))


def tokens(count: int = 44) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    words = torch.randperm(count, generator=generator) % 12
    return TensorDataset(words, torch.randn(count, 3, generator=generator))


def recipe(model: Any, **changes: Any) -> Recipe:
    data = tokens if model is Lookup else numbers
    fields: dict[str, Any] = {
        "model": model, "objective": squares, "data": lambda: Data(data(), data(9)), "seed": 3,
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9), "batch": 12, "microbatches": 3, "steps": 9,
    }  # fmt: skip
    return Recipe(**{**fields, **changes})


KINDS: dict[str, Any] = {
    "max_norm": Lookup,
    "forced": Forced,
    "forced, past autograd": partial(Forced, past=True),
    "forced, other memory": partial(Forced, swaps=True),
    "teacher": Teacher,
}


def plain_loop(made: Recipe) -> nn.Module:
    """The model after a plain loop over whole batches, without microbatches or any of the project's machinery."""
    data = Replica(made, "cpu").data.train
    cursor = Cursor(samples=len(data), batch=made.batch, microbatches=made.microbatches, seed=made.seed)
    seed_all(key(made.seed, "model"))
    model = made.model.build()
    optimizer = made.optimizer.build([p for p in model.parameters() if p.requires_grad])
    for step in range(made.steps):
        indices = torch.tensor(cursor.indices(step))
        batch = [tensor[indices] for tensor in data.tensors]  # type: ignore[attr-defined]
        optimizer.zero_grad()
        (made.objective.load()(model, batch) / len(indices)).backward()
        optimizer.step()
    return model
