"""Optimizers that train other weights than are to be used, as schedule-free ones do, and tell by `eval` and `train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from instep.data import Data
from instep.errors import ComponentError
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.recipe import Recipe, Team
from instep.record import checkpoint
from instep.record.folder import digest as digest_of
from instep.rules import UpdateRule
from instep.rules import presets as p
from support.harness import train_here
from support.regression import numbers, regression, squares
from support.schedule_free import BETA, ScheduleFree
from support.sentences import one_sentence
from support.serving import replayed

pytestmark = pytest.mark.processes


class Hidden(ScheduleFree):
    """The same steps, without a word that other weights are meant."""

    def __init__(self, parameters: list[Tensor]):
        super().__init__(parameters)
        self.param_groups[0]["training"] = True

    train = eval = None  # type: ignore[assignment]


def held_out(state: Mapping[str, Tensor]) -> float:
    """The objective that weights have on the held-out data."""
    return float(squares(_with(state), numbers(24, seed=1).tensors).detach()) / 24


def seen(model: nn.Module, data: Data, folder: Path) -> Mapping[str, Any]:
    return {"weight": model.state_dict()["2.weight"].flatten().tolist()}


def recipe_of(optimizer: Any = ScheduleFree, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "model": lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)),
        "data": lambda: Data(numbers(24), numbers(24, seed=1)), "batch": 6, "microbatches": 3, "artifacts": seen,
    }  # fmt: skip
    return regression(optimizer=optimizer, **{**fields, **changes})


def loaded(run: Path, version: int = 6) -> checkpoint.Loaded:
    return checkpoint.load(checkpoint.path_of(run / "checkpoints", version))


def check(run: Any) -> None:
    """What is saved, shown and evaluated is x, and the checkpoint's own state y."""
    saved = loaded(run.path, run.result["versions"])
    states = saved.training_state["optimizer"]["state"]
    for index, (name, y) in enumerate(saved.training_state["weights"].items()):
        assert torch.equal(y.lerp(states[index]["z"], 1 - 1 / BETA), saved.model_state[name])
        assert not torch.equal(y, saved.model_state[name])
    assert digest_of(run.path) == run.digest == saved.digest
    assert run.result["artifacts"]["figures"] == seen(_with(saved.model_state), None, run.path)  # type: ignore[arg-type]
    assert run.result["held_out"] == pytest.approx(held_out(saved.model_state), rel=1e-6)
    trained = {**saved.model_state, **saved.training_state["weights"]}
    assert run.result["held_out"] != pytest.approx(held_out(trained), rel=1e-6)


def _with(state: Mapping[str, Tensor]) -> nn.Module:
    model: nn.Module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    model.load_state_dict(dict(state))
    return model


def test_what_is_evaluated_and_saved_is_the_average_and_training_goes_on_from_the_other(tmp_path: Path) -> None:
    runs = [
        train_here(recipe_of(evaluate_every=every), Team(workers=w, checkpoint_every=2), tmp_path / f"{w}-{every}")
        for w, every in ((1, 0), (2, 1), (3, 2))
    ]
    for run in runs:
        check(run)
        assert run.digest == runs[0].digest, "evaluations leave no trace"
        assert not [event["why"] for event in run.events if event["kind"] == "warned"]
        assert replayed(recipe_of(), run.path).same
    hidden = train_here(recipe_of(Hidden), Team(workers=2), tmp_path / "hidden")
    trained = loaded(runs[0].path).training_state["weights"]
    for name, value in loaded(hidden.path).model_state.items():
        assert torch.equal(value, trained[name])


@pytest.mark.parametrize("engine", ["lockstep", "server"])
def test_a_resume_goes_on_from_the_weights_that_were_trained(engine: Any, tmp_path: Path) -> None:
    whole = train_here(recipe_of(), Team(workers=1), tmp_path / "whole")
    train_here(recipe_of(steps=3), Team(workers=2, engine=engine), tmp_path / "run", tried=True)
    run = train_here(recipe_of(), Team(workers=3, engine=engine), tmp_path / "run", resume=True)
    check(run)
    assert run.digest == whole.digest
    assert replayed(recipe_of(), run.path).same


def test_the_server_and_the_virtual_clock_take_the_average_too(tmp_path: Path) -> None:
    recipe = recipe_of(rule=p.asynchronous(), evaluate_every=2)
    run = train_here(recipe, Team(workers=2, checkpoint_every=2), tmp_path / "run")
    check(run)
    assert replayed(recipe, run.path).same
    (tmp_path / "virtual/checkpoints").mkdir(parents=True)
    result = simulate(recipe, Cluster(workers=2), True, tmp_path / "virtual", lambda event: None)
    assert loaded(tmp_path / "virtual", result["versions"]).digest == result["digest"]
    assert replayed(recipe, tmp_path / "virtual").same


def test_a_rollback_goes_back_to_the_weights_that_were_trained(tmp_path: Path) -> None:
    from instep.worker.replica import Replica

    replica = Replica(recipe_of(), "cpu")
    noise = [torch.ones_like(parameter) for parameter in replica.parameters]
    replica.update(0, list(noise))
    state, training = replica.saved_state(), replica.training_state()
    before = [parameter.detach().clone() for parameter in replica.parameters]
    replica.update(1, list(noise))
    replica.load(state, training)
    assert all(torch.equal(*each) for each in zip(before, replica.parameters, strict=True))


def test_local_steps_are_warned_of(tmp_path: Path) -> None:
    rule = UpdateRule.from_text("local_sgd:2")
    run = train_here(recipe_of(rule=rule), Team(workers=2), tmp_path / "run")
    (line,) = (event["why"] for event in run.events if event["kind"] == "warned")
    assert line.startswith("the optimizer ScheduleFree averages the weights of its own steps, and under a rule with")
    assert one_sentence(line)


def test_an_evaluation_that_would_change_the_state_is_refused(tmp_path: Path) -> None:
    class Swapping(ScheduleFree):
        def eval(self) -> None:
            super().eval()
            self.param_groups[0]["steps"] += 1

    with pytest.raises(ComponentError, match="Swapping does not come back to its own 'optimizer.param_groups.0.steps'"):
        train_here(recipe_of(Swapping), Team(), tmp_path / "run", tried=True)
