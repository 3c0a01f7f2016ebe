"""Rules with a server over several hosts: every rule learns and replays there, whatever becomes of links and hosts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from instep.recipe import Recipe, Team
from instep.rules import UpdateRule
from instep.rules import presets as p
from instep.team import hosts
from support import workloads
from support.agents import meet_here, train_on
from support.harness import Outcome
from support.kinds import quick
from support.serving import RULES, WORKLOADS, check_tape, drive, replayed

pytestmark = pytest.mark.processes


@pytest.fixture(autouse=True)
def _meeting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meet_here(monkeypatch, tmp_path)
    monkeypatch.setattr(hosts, "FAREWELL_S", 1.0)


def narrow(rule: UpdateRule, wire: str) -> UpdateRule:
    return dataclasses.replace(rule, wire=wire)


CASES: dict[str, tuple[UpdateRule, str]] = {
    **{name: (rule, WORKLOADS[name]) for name, rule in RULES.items()},
    **{f"diloco-{wire}": (narrow(p.diloco(2), wire), "convnet") for wire in ("bfloat16", "int8", "int4")},
    **{
        f"diloco-fragments-{wire}": (narrow(dataclasses.replace(p.diloco(2), fragments=2), wire), "convnet")
        for wire in ("float32", "int4")
    },
    **{f"async_diloco-{wire}": (narrow(RULES["async_diloco"], wire), "gpt") for wire in ("bfloat16", "int8", "int4")},
}


def check_replay(run: Outcome, recipe: Recipe) -> None:
    check_tape(run.events, recipe)
    found = replayed(recipe, run.path)
    assert found.divergence == ""
    assert found.digest == run.digest


@pytest.mark.parametrize(
    "name", quick(list(CASES), "asynchronous", "delay_compensated", "diloco-int4", "diloco-fragments-float32")
)
def test_every_rule_replays_on_two_hosts(name: str, tmp_path: Path) -> None:
    rule, workload = CASES[name]
    recipe = workloads.ALL[workload](rule=rule, steps=6, evaluate_every=4)
    team = Team(workers=3, checkpoint_every=2, engine="server")
    run, told = train_on((1, 1), recipe, team, tmp_path / "run")
    assert told[0].result == run.result, told[0].error
    check_replay(run, recipe)
    if rule.lockstep:
        assert run.digest == drive(recipe, 3).digest, "the bits of one machine"
    assert {event["worker"] for event in run.events if event["kind"] == "pushed"} == {0, 1, 2}
