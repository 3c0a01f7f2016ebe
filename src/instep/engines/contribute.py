"""A worker of the server engine."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from instep.clock.slow import parse_slow, slowness
from instep.engines.lines import FarServerOf, NearServer, ToServer
from instep.engines.server_memory import server_memory
from instep.rules.work import Pieces
from instep.team import messages
from instep.worker.activation_memory import fit_memory
from instep.worker.contributor import Contributor

if TYPE_CHECKING:
    from instep.team.session import Session


def contribute(session: Session, descriptor: int, far: FarServerOf | None = None) -> None:
    """The life of a worker: takes work until there is no more. far: its end, where the server is on another host."""
    assignment, worker = session.assignment, session.number
    replica = session.build()
    agreed = session.ready(session.facts(), {})
    known = agreed.facts["written"]
    replica.written.learn(known)
    pieces, every = pieces_of(session, agreed.facts["cut"]), assignment.team.checkpoint_every
    contributor = Contributor(
        replica, pieces, session.heartbeat.advance, checkpoint_every=every, merged_on="cpu", worker=worker
    )  # fmt: skip
    contributor.prepare(0)
    fit_memory(replica, assignment.team, session.emit if session.number == 0 else None)
    replica.written.agree(known, "a first forward")
    if far is None:
        weights, vectors = server_memory(descriptor, agreed.memory)
        line: ToServer = NearServer(assignment.lines[worker].worker, weights, vectors[worker])
    else:
        line = far(contributor)
    line.send(messages.Hello(assignment.incarnation, os.getpid(), socket.gethostname()))
    try:
        _work(session, contributor, line)
    except BaseException:
        line.leave()
        raise
    session.tell_gpu_memory()
    session.send_events()
    session.pipe.send(messages.Ended())


def _work(session: Session, contributor: Contributor, line: ToServer) -> None:
    """Does what it is told to, until there is no more."""
    replica, slow, begun, own = contributor.replica, slowness_of(session), False, session.assignment.incarnation
    ahead: dict[int, tuple[float, float]] = {}  # when it began a piece by itself
    while True:
        session.heartbeat.waiting(True)
        message = line.receive()
        session.heartbeat.waiting(False)
        if isinstance(message, messages.NoMore):
            break
        if message.incarnation != own:
            continue  # it was meant for the process that had this place before
        contributor.enter(message.version)
        work = contributor.pieces.work(message.piece)
        replica.reader.expect_own(work, contributor.pieces.after(work), replica.entered)
        replica.doing = f"computing piece {message.piece}"
        if contributor.way_up is not None and not begun:
            contributor.way_up.take(line.vectors.lost)
        begun, from_s = True, session.clock()
        found = contributor.compute(work, line.weights(message.slot), line.vectors, message.off, message.scale)
        if slow(work.batch) > 1:
            time.sleep((slow(work.batch) - 1) * (session.clock() - from_s))
        span = from_s, session.clock()
        line.send(messages.Pushed(own, found, *span, replica.verified(), ahead.pop(message.piece, None)))
        replica.doing, from_s = "beginning the next piece", session.clock()
        if (next_piece := contributor.go_ahead()) >= 0:
            if (factor := slow(contributor.pieces.work(next_piece).batch)) > 1:
                time.sleep((factor - 1) * (session.clock() - from_s))
            ahead[next_piece] = from_s, session.clock()


def slowness_of(session: Session) -> Callable[[int], float]:
    """What gives of a global batch how many times as long as it needs this worker is to take for its computing."""
    team = session.assignment.team
    return slowness(parse_slow(team.slow) if team.slow else (), team.workers)(session.number)


def pieces_of(session: Session, cut: int) -> Pieces:
    """The run's pieces, as they were cut when it began: for so many workers."""
    recipe = session.recipe
    return Pieces(recipe.rule, cut, recipe.microbatches, recipe.steps)
