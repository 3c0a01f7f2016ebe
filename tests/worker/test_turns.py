"""Objectives that take turns: a step has one of them, and trains what is its own, by its own optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, optim
from torch.nn.utils import clip_grad_norm_

from instep.engines.seat import Seat
from instep.engines.standing_in import StandIn
from instep.equivalences.forks import alone
from instep.equivalences.whole_batch import WholeBatch
from instep.offline.verifying import verify
from instep.randomness import key_of_step, seed_all
from instep.recipe import Recipe, Team
from instep.record import tape
from instep.report.comparison import compare
from instep.report.figures import data as drawn
from instep.report.reading import read
from instep.rules import UpdateRule
from instep.run import Run
from instep.worker.replica import Replica
from support import deaths
from support.adversaries import DeepPair, Pair, adversarial, ring, turns
from support.harness import Outcome, saved, stopping_at, told, train_here
from support.serving import replayed

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("forked_pythons")]


def weights(run: Outcome, version: int) -> Mapping[str, Tensor]:
    return saved(run, version).model_state


def plain(recipe: Recipe, first: int, second: int, penalty: float = 0.0) -> Mapping[str, Tensor]:
    """As people write it: two optimizers, so many steps of one and then of the other."""
    replica = Replica(recipe, "cpu")
    model: Any = replica.module.requires_grad_(True)
    points, cursor = ring()[0].tensors[0], replica.cursor
    judge = optim.AdamW(model.discriminator.parameters(), lr=0.01, weight_decay=0.1)
    maker = optim.SGD(model.generator.parameters(), lr=0.05, momentum=0.5, weight_decay=0.1)
    for step in range(recipe.steps):
        drawn, real = [], points[torch.tensor(list(cursor.indices(step)))]
        for microbatch in range(recipe.microbatches):
            seed_all(key_of_step(recipe.seed, step, microbatch, "compute"))
            drawn.append(torch.randn(cursor.microbatch_size(step, microbatch), 4))
        noise, ones = torch.cat(drawn), torch.ones(len(real), 1)
        model.zero_grad()
        if step % (first + second) < first:
            made = model.generator(noise).detach()
            real.requires_grad_(penalty > 0)
            logits = model.discriminator(real)
            loss = F.binary_cross_entropy_with_logits(logits, ones)
            if penalty:
                (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
                loss = loss + penalty / 2 * slope.square().sum(1).mean()
            loss = loss + F.binary_cross_entropy_with_logits(model.discriminator(made), 0 * ones)
            which, part = judge, model.discriminator
        else:
            loss = F.binary_cross_entropy_with_logits(model.discriminator(model.generator(noise)), ones)
            which, part = maker, model.generator
        loss.backward()
        clip_grad_norm_(part.parameters(), 0.5)
        which.step()
    return dict(model.state_dict())


@pytest.mark.parametrize(("first", "second", "penalty"), [(1, 1, 0.0), (3, 2, 0.5)])
def test_fifty_steps_are_those_of_a_plain_loop(first: int, second: int, penalty: float, tmp_path: Path) -> None:
    recipe = adversarial(objective=turns(first, second, penalty), steps=50)
    run = train_here(recipe, Team(workers=2), tmp_path / "run")
    expected, found = plain(recipe, first, second, penalty), weights(run, 50)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    start = Replica(recipe, "cpu").module.state_dict()
    assert all(not torch.allclose(found[name], start[name], atol=1e-3) for name in start), "both were trained"


def test_any_team_engine_and_plan_gives_one_digest_and_tells_whose_turn_it_was(tmp_path: Path) -> None:
    recipe = adversarial(objective=turns(2, 1), model=partial(Pair, dropout=0.2), evaluate_every=4)
    teams = {f"{workers} workers": Team(workers=workers, checkpoint_every=1, keep=0) for workers in (1, 2, 3, 5)}
    teams["server"] = Team(workers=2, engine="server", checkpoint_every=1, keep=0)
    teams["replicated"] = Team(workers=3, shard="none", checkpoint_every=1, keep=0)
    teams["audited"] = Team(workers=2, audit="50%", checkpoint_every=1, keep=0)
    runs = {name: train_here(recipe, team, tmp_path / name, tried=name == "1 workers") for name, team in teams.items()}
    first = runs["1 workers"]
    for name, run in runs.items():
        assert run.digests == first.digests, name
        assert not told(run, "warned"), name
        merged = told(run, "merged")
        assert [event["turn"] for event in merged] == ["discriminator", "discriminator", "generator"] * 2 + [
            "discriminator"
        ] * 2
        for event in merged:
            assert all(term.partition(".")[0] == event["turn"] for term in event["terms"])
            assert event["items"] in (25, 10), "of the turn's first term"
            minimised = [value for term, value in event["terms"].items() if not term.endswith("right")]
            assert event["objective"] == pytest.approx(sum(minimised))
        assert [event["lr"] for event in merged[1:3]] == [0.01, 0.05]
        for event in told(run, "evaluated"):
            assert event["turns"].keys() == {"discriminator", "generator"}
            assert event["objective"] == pytest.approx(sum(event["turns"].values()))
            assert event["terms"]["generator"] == event["turns"]["generator"]
    assert first.result["items"] == 25 + 25 + 10 + 25 + 25 + 10 + 25 + 25


def test_only_the_parameters_of_the_turn_move_and_have_state(tmp_path: Path) -> None:
    run = train_here(adversarial(steps=4), Team(workers=2, checkpoint_every=1, keep=0), tmp_path / "run")
    for version in range(1, 5):
        before = weights(run, version - 1) if version > 1 else Replica(adversarial(), "cpu").module.state_dict()
        now = weights(run, version)
        moved = {name.partition(".")[0] for name, value in now.items() if not torch.equal(value, before[name])}
        assert moved == {"discriminator" if version % 2 else "generator"}
    training = saved(run, 1).training_state
    judge, maker = training["optimizer"]["several"]
    assert len(judge["state"]) == 4
    assert not maker["state"], "it has not had its turn"


class Counting(optim.SGD):
    """Keeps how many steps it was asked for."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1


