"""Workers of several hosts that are lost: the others go on in the same processes, with the same bits."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from instep.engines.continued import Continued
from instep.errors import WorkerError
from instep.loss_scale import LossScale
from instep.recipe import Team
from instep.team import regrouped
from instep.team.processes import MemberProcesses
from instep.team.regrouped import CannotRegroup, HeldByRank
from instep.team.remote import Silence
from support import workloads
from support.agents import Followers, train_on
from support.harness import Client, Outcome, told, train_here
from support.kinds import quick
from support.paced import Paced, pid_of
from support.patience import LONG_S
from support.regression import squares, waiting_for
from support.threads import meanwhile

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("agents_meet_here")]

STEPS = 12


def team(**changes: Any) -> Team:
    return Team(**{"workers": 3, "checkpoint_every": 5, "keep": 0, "lease_s": 60.0, "restarts": 9, **changes})


class Killing:
    """Kills workers once the tape tells of a version, but some only when the team goes on without those of before, for
    many updates are told at once; `at`: who, by version.
    """

    def __init__(self, at: dict[int, Sequence[int]]):
        self._at, self._pids, self._goes_on = dict(at), dict[int, int](), True
        self.client = Client(self._see)

    def _see(self, event: dict[str, Any]) -> None:
        if event["kind"] == "joined":
            self._pids[event["worker"]] = event["pid"]
        self._goes_on |= event["kind"] == "regrouped"
        due = [version for version in self._at if event["kind"] == "merged" and version <= event["version"]]
        if due and self._goes_on:
            self._goes_on = False
            for who in self._at.pop(min(due)):
                os.kill(self._pids[who], signal.SIGKILL)


def check(run: Outcome, lost: Sequence[int], digest: str) -> None:
    """The same processes have done each step once, from no checkpoint, but for who was lost."""
    assert run.digest == digest
    assert len(told(run, "run_started")) == 1
    assert [event["version"] for event in told(run, "merged")] == list(range(1, STEPS + 1))
    assert [event["worker"] for event in told(run, "left") if "before it could" not in event["why"]] == list(lost)
    joined = Counter(event["worker"] for event in told(run, "joined"))  # a successor may come when all is done
    assert Counter([0, 1, 2]) <= joined <= Counter([0, 1, 2, *lost])
    assert run.result["restarts"] == len(lost)


CASES = [*product(["gpt", "convnet"], [(1, 1), (1, 1, 1)], [0, 1, 2])]


@pytest.mark.parametrize(
    "case", quick(CASES, ("gpt", (1, 1), 0), ("gpt", (1, 1), 1), ("convnet", (1, 1, 1), 2)), ids=str
)
def test_who_is_lost_costs_the_others_neither_process_nor_checkpoint(
    case: tuple[str, tuple[int, ...], int], tmp_path: Path
) -> None:
    """A first worker whose host has no other is waited for; who has lost its part of the optimizer's state gets it."""
    name, agents, who = case
    recipe = dataclasses.replace(workloads.ALL[name](), steps=STEPS)
    run, others = train_on(agents, recipe, team(), tmp_path / "run", client=Killing({3: [who]}).client)
    check(run, [who], train_here(recipe, Team(), tmp_path / "alone").digest)
    assert [each.result for each in others] == [run.result] * (len(agents) - 1)
    assert who not in told(run, "regrouped")[0]["workers"] or who == 0
    assert [event["version"] for event in told(run, "checkpointed")] == [5, 10, STEPS]


def test_who_comes_computes_with_the_loss_scale_that_the_others_have(tmp_path: Path) -> None:
    """Each of two workers dies once the other's successor takes part."""
    paced, client = Paced(tmp_path), Client()
    recipe = dataclasses.replace(
        paced.recipe, precision="float16", loss_scale=LossScale(init=2.0**24, growth_interval=2)
    )

    def both() -> int:
        return [event["workers"] for event in told(client, "regrouped")].count([0, 1])

    def kill() -> None:
        for times, who in enumerate((1, 0), start=1):
            paced.until(lambda more=4 * times: len(told(client, "merged")) > more, "some steps")  # type: ignore[misc]
            os.kill(pid_of(client, who), signal.SIGKILL)
            paced.until(lambda times=times: both() >= times, "its successor")  # type: ignore[misc]

    with meanwhile(kill, paced.go_on):
        run, _ = train_on((1, 1), recipe, team(workers=2), tmp_path / "run", client=client)
    alone = train_here(dataclasses.replace(recipe, objective=squares), Team(), tmp_path / "alone")
    assert run.digest == alone.digest
    assert run.result["overflows"] == alone.result["overflows"] > 3
    assert len(told(run, "run_started")) == 1
    assert [each["loss_scale"] for each in told(run, "merged")] == [
        each["loss_scale"] for each in told(alone, "merged")
    ]


