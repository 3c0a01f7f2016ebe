"""Recomputed values are compared after the first step too: what goes wrong later is found, at little cost."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from instep import Recipe, Team
from instep import gradient_checkpointing as gc
from instep.errors import RecomputeError
from instep.worker import spot_checks
from instep.worker.spot_checks import SpotChecks
from support.harness import Client, train_here
from support.workloads import gpt


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.widen, self.back = nn.Linear(16, 256), nn.Linear(256, 16)
        self.scale = torch.ones(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.back(torch.tanh(torch.relu(self.widen(x)) * self.scale))
        return out


class WarmsUp(nn.Module):
    """Its blocks read a value that is set for each call: 1 in the first `late` steps, another one later."""

    def __init__(self, late: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.out, self.late = nn.Linear(16, 4), late
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        ones = torch.ones(len(x), 1)
        scale = 1 + x[:, :1].abs() if int(self.seen) > self.late else ones
        for block in self.blocks:
            block.scale = scale
        for block in self.blocks:
            x = block(x)
        for block in self.blocks:
            block.scale = ones
        out: Tensor = self.out(x)
        return out


def recipe(**changes: Any) -> Recipe:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    fields: dict[str, Any] = {
        "model": lambda: WarmsUp(3), "data": torch.utils.data.TensorDataset(x, x[:, :4].argmax(1)), "batch": 16,
        "objective": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="sum"),
        "microbatches": 4, "steps": 12, "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    }  # fmt: skip
    return Recipe(**{**fields, **changes})


@pytest.mark.processes
@pytest.mark.parametrize(("workers", "engine"), [(1, "lockstep"), (2, "lockstep"), (2, "server")])
def test_a_value_that_differs_only_after_some_steps_ends_the_run_before_the_update(
    workers: int, engine: Any, tmp_path: Path
) -> None:
    client = Client()
    said = r"of block 'blocks\.\d', mul\.Tensor in 'blocks\.\d', gave another value .* It was right in step \d, when"
    with pytest.raises(RecomputeError, match=said):
        train_here(recipe(), Team(workers=workers, engine=engine, memory="66%"), tmp_path / "run", client=client)
    assert 3 <= sum(event["kind"] == "merged" for event in client.events) < 9


@pytest.mark.processes
def test_the_tape_counts_the_seconds_and_no_bit_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = train_here(gpt(steps=4), Team(workers=1), tmp_path / "bare")
    for workers, free_s in ((2, 1e9), (3, 0.0)):
        monkeypatch.setattr(spot_checks, "FREE_S", free_s)
        run = train_here(gpt(steps=4), Team(workers=workers, memory="80%"), tmp_path / f"{workers}")
        assert run.digest == bare.digest
        counted = {e["version"] for e in run.events if e["kind"] == "computed" and e.get("verify_s", 0.0) > 0}
        assert counted > {0} if free_s else counted == {0}
    assert not any("verify_s" in event for event in bare.events)


def test_one_block_alone_is_compared_where_it_is_named() -> None:
    torch.manual_seed(0)
    model, x = WarmsUp(0), torch.randn(8, 16)

    def objective(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum()

    profile = gc.profile(WarmsUp(99), objective, x)
    applied = gc.apply(model, gc.plan(profile, budget_bytes=gc.least_bytes(profile)), verify="blocks.1")
    with pytest.raises(RecomputeError, match=r"of block 'blocks\.1'"):
        objective(model, x).backward()
    assert applied.verify_s["blocks.1"] > 0
    assert sum(applied.verify_s.values()) == applied.verify_s["blocks.1"]


class Run:
    """A run of `steps` of a second each, whose checks take `cost_s` each, on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost_s: float, steps: int, workers: int = 1):
        self.now_s = 0.0
        monkeypatch.setattr(spot_checks, "time", SimpleNamespace(monotonic=lambda: 1 + self.now_s))
        self.names = [f"blocks.{place}" for place in range(5)]
        self.applied: Any = SimpleNamespace(verify=False, verify_s=dict.fromkeys(self.names, 0.0))
        self.found: dict[int, tuple[int, str]] = {}
        team = [
            SpotChecks(self.applied, microbatches=4, steps=steps, checkpoint_every=100, workers=workers)
            for _ in range(workers)
        ]
        self.first = set()
        for step in range(steps):
            for microbatch in range(4):
                checks = team[microbatch * workers // 4]
                checks.choose(step, microbatch)
                verified = self.applied.verify
                for name in self.names:
                    self.applied.verify_s[name] += cost_s if verified is True or verified == name else 0.0
                if verified is True:
                    self.first.add((step, microbatch))
                elif verified:
                    assert step not in self.found, "one microbatch of a step"
                    self.found[step] = microbatch, verified
                checks.computed(step)
            self.now_s += 1.0


def test_comparing_takes_half_a_percent_of_the_seconds_and_every_block_has_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(monkeypatch, cost_s=0.02, steps=2000)
    assert run.first == {(0, microbatch) for microbatch in range(4)}
    spent_s = 0.02 * len(run.found)
    assert 0.004 * run.now_s < spent_s < spot_checks.FREE_S + spot_checks.SHARE * run.now_s
    assert {name for _, name in run.found.values()} == set(run.names)
    assert {microbatch for microbatch, _ in run.found.values()} == set(range(4))
    assert set(range(99, 2000, 100)) <= run.found.keys(), "at checkpoints"


def test_a_check_too_dear_waits_until_there_is_time_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, cost_s=3.0, steps=2000)
    assert 1 <= 3.0 * len(run.found) <= spot_checks.FREE_S + spot_checks.SHARE * run.now_s


def test_where_there_is_time_every_block_is_compared_in_as_many_steps_as_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(monkeypatch, cost_s=0.0, steps=21)
    for first in range(5, 20, 5):
        assert {run.found[step][1] for step in range(first, first + 5)} == set(run.names)


def test_which_block_and_microbatch_follows_from_the_step_for_any_number_of_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [Run(monkeypatch, cost_s=0.0, steps=20, workers=workers).found for workers in (1, 2, 4)]
    assert found[0] == found[1] == found[2]
