"""The same numbered samples in files of each format, and a model that counts how often it has seen each of them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from instep.data import Data
from instep.data.lines import jsonl, text_lines
from instep.objectives import objective
from instep.recipe import Recipe

SAMPLES = 60
SHARDS = ((0, 9), (9, 10), (10, 34), (34, 60))
"""The numbers that lie in each file, from and to."""


class Seen(nn.Module):
    """`seen[n]` is how often the sample of number n was trained on; the weight is trained by what it gives."""

    seen: Tensor

    def __init__(self, samples: int = SAMPLES) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5]))
        self.register_buffer("seen", torch.zeros(samples, dtype=torch.int64))

    def forward(self, numbers: Tensor) -> Tensor:
        if self.training:
            self.seen += torch.bincount(numbers, minlength=len(self.seen))
        return self.weight * numbers / len(self.seen)


@objective
def distance(model: nn.Module, numbers: Tensor) -> Tensor:
    return (model(numbers) - 0.3).square().sum()


def recipe(data: Any, *, epochs: int = 2, **fields: Any) -> Recipe:
    """Goes through the samples so often, by batches of 10 in 5 microbatches."""
    defaults: dict[str, Any] = {
        "model": Seen, "objective": distance, "data": data, "batch": 10, "microbatches": 5,
        "steps": epochs * SAMPLES // 10, "optimizer": functools.partial(torch.optim.AdamW, lr=0.01),
        "buffers": {"seen": "sum"},
    }  # fmt: skip
    return Recipe(**{**defaults, **fields})


def by_shard(folder: Path, ending: str, write: Callable[[Path, range], Any]) -> str:
    """Writes the files; their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (start, stop) in enumerate(SHARDS):
        write(folder / f"part-{number + 8}{ending}", range(start, stop))  # part-10 comes after part-9
    return str(folder / f"*{ending}")


def number_of(record: Any) -> Tensor:
    return torch.tensor(int(record["number"] if isinstance(record, dict) else record))


def in_json_lines(folder: Path) -> Callable[[], Data]:
    def write(path: Path, numbers: range) -> None:
        path.write_text("".join(json.dumps({"number": number, "text": "é" * number}) + "\n" for number in numbers))

    return functools.partial(jsonl, by_shard(folder, ".jsonl", write), 0, map=number_of)


def in_text(folder: Path) -> Callable[[], Data]:
    pattern = by_shard(folder, ".txt", lambda path, numbers: path.write_text("\n".join(map(str, numbers))))
    return functools.partial(text_lines, pattern, 0, map=number_of)


FORMATS: dict[str, Callable[[Path], Callable[[], Data]]] = {"jsonl": in_json_lines, "text": in_text}
"""By name: writes the files into a folder, and gives what a recipe's `data` is to be."""
