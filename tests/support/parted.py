"""Pairs of short runs that part in a known way, and single faults in a run: what `instep diff` must find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from instep.recipe import Recipe, Team
from support.harness import Outcome, train_here

WIDE, CLASSES, SAMPLES = 6, 4, 41


class Block(nn.Module):
    """A small block whose steps a pair may make in another way; `how` gives them, by name."""

    def __init__(self, how: dict[str, Callable[..., Tensor]], eps: float = 1e-5):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(WIDE, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES)
        self.norm = nn.LayerNorm(16, eps=eps)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self._do("activation", F.gelu, self.first(x)))
        x = self._do("residual", torch.add, x, self.second(x))
        x = self._do("mask", lambda x: x, x)
        x = self._do("sum", lambda x: x, x)
        return self.last(x)  # type: ignore[no-any-return]

    def _do(self, name: str, otherwise: Callable[..., Tensor], *given: Tensor) -> Tensor:
        return self.how.get(name, otherwise)(*given)


def data(change: Callable[[Tensor, Tensor], None] = lambda x, y: None) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, WIDE, generator=generator)
    y = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
    change(x, y)
    return TensorDataset(x, y)


def entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def recipe(how: dict[str, Callable[..., Tensor]] | None = None, *, eps: float = 1e-5, **fields: Any) -> Recipe:
    """A sound one of 8 updates with checksums after every 4."""
    given: dict[str, Any] = {
        "model": lambda: Block(how or {}, eps), "objective": entropy, "data": data(), "batch": 12, "microbatches": 4,
        "steps": 8, "optimizer": lambda p: torch.optim.Adam(p, lr=0.05), "name": "parted", "checksum_every": 4,
    }  # fmt: skip
    return Recipe(**{**given, **fields})


def trained(given: Recipe, path: Path, **team: Any) -> Outcome:
    return train_here(given, Team(**{"workers": 2, "checkpoint_every": 3, "keep": 99, **team}), path)
