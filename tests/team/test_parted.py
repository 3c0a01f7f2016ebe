"""Who counts as lost where workers have lost each other, of a team that was asked to end above all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from instep.team import parted
from instep.team.orders import FinishRun, HostLost, Lost, StopAsked
from instep.team.parted import BEREFT_S, PARTED_S, Parted
from instep.team.regroup_messages import PeersLost
from support.world import World

pytestmark = pytest.mark.pure

HOSTS: Any = SimpleNamespace(at=lambda address: None, silent=lambda host: False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(parted, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def bereft(workers: int, agents: tuple[int, ...]) -> World:
    """A team that was asked to end, and has lost host 1 then."""
    world = World(workers, restarts=0, agents=agents)
    for host in range(1, len(agents)):
        world.comes(host)
    world.build()
    world.stop()
    world.loses(1)
    assert world.roster.bereft
    return world


def looked(looks: Parted, world: World, clock: list[float], hosts: Any = HOSTS) -> Any:
    """What is found once it has been looked for as long as it takes."""
    event = None
    while event is None and clock[0] < 10 * PARTED_S:
        clock[0] += 0.2
        event = looks.look(world.roster, hosts)
    return event


def test_who_is_cut_off_on_other_hosts_does_not_keep_the_leader_from_saving(clock: list[float]) -> None:
    world, looks = bereft(5, (1, 1, 1, 1)), Parted()
    leader, *others = world.roster.active
    for each in others:
        looks.note(each, PeersLost("the connection has ended"))
    for host in (2, 3):
        event = looked(looks, world, clock)
        assert isinstance(event, HostLost)
        assert event.host == host
        world.loses(host)
    assert looks.look(world.roster, HOSTS) is None
    world.end(leader)
    assert world.final == FinishRun(leader)


def test_a_bereft_team_has_some_time_but_as_much_as_it_takes_to_write(clock: list[float]) -> None:
    world, looks = bereft(2, (1, 1)), Parted()
    clock[0] += BEREFT_S / 2
    assert looks.look(world.roster, HOSTS) is None
    looks.saves = True
    clock[0] += 100 * BEREFT_S
    assert looks.look(world.roster, HOSTS) is None
    looks.saves = False
    clock[0] += BEREFT_S / 2
    assert looks.look(world.roster, HOSTS) is None
    clock[0] += BEREFT_S / 2
    assert looks.look(world.roster, HOSTS) == StopAsked(at_once=True)


def test_who_is_beside_the_leader_and_could_not_save_ends_the_run_at_once(clock: list[float]) -> None:
    world, looks = bereft(2, (1, 1)), Parted()
    looks.note(world.roster.leader, PeersLost("the connection has ended"))
    assert looked(looks, world, clock) == StopAsked(at_once=True)
    assert clock[0] < BEREFT_S


def test_who_saves_after_it_has_told_of_its_loss_is_let_save(clock: list[float]) -> None:
    """The loss was noticed by all before the run was asked to end."""
    world, looks = bereft(2, (1, 1)), Parted()
    looks.note(world.roster.leader, PeersLost("the connection has ended"))
    looks.keeps(world.roster.leader)
    clock[0] += 10 * PARTED_S
    assert looks.look(world.roster, HOSTS) is None


def test_who_does_not_end_once_the_leader_has_saved_is_ended_without(clock: list[float]) -> None:
    world, looks = bereft(4, (1, 1, 1)), Parted()
    leader, *others = world.roster.active
    world.end(leader)
    assert looks.look(world.roster, HOSTS) is None
    while world.final is None:
        clock[0] += BEREFT_S
        event = looks.look(world.roster, HOSTS)
        assert isinstance(event, Lost)
        assert event.member in others
        assert event.why.endswith(" has not ended 10 s after the run was saved.")
        world.lose(event.member)
    assert world.final == FinishRun(leader)


def test_who_could_not_form_a_group_is_lost_though_another_was_to_follow(clock: list[float]) -> None:
    """It has gone on to that one, and the others of the group that it could not form wait for it."""
    world, looks = World(2, agents=(1, 1)), Parted()
    world.comes(1)
    world.build()
    other = world.roster.active[1]
    looks.clear(2, at_once=False)
    looks.note(other, PeersLost("it could not join", generation=2, forming=True))
    looks.clear(3, at_once=False)
    looks.note(other, PeersLost("it has left with all", generation=2))
    lost = looked(looks, world, clock)
    assert isinstance(lost, Lost)
    assert lost.member == other
    looks.note(other, PeersLost("it could not join", generation=2, forming=True))
    looks.clear(4)
    looks.note(other, PeersLost("it could not join", generation=3, forming=True))
    assert looked(looks, world, clock) is None, "the group was broken off"


def test_nobody_is_set_aside_by_an_agent_that_was_busy_nor_while_any_host_is_overdue(clock: list[float]) -> None:
    """The death for which they have lost each other may not be heard of yet."""
    world, looks = World(3, agents=(1, 1, 1)), Parted()
    world.comes(1)
    world.comes(2)
    world.build()
    looks.note(world.roster.active[0], PeersLost("the connection has ended"))
    clock[0] += 5 * PARTED_S
    assert looks.look(world.roster, HOSTS) is None
    overdue: Any = SimpleNamespace(at=lambda address: None, silent=lambda host: host == 2)
    assert looked(looks, world, clock, overdue) is None
    assert isinstance(looks.look(world.roster, HOSTS), Lost)
