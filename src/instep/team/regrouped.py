"""How workers in lockstep go on in another group of the same processes: some were lost, or there are more.

Nothing of the step that was on its way has been committed, so it is done again by who is there: each has the replica,
with its weights and its part of the optimizer's state, as the last step has left it. A step is committed by some and
not by others where who died had told some alone; and a host lacks what a worker of it that died had kept of the
optimizer's state. Who lacks something is given all by a host that has the newest version whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import msgspec
import torch
from msgspec import UNSET

from instep.engines.continued import Continued
from instep.engines.kept import KeptOfStep
from instep.engines.lockstep import Lockstep
from instep.engines.redo import redo_of
from instep.errors import ResourceError
from instep.record.event_kinds import RegroupedEvent
from instep.record.events import MergedEvent
from instep.team.groups import Reach
from instep.team.regroup_messages import NextGroup, Regrouped
from instep.team.session import Session
from instep.team.successors import PlacesHeld
from instep.transport.group import Group, PeerLost
from instep.transport.memory import reserve
from instep.transport.shared_memory import SharedMemoryGroup
from instep.worker.milestones import Progress
from instep.worker.parcels import packed, unpacked

Make = Callable[[Sequence[int], Continued, Progress], Lockstep]
"""An engine in a team of so many workers by machine."""

Process = tuple[int, int]
"""Number and incarnation."""


class CannotRegroup(Exception):
    """The workers cannot go on from what they hold."""


@dataclass
class Formed:
    """A worker's side of a group that it is in, or was.

    here: the processes of its host in it; none where this one has been in no group yet. done: the version up to which
    all is done that was due. whole: whether the replica holds what a group has left, and no half of something newer.
    """

    engine: Lockstep
    progress: Progress
    reach: Reach
    here: frozenset[Process]
    why_whole: str
    done: int
    whole: bool = True
    left: bool = False
    again: bool = False
    """Whether what was due at the present version is still to be done."""
    began_s: float = 0.0
    """When it was ready to train, on the run's clock."""
    kept: KeptOfStep | None = None
    """What the worker had computed of the next version when it left the group."""
    first: Process = (0, 0)
    """The first worker of the group."""
    handed_in: dict[str, Any] | None = None
    """See `BetweenSteps.handed_in`."""

    def take(self, other: Formed) -> None:
        """The worker is in that one now."""
        vars(self).update(vars(other))


class HeldByRank(NamedTuple):
    """What a worker tells that it holds. version: one more than that, 0 where it has none that is whole.

    complete: it has all that it needs of it. given: its host can give it to others, with all who were there. done,
    saved: versions up to which all that was due is done, and of the newest checkpoint. fresh: it was in no group.
    shares: it shares weights, and makes a part of each update. seen: all of its host see the optimizer's state of all.
    handed_in: that lies with its host's first one, from when the last group was left.
    """

    version: int
    complete: bool
    given: bool
    done: int
    saved: int
    fresh: bool
    shares: bool
    seen: bool = False
    handed_in: bool = False


