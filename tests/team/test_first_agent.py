"""What an agent that follows tells the first comes there whole, or is told in a sentence; and an agent that has no room
for what is to be done leaves the others, who go on.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from instep.errors import ResourceError, WorkerError
from instep.randomness import key_of_step
from instep.recipe import Recipe, Team
from instep.record.events import JoinedEvent
from instep.team import link
from instep.team.crew import LocalCrew
from instep.team.first_agent import FirstAgent
from instep.team.messages import Events, Sync
from instep.team.orders import Member, Regroup
from instep.team.wire_format import TooLong
from instep.team.wire_messages import FromMember, WireError
from support.agents import train_on
from support.harness import Client, told, train_here
from support.patience import LONG_S
from support.regression import regression, squares

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("agents_meet_here")]

MEMBER = Member(1, 1, 0, 1)


def doing(what: Any, *, steps: int = 3) -> Recipe:
    """Of which the last microbatch of the second step, which is the last worker's, does something besides."""
    key = key_of_step(0, 1, 3, "compute")

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if torch.initial_seed() == key:
            what()
        return squares(model, batch)

    return regression(steps=steps, objective=objective)


def test_what_a_worker_elsewhere_raises_is_told_however_long_it_is(tmp_path: Path) -> None:
    def raises() -> None:
        raise ValueError("x" * (17 << 20) + " is the end")

    who = Team(workers=2, lease_s=LONG_S, stall_timeout_s=LONG_S)
    with pytest.raises(WorkerError, match="worker 1 raised ValueError: xxx") as raised:
        train_on((1, 1), doing(raises), who, tmp_path / "run")
    assert raised.value.detail.rstrip().endswith("is the end")


def test_what_a_worker_elsewhere_prints_comes_whole_however_much_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much in proportion as the link would not take at once."""
    monkeypatch.setattr(link, "WAITING_BYTES", 5 << 20)
    monkeypatch.setattr(link, "AHEAD_BYTES", 1 << 20)
    line, count = "x" * 63 + "\n", 1 << 18

    def prints() -> None:
        with os.fdopen(1, "w", closefd=False) as out:
            out.write(line * count)

    run, others = train_on((1, 1), doing(prints), Team(workers=2, lease_s=LONG_S), tmp_path / "run")
    assert [each.result for each in others] == [run.result]
    (log,) = (tmp_path / "run" / "logs").glob("*-1.txt")
    assert log.read_text() == line * count


class Link:
    """In place of one to agent 0, which takes only so many bytes of text together, and nothing while it is `full`."""

    def __init__(self, most: int = 100):
        self._most, self.full, self.wants_write = most, False, False
        self.sent: list[Any] = []

    def fileno(self) -> int:
        return 3

    def send(self, message: FromMember) -> None:
        assert not self.full
        if isinstance(message.message, Events) and sum(len(each.host) for each in message.message.events) > self._most:
            raise TooLong("a FromMember of 101 bytes; at most 100 can be sent")
        self.sent.append(message)


def first_agent(there: Link | None) -> FirstAgent:
    run: Any = SimpleNamespace(place=SimpleNamespace(agent=1), team=Team())
    clock: Any = None
    found = FirstAgent(run, clock)
    found.link = there  # type: ignore[assignment]
    return found


def joined(*lengths: int) -> FromMember:
    return FromMember(MEMBER, Events([JoinedEvent(worker=1, pid=each, host="x" * each) for each in lengths]))


def test_what_the_link_does_not_take_waits_in_order() -> None:
    there = Link()
    first = first_agent(there)
    first.tell(joined(1))
    there.full = True
    first.tell(joined(2))
    first.tell(FromMember(MEMBER, Sync()))
    assert (there.sent, first.waits, first.has_room()) == ([joined(1)], True, False)
    there.full = False
    assert first.has_room()
    assert (there.sent, first.waits) == ([joined(1), joined(2), FromMember(MEMBER, Sync())], False)
    nobody = first_agent(None)
    nobody.tell(joined(1))
    assert not nobody.waits, "agent 0 is lost, as is seen elsewhere"


def test_events_that_are_too_long_together_are_sent_in_parts_and_one_is_an_error() -> None:
    there = Link()
    first = first_agent(there)
    first.tell(joined(60, 30, 50, 40, 50))
    first.tell(FromMember(MEMBER, Sync()))
    assert there.sent == [joined(60, 30), joined(50), joined(40, 50), FromMember(MEMBER, Sync())]
    with pytest.raises(WorkerError, match=r"worker 1 has told is too long .* of 101 bytes; .* be shorter") as raised:
        first.tell(joined(1, 101))
    assert raised.value.message.endswith(".")
    assert isinstance(raised.value.__cause__, WireError)
    assert there.sent[-1] == joined(1)


def test_a_host_without_room_for_another_group_leaves_the_others_who_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends its workers, so that there is room again, and comes anew."""
    regroup, agent, steps = LocalCrew.regroup, os.getpid(), 40
    refused = tmp_path / "refused"

    def has_no_room(crew: LocalCrew, group: Regroup, told: int, saved: int) -> None:
        if os.getpid() != agent and not refused.exists():
            refused.touch()
            raise ResourceError("there is no room for what workers share: Too many open files.")
        regroup(crew, group, told, saved)

    monkeypatch.setattr(LocalCrew, "regroup", has_no_room)
    pids: dict[int, int] = {}

    def see(event: dict[str, Any]) -> None:
        if event["kind"] == "joined":
            pids.setdefault(event["worker"], event["pid"])
        if event["kind"] == "merged" and event["version"] == 3:
            os.kill(pids[1], signal.SIGKILL)
        if event["kind"] == "merged":
            time.sleep(0.02)

    who = Team(workers=4, lease_s=LONG_S, checkpoint_every=100)
    recipe = regression(steps=steps)
    run, others = train_on((1, 1), recipe, who, tmp_path / "run", client=Client(see))
    assert run.digest == train_here(recipe, Team(), tmp_path / "alone").digest
    assert [event["version"] for event in told(run, "run_started")] == [0], "from no checkpoint"
    assert [event["version"] for event in told(run, "merged")] == list(range(1, steps + 1))
    first = {event["worker"]: event["why"] for event in reversed(told(run, "left"))}
    for worker in (2, 3):
        assert "leaves the others: there is no room for what workers share: Too many open files." in first[worker]
    assert [each.result for each in others] == [run.result]
