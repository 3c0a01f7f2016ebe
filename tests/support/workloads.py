"""Small recipes that between them meet everything that could change a bit."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from instep.data import Data
from instep.models import GPT
from instep.objectives.language import NextToken
from instep.optimizers import adamw
from instep.recipe import Recipe, Schedule


class Sentences(Dataset[list[int]]):
    """Token lists of uneven length, from 2 to 12, made from the index alone."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> list[int]:
        generator = torch.Generator().manual_seed(index)
        length = int(torch.randint(2, 13, (), generator=generator))
        return torch.randint(0, 32, (length,), generator=generator).tolist()


def padded(samples: list[list[int]], longest: int = 0) -> Tensor:
    """[B, T] int64, padded with -100 to the longest of the batch, or to `longest`."""
    longest = longest or max(len(sample) for sample in samples)
    return torch.tensor([sample + [-100] * (longest - len(sample)) for sample in samples])


class ConvNet(nn.Module):
    """Convolutions with BatchNorm, a frozen layer, a branch that only some batches use, and one that none uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(8)
        self.frozen = nn.Conv2d(8, 8, 1).requires_grad_(False)
        self.second = nn.Conv2d(8, 8, 3, stride=2)
        self.norm2 = nn.BatchNorm2d(8, momentum=None)
        self.sometimes = nn.Linear(8, 4)
        self.never = nn.Linear(8, 4)
        self.head = nn.Linear(8, 4)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(self.norm2(self.second(self.frozen(x))))
        features = x.mean((2, 3))
        out: Tensor = self.head(features)
        if bool(features.sum() > 4.1 * len(x)):
            out = out + self.sometimes(features)
        return out


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Two terms with denominators of their own: samples, and samples of class 0."""
    images, labels = batch
    logits = model(images)
    return {
        "cross_entropy": F.cross_entropy(logits, labels, reduction="sum"),
        "pull": 0.01 * logits[labels == 0].square().sum(),
    }


def classify_counts(batch: tuple[Tensor, Tensor]) -> dict[str, int]:
    labels = batch[1]
    return {"cross_entropy": len(labels), "pull": int((labels == 0).sum())}


classify.counts = classify_counts  # type: ignore[attr-defined]


def images(count: int = 69) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(count, 1, 8, 8, generator=generator)
    return TensorDataset(pictures, (pictures.mean((1, 2, 3)) * 16).long().clamp(-1, 2) + 1)


def gpt(**changes: Any) -> Recipe:
    """Dropout, tied weights, padding of uneven length, a ragged last batch, clipping, AdamW, cosine."""
    fields: dict[str, Any] = {
        "name": "gpt",
        "model": lambda: GPT(vocabulary=32, context=12, width=16, depth=2, heads=2, dropout=0.2, tied=True),
        "objective": NextToken,
        "data": lambda: Data(Sentences(69), Sentences(20), collate=padded),
        "optimizer": lambda parameters: adamw(parameters, lr=3e-3),
        "schedule": Schedule(kind="cosine", warmup_steps=2),
        "clip_norm": 0.5,
        "batch": 32,
        "microbatches": 8,
        "ragged": "spread",  # this, and the order, as when their golden digests were made
        "order": "permutation",
        "steps": 7,
    }
    return Recipe(**{**fields, **changes})


def convnet(**changes: Any) -> Recipe:
    """BatchNorm, SGD with Nesterov momentum (it changes gradients in place), two terms, ragged batches, WSD."""
    fields: dict[str, Any] = {
        "name": "convnet",
        "model": ConvNet,
        "objective": classify,
        "data": lambda: Data(images(), images(24)),
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True, weight_decay=0.01),
        "schedule": Schedule(kind="wsd", warmup_steps=1, decay_steps=3),
        "batch": 32,
        "microbatches": 8,
        "ragged": "spread",  # this, and the order, as when their golden digests were made
        "order": "permutation",
        "steps": 7,
    }
    return Recipe(**{**fields, **changes})


ALL = {"gpt": gpt, "convnet": convnet}
