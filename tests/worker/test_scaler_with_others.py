"""The loss scale where weights are averaged, where parameters are frozen, and where objectives take turns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instep.engines.standing_in import StandIn
from instep.loss_scale import LossScale
from instep.recipe import Recipe, Team
from support import workloads
from support.adversaries import adversarial, turns
from support.deaths import before
from support.deaths import run as run_with_deaths
from support.harness import Outcome, stopping_at, told, train_here
from support.serving import replayed

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("forked_pythons")]

SCALE: dict[str, Any] = {"precision": "float16", "loss_scale": LossScale(init=2.0**24, growth_interval=2)}


def averaged() -> Recipe:
    frozen = {"embedding.*": "..3", "blocks.1.attention*": "4.."}
    return workloads.gpt(ema=(0.3,), freeze=frozen, steps=10, **SCALE)


def in_turns() -> Recipe:
    return adversarial(objective=turns(2, 1), ema=(0.3,), steps=14, **SCALE)


def found(run: Outcome) -> tuple[Any, ...]:
    """Digests of the weights and of their average, and the scale of each update."""
    scales = [(each["loss_scale"], each.get("overflows", 0)) for each in told(run, "merged")]
    return run.digest, run.result["ema"]["0.3"]["digest"], scales


@pytest.mark.parametrize("of", [averaged, in_turns])
def test_one_digest_for_any_team_a_death_and_a_resume(of: Callable[[], Recipe], tmp_path: Path) -> None:
    recipe = of()
    one = train_here(recipe, Team(), tmp_path / "one")
    left_out = [place for place, (_, overflow) in enumerate(found(one)[2]) if overflow]
    assert 2 <= len(left_out) < recipe.steps - 2
    for team in (Team(workers=3), Team(workers=2, engine="server")):
        assert found(train_here(recipe, team, tmp_path / f"{team.workers}")) == found(one)
    died = run_with_deaths(recipe, 2, tmp_path / "died", before(StandIn, "until_settled", 1, calls=left_out[-1] + 1))
    assert died.result["restarts"] == 1
    assert found(died) == found(one)
    stopped = train_here(recipe, Team(workers=2), tmp_path / "run", client=stopping_at(left_out[-1]))
    assert stopped.result["interrupted"]
    resumed = train_here(recipe, Team(workers=3), tmp_path / "run", resume=True)
    assert found(resumed)[:2] == found(one)[:2]
    assert replayed(recipe, resumed.path).same
