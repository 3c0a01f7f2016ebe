"""The engine of a worker in lockstep, in the first group of its team, as a successor, and in every later group."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from instep.budget import parse_share
from instep.engines.audits import Audit
from instep.engines.continued import Continued
from instep.engines.lockstep import Lockstep
from instep.engines.standing_in import Handed
from instep.record.checkpoint import Loaded
from instep.record.digest import digest_of_state
from instep.record.event_kinds import TookPlaceEvent
from instep.record.events import WarnedEvent
from instep.team.judging import third_result
from instep.team.session import Session
from instep.team.successors import PlacesHeld
from instep.worker.milestones import Progress
from instep.worker.replica import Replica


def facts_of(session: Session, engine: Lockstep, progress: Progress) -> dict[str, Any]:
    """What workers in lockstep must agree on before they start."""
    replica, placement = engine.replica, engine.placement
    return session.facts(
        version=progress.version,
        weights=digest_of_state(replica.saved_state()),
        terms=engine.terms,
        shared_weight_bytes=placement.weight_bytes,
        whole_update=placement.why_whole,
        written=list(replica.written.names),
        stands_in=session.assignment.network is None and engine.can_regroup,
        regroups=session.assignment.network is not None and engine.can_regroup,
        resizes=engine.can_regroup,
        apart=engine.why_not_shared,
    )


def engine_of(
    session: Session,
    replica: Replica,
    machines: Sequence[int],
    progress: Progress,
    held: PlacesHeld | None,
    handed: Handed | None = None,
    again: Continued | None = None,
) -> Lockstep:
    team, emit, clock = session.assignment.team, session.emit, session.clock
    session.heartbeat.ask_for_saves(session.aside.due)
    if again is None and session.assignment.generation:  # this process's first group is not the team's
        again = Continued(session.numbers)
    of_run = session.rank, machines, session.heartbeat, emit, clock, team.checkpoint_every, team.shard, team.balance
    engine = Lockstep(replica, *of_run, held, handed, again)
    if team.audit:
        share, judge = parse_share(team.audit, "'team.audit'"), partial(third_result, session.recipe, replica)
        of_team = session.number, team.workers, share, progress.version
        engine.audit = Audit(replica, engine.gradients, *of_team, emit, judge)
    return engine


def engine_again(
    session: Session,
    replica: Replica,
    held: PlacesHeld | None,
    machines: Sequence[int],
    again: Continued,
    progress: Progress,
) -> Lockstep:
    return engine_of(session, replica, machines, progress, held, again=again)


def successor(
    session: Session, replica: Replica, machines: Sequence[int], held: PlacesHeld | None, handed: Handed
) -> tuple[Lockstep, Progress]:
    """The engine of a worker that takes the place of one that died, and where the run stands."""
    replica.load({**replica.module.state_dict(), **handed.model}, handed.training)
    progress = Progress(**handed.progress)
    engine = engine_of(session, replica, machines, progress, held, handed)
    engine.updates.watcher.load(handed.watch)
    engine.sizes()
    session.emit(TookPlaceEvent(worker=session.number, version=progress.version))
    return engine, progress


def progress_of(session: Session, saved: Loaded) -> Progress:
    """Where the run stands that goes on from this checkpoint. Raises CheckpointError."""
    progress, steps = Progress.resumed(saved, session.recipe), session.recipe.steps
    why = f"the run has done all its {steps} steps; give more steps (--steps)" if progress.steps >= steps else ""
    if progress.stopped:
        why = f"the run was ended ({progress.stopped}); give another recipe.watch to go on"
    if why and session.leads:
        session.emit(WarnedEvent(why=f"nothing is left to train, for {why}."))
    return progress
