"""A run whose steps begin one by one, so that a test has something happen in the midst of any of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from instep.randomness import key_of_step
from instep.recipe import Team
from support.harness import Client, Outcome, told, train_here
from support.patience import LONG_S
from support.processes import wait_until
from support.regression import regression, squares


class Paced:
    """A recipe whose steps begin one by one until what the test waits for has happened, and then all at once."""

    def __init__(self, folder: Path, steps: int = 200):
        self.steps, self._file = steps, folder / "steps that may begin"
        self._file.touch()
        seeds = {key_of_step(0, step, 0, "compute"): step for step in range(steps)}

        def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            step = seeds.get(torch.initial_seed(), 0)
            while self._file.stat().st_size < step:
                time.sleep(0.002)
            return squares(model, batch)

        optimizer = partial(torch.optim.AdamW, lr=0.01)
        self.recipe = regression(steps=steps, objective=objective, optimizer=optimizer, model=two_layers)

    def until(self, true: Callable[[], bool], what: str) -> None:
        """One more step every while, until then."""
        until = time.monotonic() + LONG_S
        while not true():
            assert time.monotonic() < until, what
            with self._file.open("ab") as file:
                file.write(b".")
            time.sleep(0.1)

    def hold(self, client: Client) -> None:
        """Returns once the next step waits in its first microbatch, since no more may begin."""
        may_begin = self._file.stat().st_size
        wait_until(lambda: told(client, "merged")[-1]["version"] > may_begin, LONG_S, "the step before")

    def go_on(self) -> None:
        os.truncate(self._file, self.steps)


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))


def check_in_place(run: Outcome, paced: Paced, path: Path) -> None:
    """The digest of one worker, each step once, one start, and the checkpoint of the end alone."""
    assert run.digest == train_here(replace(paced.recipe, objective=squares), Team(), path).digest
    assert [each["version"] for each in told(run, "merged")] == list(range(1, paced.steps + 1))
    assert len(told(run, "run_started")) == 1
    assert [each["version"] for each in told(run, "checkpointed")] == [paced.steps]


def changed(client: Client, times: int) -> bool:
    """Whether the team has been changed so often, and has done a step since."""
    groups, merged = told(client, "regrouped"), told(client, "merged")
    return len(groups) == times and merged[-1]["version"] > groups[-1]["version"]


def pid_of(client: Client, worker: int) -> int:
    def found() -> list[int]:
        return [int(each["pid"]) for each in told(client, "joined") if each["worker"] == worker]

    wait_until(lambda: bool(found()), LONG_S, "its start")
    return found()[-1]
