"""A worker's word with its agent about others in lockstep that have died: whose places it holds, and who takes them."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from instep.engines.standing_in import Handed
from instep.memory_file import let_go
from instep.record.events import JoinedEvent
from instep.team.heartbeat import HeartbeatBoard
from instep.team.messages import HandedOver, SeatHanded
from instep.team.regroup_messages import NextGroup, TakePlace
from instep.team.session import Session
from instep.transport.group import Group, PeerLost
from instep.transport.memory import Region
from instep.transport.shared_memory import Fact, SharedMemoryGroup
from instep.worker.gradients import compile_first

FIRST_TO_GO = 1000
"""What Linux calls `oom_score_adj`: where memory runs out an idle process ends before those that train."""


class PlacesHeld:
    """The places of others that this worker holds: `instep.engines.standing_in.Successors`. Engines know workers by
    their ranks in the group, the agent by their numbers.
    """

    def __init__(self, session: Session, board: HeartbeatBoard):
        self._session, self._board = session, board
        # The incarnation of who has a place. What the board says that this worker holds, one of its number held
        # before, who has given it back, or who died of it and others hold it since.
        self._given = board.held_by(session.number)

    def changes(self) -> int:
        return self._board.changes

    def held(self) -> Collection[int]:
        return self._vacant(self._board.held_by(self._session.number))

    def _vacant(self, held: Mapping[int, int]) -> list[int]:
        """The ranks of those, given with their successors' incarnations, whose places are held still."""
        numbers = enumerate(self._session.numbers)
        return [rank for rank, number in numbers if held.get(number, 0) > self._given.get(number, 0)]

    def begin(self, word: NextGroup) -> None:
        """Another group begins: who is lost of that is not yet known to be."""
        self._given = dict(zip(word.numbers, word.incarnations, strict=True))

    @property
    def told(self) -> int:
        return self._board.told

    def ready(self, worker: int) -> bool:
        number = self._session.numbers[worker]
        return int(self._board.successors[number]) == self._board.held_by(self._session.number).get(number)

    def hand_over(self, worker: int, state: Handed) -> None:
        number = self._session.numbers[worker]
        incarnation = int(self._board.successors[number])  # who is ready, though another may follow that one by now
        self._session.send_events()
        self._session.pipe.send(HandedOver(number, incarnation, pickle.dumps(state)))
        self._given[number] = incarnation

    def refuse_without(self, group: SharedMemoryGroup) -> None:
        """While that is formed, its calls raise PeerLost where one has died that did not come to them: at all alike."""
        group.stand_in(_LostMeanwhile(self), _cannot_form)

    @property
    def lost(self) -> Collection[int]:
        """The ranks of all whose places are held, by whomever."""
        return self._vacant(self._board.all_held())


class _LostMeanwhile:
    """Of a group that is being formed: `instep.transport.shared_memory.Vacancies`."""

    def __init__(self, places: PlacesHeld):
        self._places = places

    def changes(self) -> int:
        return self._places.changes()

    def held(self) -> Collection[int]:
        return self._places.lost


def _cannot_form(rank: int, length: int | None) -> Fact | None:
    raise PeerLost("a worker died before it was in the group")


def places_held(session: Session, board: HeartbeatBoard) -> PlacesHeld | None:
    """Of a worker; None where none is ever held: over several machines, and on GPUs."""
    in_place = session.assignment.network is None and session.assignment.team.device == "cpu"
    return PlacesHeld(session, board) if in_place else None


def handed_over(session: Session, board: HeartbeatBoard, group: Group) -> Handed | NextGroup:
    """Says that this process, the successor of a worker that died, can take its place, and waits until it gets it; or
    is to begin in a later group, where the others have left this one.
    """
    assert session.replica is not None, "the recipe is built"
    compile_first(session.replica)  # while the others go on
    board.successors[session.number] = session.assignment.incarnation
    session.heartbeat.waiting(True)
    message: SeatHanded | NextGroup = session.pipe.recv()
    session.heartbeat.waiting(False)
    if isinstance(message, NextGroup):
        group.close()
        return message
    handed: Handed = pickle.loads(message.state)
    return handed


def tell_joined(session: Session) -> None:
    """Tells that this process is there."""
    session.emit(JoinedEvent(worker=session.number, pid=os.getpid(), host=socket.gethostname()))


def ready_in_place(session: Session, memory: int, facts: Mapping[str, Any], sizes: Mapping[str, Region]) -> Any:
    """As `Session.ready`. A process that is to take a place should it become vacant waits first, all being built, until
    it has it, and tells so; `memory`, of another group, is nothing to it.
    """
    if session.heartbeat.spare:
        let_go(memory)
        _wait_for_place(session)
    return session.ready(facts, sizes)


def _wait_for_place(session: Session) -> None:
    file, before = Path("/proc/self/oom_score_adj"), "0"
    with contextlib.suppress(OSError):
        before = file.read_text()
        file.write_text(str(FIRST_TO_GO))
    word: TakePlace = session.pipe.recv()
    with contextlib.suppress(OSError):
        file.write_text(before)
    session.heartbeat.take_place()
    session.take_place(word.workers)
    tell_joined(session)
