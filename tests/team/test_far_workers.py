"""Rules with a server over several hosts: every rule learns and replays there, whatever becomes of links and hosts."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from instep.loss_scale import LossScale
from instep.recipe import Recipe, Team
from instep.rules import UpdateRule
from instep.rules import presets as p
from instep.team import far_server, letters
from instep.team.far_server import FarServer
from instep.team.host_weights import HostPlaces
from instep.team.processes import import_before_forks
from support import workloads
from support.agents import Followers, train_on
from support.harness import Client, Outcome, act_on, train_here
from support.kinds import quick
from support.serving import RULES, WORKLOADS, check_tape, drive, replayed

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("agents_meet_here")]


def narrow(rule: UpdateRule, wire: str) -> UpdateRule:
    return dataclasses.replace(rule, wire=wire)


CASES: dict[str, tuple[UpdateRule, str]] = {
    **{name: (rule, WORKLOADS[name]) for name, rule in RULES.items()},
    **{f"diloco-{wire}": (narrow(p.diloco(2), wire), "convnet") for wire in ("bfloat16", "int8", "int4")},
    **{
        f"diloco-fragments-{wire}": (narrow(dataclasses.replace(p.diloco(2), fragments=2), wire), "convnet")
        for wire in ("float32", "int4")
    },
    "diloco-overlap-int4": (dataclasses.replace(p.diloco(4), fragments=2, overlap=1, wire="int4"), "convnet"),
    **{f"async_diloco-{wire}": (narrow(RULES["async_diloco"], wire), "gpt") for wire in ("bfloat16", "int8", "int4")},
}


def check_replay(run: Outcome, recipe: Recipe, *, finished: bool = True) -> None:
    check_tape(run.events, recipe, finished=finished)
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


def test_workers_of_other_hosts_compute_with_the_loss_scale_that_the_server_has(tmp_path: Path) -> None:
    recipe = asynchronous(precision="float16", loss_scale=LossScale(init=2.0**24), steps=6)
    run, told = train_on((1, 1), recipe, Team(workers=3), tmp_path / "run")
    assert told[0].result == run.result, told[0].error
    assert run.result["overflows"] > 1
    check_replay(run, recipe)


def asynchronous(**changes: Any) -> Recipe:
    return workloads.gpt(**{"rule": p.asynchronous(), "steps": 8, **changes})


def team(**changes: Any) -> Team:
    return Team(**{"workers": 3, "checkpoint_every": 2, "keep": 0, "lease_s": 30.0, **changes})


def pushes(run: Outcome, worker: int) -> list[int]:
    """The places on the tape of a worker's contributions."""
    return [at for at, event in enumerate(run.events) if event["kind"] == "pushed" and event["worker"] == worker]


def test_a_killed_worker_of_another_host_is_replaced_and_nobody_else_stops(tmp_path: Path) -> None:
    strike = act_on("merged", lambda pid: os.kill(pid, signal.SIGKILL), version=5)
    seen: list[str] = []

    def see(event: dict[str, Any]) -> None:
        strike(event)
        seen.extend(["left"] if event["kind"] == "left" else [])
        if event["kind"] == "pushed" and event["worker"] == 1 and seen:
            client.ask_to_stop()

    client, recipe = Client(see), asynchronous(steps=5000)
    run, told = train_on((1, 1), recipe, team(checkpoint_every=100), tmp_path / "run", client=client)
    assert told[0].error == ""
    check_replay(run, recipe, finished=False)
    (left,) = (event for event in run.events if event["kind"] == "left")
    assert "worker 1 on host 1" in left["why"]
    assert max(pushes(run, 1)) > run.events.index(left), "its successor takes part"
    assert [event["kind"] for event in run.events].count("run_started") == 1
    assert run.result["restarts"] == 1


def test_others_go_on_without_a_host_that_is_lost_and_it_takes_part_when_it_is_back(tmp_path: Path) -> None:
    import_before_forks()  # or the host that comes back would do it once for each worker
    recipe, own = asynchronous(steps=5000), team(checkpoint_every=100, slow="0:20x")
    followers = Followers(recipe, own, (1, 1), tmp_path, again=[1])
    seen: list[str] = []

    def see(event: dict[str, Any]) -> None:
        kind, worker = event["kind"], event.get("worker", 0)
        if kind == "pushed" and worker and "killed" not in seen:
            seen.append("killed")
            followers.kill(1)
        if kind == "left" and "left" not in seen:
            seen.append("left")
            followers.start_again(1)
        if kind == "pushed" and worker and "left" in seen:
            client.ask_to_stop()

    client = Client(see)
    run, told = train_on((1, 1), recipe, own, tmp_path / "run", client=client, followers=followers)
    assert told[0].error == ""
    check_replay(run, recipe, finished=False)
    left = [event for event in run.events if event["kind"] == "left"]
    assert [event["worker"] for event in left] == [1, 2]
    assert all("host 1" in event["why"] for event in left)
    assert max(pushes(run, 1) + pushes(run, 2)) > run.events.index(left[1]), "it is back"
    assert [event["kind"] for event in run.events].count("run_started") == 1
    assert run.result["restarts"] == 1


