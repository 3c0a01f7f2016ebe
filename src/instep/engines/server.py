"""The server engine: free workers and one server, under any update rule.

Weights and contributions lie in memory that the server shares with the workers of its machine, and who does what when
goes over one line a worker; to other machines all goes over the network, see `instep.engines.lines`. The server drives
the ledger and makes the updates, and writes what a replay needs to the tape, in the order in which it did it.
A worker that dies is a `left` event: its piece is given out again, and nobody else stops.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from dataclasses import asdict
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, assert_never

from msgspec import UNSET
from torch import Tensor

from instep.engines.contribute import pieces_of
from instep.engines.costs import Tally
from instep.engines.lines import FarWorkersOf, Lines
from instep.engines.server_memory import PublishedWeights, server_memory, server_regions
from instep.record import events
from instep.record.digest import digest_of_state
from instep.record.event_kinds import GraceEndedEvent
from instep.reduce.written import FirstWrite
from instep.rules.ledger import Action, Drop, Ledger, Merge, Release
from instep.rules.ledger_state import ledger_state, resumed_ledger
from instep.team import messages
from instep.worker.averages import digests_of
from instep.worker.contribution import Arrived, Facts, Vectors
from instep.worker.contributor import Contributor
from instep.worker.evaluation import batches_held_out, evaluate_alone
from instep.worker.first_look import look_at_data, look_at_objective
from instep.worker.milestones import Milestones, Progress
from instep.worker.replica import Replica
from instep.worker.tensor_checksums import checksum_when_due
from instep.worker.updates import Merger
from instep.worker.wire import vector_bytes

if TYPE_CHECKING:
    from instep.team.session import Session

LOOK_S = 0.1
"""Seconds between two looks at whether the run was asked to stop."""

PAUSE_S = 0.005
"""Seconds between two looks at whether a worker has answered."""


def serve(session: Session, descriptor: int, far: FarWorkersOf | None = None) -> None:
    """The life of the server. far: its end to workers of other hosts, if there are some."""
    replica = session.build()
    workers = session.assignment.team.workers
    saved = session.saved()
    pieces = pieces_of(session, workers if saved is None else saved.meta.get("cut", workers))
    contributor = Contributor(replica, pieces)
    first = look_at_data(replica, lambda why: session.emit(events.WarnedEvent(why=why))) if saved is None else None
    probe = contributor.prepare(0, first)
    merger = Merger(replica, pieces)
    ledger, progress = Ledger(session.recipe.rule, pieces), Progress()
    lost: list[Action] = []
    if saved is not None:
        merger.load(saved.model_state, saved.training_state)
        progress = Progress.resumed(saved, session.recipe)
        ledger, lost = resumed_ledger(pieces, saved.meta, saved.version)
        merger.microbatches, merger.version = ledger.merged_microbatches, progress.version
    else:
        look_at_objective(replica, probe)
    contributor.enter(progress.version)  # what a resume has changed is refused here, while nothing keeps it
    facts = session.facts(
        terms=list(contributor.terms), version=progress.version, step=progress.steps, cut=pieces.workers,
        weights=digest_of_state(replica.saved_state()),
        written=list(replica.written.names),
    )  # fmt: skip
    memory = session.ready(facts, server_regions(contributor, workers)).memory
    weights, vectors = server_memory(descriptor, memory)
    near, others = [line.server for line in session.assignment.lines], far and far(merger, vectors, weights)
    server = _Server(session, replica, merger, ledger, progress, weights, vectors, Lines(near, others))
    try:
        server.run(lost)
    except FirstWrite:
        raise  # in an evaluation, which has left other weights than those of this version
    except BaseException:
        doing = replica.doing
        with contextlib.suppress(Exception):  # the first error is the one to tell of
            server.stop()
        replica.doing = doing
        raise


class _Server:
    """The server between one start of the team and its end."""

    def __init__(
        self,
        session: Session,
        replica: Replica,
        merger: Merger,
        ledger: Ledger,
        progress: Progress,
        weights: list[Tensor],
        vectors: list[Vectors],
        lines: Lines,
    ):
        self._session, self._replica, self._merger, self._ledger = session, replica, merger, ledger
        self._progress, self._vectors = progress, vectors
        self._lines, workers = lines, len(vectors)
        self._incarnations = [0] * workers
        self._published = PublishedWeights(weights, merger.pack, ledger, merger.fragments, merger.way_down)
        self._arrived: dict[int, tuple[Facts, Vectors]] = {}
        self._tally = Tally(workers, session.clock)
        self._held_out = batches_held_out(replica)
        recipe, team = session.recipe, session.assignment.team
        every = recipe.evaluate_every, team.checkpoint_every, recipe.artifacts_every
        self._milestones = Milestones(recipe.steps, *every)
        self._heard: deque[messages.SupervisorToWorker] = deque()  # from the supervisor, not yet acted on
        self._waiting: set[int] = set()
        self._begun = False
        self._gone: set[int] = set()  # workers that have left, as the ledger is to hear yet
        self._told_to_stop = False  # since a worker's code has raised
        self._unmade: list[Action] = []  # what the ledger asked for last, and was not done since the run ends there
        self._began_s = 0.0  # when training would have begun, had it gone on without evaluations and checkpoints

    def run(self, lost: list[Action]) -> None:
        """Serves until every piece is merged, or until the run is asked to stop. `lost`: what a restart has cost."""
        session = self._session
        self._obey(lost)
        if self._progress.unevaluated:
            self._milestones.reached(self._progress, self._progress.steps, self._evaluate, self._keep)
        while not (self._over or self._told_to_stop or session.heartbeat.stop_wanted()):
            self._replica.doing = "waiting for workers"
            session.heartbeat.waiting(True)
            sources: list[Any] = [session.pipe, *self._lines.sources]
            deadline_s = self._ledger.deadline_s
            left_s = LOOK_S if deadline_s is None else deadline_s - session.clock()
            listened: list[Any] = wait(sources, max(0.0, min(LOOK_S, left_s)))
            session.heartbeat.waiting(False)
            if deadline_s is not None and (now_s := session.clock()) >= deadline_s:
                if waiting := self._ledger.graced(now_s):
                    session.emit(GraceEndedEvent(version=self._progress.version, waiting=waiting))
                self._obey(self._ledger.passed(now_s))
            while session.pipe.poll():  # first, for a successor's first word must not come before the news of the death
                self._heard.append(session.pipe.recv())
            while self._heard:
                self._hear_supervisor(self._heard.popleft())
            for worker, message in self._lines.hear(listened):
                self._hear(worker, message)
            if self._begun:
                self._progress.train_s = time.monotonic() - self._began_s
            session.send_events(held=True)
        if self._told_to_stop and not self._over:
            self.stop()
            session.pipe.send(messages.StoppedAt(session.saved_version))
            return
        interrupted = not self._over
        self._fetch_lost()
        for worker in range(len(self._vectors)):  # those too who come late
            self._lines.send(worker, messages.NoMore())
        self._save(looked=self._ledger.finished)
        if not interrupted:
            self._milestones.ended(self._progress, self._evaluate, lambda: session.mark_best(self._progress))
        digests = digests_of(self._replica)
        left: dict[str, Any] = {"ema": digests.averages, **({} if interrupted else session.leave())}
        session.send_events()
        costs = self._tally.result(self._ledger.delays.longest)
        session.pipe.send(messages.Ended(asdict(self._progress), digests.weights, interrupted, left, costs))

    @property
    def _over(self) -> bool:
        return self._ledger.finished or bool(self._progress.stopped)

    def stop(self) -> None:
        """Somebody's code has raised, a worker's or the server's: saves the weights if they are sound."""
        session, version = self._session, self._progress.version
        session.settle()
        if self._merger.sound and session.must_save(version):
            self._save(looked=False)
            session.send_events()
        session.stopped_at = session.saved_version

    def _hear(self, worker: int, message: messages.WorkerToServer) -> None:
        if message.incarnation != self._incarnations[worker]:
            return  # a last word of a process that has been replaced
        match message:
            case messages.Hello():
                self._session.emit(events.JoinedEvent(worker=worker, pid=message.pid, host=message.host))
                self._tally.joined(worker)
                self._waiting.add(worker)
                if self._begun or len(self._waiting) == len(self._vectors):
                    self._begin()
            case messages.Pushed():
                self._pushed(worker, message)
            case _:
                assert_never(message)

    def _begin(self) -> None:
        """Lets in who waits: at first only once all are there, or the quickest would make up a quorum alone."""
        if not self._begun:
            self._begun, self._began_s = True, time.monotonic() - self._progress.train_s
        for worker in sorted(self._waiting):
            self._obey(self._ledger.joined(worker, self._session.clock()))
        self._waiting.clear()

    def _hear_supervisor(self, message: messages.SupervisorToWorker) -> None:
        match message:
            case messages.StopRun():
                self._told_to_stop = True
            case messages.Left(worker, why):
                if worker in self._gone:
                    self._gone.discard(worker)
                else:
                    self._note_left(worker, why)
                if worker in self._ledger.active:
                    self._obey(self._ledger.left(worker, self._session.clock()))
            case _:
                raise AssertionError(f"the server has asked for nothing that {message} answers")

    def _note_left(self, worker: int, why: str) -> None:
        self._incarnations[worker] += 1
        self._session.emit(events.LeftEvent(worker=worker, why=why))
        self._tally.left(worker)
        self._waiting.discard(worker)
        self._lines.left(worker)
        self._published.left(worker)

    def _pushed(self, worker: int, pushed: messages.Pushed) -> None:
        ledger, facts, from_s, to_s = self._ledger, pushed.facts, pushed.from_s, pushed.to_s
        seq, piece, base = ledger.next_seq, *ledger.in_hand(worker)
        work, vectors = ledger.pieces.work(piece), self._vectors[worker]
        covers = work.covers()
        items = self._replica.objective.items(facts.counts)
        fragment = self._merger.fragments.of_round(ledger.pieces.round_of(piece))
        sent_bytes = vector_bytes(ledger.rule.wire, self._replica.parameters, fragment) * len(facts.nodes)
        self._session.emit(
            events.ComputedEvent(
                worker=worker, version=base, from_s=from_s, to_s=to_s, **covers, **pushed.verified,
                ahead=UNSET if pushed.ahead is None else list(pushed.ahead),
            )
        )  # fmt: skip
        self._session.emit(
            events.PushedToServerEvent(
                seq=seq, worker=worker, version=base, piece=piece, **covers, items=items, bytes=sent_bytes,
                checksum=vectors.checksum(len(facts.nodes)),
            )
        )  # fmt: skip
        for span in ((from_s, to_s), pushed.ahead or (0.0, 0.0)):
            self._tally.computed(worker, *span)
        self._tally.pushed(sent_bytes)
        self._arrived[seq] = (facts, vectors)
        self._obey(ledger.pushed(worker, items, self._session.clock()))

    def _obey(self, actions: list[Action]) -> None:
        before = self._progress.steps
        last = next((action for action in reversed(actions) if isinstance(action, Merge)), None)
        for place, action in enumerate(actions):
            self._unmade = actions[place:]
            if self._progress.stopped:
                return
            if isinstance(action, Release):
                self._release(action)
            elif isinstance(action, Merge):
                self._merge(action)
                self._unmade = actions[place + 1 :]
                if action is last:  # not before: the ledger, which checkpoints hold, has made all updates of the event
                    self._at_milestones(before, self._progress.steps)
            elif isinstance(action, Drop):
                self._arrived.pop(action.contribution.seq, None)
                self._tally.dropped()
                dropped = action.contribution
                self._session.emit(events.DroppedEvent(seq=dropped.seq, worker=dropped.worker, why=action.why))
        self._unmade = []

    def _release(self, action: Release) -> None:
        worker = action.worker
        if worker in self._gone:
            return
        for seq, (facts, vectors) in self._arrived.items():
            if vectors is self._vectors[worker]:  # it waits for its update while its worker goes on
                self._arrived[seq] = (facts, vectors.clone())
        if self._merger.way_down is not None and (lost := self._merger.way_down.lost_of(worker)) is not None:
            self._vectors[worker].lost.copy_(lost)
        lead = self._ledger.lead_of(worker)
        self._session.emit(events.ReleasedEvent(worker=worker, version=action.version, piece=action.piece, lead=lead))
        slot, pulled_bytes = self._published.give(worker, action.version)
        self._tally.released(worker, lead, pulled_bytes)
        off = tuple(self._replica.trainable.off)
        scale = self._replica.scaler.value
        order = messages.Compute(self._incarnations[worker], action.piece, slot, off, action.version, scale)
        self._lines.send(worker, order)

    def _merge(self, action: Merge) -> None:
        self._replica.doing = f"making update {action.version}"
        ledger = self._ledger
        arrived = []
        for contribution, weight, staleness in zip(action.contributions, action.weights, action.staleness, strict=True):
            facts, vectors = self._arrived.pop(contribution.seq)
            base = self._published.base(contribution.base) if ledger.rule.compensation and staleness else None
            work = ledger.pieces.work(contribution.piece)
            of = contribution.worker, work, facts, vectors, weight, staleness, base, contribution.seq
            arrived.append(Arrived(*of))
        update = self._merger.merge(arrived)
        self._session.heartbeat.advance()
        self._progress.train_s = time.monotonic() - self._began_s
        done = self._merger.microbatches // ledger.pieces.microbatches
        self._progress.merged(version=action.version, steps=done, items=update.items, objective=update.objective)
        update.verdict.note(self._progress)
        self._tally.merged(action.staleness)
        contributions = [
            events.MergedContribution(seq=c.seq, worker=c.worker, version=c.base, piece=c.piece)
            for c in action.contributions
        ]
        for why in filter(None, (update.verdict.why, *update.doubts)):
            self._session.emit(events.WarnedEvent(why=why, version=action.version))
        self._session.emit(
            events.MergedByServerEvent(
                version=action.version, step=done, contributions=contributions, weights=list(action.weights),
                staleness=list(action.staleness), train_s=round(self._progress.train_s, 6), **update.facts(),
                checksum=self._merger.checksum(),
            )
        )  # fmt: skip
        self._lines.merged(action.contributions)
        checksum_when_due(self._replica, self._progress, self._session.emit)

    def _at_milestones(self, before: int, now: int) -> None:
        recipe = self._session.recipe
        if self._session.tries_checkpoint(self._progress.version):
            self._session.try_checkpoint(
                self._progress.version, self._replica.saved_state(), self._replica.training_state()
            )
        if now == recipe.steps:
            return  # the run ends, and is saved when all workers are told
        came_s = time.monotonic()
        if self._milestones.shows(before, now):  # first: a restart makes them again
            self._session.show(self._progress.version)
        self._milestones.reached(self._progress, before, self._evaluate, self._keep)
        self._began_s += time.monotonic() - came_s

    def _keep(self, due: bool, best: bool) -> None:
        """Saves this version if it is due or, which is noted, the best so far; or, by the clock, in the background."""
        self._session.settle(wait=False)
        if best or due:
            self._save()
        elif self._session.aside.due():
            self._save(aside=True)
        if best:
            self._session.mark_best(self._progress)

    def _evaluate(self) -> bool:
        """Evaluates; whether this version is to be saved as the best."""
        self._replica.doing = f"evaluating version {self._progress.version}"
        began_s = self._session.clock()
        found = evaluate_alone(self._replica, self._held_out, self._session.heartbeat.advance)
        return self._session.evaluated(self._progress, found, began_s)

    def _sync_tape(self) -> None:
        """Whoever is killed now, no checkpoint holds updates that the tape lacks: no replay could make them."""
        self._session.send_events()
        self._session.pipe.send(messages.Sync())
        while not isinstance(message := self._session.pipe.recv(), messages.Synced):
            self._heard.append(message)

    def _fetch_lost(self) -> None:
        """Fetches what a checkpoint holds of workers on other hosts: what narrow wires there have lost."""
        way_down = self._merger.way_down
        if way_down is not None and way_down.common:
            for worker in self._lines.fetch_lost(self._pause):
                way_down.take_lost(worker, self._vectors[worker].lost)

    def _pause(self) -> None:
        """Waits a moment. Who leaves meanwhile has left before the checkpoint; the ledger hears of it later."""
        if self._session.pipe.poll(PAUSE_S):
            message: messages.SupervisorToWorker = self._session.pipe.recv()
            if isinstance(message, messages.Left):
                self._note_left(message.worker, message.why)
                self._gone.add(message.worker)
            self._heard.append(message)

    def _save(self, *, looked: bool = True, aside: bool = False) -> None:
        session, progress, began_s = self._session, self._progress, self._session.clock()
        self._replica.doing = f"saving version {progress.version}"
        self._fetch_lost()
        self._sync_tape()
        unmade = [action for action in self._unmade if isinstance(action, Merge)]
        states = self._replica.saved_state(), self._merger.training_state()
        ledger, cut = ledger_state(self._ledger, unmade), self._ledger.pieces.workers
        meta: dict[str, Any] = {"ledger": ledger, "cut": cut, "steps": session.recipe.steps}
        if aside:
            session.aside.begin(*states, session.to_save(progress, looked=False, **meta), began_s)
        else:
            session.save(progress, *states, looked=looked, **meta)
