"""Who waits for whom, how fast, and who holds the others up, from events and looks."""

from __future__ import annotations

from typing import Any

import pytest

from instep.record.events import ComputedEvent, JoinedEvent, LeftEvent
from instep.team.orders import Member
from instep.team.standing import TeamStanding, ended
from instep.team.wire_messages import LoaderShown, Shown

pytestmark = pytest.mark.pure


def standing(workers: int | None = None) -> TeamStanding:
    """Of a team with a server, behind so many workers, or in lockstep."""
    found = TeamStanding(serving=workers is not None)
    found.begin(workers or 0)
    return found


def shown(
    number: int, doing: str = "computing", since_s: float = 9.0, waits_s: float | None = None, **more: Any
) -> Shown:
    member = Member(1, number, host=more.pop("host", 0))
    return Shown(member, 1000 + number, 10.0, 1.0, doing, since_s, waits_s, **more)


def test_in_lockstep_all_who_wait_wait_for_those_who_do_not() -> None:
    team = [shown(0, waits_s=8.5), shown(1, host=1), shown(2, waits_s=9.5), shown(3, done=True)]
    table = standing().table(team, 10.0, 0)
    assert [each["waits_for"] for each in table["members"]] == [["worker 1 on host 1"], [], ["worker 1 on host 1"], []]
    assert [each["waits_for_s"] for each in table["members"]] == [1.5, None, 0.5, None]
    assert table["members"][3]["doing"] == "done"


def test_under_a_server_workers_wait_for_it_and_it_for_those_who_compute() -> None:
    team = [shown(0, waits_s=8.5), shown(1), shown(2, "waiting for workers")]
    table = standing(2).table(team, 10.0, 0)
    assert [each["waits_for"] for each in table["members"]] == [["the server"], [], ["worker 1"]]
    assert [each["worker"] for each in table["members"]] == [0, 1, None]


def test_who_holds_the_others_up_is_who_has_done_one_thing_for_the_longest() -> None:
    team_of = standing()
    waits, brief = shown(0, waits_s=8.9), shown(0, waits_s=9.5)
    slow, slower = shown(1, since_s=8.0), shown(2, since_s=7.0)
    assert team_of.holds_up([waits, slow, slower]) == slower
    assert team_of.holds_up([brief, slow, slower]) is None, "nobody waits for more than a second"
    assert team_of.holds_up([waits, waits]) is None
    assert team_of.holds_up([slow, slower]) is None
    stopped = shown(2, waits_s=7.0, stopped=True)
    assert team_of.holds_up([waits, stopped]) == stopped, "it may have been stopped while it waited"


def test_under_a_server_that_computes_itself_it_is_who_holds_the_others_up() -> None:
    waits, slow = shown(0, waits_s=8.0), shown(1, since_s=2.0)
    evaluates, listens = shown(2, "evaluating version 3"), shown(2, "waiting for workers", waits_s=1.0)
    assert standing(2).holds_up([waits, slow, evaluates]) == evaluates
    assert standing(2).holds_up([waits, slow, listens]) == slow
    assert standing(2).holds_up([slow, listens]) is None, "a server that listens is held up by nobody"


def test_speed_is_that_of_the_last_contributions_of_the_present_process() -> None:
    team_of = standing()
    for version in range(30):
        span = {"from_s": 1.0 * version, "to_s": version + (2.0 if version < 10 else 0.5)}
        team_of.note(ComputedEvent(worker=1, version=version, microbatches=[2, 6], **span))
    (one,) = team_of.table([shown(1)], 10.0, 0)["members"]
    assert one["microbatches_per_s"] == 8.0
    team_of.note(JoinedEvent(worker=1, pid=7, host="node3"))
    (one,) = team_of.table([shown(1)], 10.0, 0)["members"]
    assert (one["microbatches_per_s"], one["host_name"]) == (None, "node3")


def test_loaders_are_told_by_number_with_the_host_that_they_are_on() -> None:
    team_of = standing()
    team_of.note(JoinedEvent(worker=1, pid=7, host="node1"))
    loaders = [
        LoaderShown(1, 2, 202, 5, 1, 64, 1, "reading step 3, microbatch 0"),
        LoaderShown(0, 0, 200, 9, 0, 0, 0, ""),
    ]
    found = team_of.table([shown(0), shown(1, host=1)], 10.0, 0, loaders)["loaders"]
    assert [(each["name"], each["host_name"]) for each in found] == [
        ("loader 0", None),
        ("loader 2 on host 1", "node1"),
    ]
    assert {**found[1]} == {
        "loader": 2, "name": "loader 2 on host 1", "host": 1, "host_name": "node1", "pid": 202, "read": 5, "ahead": 1,
        "ahead_bytes": 64, "died": 1, "doing": "reading step 3, microbatch 0", "stopped": False,
    }  # fmt: skip


def test_who_has_left_is_told_with_when_and_why() -> None:
    team_of = standing()
    team_of.note(LeftEvent(t_s=3.0, worker=1, why="worker 1 was killed."))
    assert team_of.table([], 10.0, 1)["left"] == [{"worker": 1, "t_s": 3.0, "why": "worker 1 was killed."}]


def test_a_tape_tells_how_its_run_has_ended() -> None:
    began = {"t_s": 0.0, "kind": "run_started", "version": 0, "step": 0, "steps": 5, "engine": "lockstep"}
    merged = {"t_s": 1.0, "kind": "merged", "version": 2, "step": 2}
    end = {"t_s": 2.0, "kind": "run_ended", "interrupted": False}
    assert ended([], None)["state"] == "nothing"
    assert ended([began, merged], None)["state"] == "killed"
    assert ended([began, merged, {**end, "interrupted": True}], {"restarts": 1})["state"] == "interrupted"
    assert ended([began, merged, end], {"restarts": 1})["state"] == "ended"
    failed = ended([began, merged, {"t_s": 2.0, "kind": "failed", "why": "a pity."}], None)
    assert (failed["state"], failed["why"], failed["step"], failed["steps"]) == ("failed", "a pity.", 2, 5)
    assert ended([began, end, began], None)["state"] == "killed", "it went on, and ended in the middle"
