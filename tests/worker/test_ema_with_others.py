"""Averages of the weights where parameters are frozen, where objectives take turns, and where optimizers average."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, optim

from instep.errors import RecipeError
from instep.recipe import Recipe, Team
from instep.record.digest import digest_of_state
from instep.rules import UpdateRule
from instep.run import Run
from instep.worker.replica import Replica
from support import workloads
from support.adversaries import adversarial, turns
from support.harness import Outcome, digests, saved, stopping_at, told, train_here
from support.schedule_free import ScheduleFree
from support.sentences import one_sentence
from support.serving import replayed

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("forked_pythons")]

DECAYS = (0.3, 0.9)
FROZEN = {"embedding.*": "..3", "blocks.0.mlp.widen.*": "all", "blocks.1.attention*": "4..", "*.mlp_norm.*": "2..5"}


def freezing(**changes: Any) -> Recipe:
    return workloads.gpt(**{"ema": DECAYS, "freeze": FROZEN, "steps": 6, **changes})


def in_turns(**changes: Any) -> Recipe:
    return adversarial(**{"ema": DECAYS, "objective": turns(2, 1), "steps": 7, "evaluate_every": 3, **changes})


RECIPES = {"freeze": freezing, "turns": in_turns}


def by_hand(recipe: Recipe, run: Outcome, decay: float) -> dict[str, Tensor]:
    """Over the weights of all versions, of each of which there is a checkpoint."""
    average: Mapping[str, Tensor] = Replica(recipe, "cpu").module.state_dict()
    for version in range(1, recipe.steps + 1):
        now = saved(run, version).model_state
        average = {name: torch.lerp(average[name], value, 1 - decay) for name, value in now.items()}
    return dict(average)


@pytest.mark.parametrize("which", RECIPES)
def test_one_digest_of_the_averages_for_any_team_and_after_resumes(which: str, tmp_path: Path) -> None:
    recipe = RECIPES[which]()
    one = train_here(recipe, Team(checkpoint_every=1, keep=0), tmp_path / "one")
    for decay in DECAYS:
        assert digest_of_state(by_hand(recipe, one, decay)) == one.result["ema"][str(decay)]["digest"]
    for team in (Team(workers=2), Team(workers=3, engine="server")):
        run = train_here(recipe, team, tmp_path / f"{team.workers}")
        assert digests(run) == digests(one)
        assert run.result["ema"] == one.result["ema"], "figures on held-out data too"
    for version, team in ((2, Team(workers=2)), (4, Team(workers=3, engine="server"))):
        run = train_here(recipe, team, tmp_path / "run", client=stopping_at(version), resume=version > 2)
        assert run.result["interrupted"]
    run = train_here(recipe, Team(), tmp_path / "run", resume=True)
    assert digests(run) == digests(one)
    assert replayed(recipe, run.path).same
    plain = train_here(RECIPES[which](ema=()), Team(workers=2), tmp_path / "plain")
    assert plain.digest == one.digest, "the weights do not know of it"


def test_an_average_has_what_is_frozen_for_the_whole_run_from_the_model(tmp_path: Path) -> None:
    recipe = freezing()
    run = train_here(recipe, Team(workers=2), tmp_path / "run")
    own = saved(run, 6).training_state["ema"]["averages"]["0.9"]
    assert not [name for name in own if name.startswith("blocks.0.mlp.widen.")]
    assert "embedding.weight" in own
    found = Run(run.path, run.result, recipe).state_dict(ema=0.9)
    for name, value in saved(run, 6).model_state.items():
        assert torch.equal(found[name], value) == name.startswith("blocks.0.mlp.widen.")


def test_averages_are_told_by_objective_and_move_on_in_the_turns_of_others(tmp_path: Path) -> None:
    recipe = in_turns()
    run = train_here(recipe, Team(workers=2, checkpoint_every=1, keep=0), tmp_path / "run")
    for event in told(run, "evaluated"):
        for own in event["ema"].values():
            assert own["turns"].keys() == event["turns"].keys() == {"discriminator", "generator"}
            assert own["objective"] == pytest.approx(sum(own["turns"].values()))
            assert own["turns"] != event["turns"]
    # Step 3 is the generator's, and 4 and 5 the discriminator's: its average goes on towards weights that stay.
    name, averages = "generator.0.weight", {}
    for version in (3, 4, 5):
        state = saved(run, version)
        averages[version] = state.training_state["ema"]["averages"]["0.9"][name]
        assert torch.equal(state.model_state[name], saved(run, 3).model_state[name])
    gap = {version: (average - saved(run, 3).model_state[name]).abs().max() for version, average in averages.items()}
    assert math.isclose(gap[5], 0.9**2 * gap[3], rel_tol=1e-3)


@pytest.mark.parametrize("rule", ["local_sgd:3", "diloco:2"])
@pytest.mark.parametrize("which", RECIPES)
def test_under_local_steps_they_are_replayed(which: str, rule: str, tmp_path: Path) -> None:
    recipe = RECIPES[which](rule=UpdateRule.from_text(rule), steps=12)
    run = train_here(recipe, Team(workers=2), tmp_path / "run")
    assert len(set(digests(run).values())) == 3
    assert replayed(recipe, run.path).same


def test_one_optimizer_of_several_that_averages_weights_itself_is_refused_with_them(tmp_path: Path) -> None:
    optimizers = {"discriminator.*": ScheduleFree, "generator.*": partial(optim.SGD, lr=0.05)}
    with pytest.raises(RecipeError, match=r"'recipe.ema' is \[0.3, 0.9\], and the optimizer .*ScheduleFree") as refused:
        train_here(in_turns(optimizer=optimizers), Team(), tmp_path / "run")
    assert one_sentence(refused.value.message)
