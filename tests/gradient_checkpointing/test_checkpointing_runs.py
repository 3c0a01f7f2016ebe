"""`Team.memory`: runs of every engine with plans have the digest of the run without."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from instep.budget import Budget, parse_budget
from instep.data import Data
from instep.errors import CheckpointingError, RecipeError
from instep.recipe import Recipe, Team
from support.checkpointed import ResNet
from support.harness import train_here
from support.workloads import Sentences, classify, gpt, images, padded

pytestmark = pytest.mark.processes

BUDGETS = ("100%", "96%", "90%", "85%", "80%", "75%", "70%", "65%", "60%")


def resnet(**changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "name": "resnet", "model": ResNet, "objective": classify, "data": lambda: (images(), images(24)),
        "batch": 32, "microbatches": 8, "steps": 2,
    }  # fmt: skip
    return Recipe(**{**fields, **changes})


def planned(outcome: Any) -> list[dict[str, Any]]:
    return [event for event in outcome.events if event["kind"] == "planned"]


@pytest.mark.slow  # test_teams_and_autocast_and_the_server_take_plans_too has it at one
@pytest.mark.parametrize(
    ("make", "plans"),
    [(lambda: gpt(steps=2), 6), (resnet, 3)],
    ids=["gpt", "resnet"],
)
def test_a_run_has_the_same_digest_at_ten_budgets(make: Any, plans: int, tmp_path: Path) -> None:
    """`plans`: how many different ones these are at least. The small ResNet has three in all."""
    recipe = make()
    expected = train_here(recipe, Team(), tmp_path / "none").digest
    takes = set()
    for budget in BUDGETS:
        team = Team(memory=budget, workers=1)
        try:
            outcome = train_here(recipe, team, tmp_path / budget)
        except CheckpointingError:  # less than the least that a plan needs
            continue
        assert outcome.digest == expected
        (event,) = planned(outcome)
        assert event["measured_bytes"] == pytest.approx(event["predicted_bytes"], rel=0.05)
        assert event["predicted_bytes"] <= event["budget_bytes"]
        takes.add(event["predicted_bytes"])
    assert len(takes) >= plans


@pytest.mark.parametrize(
    ("changes", "workers", "engine"),
    [
        ({"steps": 2}, 2, "auto"),
        pytest.param({"steps": 2, "precision": "bfloat16"}, 1, "auto", marks=pytest.mark.slow),
        pytest.param({"steps": 2}, 1, "server", marks=pytest.mark.slow),
        ({"steps": 4, "rule": "diloco:2"}, 1, "auto"),
    ],
    ids=["team", "bfloat16", "server", "diloco"],
)
def test_teams_and_autocast_and_the_server_take_plans_too(
    changes: dict[str, Any], workers: int, engine: Any, tmp_path: Path
) -> None:
    bare = train_here(gpt(**changes), Team(workers=workers, engine=engine), tmp_path / "bare")
    lean = train_here(gpt(**changes), Team(workers=workers, engine=engine, memory="80%"), tmp_path / "lean")
    assert lean.digest == bare.digest
    assert len(planned(lean)) == 1
    assert not planned(bare)


def test_a_budget_that_cannot_be_met_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointingError, match=r"no plan fits into .*: the least that one needs is"):
        train_here(gpt(steps=1), Team(memory="1kB"), tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("512MiB", Budget(512 * 2**20)),
        ("2 GB", Budget(2 * 10**9)),
        ("40%", Budget(share=0.4)),
        ("10kB", Budget(10_000)),
    ],
)
def test_a_budget_is_read(text: str, budget: Budget) -> None:
    assert parse_budget(text, "it") == budget


@pytest.mark.parametrize("text", ["0", "0MiB", "512", "512Mb", "40", "0%", "101%", "-1GB", "lots", "1iB"])
def test_a_budget_of_0_or_in_a_wrong_unit_is_a_sentence(text: str) -> None:
    with pytest.raises(RecipeError, match=r"'team.memory' is .*; .*\."):
        Team(memory=text)


@pytest.mark.slow
def test_a_compiled_run_has_the_same_digest_within_a_budget(tmp_path: Path) -> None:
    recipe = gpt(steps=1, compile=True, data=lambda: Data(Sentences(69), collate=partial(padded, longest=12)))
    expected = train_here(recipe, Team(), tmp_path / "none").digest
    outcome = train_here(recipe, Team(workers=2, memory="65%"), tmp_path / "lean")
    (event,) = planned(outcome)
    assert event["measured_bytes"] is None
    assert outcome.digest == expected
