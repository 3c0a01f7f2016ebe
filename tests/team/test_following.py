"""A team whose number of workers follows what is there, within bounds: the same digest, whatever comes or goes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import instep
from instep import api, bounds
from instep.bounds import Bounds, parse_bounds, room_here
from instep.cli import main
from instep.errors import RecipeError
from instep.ranges import fill
from instep.recipe import Team
from instep.team import asking, hosts, hosts_there
from support.agents import Followers, train_on
from support.harness import Client, told, train_here
from support.patience import LONG_S
from support.processes import wait_until
from support.regression import regression, waiting_for
from support.threads import meanwhile


@pytest.mark.pure
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("8..2", "'team.bounds' is '8..2', whose least is above its most; write '2..8'."),
        ("0..4", "'team.bounds' is '0..4'; the least is 1, as a team has at least one worker."),
        ("2..", "'team.bounds' is '2..'; write the least and the most workers, such as '2..8'."),
        ("..8", "'team.bounds' is '..8'; write the least and the most workers, such as '2..8'."),
        ("1..2..3", "'team.bounds' is '1..2..3'; write the least and the most workers, such as '2..8'."),
        ("2..9999999", "'team.bounds' is '2..9999999'; the most must be at most 1048576."),
        (
            "2..17",
            "17 workers are more than the 16 microbatches of a step, which are never split; take at most 16 workers, "
            "or raise recipe.microbatches.",
        ),
        ("1..4 --audit 1%", "'team.audit' has workers compute microbatches of each other's again, and there is 1 wor"),
        ("1..4 --slow 3:4x", "'3:4x' names no worker of a team of worker 0 alone; name one that is there"),
        ("1..4 --team.workers 2", "--team.workers and --team.bounds both say how many workers there are; give one of"),
        ("1..4 --team.device cuda", "'team.bounds' has the number of workers follow what is there, and 'team.device'"),
        ("1..4 --team.when-lost wait", "'team.bounds' has the number of workers follow what is there, and 'team.when"),
    ],
)
def test_bounds_that_no_team_can_have_are_one_sentence(
    text: str, why: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["train", "gpt", "--recipe.microbatches", "16", "--recipe.batch", "16", "--out", str(tmp_path / "run")]
    assert main([*words, "--workers", *text.split()]) in (1, 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("instep: ")
    assert why in error
    assert not (tmp_path / "run").exists()


@pytest.mark.pure
def test_a_machine_with_too_little_room_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(api, "room_here", lambda threads: 1)
    with pytest.raises(RecipeError, match="is '2..4', and this machine has room for 1, one worker for each processor"):
        instep.train(regression(), team=Team(bounds="2..4"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.pure
def test_a_machine_has_room_for_a_worker_for_each_processor_that_it_may_use_and_its_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bounds.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(bounds, "_quotas", lambda: [100.0, 6.5])
    assert [room_here(threads) for threads in (1, 2, 4, 8)] == [6, 3, 1, 1]
    file = tmp_path / "cpu.max"
    for text, processors in [("250000 100000", 2.5), ("50000 100000", 1.0), ("max 100000", 1 << 20), ("", 1 << 20)]:
        file.write_text(f"{text}\n")
        assert bounds._quota_of(file) == processors
    assert bounds._quota_of(tmp_path / "none") == 1 << 20


@pytest.mark.pure
def test_workers_are_shared_as_equally_as_there_is_room_for() -> None:
    for rooms in [(3,), (1, 5), (4, 0, 2), (2, 2, 2, 9)]:
        for workers in range(1, sum(rooms) + 1):
            found = fill(workers, rooms)
            assert sum(found) == workers
            assert all(0 <= count <= room for count, room in zip(found, rooms, strict=True))
            free = [count for count, room in zip(found, rooms, strict=True) if count < room]
            assert max(found) <= min(free, default=max(found)) + 1, "who has room has nearly as many as the others"
    assert [Bounds(2, 8).within(room) for room in (1, 2, 5, 8, 9)] == [2, 2, 5, 8, 8]
    assert parse_bounds(" 2 .. 8 ", "it", 8) == Bounds(2, 8)


@pytest.mark.processes
def test_a_machine_gives_what_it_has_room_for_and_a_resume_or_a_number_of_workers_counts_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alone = train_here(regression(steps=2), Team(), tmp_path / "alone").digest
    monkeypatch.setattr(api, "room_here", lambda threads: 2)
    run = instep.train(regression(steps=1), team=Team(bounds="1..4"), out=tmp_path / "run")
    assert run.result["workers"] == 2
    monkeypatch.setattr(api, "room_here", lambda threads: 3)
    run = instep.train(regression(steps=2), resume=tmp_path / "run")
    assert (run.result["workers"], run.digest) == (3, alone)


@pytest.mark.usefixtures("agents_meet_here")
@pytest.mark.processes
@pytest.mark.parametrize(
    ("engine", "fixed"),
    [
        ("lockstep", False),
        pytest.param("lockstep", True, marks=pytest.mark.slow),
        pytest.param("server", False, marks=pytest.mark.slow),
    ],
)
def test_hosts_that_come_and_go_change_the_number_of_workers_and_no_bit(
    engine: Any, fixed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """fixed: somebody asks for the number that the team has with host 1, before that goes."""
    monkeypatch.setattr(hosts, "GATHER_S", 0.0)
    monkeypatch.setattr(hosts_there, "room_here", lambda threads: 1)
    come, gone, client = tmp_path / "come", tmp_path / "gone", Client()
    recipe = waiting_for((1, 0, come), (2, 0, gone), steps=3)
    team = Team(bounds="1..4", engine=engine, checkpoint_every=1, restarts=int(fixed), lease_s=LONG_S)
    followers = Followers(recipe, team, (1, 1), tmp_path, again=[1], late=[1])

    def act() -> None:
        wait_until(lambda: bool(told(client, "run_started")), LONG_S, "a start without host 1")
        followers.start_again(1)
        wait_until(lambda: bool(told(client, "resized")), LONG_S, "host 1")
        come.touch()
        wait_until(lambda: len(told(client, "run_started")) == 2, LONG_S, "a start with host 1")
        wait_until(lambda: any(each["version"] == 2 for each in told(client, "merged")), LONG_S, "step 2")
        if fixed:
            assert asking.resized(tmp_path / "run", 2) == {"workers": 2, "before": 2, "supervisor": os.getpid()}
        followers.kill(1)
        wait_until(lambda: bool(told(client, "left")), LONG_S, "a loss")

    def go_on() -> None:
        come.touch()
        gone.touch()

    with meanwhile(act, go_on):
        run, _ = train_on((1, 1), recipe, team, tmp_path / "run", client=client, followers=followers, told_s=0.0)
    assert run.digest == train_here(recipe, Team(), tmp_path / "alone").digest
    assert run.result["restarts"] == int(fixed), "it is none where the number follows what is there"
    changes = [(each["before"], each["workers"], each["by_whom"]) for each in told(client, "resized")]
    assert changes[0][:2] == (1, 2)
    assert changes[0][2].startswith("host 1 (")
    after = [(2, 1, "hosts that have come or gone")] if engine == "lockstep" and not fixed else []
    assert changes[1:] == after, "under a server the others go on as they are"
    last = [1] if engine == "lockstep" and not fixed else []  # a number that is asked for stays: others go on in place
    assert [each["team"]["workers"] for each in told(client, "run_started")] == [1, 2, *last]
