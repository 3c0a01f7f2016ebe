"""What a worker in lockstep does that has lost others: it waits for its end, and keeps the state where it is asked to.

That is asked by an agent that has lost agent 0. All workers of a host are at the same version then, and hold the whole
state together; what they keep is a checkpoint as any other.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch

from instep.engines.lockstep import Lockstep
from instep.engines.undo import SeatLost
from instep.errors import InstepError, described
from instep.record.events import MergedEvent
from instep.team.messages import KeepingState, KeepState, StateKept
from instep.team.regroup_messages import LeftGroup, NextGroup, NotRegrouped, PeersLost
from instep.team.session import Session
from instep.transport.group import Group, PeerLost, PeerRaised
from instep.worker.milestones import Progress

LOOK_S = 0.1
"""Seconds between two looks of a worker that waits for its end, whether the run is to end."""


def wait_for_the_end(session: Session, error: PeerLost | PeerRaised | SeatLost) -> None:
    """Until the agent, which hears from another what has happened, ends this process, which can go on in no group."""
    while isinstance(word := wait_for_others(session, error), NextGroup):
        session.pipe.send(NotRegrouped(word.generation, "a worker was in no group before that one was lost"))


def wait_for_others(
    session: Session,
    error: Exception,
    keep: Callable[[], StateKept] = StateKept,
    save: Callable[[], bool] | None = None,
    *,
    forming: bool = False,
) -> NextGroup | Literal[True] | None:
    """Until the agent tells in which group this worker goes on, or ends this process. `keep` is called when asked.

    forming: the worker was not yet in the group of its others, who wait for it.
    save: is called once, where the run is asked to end meanwhile; True if that has saved it, so that this process ends.
    """
    session.send_events()
    beat = session.heartbeat
    if isinstance(error, PeerLost) and session.assignment.network is None:
        session.pipe.send(LeftGroup(beat.generation))
    elif isinstance(error, PeerLost):
        session.pipe.send(PeersLost(str(error).rstrip("."), error.silent, beat.generation, forming))
    sys.stdout.flush()
    beat.waiting(True)
    with contextlib.suppress(EOFError):
        while True:
            if save is not None and beat.stop_wanted():
                if save():
                    return True
                save = None
            match session.pipe.recv() if session.pipe.poll(LOOK_S) else None:
                case None:
                    pass
                case KeepState():
                    session.pipe.send(keep())
                case NextGroup(generation) as word:
                    if generation > beat.generation and not beat.is_past(generation):
                        beat.waiting(False)
                        return word
                case _:
                    break
    return None


def keep_state(session: Session, engine: Lockstep, machine: Group | None, progress: Progress) -> StateKept:
    """Has the workers of `machine`, this host, keep their state. Each of them calls this."""
    if machine is None or not progress.version:
        return StateKept(why="there is nothing to keep")
    try:
        kept = kept_by(engine, progress.version, machine)
        if kept is None or session.replica is None:
            return StateKept(why="another worker keeps it, or it is no whole version")
        session.pipe.send(KeepingState())
        training, events = kept
        training = {**training, "watch": engine.updates.watcher.state()}
        saved = session.keep(progress, session.replica.saved_state(), training)
        return StateKept(progress.version, saved.path.name, saved.digest, events)
    except InstepError as error:
        return StateKept(why=error.message.rstrip("."))
    except Exception as error:
        return StateKept(why=described(error))


def kept_by(engine: Lockstep, version: int, machine: Group) -> tuple[dict[str, Any], list[MergedEvent]] | None:
    """After PeerLost: the training state at `version` as the workers of a `machine` have it among themselves, and the
    last updates, for its first worker. None at the others, and where there is no sound one.

    A step is made by all of a machine or by none: what one of them needs for it, all have by then.
    """
    engine.gradients.buffers.put_back()
    states = machine.gather(torch.tensor([version + 1 if engine.updates.sound else 0]))
    if not bool((states == version + 1).all()):
        return None
    training = engine.placement.training_state(machine)
    return None if training is None else (training, engine.merged.remembered())
