"""A worker's word with its agent about others in lockstep that have died: whose places it holds, and who takes them."""

from __future__ import annotations

import pickle
from collections.abc import Collection

from instep.engines.standing_in import Handed
from instep.team.heartbeat import HeartbeatBoard
from instep.team.messages import HandedOver, SeatHanded
from instep.team.session import Session
from instep.worker.gradients import compile_first


class PlacesHeld:
    """The places of others that this worker holds: `instep.engines.standing_in.Successors`."""

    def __init__(self, session: Session, board: HeartbeatBoard):
        self._session, self._board = session, board
        # The incarnation of the successor that has taken a place. What the board says that this worker holds, one of
        # its number held before, who has given it back, or who died of it and others hold it since.
        self._given = board.held_by(session.number)

    def changes(self) -> int:
        return self._board.changes

    def held(self) -> Collection[int]:
        held = self._board.held_by(self._session.number)
        return [worker for worker, incarnation in held.items() if incarnation > self._given.get(worker, 0)]

    def forget(self) -> None:
        """Those that were held, in another group."""
        self._given.update(self._board.all_held())

    @property
    def told(self) -> int:
        return self._board.told

    def ready(self, worker: int) -> bool:
        return int(self._board.successors[worker]) == self._board.held_by(self._session.number).get(worker)

    def hand_over(self, worker: int, state: Handed) -> None:
        incarnation = int(self._board.successors[worker])  # who is ready, though another may follow that one by now
        self._session.send_events()
        self._session.pipe.send(HandedOver(worker, incarnation, pickle.dumps(state)))
        self._given[worker] = incarnation


def places_held(session: Session, board: HeartbeatBoard) -> PlacesHeld | None:
    """Of a worker; None where none is ever held: over several machines, and on GPUs."""
    in_place = session.assignment.network is None and session.assignment.team.device == "cpu"
    return PlacesHeld(session, board) if in_place else None


def handed_over(session: Session, board: HeartbeatBoard) -> Handed:
    """Says that this process, the successor of a worker that died, can take its place, and waits until it gets it."""
    assert session.replica is not None, "the recipe is built"
    compile_first(session.replica)  # while the others go on
    board.successors[session.number] = session.assignment.incarnation
    session.heartbeat.waiting(True)
    message: SeatHanded = session.pipe.recv()
    session.heartbeat.waiting(False)
    handed: Handed = pickle.loads(message.state)
    return handed