def regroup(session: Session, before: Formed, word: NextGroup, make: Make, held: PlacesHeld | None = None) -> Formed:
    """Forms the group of `word` with the others, and takes what this worker lacks. held: the places that it holds, on
    one machine. Raises PeerLost where that is to be left again, and CannotRegroup, at all alike.
    """
    leave(before)
    rank = word.numbers.index(session.number)
    session.saved_version = max(session.saved_version, word.saved)
    session.heartbeat.generation = word.generation
    session.regrouped(word.numbers, [len(list(those)) for _, those in groupby(word.hosts)])
    processes = _processes(session, word)
    now = frozenset(p for p, host in zip(processes, word.hosts, strict=True) if host == word.hosts[rank])
    before.engine.merged.renumber(word.numbers)
    merged, busy_s = before.engine.merged, before.engine.busy_s
    again = Continued(word.numbers, before.why_whole, merged, busy_s, before.progress.version)
    reach = Reach(session, before.reach)
    engine = make(reach.machines, again, before.progress)
    session.heartbeat.waiting(True)  # for others, who may be in the midst of a step
    try:
        group = _group(engine, reach, word)
    finally:
        session.heartbeat.waiting(False)
    try:
        if held is not None and isinstance(group, SharedMemoryGroup):
            held.refuse_without(group)
        states = _held(session, before, now, before.first in now, group)
        source, top = _source(states, word.hosts)
        needs = _needs(states, word.hosts, top)
        events: list[MergedEvent] = []
        watch = before.engine.updates.watcher.state()
        if any(needs):
            given = _given(session, before, reach, group, rank, source, states, word.hosts, needs)
            if needs[rank]:
                watch, events = _take(session, before, given)
                engine = make(reach.machines, again, before.progress)
                engine.sizes()
        first = 0 if states[0].version == top else source
        counted = before.engine.division.bytes_sent, before.engine.division.moves
        own = packed((asdict(before.progress), *counted)) if rank == first else b""
        fields, engine.division.bytes_sent, engine.division.moves = unpacked(group.share(own)[first])
        progress = Progress(**fields)
        if not needs[rank]:
            before.engine.placement.hand_on(engine.placement)
        if not engine.placement.shared:
            _take_apart(session, before)
        engine.updates.watcher.load(watch)
        redo = redo_of(before.kept, group, rank, progress.version, engine.reduction, reach.here)
        engine.join(group, redo)
    except BaseException:
        group.close()
        raise
    kept = UNSET if redo is None else redo.told
    engine.between.lead(partial(_tell, session, engine, word, progress.version, needs, events, kept))
    engine.between.evaluated(progress.held_out.get("version", -1))
    # On one machine what was due is done, by whoever did it; over hosts the first one may have been lost with it.
    knows = states[first if session.assignment.network is None else 0]
    undone = progress.version != knows.saved and not (knows.version == top and progress.version == knows.done)
    done = before.done if undone else progress.version
    leader, here = (processes[0], now) if session.assignment.network else _in_a_group(processes[0], now)
    told = dict[str, Any](again=undone and progress.version > 0, began_s=before.began_s, first=leader)
    return Formed(engine, progress, reach, here, before.why_whole, done, **told)


def _tell(
    session: Session,
    engine: Lockstep,
    word: NextGroup,
    version: int,
    needs: Sequence[bool],
    events: Sequence[MergedEvent],
    kept: Any,
) -> None:
    """The first worker, or who holds its place, tells the tape and the agent that all are in the group."""
    engine.merged.catch_up(word.told, events)
    lacked = [number for number, lacks in zip(word.numbers, needs, strict=True) if lacks]
    session.emit(RegroupedEvent(version=version, workers=list(word.numbers), given=lacked, kept=kept))
    session.pipe.send(Regrouped(word.generation))


def leave(before: Formed) -> None:
    """Leaves a group, once."""
    if not before.left:
        before.left = True
        before.kept = before.engine.uncommitted(before.progress.version) if before.here else None
        before.engine.close()


def _processes(session: Session, word: NextGroup) -> list[Process]:
    """Of one machine alone a place stays with who comes to have it: there the processes of a group count as one, with 0
    for their incarnation.
    """
    if session.assignment.network is None:
        return [(number, int(number in word.fresh)) for number in word.numbers]
    return list(zip(word.numbers, word.incarnations, strict=True))


def _in_a_group(leader: Process, here: Collection[Process]) -> tuple[Process, frozenset[Process]]:
    """These on one machine, now that they are in a group."""
    return (leader[0], 0), frozenset((number, 0) for number, _ in here)


def _group(engine: Lockstep, reach: Reach, word: NextGroup) -> Group:
    sizes, descriptor = engine.sizes(), -1
    regions = reach.memory(sizes)
    try:
        if regions:
            descriptor = os.open(f"/proc/{os.getppid()}/fd/{word.memory}", os.O_RDWR)
            if os.fstat(descriptor).st_ino != word.inode:  # the agent has closed that, and the number is another's
                raise PeerLost("the memory of this group is not there any more")
            reserve(descriptor, regions)
        return reach.group(sizes, descriptor)
    except ResourceError as error:
        raise CannotRegroup(error.message.rstrip(".")) from error
    except OSError as error:
        raise PeerLost(f"the memory of this group is not there any more: {error.strerror}") from error
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _held(
    session: Session, before: Formed, now: frozenset[Process], first_is_here: bool, group: Group
) -> list[HeldByRank]:
    """What each holds, by rank."""
    shares, fresh, version = before.engine.placement.shared, not before.here, before.progress.version
    torn = not fresh and shares and before.engine.marks.torn(version)
    sound = not fresh and before.whole and before.engine.updates.sound and not torn
    seen = not fresh and before.engine.placement.state_seen
    handed_in = before.handed_in is not None and first_is_here and not fresh
    own = HeldByRank(
        version=version + 1 if sound else 0,
        complete=not fresh and (not shares or seen or now == before.here),
        given=handed_in or (not fresh and (not shares or seen or before.here <= now)),
        done=before.done,
        saved=session.saved_version,
        fresh=fresh,
        shares=shares,
        seen=seen,
        handed_in=handed_in,
    )
    return [HeldByRank(*row) for row in group.gather(torch.tensor([int(each) for each in own])).tolist()]