@pytest.mark.parametrize("name", quick(["asynchronous", "diloco-int4", "async_diloco-int8"], "diloco-int4"))
def test_what_was_on_its_way_when_a_connection_broke_comes_once(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At both ends, every few parts."""
    rule, _ = CASES[name]
    broken = CountedInAll(tmp_path / "broken")
    take, messages = letters.Inbox.take, itertools.count()

    def breaking(self: letters.Inbox, message: Any) -> Any:
        if next(messages) % 7 == 6:
            broken.add()
            raise ConnectionResetError("it broke")
        return take(self, message)

    monkeypatch.setattr(letters.Inbox, "take", breaking)
    monkeypatch.setattr(letters, "PART_BYTES", 1 << 9)
    monkeypatch.setattr(far_server, "PAUSE_S", 0.01)
    recipe = workloads.gpt(rule=rule, steps=8)
    run, told = train_on((1, 1), recipe, team(workers=2, slow="0:9x"), tmp_path / "run")
    assert told[0].error == ""
    check_replay(run, recipe)
    assert len(broken) > 5
    assert not [event for event in run.events if event["kind"] == "left"]


def test_weights_go_to_a_host_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where its workers wait for each other: a version for one of them, which the others read."""
    whole, beside = CountedInAll(tmp_path / "whole"), CountedInAll(tmp_path / "beside")
    note = FarServer._note_weights

    def noting(self: FarServer, letter: Any) -> None:
        if isinstance(letter, letters.Order):
            (whole if letter.weights == "whole" else beside).add()
            assert letter.weights in ("whole", "beside")
        note(self, letter)

    monkeypatch.setattr(FarServer, "_note_weights", noting)
    recipe = workloads.convnet(rule=p.local_sgd(2), steps=8)
    run, told = train_on((1, 1), recipe, team(workers=7), tmp_path / "run")  # 3 and 4
    assert told[0].error == ""
    assert run.digest == drive(recipe, 7).digest
    assert (len(whole), len(beside)) == (4, 12), "four rounds"


@pytest.mark.parametrize("name", quick(["local_sgd", "asynchronous", "softsync"], "local_sgd"))
def test_who_waits_for_weights_that_go_to_another_worker_gets_them_should_that_one_die(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """That is as weights begin to come, the third time that they do to somebody."""
    died, again = tmp_path / "died", CountedInAll(tmp_path / "again")
    place, put_again, begun = FarServer._place, FarServer._put_again, itertools.count(1)

    def dying(self: FarServer, message: Any, shapes: Any) -> Any:
        if isinstance(message, letters.Order) and message.weights == "whole" and next(begun) == 3:
            with contextlib.suppress(FileExistsError):  # one did before
                died.touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        return place(self, message, shapes)

    def putting(self: FarServer, letter: letters.WeightsAgain) -> None:
        again.add()
        put_again(self, letter)

    monkeypatch.setattr(FarServer, "_place", dying)
    monkeypatch.setattr(FarServer, "_put_again", putting)
    recipe = workloads.convnet(rule=RULES[name], steps=12)
    run, told = train_on((1, 1), recipe, team(workers=5, restarts=3), tmp_path / "run")  # 2 and 3
    assert told[0].error == ""
    check_replay(run, recipe)
    assert died.exists()
    assert [event["kind"] for event in run.events].count("left") == 1
    if RULES[name].lockstep:
        assert len(again) == 2


def test_places_that_a_host_shares_are_filled_where_nobody_reads() -> None:
    """Random orders and deaths: what a worker was told of last stays, until it is told of other weights."""
    for seed in range(200):
        draw, workers = random.Random(seed), 4
        places, filled = HostPlaces(workers), dict[int, int]()
        told: dict[int, tuple[int, int]] = {}
        version, has = 0, dict[int, int]()
        for _ in range(40):
            version += draw.random() < 0.4
            worker = draw.randrange(workers)
            if draw.random() < 0.1:
                has.pop(worker, None)  # what it was told of is kept for it, dead or alive
                place, fill, waiting = places.left(worker)
                assert all(told[other] == (place, fill) for other in waiting)
                continue
            beside = next((each for each, of in has.items() if of == version and each != worker), None)
            told[worker], has[worker] = places.give(worker, beside), version
            place, fill = told[worker]
            if beside is None:
                assert fill == filled.get(place, 0) + 1
                filled[place] = fill
            assert told[worker] == told.get(beside, told[worker])
            assert all(filled[place] == fill for place, fill in told.values()), "nothing was put where one reads"


def test_a_run_on_two_hosts_is_resumed_on_one_and_back(tmp_path: Path) -> None:
    rule, _ = CASES["diloco-int4"]
    recipe = workloads.gpt(rule=rule, steps=12)
    client = Client(lambda event: event["kind"] == "checkpointed" and event["version"] == 2 and client.ask_to_stop())
    train_on((1, 1), recipe, team(), tmp_path / "run", client=client)
    client = Client(lambda event: event["kind"] == "checkpointed" and event["version"] == 4 and client.ask_to_stop())
    train_here(recipe, team(), tmp_path / "run", resume=True, client=client)
    run, _ = train_on((1, 1), recipe, team(), tmp_path / "run", resume=True)
    assert run.result["steps"] == 12
    found = replayed(recipe, run.path)
    assert found.divergence == ""
    assert found.digest == run.digest


class CountedInAll:
    """Counts over processes."""

    def __init__(self, path: Path):
        self._path = path

    def add(self) -> None:
        with self._path.open("a") as file:
            file.write(".")

    def __len__(self) -> int:
        return len(self._path.read_text()) if self._path.exists() else 0