@pytest.mark.slow
def test_who_comes_in_the_place_of_the_first_worker_leads_as_that_did(tmp_path: Path) -> None:
    """Four workers of two hosts: another one of its host leads meanwhile."""
    recipe = workloads.gpt(steps=STEPS)
    kill = Killing({2: [0], 6: [3], 9: [1]})
    run, _ = train_on((1, 1), recipe, team(workers=4), tmp_path / "run", client=kill.client)
    assert run.digest == train_here(recipe, Team(), tmp_path / "alone").digest
    assert [event["version"] for event in told(run, "merged")] == list(range(1, STEPS + 1))
    assert told(run, "regrouped")[0]["workers"] == [1, 2, 3]


@pytest.mark.slow
def test_a_host_that_is_lost_while_another_holds_the_newest_version_costs_no_step(tmp_path: Path) -> None:
    recipe = workloads.gpt(steps=STEPS)
    who = team(workers=4)
    followers = Followers(recipe, who, (1, 1), tmp_path)

    def see(event: dict[str, Any]) -> None:
        if event["kind"] == "merged" and event["version"] == 4:
            followers.kill(1)

    run, _ = train_on((1, 1), recipe, who, tmp_path / "run", client=Client(see), followers=followers, told_s=0.0)
    assert run.digest == train_here(recipe, Team(), tmp_path / "alone").digest
    assert len(told(run, "run_started")) == 1
    assert told(run, "regrouped")[0]["workers"] == [0, 1]
    assert told(run, "regrouped")[0]["given"] == [], "they have it all"