def _source(states: Sequence[HeldByRank], hosts: Sequence[int]) -> tuple[int, int]:
    """The first rank of a host that has the newest version whole, best one that need not be given it itself; and
    `HeldByRank.version` of that.
    """
    found: list[tuple[int, bool, int]] = []
    for host in sorted(set(hosts)):
        ranks = [rank for rank, where in enumerate(hosts) if where == host]
        there = [states[rank] for rank in ranks if not states[rank].fresh]
        if there and there[0].version and all(each.given and each.version == there[0].version for each in there):
            first = next(rank for rank in ranks if not states[rank].fresh)
            found.append((there[0].version, all(each.complete for each in there), -first))
    if not found:
        raise CannotRegroup("no host has the weights and the optimizer's state of a version whole")
    version, _, place = max(found)
    return -place, version


def _needs(states: Sequence[HeldByRank], hosts: Sequence[int], top: int) -> list[bool]:
    """Who is to be given all, by rank. Where one of a host that shares weights does not hold the version `top` it may
    have begun to write another there, when others of the host had left already: none of them has it then.
    """
    torn = {
        host for each, host in zip(states, hosts, strict=True) if each.shares and not each.fresh and each.version != top
    }
    return [
        host in torn or not (each.version == top and each.complete) for each, host in zip(states, hosts, strict=True)
    ]


def givers(hosts: Sequence[int], needs: Sequence[bool], source: int) -> list[int]:
    """By rank, who gives to those of its host that need all: one of them if one has it, else `source`."""
    there = {host: rank for rank, host in reversed(list(enumerate(hosts))) if not needs[rank]}
    return [there.get(host, source) for host in hosts]


def _given(
    session: Session,
    before: Formed,
    reach: Reach,
    group: Group,
    rank: int,
    source: int,
    states: Sequence[HeldByRank],
    hosts: Sequence[int],
    needs: Sequence[bool],
) -> bytes:
    """All that a replica has, at the ranks that need it: from one of the same host, or else from a host that has it."""
    found, whose, placement = b"", givers(hosts, needs, source), before.engine.placement
    machine = reach.machine or group  # of this host
    there = [each for each, host in enumerate(hosts) if host == hosts[rank]]
    here = whose[rank] in there and not needs[whose[rank]]
    if any(lacks and (hosts[whose[each]] != hosts[each] or needs[whose[each]]) for each, lacks in enumerate(needs)):
        own = b""
        if hosts[rank] == hosts[source]:
            if states[source].seen or not states[source].shares:
                own = _all(session, before, placement.whole_state()) if rank == source else b""
            elif states[source].handed_in:
                own = _all(session, before, before.handed_in) if rank == source else b""
            elif states[rank].fresh:
                machine.share(b"", to=0)
            else:
                training = placement.training_state(machine)
                own = _all(session, before, training) if rank == source else b""
        found = group.share(own)[source]
    if here and any(needs[each] for each in there):
        own = _all(session, before, placement.whole_state()) if rank == whose[rank] else b""
        found = machine.share(own)[whose[rank] - there[0]]
    return found


def _all(session: Session, before: Formed, training: dict[str, Any] | None) -> bytes:
    """With what it gives of its own."""
    assert training is not None, "it is the first of its host"
    assert session.replica is not None, "the recipe is built"
    watch, remembered = before.engine.updates.watcher.state(), before.engine.merged.remembered()
    events = [msgspec.msgpack.encode(event) for event in remembered]
    return packed({"model": session.replica.saved_state(), "training": training, "watch": watch, "events": events})


def _take_apart(session: Session, before: Formed) -> None:
    """Weights that were shared in the group of before are the worker's own."""
    assert session.replica is not None
    session.replica.averages.lie_apart()
    for parameter in session.replica.parameters if before.engine.placement.shared else ():
        parameter.data = parameter.data.clone()


def _take(session: Session, before: Formed, given: bytes) -> tuple[Any, list[MergedEvent]]:
    """Loads it. The state of the watch, and the last updates that its giver remembers."""
    assert session.replica is not None
    state = unpacked(given)
    before.whole = False
    session.replica.load(state["model"], state["training"])
    return state["watch"], [msgspec.msgpack.decode(event, type=MergedEvent) for event in state["events"]]
