"""The recipe `muon`: Muon for the matrices of a GPT's blocks, AdamW for the rest, told apart by patterns in TOML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from instep import data
from instep.cli.flags import merge
from instep.data.mixture import cursor_over
from instep.engines import piecewise
from instep.errors import ComponentError
from instep.objectives.language import NextToken
from instep.optimizers import adamw
from instep.randomness import key, seed_all
from instep.recipe import Recipe, Team, parse
from instep.recipe_files import read
from instep.record import checkpoint
from instep.rules import UpdateRule
from instep.worker.replica import Replica
from support.deaths import STEPS, after, before, came_through
from support.deaths import run as run_with_deaths
from support.harness import Outcome, saved, stopping_at, told, train_here
from support.serving import replayed
from support.sharding import assert_same

SMALL = {"embedding", "norm", "bias"}


def muon(**settings: str) -> Recipe:
    """The recipe, with a small model and a small text."""
    small = {
        "recipe.model.args": "{ vocabulary = 256, context = 32, width = 32, depth = 2, heads = 2, tied = true }",
        "recipe.data.use": "instep.data.text:text_files", "recipe.steps": str(STEPS), "recipe.sample_length": "0",
        "recipe.data.args": f"{{ pattern = '{Path(data.__file__).parent}/*.py', context = 32 }}",
        "recipe.evaluate_samples": "16",
    }  # fmt: skip
    changes = {f"recipe.{name}": value for name, value in settings.items()}
    return parse(merge(read("muon"), list({**small, **changes}.items())))[0]


def plain_loop(made: Recipe) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """As anybody would write it with these two optimizers."""
    torch.set_num_threads(1)
    seed_all(key(made.seed, "model"))
    model, objective = made.model.build(), NextToken()
    named = dict(model.named_parameters())
    small = {name for name in named if any(part in name for part in SMALL)}
    adam = {"lr": 2e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    matrices = [parameter for name, parameter in named.items() if name not in small]
    assert len(matrices) == 2 * 4
    assert all(parameter.dim() == 2 for parameter in matrices)
    optimizers = [
        adamw([parameter for name, parameter in named.items() if name in small], **adam),  # type: ignore[arg-type]
        torch.optim.Muon(matrices, lr=2e-3, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    rates = [[group["lr"] for group in each.param_groups] for each in optimizers]
    samples = data.from_component(made.data).train
    cursor = cursor_over(
        samples, batch=made.batch, microbatches=made.microbatches, seed=made.seed, ragged=made.ragged,
        drop_last=made.drop_last, order=made.order,
    )  # fmt: skip
    for step in range(made.steps):
        batch = default_collate([samples[int(index)] for index in cursor.indices(step)])
        for each, own in zip(optimizers, rates, strict=True):
            each.zero_grad()
            for group, rate in zip(each.param_groups, own, strict=True):
                group["lr"] = rate * made.schedule.factor(step, made.steps)
        total = objective(model, batch)
        assert isinstance(total, Tensor)
        (total / objective.counts(batch)).backward()
        if made.clip_norm is not None:
            nn.utils.clip_grad_norm_(list(model.parameters()), made.clip_norm)
        for each in optimizers:
            each.step()
    return model, optimizers


def last(run: Outcome) -> checkpoint.Loaded:
    return saved(run, run.result["versions"])


@pytest.mark.processes
def test_fifty_steps_are_those_of_a_plain_loop_with_both_optimizers_to_the_bit(tmp_path: Path) -> None:
    made = muon(steps="50", microbatches="1", clip_norm="none")
    run = train_here(made, Team(), tmp_path / "run")
    model, optimizers = plain_loop(made)
    found = last(run)
    for name, value in model.state_dict().items():
        assert torch.equal(found.model_state[name], value), name
    for one, other in zip(found.training_state["optimizer"]["several"], optimizers, strict=True):
        assert_same(one["state"], other.state_dict()["state"])


@pytest.mark.processes
def test_so_are_those_of_a_team_that_clips_but_for_roundings(tmp_path: Path) -> None:
    made = muon(steps="50")
    run = train_here(made, Team(workers=3), tmp_path / "run")
    model, _ = plain_loop(made)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(last(run).model_state[name], value, rtol=1e-2, atol=2e-3)


@pytest.mark.processes
def test_one_digest_for_any_team(tmp_path: Path) -> None:
    teams: list[dict[str, Any]] = [{"workers": w} for w in (1, 2, 3, 5)]
    teams += [{"workers": 2, "memory": "80%"}, {"workers": 2, "engine": "server"}, {"workers": 3, "shard": "none"}]
    runs = [train_here(muon(), Team(**team), tmp_path / str(number)) for number, team in enumerate(teams)]
    assert len({run.digest for run in runs}) == 1
    states = [last(run).training_state["optimizer"] for run in runs]
    for state in states[1:]:
        assert_same(state, states[0])
    for run in runs:
        assert not [event["why"] for event in run.events if event["kind"] == "warned"]
        assert "whole_update" not in told(run, "run_started")[0]


@pytest.mark.processes
def test_a_run_is_resumed_by_another_team_and_computed_again_from_its_tape(tmp_path: Path) -> None:
    whole = train_here(muon(), Team(), tmp_path / "whole")
    run = train_here(muon(), Team(workers=3), tmp_path / "run", client=stopping_at(3))
    assert run.result["interrupted"]
    run = train_here(muon(), Team(workers=2), tmp_path / "run", resume=True)
    assert run.digest == whole.digest
    assert replayed(muon(), run.path).same


@pytest.mark.processes
@pytest.mark.parametrize(
    "hooks",
    [before(torch.optim.Muon, "step", 1, calls=6), after(torch.optim.Muon, "step", 1, calls=6)],
    ids=["before Muon", "after Muon"],
)
def test_a_worker_that_is_killed_in_the_midst_of_an_update_is_stood_in_for(
    hooks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piecewise, "PIECE", 4000)  # so that a share is of several
    undisturbed = train_here(muon(), Team(workers=2), tmp_path / "undisturbed")
    came_through(run_with_deaths(muon(), 3, tmp_path / "killed", hooks), undisturbed, 1)


@pytest.mark.processes
@pytest.mark.parametrize("rule", ["asynchronous", "diloco:5"])
def test_a_run_under_other_rules_is_computed_again(rule: str, tmp_path: Path) -> None:
    made = muon(rule=rule, steps="10")
    assert made.rule == UpdateRule.from_text(rule)
    run = train_here(made, Team(workers=2), tmp_path / "run")
    assert run.result["steps"] == 10
    assert replayed(made, run.path).same


@pytest.mark.processes
def test_its_patterns_are_those_of_the_model_and_other_ones_are_refused_by_name() -> None:
    replica = Replica(muon(), "cpu")
    assert [one.kind for one in replica.optimizer.each] == ["AdamW", "Muon"]
    table = merge(read("muon"), [("recipe.model.args", "{ context = 32, width = 32, depth = 1, heads = 2 }")])
    table["data"]["args"]["context"] = 32
    for parameters, sentence in (
        (["wte.*"], "has 'wte.*', and no parameter of the model has such a name; names are such as 'embeddi"),
        ("embeding.*", "has 'embeding.*', and no parameter of the model has such a name; did you mean that of"),
        ("*", "no parameter is left for the optimizer torch.optim:Muon, whose 'parameters' are '*'"),
        ("embedding.*", "takes matrices alone"),
    ):
        table["optimizer"][0]["parameters"] = parameters
        with pytest.raises(ComponentError) as caught:
            Replica(parse(table)[0], "cpu")
        assert sentence in caught.value.message