def test_an_optimizer_makes_no_step_out_of_its_turn(tmp_path: Path) -> None:
    parts = {f"{name}.*": partial(Counting, lr=0.01) for name in ("discriminator", "generator")}
    recipe = adversarial(objective=turns(2, 1), optimizer=parts, steps=7)
    run = train_here(recipe, Team(workers=2), tmp_path / "run", tried=True)
    several = saved(run, 7).training_state["optimizer"]["several"]
    assert [each["param_groups"][0]["steps"] for each in several] == [5, 2]


def test_a_run_is_resumed_in_the_middle_of_a_cycle_by_others(tmp_path: Path) -> None:
    recipe = adversarial(objective=turns(2, 2), steps=11)
    whole = train_here(recipe, Team(workers=2), tmp_path / "whole")
    for version, team in ((3, Team(workers=3)), (5, Team(workers=1)), (8, Team(workers=2, engine="server"))):
        run = train_here(recipe, team, tmp_path / "run", client=stopping_at(version), resume=version > 3)
        assert run.result["interrupted"]
    run = train_here(recipe, Team(workers=5), tmp_path / "run", resume=True)
    assert run.digest == whole.digest
    assert replayed(recipe, run.path).same
    seen = verify(recipe, whole.path, list(tape.read(whole.path / "tape.jsonl")), 1.0, 0)
    assert seen.verdict == "same"


