"""Samples that take long to make ready: late once, not in every update until the epoch ends."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from instep import Recipe, Team
from support.harness import train_here

pytestmark = pytest.mark.processes


class Slow(Dataset[tuple[Tensor, Tensor]]):
    """One sample in eight takes longer than some rounds."""

    def __init__(self) -> None:
        self.x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        time.sleep(0.15 if index % 8 == 3 else 0.005)
        return self.x[index], self.x[index, :4].argmax()


def loss(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


@pytest.mark.parametrize("rule", ["backup_workers:1", "asynchronous,max_staleness=2"])
def test_slow_samples_are_dropped_once_and_merged_in_the_middle_of_their_epoch(rule: str, tmp_path: Path) -> None:
    recipe = Recipe(
        model=lambda: torch.nn.Linear(8, 4), objective=loss, data=Slow(), batch=8, microbatches=8, steps=8,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), rule=rule, order="permutation",
    )  # fmt: skip
    run = train_here(recipe, Team(workers=4), tmp_path / "run")
    pieces = {event["seq"]: event["piece"] for event in run.events if event["kind"] == "pushed"}
    dropped = Counter(pieces[event["seq"]] for event in run.events if event["kind"] == "dropped")
    assert dropped
    assert max(dropped.values()) == 1
    assert run.result["staleness_max"] <= run.result["delayed_max"] < run.result["versions"] / 2