def test_a_host_whose_agent_is_suspended_for_longer_than_the_lease_takes_part_again_with_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go on without it. A second counts as the lease then, else a busy machine may take long."""
    left, back = tmp_path / "left", tmp_path / "back"
    recipe = waiting_for((4, 0, left), (6, 0, back), steps=STEPS)
    who = team(workers=2, lease_s=LONG_S, restarts=0, give_up_s=LONG_S, checkpoint_every=100)
    followers = Followers(recipe, who, (1, 1), tmp_path)
    there, stopped, look = True, False, Silence.look

    def looked(silence: Silence) -> float:
        found = look(silence)
        return LONG_S if stopped and not back.exists() and found >= 1.0 else found

    monkeypatch.setattr(Silence, "look", looked)

    def see(event: dict[str, Any]) -> None:
        nonlocal there, stopped
        if event["kind"] in ("left", "host_back"):
            there = event["kind"] == "host_back"
            if stopped:
                (back if there else left).touch()
        if event["kind"] == "merged" and event["version"] >= 3 and there and not stopped:
            stopped = True
            followers.kill(1, signal.SIGSTOP)
        if event["kind"] == "regrouped" and stopped and not there:
            followers.kill(1, signal.SIGCONT)

    run, _ = train_on((1, 1), recipe, who, tmp_path / "run", client=Client(see), followers=followers, told_s=0.0)
    assert run.digest == train_here(recipe, Team(), tmp_path / "alone").digest
    assert (run.result["restarts"], len(told(run, "run_started")), len(told(run, "joined"))) == (0, 1, 2)
    assert [event["version"] for event in told(run, "merged")] == list(range(1, STEPS + 1))
    assert {event["worker"] for event in told(run, "left")} == {1}
    groups = [event["workers"] for event in told(run, "regrouped")]
    assert [0, 1] in groups[groups.index([0]) :]


def test_no_more_are_replaced_than_may_be(tmp_path: Path) -> None:
    recipe, who, kill = workloads.gpt(steps=STEPS), team(restarts=0), Killing({3: [2]})
    with pytest.raises(WorkerError, match=r"worker 2 on host 1 .* SIGKILL"):
        train_on((1, 1), recipe, who, tmp_path / "run", client=kill.client)


def held(version: int, **changes: Any) -> HeldByRank:
    one = HeldByRank(version, complete=True, given=True, done=0, saved=0, fresh=False, shares=True)
    return one._replace(**changes)


OLD, NEW, NONE = held(4), held(5), held(0, fresh=True, complete=False, given=False)


@pytest.mark.parametrize(
    ("states", "found"),
    [
        ([OLD, OLD, OLD, OLD], (0, 4)),
        ([OLD, OLD, NEW, NEW], (2, 5)),  # who died had told one host alone
        ([NEW, held(0), OLD, OLD], (2, 4)),  # half an update is none
        ([held(4, complete=False, given=False), NONE, OLD, OLD], (2, 4)),
        ([held(4, complete=False), NONE, OLD, OLD], (2, 4)),  # best who has it already
        ([held(4, complete=False), NONE, NONE, NONE], (0, 4)),
    ],
)
def test_the_newest_version_that_a_host_has_whole_is_taken(states: list[HeldByRank], found: tuple[int, int]) -> None:
    assert regrouped._source(states, [0, 0, 1, 1]) == found


@pytest.mark.parametrize(
    ("states", "found"),
    [
        ([OLD, OLD, OLD, NONE], [False, False, False, True]),
        ([held(4, seen=True), NONE, OLD, OLD], [False, True, False, False]),
        ([OLD, held(0), OLD, OLD], [True, True, False, False]),  # half an update may lie in the weights of both
        ([OLD, held(0, shares=False), OLD, OLD], [False, True, False, False]),
        ([held(3), OLD, OLD, OLD], [True, True, False, False]),
        ([OLD, NONE, held(4, complete=False), OLD], [False, True, True, False]),
    ],
)
def test_weights_that_one_of_a_host_may_have_begun_to_write_are_given_to_all_of_it(
    states: list[HeldByRank], found: list[bool]
) -> None:
    assert regrouped._needs(states, [0, 0, 1, 1], 4) == found


def test_what_workers_are_to_share_is_known_apart_from_what_comes_to_have_its_descriptor() -> None:
    processes = MemberProcesses(2, set(), serving=False, lines=0)
    try:
        found = list[tuple[int, int]]()
        for generation in range(1, 6):
            found.append(processes.renew_memory(generation))
            processes.close_memory(generation - 1)
    finally:
        processes.close()
    assert len({number for number, _ in found}) < len({inode for _, inode in found}) == 5


def test_what_workers_shared_in_a_group_is_let_go_once_all_of_a_later_one_are_there() -> None:
    processes, found = MemberProcesses(2, set(), serving=False, lines=0), list[tuple[int, int]]()

    def there() -> list[bool]:
        return [os.path.exists(f"/proc/self/fd/{n}") and os.fstat(n).st_ino == inode for n, inode in found]

    try:
        found += [processes.renew_memory(1), processes.renew_memory(2)]
        processes.close_memory(0)
        assert there() == [True, True], "the first of them may not be formed yet"
        found.append(processes.renew_memory(3))
        processes.close_memory(1)
        assert there() == [False, True, True]
        processes.close_memory(3)
        assert there() == [False] * 3
        assert processes._newest == processes.descriptor
    finally:
        processes.close()


@pytest.mark.parametrize(
    ("needs", "found"),
    [
        ([True, False, False, True], [1, 1, 2, 2]),
        ([True, True, False, False], [2, 2, 2, 2]),
    ],
)
def test_one_of_the_same_host_gives_what_it_has(needs: list[bool], found: list[int]) -> None:
    assert regrouped.givers([0, 0, 1, 1], needs, 2) == found


def test_where_none_has_a_version_whole_nobody_goes_on() -> None:
    with pytest.raises(CannotRegroup, match="no host has"):
        regrouped._source([held(4, given=False), NONE, NEW, held(0)], [0, 0, 1, 1])


def test_what_each_rank_has_is_told_by_number() -> None:
    again = Continued([0, 3, 1])
    assert again.by_number(["a", "b", "c"], "") == ["a", "c", "", "b"]
    assert again.by_number([], "") == []
