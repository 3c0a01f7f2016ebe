"""Which agents each host has: what agents tell of themselves comes to the whole, in whatever order, or is refused."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instep.ranges import equal_ranges, share_out
from instep.record.hardware import hardware
from instep.team.agents_by_host import AgentsByHost
from instep.team.place import Place, from_environment
from instep.team.wire_messages import HelloAgent

pytestmark = pytest.mark.pure


def placed(counts: Sequence[int], order: Sequence[int]) -> list[Place]:
    """Of agents that torchrun has started on hosts with so many each; `order`: of hosts, by their agents' numbers."""
    found = []
    firsts = dict(zip(order, itertools.accumulate((counts[host] for host in order), initial=0), strict=False))
    for host, count in enumerate(counts):
        for local in range(count):
            told = {
                "TORCHELASTIC_RUN_ID": "none", "RANK": firsts[host] + local, "WORLD_SIZE": sum(counts),
                "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": host, "GROUP_WORLD_SIZE": len(counts),
                "MASTER_ADDR": "n1", "MASTER_PORT": 29500,
            }  # fmt: skip
            place = from_environment({name: str(value) for name, value in told.items()})
            assert place is not None
            found.append(place)
    return sorted(found, key=lambda place: place.agent)


def hello(place: Place) -> HelloAgent:
    return HelloAgent(place.agent, place.host, place.local, place.here, "n", "", 1, {}, "", "", {}, "", hardware())


HOSTS = st.lists(st.integers(1, 4), min_size=2, max_size=5)


@given(HOSTS, st.data())
def test_in_whatever_order_agents_come_the_first_learns_which_host_each_is_on(
    counts: list[int], data: st.DataObject
) -> None:
    order = [0, *data.draw(st.permutations(range(1, len(counts))))]
    places = placed(counts, order)
    agents = AgentsByHost(places[0])
    for place in data.draw(st.permutations(places[1:])):
        assert agents.can_be(place.agent, place.host)
        assert agents.learn(hello(place))
        assert agents.learn(hello(place)), "it may come again"
    for host, count in enumerate(counts):
        those = [place.agent for place in places if place.host == host]
        assert list(agents.of(host) or ()) == those
        assert len(those) == count


@given(HOSTS, st.integers(-1, 20), st.integers(-1, 5), st.integers(-1, 5), st.integers(0, 6))
def test_what_cannot_be_is_refused_and_nothing_learned(
    counts: list[int], agent: int, host: int, local: int, here: int
) -> None:
    places = placed(counts, range(len(counts)))
    agents = AgentsByHost(places[0])
    for place in places[1 : len(places) // 2]:
        agents.learn(hello(place))
    odd = HelloAgent(agent, host, local, here, "n", "", 1, {}, "", "", {}, "", hardware())
    before = [agents.of(host) for host in range(len(counts))]
    if not agents.learn(odd):
        assert [agents.of(host) for host in range(len(counts))] == before
    spans = [span for span in (agents.of(each) for each in range(len(counts))) if span is not None]
    taken = [agent for span in spans for agent in span]
    assert len(set(taken)) == len(taken)
    assert set(taken) <= set(range(len(places)))
    assert len(places) - len(taken) >= len(counts) - len(spans), "each of the other hosts has one"


def test_two_times_three_is_no_proof_that_each_host_has_two() -> None:
    places = placed((2, 1, 3), (0, 1, 2))
    agents = AgentsByHost(places[0])
    assert agents.of(1) is None
    assert not agents.learn(replace(hello(places[2]), local=1, here=2)), "the one before is host 0's"
    assert agents.learn(hello(places[5]))
    assert (agents.of(0), agents.of(1), agents.of(2)) == (range(2), None, range(3, 6))
    assert not agents.learn(replace(hello(places[2]), here=2)), "that is none of its own"
    assert not agents.can_be(4, 1)
    assert agents.learn(hello(places[2]))
    assert agents.of(1) == range(2, 3)


def test_a_launcher_that_tells_all_is_believed() -> None:
    place = Place(0, 4, 0, 2, 0, "srun", (1, 3))
    assert [AgentsByHost(place).of(host) for host in (0, 1)] == [range(1), range(1, 4)]


@given(HOSTS, st.integers(1, 40))
def test_workers_are_shared_out_by_the_number_of_agents(counts: list[int], workers: int) -> None:
    """As if each agent took a nearly equal part by itself."""
    found = share_out(workers, counts)
    parts = iter(equal_ranges(workers, sum(counts))) if workers >= sum(counts) else None
    assert sum(found) == workers
    for count, workers_there in zip(counts, found, strict=True):
        if parts is not None:
            assert workers_there == sum(stop - start for start, stop in itertools.islice(parts, count))
        assert workers_there <= count or workers >= sum(counts), "the rest stands by"