@pytest.mark.parametrize(
    "moment",
    [
        deaths.before(Seat, "compute", 1),
        deaths.before(Seat, "load_ahead", 1, 4),
        deaths.before(StandIn, "until_settled", 0, calls=4),
    ],
    ids=["computing", "with its rows", "updating"],
)
def test_a_worker_that_dies_in_a_turn_is_stood_in_for(moment: deaths.Hooks, tmp_path: Path) -> None:
    recipe = adversarial(steps=deaths.STEPS)
    other = deaths.run(recipe, 2, tmp_path / "other")
    deaths.came_through(deaths.run(recipe, 2, tmp_path / "it", moment), other, 1)


def test_a_model_of_a_version_in_a_turn_is_computed_again(tmp_path: Path) -> None:
    recipe = adversarial(steps=6)
    run = train_here(recipe, Team(workers=2, checkpoint_every=1, keep=0), tmp_path / "run")
    sparse = train_here(recipe, Team(workers=3), tmp_path / "sparse")
    model = Run(sparse.path, sparse.result, recipe).at(3)
    for name, value in weights(run, 3).items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("rule", ["local_sgd:3", "local_sgd:1", "diloco:2", "post_local_sgd:2,after=3"])
def test_local_steps_take_turns_by_the_global_batch(rule: str, tmp_path: Path) -> None:
    recipe = adversarial(rule=UpdateRule.from_text(rule), steps=12)
    run = train_here(recipe, Team(workers=2), tmp_path / "run")
    assert replayed(recipe, run.path).same
    whose = {event["turn"] for event in told(run, "merged")}
    both = {"discriminator+generator"}
    alone = {"discriminator", "generator"}
    assert whose == {"local_sgd:1": alone, "post_local_sgd:2,after=3": both | alone}.get(rule, both)
    assert not told(run, "warned")


def test_one_worker_with_local_steps_is_a_plain_loop(tmp_path: Path) -> None:
    recipe = adversarial(rule=UpdateRule.from_text("local_sgd:4"), steps=20)
    run = train_here(recipe, Team(), tmp_path / "run")
    for name, value in plain(recipe, 1, 1).items():
        torch.testing.assert_close(weights(run, 5)[name], value, rtol=1e-4, atol=1e-5)


def test_a_page_draws_each_objective_by_itself(tmp_path: Path) -> None:
    run = train_here(adversarial(evaluate_every=4), Team(workers=2), tmp_path / "run")
    curves = drawn(compare([read(run.path)]))["curves"]
    assert [curve["turn"] for curve in curves] == ["discriminator", "generator"]
    assert all(curve["training"] and curve["held_out"] for curve in curves)
    assert curves[0]["training"] != curves[1]["training"]


def test_the_gradient_of_each_turn_is_that_of_the_whole_batch() -> None:
    found = alone(WholeBatch(adversarial(objective=turns(2, 1, 0.5), model=partial(Pair, dropout=0.2))))
    assert [each.step for each in found] == [0, 2]
    assert all(each.right and each.off and not each.skipped for each in found)
    assert {name.partition(".")[0] for name in found[0].off} == {"discriminator"}
    assert {name.partition(".")[0] for name in found[1].off} == {"generator"}


def test_each_turn_has_a_plan_within_the_memory_and_no_bit_changes(tmp_path: Path) -> None:
    recipe = adversarial(model=DeepPair, batch=300, data=partial(ring, 600), steps=6)
    plain = train_here(recipe, Team(), tmp_path / "plain")
    for workers, audit in ((1, ""), (2, ""), (2, "50%")):
        team = Team(workers=workers, memory="60%", audit=audit)
        run = train_here(recipe, team, tmp_path / f"{workers} {audit}")
        assert run.digest == plain.digest
        plans = told(run, "planned")
        assert len(plans) == 2, "one for each turn"
        assert plans[0]["budget_bytes"] == plans[1]["budget_bytes"], "of the turn that takes most"
        for plan in plans:
            assert plan["measured_bytes"] <= 1.05 * plan["budget_bytes"]
        assert any(plan["checkpointed"] for plan in plans)
        assert any("verify_s" in event for event in told(run, "computed")), "what was computed again was compared"
