"""Two small nets that train in turns, on points of the plane."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.utils.data import TensorDataset

from instep.objectives.adversarial import Discriminator, Generator
from instep.recipe import Recipe


class Pair(nn.Module):
    """A generator of points [B, 2] from noise [B, 4], and what tells them from others: logits [B]."""

    latents = 4

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(0.2), nn.Dropout(dropout), nn.Linear(8, 1))


def ring(count: int = 60) -> tuple[TensorDataset, TensorDataset]:
    """Points near a circle: those to train on, and 20 that are held out."""
    draws = torch.Generator().manual_seed(0)
    angles = 6.2832 * torch.rand(count + 20, generator=draws)
    points = torch.stack((angles.cos(), angles.sin()), 1) + 0.1 * torch.randn(count + 20, 2, generator=draws)
    return TensorDataset(points[:count]), TensorDataset(points[count:])


def turns(discriminator: int = 1, generator: int = 1, penalty: float = 0.0) -> list[dict[str, Any]]:
    """Both objectives, with so many steps in a row."""
    judge = partial(Discriminator, penalty=penalty)
    return [
        {"name": "discriminator", "parameters": "discriminator.*", "steps": discriminator, "use": judge},
        {"name": "generator", "parameters": "generator.*", "steps": generator, "use": Generator},
    ]


def adversarial(**changes: Any) -> Recipe:
    """A small recipe of both; the last batch of an epoch is ragged."""
    fields: dict[str, Any] = {
        "model": Pair,
        "objective": turns(),
        "data": ring,
        "optimizer": {
            "discriminator.*": partial(optim.AdamW, lr=0.01, weight_decay=0.1),
            "generator.*": partial(optim.SGD, lr=0.05, momentum=0.5, weight_decay=0.1),
        },
        "batch": 25,
        "microbatches": 5,
        "steps": 8,
        "clip_norm": 0.5,
    }
    return Recipe(**{**fields, **changes})


class Block(nn.Module):
    """A residual layer, [B, 16]: such are computed again where memory lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.widen, self.narrow = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = x + self.narrow(torch.tanh(self.widen(self.norm(x))))
        return made


class DeepPair(Pair):
    """Both nets with repeated blocks, and dropout in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 16), *(Block() for _ in range(3)), nn.Linear(16, 2))
        judge = (nn.Sequential(Block(), nn.Dropout(0.1)) for _ in range(3))
        self.discriminator = nn.Sequential(nn.Linear(2, 16), *judge, nn.Linear(16, 1))
