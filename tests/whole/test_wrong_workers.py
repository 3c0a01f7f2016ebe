"""A worker that is wrong in every microbatch from some step on is named soon at 1 %, and leaves no trace."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from instep.recipe import Team
from support.harness import train_here
from support.proved import save
from support.regression import regression, squares
from support.wrong_workers import computed, one_wrong

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("forked_pythons")]

SEED = 16
WITHIN = 500
"""Of its microbatches, those from the first wrong one on."""


def trial(number: int, folder: Path) -> dict[str, Any]:
    """One run, in which a worker is wrong from a microbatch on; both are drawn. `held`: it leaves no trace."""
    chance = random.Random(f"{SEED}/{number}")
    workers = chance.choice([2, 3])
    worker, after = chance.randrange(workers), chance.randrange(100)
    steps = (after + WITHIN) // (4 // workers) + 10
    objective = one_wrong(squares, worker, folder / f"noted-{number}", after=after)
    team = Team(workers=workers, audit="1%", balance="off", checkpoint_every=50, keep="thinned")
    run = train_here(regression(steps=steps, seed=number, objective=objective), team, folder / f"run-{number}")
    alone = train_here(regression(steps=steps, seed=number), Team(checkpoint_every=steps), folder / f"alone-{number}")
    wrong = [each["worker"] for each in run.result["audit"]["wrong"]]
    needed = computed(folder / f"noted-{number}").count("w")
    named = wrong == [worker] and needed <= WITHIN
    return {
        "workers": workers, "worker": worker, "after": after, "named": wrong, "needed": needed,
        "within": named, "held": wrong == [worker] and run.digest == alone.digest,
    }  # fmt: skip


@pytest.mark.slow
def test_a_tenth_of_the_trials(tmp_path: Path) -> None:
    found = [trial(number, tmp_path) for number in range(10)]
    assert [each for each in found if not each["held"]] == []
    assert sum(each["within"] for each in found) >= 9


@pytest.mark.prove
def test_a_hundred_trials(tmp_path: Path) -> None:
    began = time.monotonic()
    found = [trial(number, tmp_path) for number in range(100)]
    save("wrong_workers", found, seed=SEED, began=began)
    assert [each for each in found if not each["held"]] == []
    assert sum(each["within"] for each in found) >= 99
