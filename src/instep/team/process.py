"""A process of a team: a worker in lockstep, a worker of the server engine, or the server itself."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from instep.descendants import take_care_of_helpers
from instep.engines import server
from instep.engines.audits import WrongWorker
from instep.engines.contribute import contribute, slowness_of
from instep.engines.lockstep import Lockstep
from instep.engines.undo import SeatLost
from instep.errors import InstepError, described, place, with_saved
from instep.memory_file import let_go
from instep.record.digest import digest_of_state
from instep.record.events import WarnedEvent
from instep.record.folder import RunFolder
from instep.record.result import Costs
from instep.reduce.levels import machine_of
from instep.reduce.written import FirstWrite
from instep.team.channel import Channel
from instep.team.far_server import far_server_of
from instep.team.far_workers import far_workers_of
from instep.team.groups import Reach
from instep.team.heartbeat import Heartbeat, HeartbeatBoard
from instep.team.kept_state import keep_state, kept_by, wait_for_others, wait_for_the_end
from instep.team.lockstep_engine import engine_again, engine_of, facts_of, progress_of, successor
from instep.team.logs import redirect_output
from instep.team.messages import (
    Assignment,
    Digest,
    Ended,
    EndedFor,
    Failed,
    FoundWritten,
    FoundWrong,
    KeepingState,
    NotStoodIn,
)
from instep.team.regroup_messages import NextGroup, NotRegrouped
from instep.team.regrouped import CannotRegroup, Formed, Process, regroup
from instep.team.remembered import remembering_in
from instep.team.session import Session
from instep.team.signals import leave_to_others
from instep.team.stacks import Stack
from instep.team.successors import PlacesHeld, handed_over, places_held, ready_in_place, tell_joined
from instep.transport.group import Group, LeftTogether, PeerLost, PeerRaised
from instep.worker.activation_memory import fit_memory
from instep.worker.averages import StateDigests, digests_of
from instep.worker.device import not_deterministic
from instep.worker.gradients import compile_first
from instep.worker.milestones import Milestones, Progress


def main(
    assignment: Assignment, number: int, pipe: Channel, board: HeartbeatBoard, memory: int, stack: Stack, spare: bool
) -> None:
    """The life of a process of the team, which was forked. The server comes last in number. spare: see `Heartbeat`."""
    stack.answer()
    heartbeat = Heartbeat(board, number, os.getppid(), assignment.generation, spare=spare)
    heartbeat.start()
    listeners = [] if assignment.network is None else [assignment.network.listener]
    closed = [partial(os.close, each) for each in (memory, *listeners) if each is not None]
    take_care_of_helpers([pipe.close, *(line.close for line in assignment.lines), *closed])
    leave_to_others(board.ask_to_stop)
    name = "server" if assignment.serving and number == assignment.team.workers else f"worker {number}"
    redirect_output(RunFolder(assignment.scratch or assignment.folder).log_of(name))
    session = Session(assignment, number, pipe, heartbeat)
    try:
        if not assignment.serving:
            _in_lockstep(session, board, memory)
        elif session.leads:
            server.serve(session, memory, far_workers_of(assignment))
        else:
            contribute(session, memory, far_server_of(assignment, number, memory))
    except (PeerRaised, PeerLost) as error:
        wait_for_the_end(session, error)
    except WrongWorker as found:
        session.send_events()
        pipe.send(FoundWrong(found.worker, found.step, found.microbatch, found.since, found.back, found.by))
    except SeatLost as lost:
        pipe.send(NotStoodIn(worker := session.numbers[lost.worker], f"worker {worker} died while {lost.doing}"))
        wait_for_the_end(session, lost)
    except FirstWrite as found:
        session.send_events()
        pipe.send(FoundWritten(found.names, found.where))
    except InstepError as error:
        session.send_events()
        sentence = with_saved(error.message, session.stopped_at, assignment.folder)
        pipe.send(Failed(type(error).__name__, sentence, error.detail))
    except BaseException as error:
        session.send_events()
        where = f" while {session.replica.doing}{session.replica.samples_in_hand()}" if session.replica else ""
        sentence = not_deterministic(error, name, where + place(error))
        sentence = sentence or f"{name} raised {described(error)}{where}{place(error)}."
        pipe.send(Failed("WorkerError", with_saved(sentence, session.stopped_at, assignment.folder), _own_part(error)))
    sys.stdout.flush()
    sys.stderr.flush()


def _in_lockstep(session: Session, board: HeartbeatBoard, descriptor: int) -> None:
    """The life of a worker of the lockstep engine; if it is a successor, from the place on that it gets."""
    team, worker = session.assignment.team, session.number
    if not session.heartbeat.spare:
        tell_joined(session)
    replica = session.build()
    progress, saved = Progress(), session.saved()
    if saved is not None:
        replica.load(saved.model_state, saved.training_state)
        progress = progress_of(session, saved)
    reach, held = Reach(session), places_held(session, board)
    engine, succeeds = engine_of(session, replica, reach.machines, progress, held), session.assignment.succeeds
    if saved is not None:
        engine.updates.watcher.load(saved.training_state.get("watch"))
    engine.prepare(progress.version, looks=not succeeds)
    fit_memory(replica, team, session.emit if worker == 0 and not succeeds else None, workers=team.workers)
    sizes = engine.sizes()
    if session.assignment.late:
        compile_first(replica)  # while the others go on
    agreed = ready_in_place(session, descriptor, facts_of(session, engine, progress), reach.memory(sizes))
    nowhere = engine, progress, reach, frozenset[Process](), engine.why_not_shared, progress.version
    formed = Formed(*nowhere, left=True, began_s=session.clock())
    if not isinstance(agreed, NextGroup):
        group = reach.group(sizes, descriptor)
        agreed = handed_over(session, board, group) if succeeds else agreed
    word = agreed if isinstance(agreed, NextGroup) else None
    if word is None:
        if succeeds:
            engine, progress = successor(session, replica, reach.machines, held, agreed)
        engine.join(group)
        here = frozenset((session.numbers[rank], 0) for rank in machine_of(session.rank, session.machines))
        unevaluated = progress.unevaluated and not succeeds
        formed = replace(formed, engine=engine, progress=progress, here=here, left=False, again=unevaluated)
        word = _train(session, formed)
    if word is not None:
        let_go(descriptor)  # of the memory of the first group
    while word is not None:
        word = _train_on(session, formed, word, held)


def _next(word: NextGroup | Literal[True] | None) -> NextGroup | None:
    return None if word is True else word


def _train_on(session: Session, formed: Formed, word: NextGroup, held: PlacesHeld | None) -> NextGroup | None:
    """Trains in another group. Returns the next one, or None where this one was the last."""
    assert session.replica is not None
    make = partial(engine_again, session, session.replica, held)
    session.remembering = remembering_in(word.remembered, session.assignment.team.remember)
    if held is not None:
        held.begin(word)
    try:
        formed.take(regroup(session, formed, word, make, held))
    except (PeerLost, PeerRaised) as error:
        return _next(wait_for_others(session, error, forming=True))
    except CannotRegroup as why:
        session.pipe.send(NotRegrouped(word.generation, str(why)))
        return _next(wait_for_others(session, why))
    return _train(session, formed)


def _train(session: Session, formed: Formed) -> NextGroup | None:
    """Trains to the end, or until the team goes on in another group, which is returned."""
    engine, progress, reach, replica = formed.engine, formed.progress, formed.reach, session.replica
    assert replica is not None, "the recipe is built"
    engine.slowness = slowness_of(session)
    recipe, keeper = session.recipe, _Keeper(session, formed)
    try:
        if formed.again:
            if session.heartbeat.generation:  # they may have been lost with who was to tell them
                engine.between.checksums(progress)
            last = progress.version == recipe.steps or bool(progress.stopped)
            keeper.after_step(progress, last and not progress.unevaluated)
        steps = progress.version if progress.stopped else recipe.steps
        interrupted = engine.run(progress, keeper.after_step, steps)
        ended_s = session.clock()
        if not interrupted:
            mark = partial(engine.between.lead, lambda: session.mark_best(progress))
            keeper.milestones.ended(progress, keeper.evaluate, mark)
        digests = digests_of(replica)
        engine.between.meet()  # nobody reads weights any more, or raises: what the recipe shows them to may change them
    except PeerLost as lost:  # it is of no use any more to do things together, but with those of this host
        formed.handed_in = engine.between.handed_in
        if isinstance(lost, LeftTogether):  # another may lead the next group
            session.settle()
        word = keeper.after_loss(lost, reach.machine)
        if word is not True:
            return word
        interrupted, ended_s, digests = True, session.clock(), digests_of(replica)
    except (SeatLost, WrongWorker):
        raise  # the weights are uncertain
    except BaseException as error:
        session.send_events()
        doing = replica.doing
        with contextlib.suppress(Exception):  # the first error is the one to tell of
            session.settle()
        with contextlib.suppress(Exception):
            session.stopped_at = engine.stop(
                progress.version, keeper.save_at_stop, saved=session.saved_version,
                needed=session.must_save(progress.version), written=isinstance(error, FirstWrite),
            )  # fmt: skip
        replica.doing = doing
        raise
    _leave(session, engine, progress, digests, interrupted=interrupted, took_s=ended_s - formed.began_s)
    return None


def _leave(
    session: Session, engine: Lockstep, progress: Progress, digests: StateDigests, *, interrupted: bool, took_s: float
) -> None:
    """When all weights are made, in `took_s`: the last words, for those that it stands in for too."""
    left = dict[str, Any]()
    if not interrupted:
        engine.between.lead(lambda: left.update(session.leave()))
    if engine.between.others_can_lead:
        engine.between.meet()
    holds = list(engine.between.holds)
    if 0 in holds and not (interrupted or left):  # it had met all, and died before it told
        left.update(session.leave())
    session.tell_gpu_memory()
    session.send_events()
    idle = round(max(0.0, 1 - engine.busy_s / took_s), 4)
    costs = Costs(bytes_sent=engine.division.bytes_sent, idle_share=[idle], **engine.division.told())
    left |= engine.told_of_audits() | {"ema": digests.averages}
    ended = Ended(asdict(progress), digests.weights, interrupted, left, costs, session.heartbeat.generation)
    for each in holds:
        session.pipe.send(EndedFor(session.numbers[each], ended))
    session.pipe.send(ended)


class _Keeper:
    """Evaluates and saves, for a worker in lockstep, what its milestones say."""

    def __init__(self, session: Session, formed: Formed):
        assert session.replica is not None
        self._session, self._formed, self._replica = session, formed, session.replica
        self._engine, self._progress = formed.engine, formed.progress
        recipe, every = session.recipe, session.assignment.team.checkpoint_every
        self.milestones = Milestones(recipe.steps, recipe.evaluate_every, every, recipe.artifacts_every)
        self.remember()  # a checkpoint that it goes on from, so that it is read once

    def after_step(self, progress: Progress, last: bool, timed: bool = False) -> None:
        """After an update; `last`: the run ends with it; `timed`: by the clock a checkpoint is due."""
        if self.milestones.shows(progress.version - 1, progress.version):  # first: a restart makes them again
            self._session.show(progress.version, for_leader=0 in self._engine.between.holds)
        keep = partial(self._keep, last, timed)
        agree = self._engine.between.agree
        self.milestones.reached(progress, progress.version - 1, lambda: agree(self.evaluate()), keep)
        self._formed.done, self._formed.again = progress.version, False
        self.remember()

    def remember(self) -> None:
        """Where the worker is alone, copies its state, when it is time to."""
        session, version = self._session, self._progress.version
        remembering = session.remembering
        if remembering is None or not remembering.due(version, session.saved_version):
            return
        training = {**self._replica.training_state(), "watch": self._engine.updates.watcher.state()}
        meta = {"progress": asdict(self._progress), "saved": session.saved_version}
        if why := remembering.copy(version, self._replica.module.state_dict(), training, **meta):
            session.remembering = None
            how = "where the worker dies, the run goes back to its last checkpoint"
            session.emit(WarnedEvent(why=f"nothing is remembered from here on (team.remember), for {why}; {how}."))

    def evaluate(self) -> bool:
        """Evaluates; whether this version is to be saved as the best, as far as this worker knows."""
        session, between, progress = self._session, self._engine.between, self._progress
        began_s, version = session.clock(), progress.version
        found = between.evaluate(version)
        if found is None:
            return False

        def look() -> tuple[dict[str, Any], bool]:
            whole = found
            if self._replica.objective.gathers and not session.leads and between.others_can_lead:
                whole = between.evaluate_alone() or found  # in place of worker 0, which has had others' outputs
            tell = session.leads or between.others_can_lead
            return session.looked_at(version, whole, began_s, tell=tell)

        facts, best = between.answer(look)
        progress.evaluated(facts, session.recipe.steps, self._replica.watch.patience)
        return best

    def _keep(self, last: bool, timed: bool, due: bool, best: bool) -> None:
        session, engine, version = self._session, self._engine, self._progress.version
        session.settle(wait=False)
        session.send_events(held=True)
        audited = bool(session.assignment.team.audit)  # which may refute this version while it is written
        due = due or last or bool(self._progress.stopped) or (timed and audited)
        trying = session.tries_checkpoint(version)
        if not (due or best or trying):
            return self._keep_aside() if timed else None
        self._replica.doing = f"saving version {version}"
        state = self._replica.saved_state()
        session.send_events()  # a checkpoint never holds steps that the tape lacks
        if due:
            session.pipe.send(Digest(version, digest_of_state(state)))
        sound = engine.placement.unwritten(version)
        training = engine.between.training_state()

        def write(state: dict[str, Tensor], training: dict[str, Any], looked: bool) -> None:
            if trying:
                session.try_checkpoint(version, state, training)
            if due or best:
                self._save(state, training, sound, looked)
            if best:
                session.mark_best(self._progress)

        if training is not None:
            write(state, training, engine.gradients.looked)
        elif engine.between.others_can_lead:
            engine.between.lead(partial(self._write_for_another, last, write))
            session.saved_version = version if due or best else session.saved_version

    def _keep_aside(self) -> None:
        """Worker 0 copies the state, and has that written while all go on. In its place nobody does: it comes again."""
        session, engine, began_s = self._session, self._engine, self._session.clock()
        self._replica.doing = f"copying version {self._progress.version}, to save it"
        state, sound = self._replica.saved_state(), engine.placement.unwritten(self._progress.version)
        training = engine.between.training_state()
        if training is not None:
            session.send_events()  # as above
            training = {**training, "watch": engine.updates.watcher.state()}
            about = session.to_save(self._progress, looked=False)
            session.aside.begin(state, training, about, began_s, sound)

    def _write_for_another(self, last: bool, write: Callable[[dict[str, Tensor], dict[str, Any], bool], None]) -> None:
        """In place of worker 0: from what the workers share, which nobody changes before the next step is computed.
        Others compute it already, and may write into the weights unseen; but after the last.
        """
        replica, engine, session = self._replica, self._engine, self._session
        doing, entered = replica.doing, replica.enter(self._progress.version - 1)
        replica.doing = f"saving version {self._progress.version}"
        session.send_events()
        write(replica.saved_state(), engine.placement.whole_state(), last and engine.gradients.looked)
        if entered:
            replica.enter(self._progress.version)
        replica.doing = doing

    def save_at_stop(self, training: dict[str, Any]) -> None:
        """Saves weights that are sound, where code has raised."""
        self._save(self._replica.saved_state(), training, None, False)
        self._session.send_events()

    def after_loss(self, lost: PeerLost, machine: Group | None) -> NextGroup | Literal[True] | None:
        """Where others are lost: True as `saved_without_others`, and where the run is to end meanwhile; else in which
        group the worker goes on, or None, where its end has come.
        """
        save = partial(self.saved_without_others, machine)
        keep = partial(keep_state, self._session, self._engine, machine, self._progress)
        if isinstance(lost, LeftTogether):  # those of this host may be in the next group already
            return wait_for_others(self._session, lost, keep)
        late = None if self._session.heartbeat.stop_wanted() else save
        return True if save() else wait_for_others(self._session, lost, keep, late)

    def saved_without_others(self, machine: Group | None) -> bool:
        """Workers of other hosts are lost: whether the run was asked to end, and is saved then, by those of this host.

        Each worker of it calls this.
        """
        session, engine, version = self._session, self._engine, self._progress.version
        has_folder = session.assignment.scratch is None
        if machine is None or not has_folder or not version or not session.heartbeat.stop_wanted():
            return False
        try:
            if int(machine.gather(torch.tensor([session.saved_version]))[0]) == version:
                return True
            kept = kept_by(engine, version, machine)
        except (PeerLost, PeerRaised):  # others of this host are in the next group already, which saves
            return False
        if kept is not None:
            session.pipe.send(KeepingState())
            self.save_at_stop(kept[0])
        return kept is not None or not session.leads

    def _save(
        self, state: dict[str, Tensor], training: dict[str, Any], sound: Callable[[], None] | None, looked: bool
    ) -> None:
        training = {**training, "watch": self._engine.updates.watcher.state()}
        self._session.save(self._progress, state, training, sound, looked)


def _own_part(error: BaseException) -> str:
    """The traceback without this module's own frames at its top."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace))
