"""The server engine: real processes under every rule, and what they leave on the tape."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from instep.api import train
from instep.errors import RecipeError
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.recipe import Team
from instep.record import tape
from instep.reduce.layout import Pack
from instep.rules import UpdateRule
from instep.rules import presets as p
from instep.team_checks import check_team
from support import workloads
from support.harness import Client, Outcome, train_here
from support.regression import numbers, regression, squares
from support.sentences import one_sentence
from support.serving import (
    RULES,
    WORKLOADS,
    at,
    check_tape,
    disturbed,
    kill,
    reference,
    replayed,
    serving,
)

pytestmark = pytest.mark.processes

ASYNC = p.asynchronous()


# --------------------------------------------------------------------------------------------------- lockstep's bits


def lockstep_bits(name: str, workers: int, rule: UpdateRule, path: Path) -> None:
    client = Client(at("released", 3, kill(1), worker=1)) if workers > 1 else None
    run = train_here(
        workloads.ALL[name](rule=rule), serving(workers, checkpoint_every=1, keep=0), path / "run", client=client
    )
    assert run.digests == reference(name)
    assert run.result["restarts"] == (workers > 1)
    assert run.result["staleness_max"] == run.result["lead_max"] == 0


@pytest.mark.parametrize(
    ("workers", "name", "rule"),
    [(2, "gpt", p.synchronous()), (3, "convnet", p.bounded_staleness(0))],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_synchronous_rule_gives_lockstep_bits_through_a_death(
    workers: int, name: str, rule: UpdateRule, tmp_path: Path
) -> None:
    lockstep_bits(name, workers, rule, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("name", workloads.ALL)
@pytest.mark.parametrize("rule", [p.synchronous(), p.bounded_staleness(0)], ids=lambda rule: rule.name)
def test_a_synchronous_rule_gives_lockstep_bits_for_any_team(
    workers: int, name: str, rule: UpdateRule, tmp_path: Path
) -> None:
    lockstep_bits(name, workers, rule, tmp_path)


# --------------------------------------------------------------------------------------------------------- the tape


@pytest.mark.parametrize("name", RULES)
def test_the_tape_of_every_rule_has_each_sample_once_and_its_events_in_order(name: str) -> None:
    recipe, run = disturbed(name, WORKLOADS[name])
    check_tape(run.events, recipe)
    assert list(tape.read(run.path / "tape.jsonl")) == run.events
    assert [event["kind"] for event in run.events].count("run_started") == 1, "nobody else stopped"
    (left,) = (event for event in run.events if event["kind"] == "left")
    assert left["worker"] == 1
    assert "was killed by SIGKILL" in left["why"]
    assert [event["worker"] for event in run.events if event["kind"] == "joined"].count(1) == 2, "it was replaced"


def delays(events: list[Any]) -> list[int]:
    """Of each piece, the versions between the first release of it and its update."""
    released: dict[int, int] = {}
    found = []
    for event in events:
        if event["kind"] == "released":
            released.setdefault(event["piece"], event["version"])
        if event["kind"] == "merged":
            found += [event["version"] - 1 - released[each["piece"]] for each in event["contributions"]]
    return found


@pytest.mark.parametrize("name", RULES)
def test_the_result_tells_what_the_rule_cost(name: str) -> None:
    """Each figure against the tape."""
    recipe, run = disturbed(name, WORKLOADS[name])
    result, rule = run.result, recipe.rule
    merged = [event for event in run.events if event["kind"] == "merged"]
    staleness = [old for event in merged for old in event["staleness"]]
    released = [event for event in run.events if event["kind"] == "released"]
    pushed = [event for event in run.events if event["kind"] == "pushed"]
    assert (result["rule"], result["engine"]) == (name, "server")
    assert result["versions"] == len(merged) == merged[-1]["version"]
    assert result["steps"] == recipe.steps == merged[-1]["step"]
    assert result["items"] == sum(event["items"] for event in merged)
    assert result["staleness_max"] == max(staleness)
    assert result["delayed_max"] == max(delays(run.events)) >= result["staleness_max"]
    assert result["staleness_mean"] == pytest.approx(sum(staleness) / len(staleness))
    assert result["lead_max"] == max(event["lead"] for event in released)
    assert result["dropped"] == sum(event["kind"] == "dropped" for event in run.events)
    module = recipe.model.build()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    pull = Pack(module, parameters).size_bytes
    assert result["bytes_sent"] == sum(event["bytes"] for event in pushed) + pull * len(released)
    least = 4 * sum(parameter.numel() for parameter in parameters)
    assert all(event["bytes"] % least == 0 and event["bytes"] >= least for event in pushed)
    assert len(result["idle_share"]) == 3
    assert all(0 <= share <= 1 for share in result["idle_share"]), "1: who joined too late to get any work"
    assert min(result["idle_share"]) < 1
    if rule.max_lead is not None:
        assert result["lead_max"] <= rule.max_lead
    if rule.max_staleness is not None:
        assert result["staleness_max"] <= rule.max_staleness
    assert result["restarts"] == 1
    assert result["objective_first"] == merged[0]["objective"]


def test_the_result_has_the_same_fields_under_both_engines(tmp_path: Path) -> None:
    recipe = regression()
    runs = [train_here(recipe, Team(workers=2, engine=e), tmp_path / e) for e in ("lockstep", "server")]  # type: ignore[arg-type]
    lockstep, server = (run.result for run in runs)
    assert lockstep.keys() == server.keys()
    for key in (
        "rule",
        "versions",
        "steps",
        "items",
        "staleness_mean",
        "staleness_max",
        "delayed_max",
        "lead_max",
        "dropped",
        "digest",
    ):
        assert lockstep[key] == server[key], key
    for result in (lockstep, server):
        assert result["bytes_sent"] > 0
        assert len(result["idle_share"]) == 2
        assert all(0 <= share <= 1 for share in result["idle_share"])


def test_held_out_data_are_evaluated_by_items_under_every_rule() -> None:
    for name in RULES:
        _, run = disturbed(name, WORKLOADS[name])
        evaluated = [event for event in run.events if event["kind"] == "evaluated"]
        assert len(evaluated) == 2, "at step 4, and at the end"
        merged = {event["version"]: event["step"] for event in run.events if event["kind"] == "merged"}
        assert [merged[event["version"]] for event in evaluated] == [4, 6]
        assert run.result["held_out"] == evaluated[-1]["objective"]


def test_a_rule_that_is_known_to_diverge_is_warned_of(tmp_path: Path) -> None:
    rule = dataclasses.replace(p.diloco(2), quorum="1", order="arrival", max_lead=None, max_staleness=None)
    run = train_here(regression(rule=rule), serving(), tmp_path / "run")
    assert [event["why"] for event in run.events if event["kind"] == "warned"] == rule.warnings() != []
    told: list[dict[str, Any]] = []
    simulate(regression(rule=rule), Cluster(workers=2), False, None, told.append)
    assert [event["why"] for event in told if event["kind"] == "warned"] == rule.warnings()


def test_items_a_second_leave_out_evaluations_and_checkpoints(tmp_path: Path) -> None:
    def long(model: nn.Module, batch: Any) -> Tensor:
        if not torch.is_grad_enabled():
            time.sleep(0.05)  # 1 s an evaluation, of 20 batches
        return squares(model, batch)

    recipe = regression(objective=long, data=lambda: (numbers(), numbers()), rule=ASYNC, steps=6, evaluate_every=2)
    run = train_here(recipe, serving(), tmp_path / "run")
    from_s = max(event["t_s"] for event in run.events if event["kind"] == "joined")
    to_s = max(event["t_s"] for event in run.events if event["kind"] == "merged")
    trained_s = run.result["items"] / run.result["items_per_s"]
    assert trained_s < to_s - from_s - 1.5, "two evaluations lay between"


def test_a_slow_worker_does_less_and_nobody_waits_for_it(tmp_path: Path) -> None:
    def long(model: nn.Module, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            time.sleep(0.01)
        return squares(model, batch)

    def rounds(rule: UpdateRule, name: str, steps: int) -> tuple[Outcome, list[int]]:
        recipe = regression(objective=long, rule=rule, steps=steps)
        run = train_here(recipe, serving(2, slow="1:5x"), tmp_path / name)
        pushes = [event["worker"] for event in run.events if event["kind"] == "pushed"]
        return run, [pushes.count(0), pushes.count(1)]

    free, done = rounds(ASYNC, "asynchronous", 16)
    assert done[0] > 2 * done[1], "five times as many, where both get the processor when they want it"
    together, done = rounds(p.synchronous(), "synchronous", 8)
    assert done == [8, 8]
    assert together.result["idle_share"][0] > 0.5, "it waits for the slow one"
    assert free.result["idle_share"][0] < together.result["idle_share"][0] - 0.2
    for run, worker, factor in ((free, 0, 1), (free, 1, 5)):
        took = [e["to_s"] - e["from_s"] for e in run.events if e["kind"] == "computed" and e["worker"] == worker]
        assert min(took) >= 0.02 * factor * 0.95, "two microbatches"


@pytest.mark.slow
def test_versions_that_only_waiting_contributions_need_are_kept(tmp_path: Path) -> None:
    """For delay compensation, while the workers that made them go on from newer ones."""

    def long(model: nn.Module, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            time.sleep(0.004)
        return squares(model, batch)

    recipe = regression(objective=long, rule=UpdateRule(quorum="3", compensation=0.1), steps=20)
    run = train_here(recipe, serving(4, slow="1:2x,2:3x,3:7x"), tmp_path / "run")
    assert run.result["staleness_max"] > 1
    check_tape(run.events, recipe)
    assert replayed(recipe, run.path).same


# ---------------------------------------------------------------------------------------------------------- bad input

TEAMS: list[tuple[str, UpdateRule, dict[str, Any], str]] = [
    ("a quorum", UpdateRule(quorum="5"), {"workers": 4}, "'rule.quorum' is 5 and the team has 4 workers"),
    ("all in reserve", p.backup_workers(2), {"workers": 2}, "nobody would be waited for"),
    ("a slow worker", ASYNC, {"workers": 2, "slow": "2:4x"}, "names no worker of a team of 2"),
    ("no factor", ASYNC, {"workers": 2, "slow": "1:4y"}, "is no factor"),
    ("lockstep", ASYNC, {"workers": 2, "engine": "lockstep"}, "takes synchronous rules alone"),
    ("lockstep, local steps", p.local_sgd(4), {"engine": "lockstep"}, "takes synchronous rules alone"),
    ("too many", p.local_sgd(4), {"workers": 5}, "5 workers are more than the 4 microbatches"),
]


@pytest.mark.parametrize(("rule", "team", "sentence"), [case[1:] for case in TEAMS], ids=[case[0] for case in TEAMS])
def test_a_team_that_cannot_obey_the_rule_is_refused(
    rule: UpdateRule, team: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    recipe = regression(rule=rule)
    with pytest.raises(RecipeError, match=sentence) as caught:
        check_team(recipe, Team(**team))
    assert one_sentence(caught.value.message)
    with pytest.raises(RecipeError, match=sentence):
        train(recipe, team=Team(**team), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ more than the quorum


def test_an_update_waits_for_its_grace_after_the_quorum_and_replays_without_time(tmp_path: Path) -> None:
    """By the tape alone, which tells when each contribution came."""
    rule = UpdateRule(name="graced", quorum="1", max_lead=0, grace_s=0.02)
    recipe = regression(rule=rule, steps=3)
    run = train_here(recipe, serving(3, slow="2:400x"), tmp_path / "run")
    came = {event["seq"]: event["t_s"] for event in run.events if event["kind"] == "pushed"}
    merges = [event for event in run.events if event["kind"] == "merged"]
    for event in merges[:-1]:  # at the end nobody is left to wait for
        seqs = [each["seq"] for each in event["contributions"]]
        assert len(seqs) == 3 or event["t_s"] - min(came[seq] for seq in seqs) >= 0.02
    ended = {event["version"]: event["waiting"] for event in run.events if event["kind"] == "grace_ended"}
    assert ended, "the slow one is not waited for longer"
    for event in merges:
        assert event["version"] - 1 not in ended or len(event["contributions"]) == ended[event["version"] - 1]
    assert replayed(recipe, run.path).same
