"""The lockstep engine: every worker in every update, on collectives, without a server.

A step goes in one direction: load, compute and fold, exchange and add the cuts level by level, gather what all must
know, update, settle. Gradients travel by a `Group`, whatever it is made of; between machines, where that pays, while
backward still computes others. Where a machine's workers share memory they share the weights too, each worker updating
its share of them, wherever `instep.engines.sharding` finds that this changes no bit; else weights and the whole update
are private to each worker. A step is committed by the gather. Before it no weight of the step is changed, after it all
are, and they are read again only when all have settled; a team that loses a worker in between starts again from a
checkpoint, in another group.

Why a worker may read shared weights after a step (to evaluate, to write a checkpoint) though others go on: they can
compute the next step meanwhile, but update nothing before it is committed, and for that each worker must have come.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from msgspec import UNSET
from torch import Tensor

from instep.engines.audits import Audit
from instep.engines.between_steps import BetweenSteps
from instep.engines.continued import Continued
from instep.engines.division import Division, Stopwatch, most_nodes
from instep.engines.kept import UPDATE, KeptOfStep, kept_of, marks_in
from instep.engines.merged_events import REMEMBERED, MergedEvents
from instep.engines.redo import Redo
from instep.engines.seat import Seat, take_left
from instep.engines.sharding import Placement, choose
from instep.engines.shared_evaluation import SharedEvaluation
from instep.engines.signs_of_life import SignsOfLife
from instep.engines.standing_in import ADDED, ADDING, COMPUTING, JOINED, Alone, Handed, OthersParts, StandIn, Successors
from instep.engines.step_facts import GO_ON, SAVE, STOP, what_comes
from instep.engines.total import Total, in_pieces
from instep.engines.trial import Trial
from instep.engines.undo import PiecesDone, Undo
from instep.engines.whole_update import why_each_makes_all
from instep.record import events
from instep.record.event_kinds import RangesMovedEvent, StoodInEvent
from instep.reduce.levels import levels_of, machine_of
from instep.reduce.reduction import Reduction, total_norm
from instep.transport.group import Group, Sizes, as_rows
from instep.transport.memory import limited, rows_to_spare
from instep.transport.shared_memory import SharedMemoryGroup
from instep.worker.evaluation import batches_held_out
from instep.worker.first_look import look_at_data, look_at_objective
from instep.worker.gradients import Gradients
from instep.worker.milestones import Progress
from instep.worker.replica import Replica
from instep.worker.spikes import Verdict, wrong_in_step
from instep.worker.updates import Added, Updates


class Lockstep:
    """One worker's side of the lockstep engine.

    machines: how many workers each machine has; those of one are neighbours, and share memory. `emit(event)` writes to
    the tape; `clock()` is seconds since the run's start. shard, balance: as in `Team`. Raises FirstWrite while a
    forward writes parameters that were not known to be written. successors: of workers that die and are stood in for;
    None where none can be. handed: of such a successor. again: where the team has had another group before.
    """

    def __init__(
        self,
        replica: Replica,
        worker: int,
        machines: Sequence[int],
        heartbeat: SignsOfLife,
        emit: Callable[[events.Event], None],
        clock: Callable[[], float],
        checkpoint_every: int = 0,
        shard: str = "optimizer",
        balance: str = "off",
        successors: Successors | None = None,
        handed: Handed | None = None,
        again: Continued | None = None,
    ):
        recipe = replica.recipe
        self.replica, self.worker, self.workers = replica, worker, sum(machines)
        self._heartbeat, self._emit, self._clock = heartbeat, emit, clock
        self._stopwatch = Stopwatch(heartbeat.advance)
        self.gradients = Gradients(replica, self._stopwatch.advance, checkpoint_every=checkpoint_every)
        self._layout, self._buffers = self.gradients.layout, self.gradients.buffers
        self.updates = Updates(replica, self._buffers)
        self.reduction = whole = Reduction(self._layout, recipe.microbatches, levels_of(machines))
        early = in_pieces(whole, recipe.microbatches, replica.device.type) if len(machines) > 1 else None
        self.division = Division(whole, early, machines) if handed is None else handed.division
        self._machine = machine_of(worker, machines)
        self._moves = balance == "auto" and max(machines) > 1 and replica.device.type == "cpu"
        self._shard, self._regroups = shard, len(machines) > 1 or again is not None
        batches_held_out(replica)  # or it is said now that there are none
        self.slowness: Callable[[int], float] = lambda step: 1.0
        """By step, how many times as long as it needs the worker is to take for its computing."""
        self.audit: Audit | None = None
        """What compares microbatches with another worker's, where that is asked for."""
        self._seat: Seat
        self._successors, self._handed = successors, handed
        self._others: OthersParts
        self._group: Group
        self._usual: tuple[list[int], bool] = [], False  # the buffers that the last step changed; whether it wrote
        self._whole: Tensor | None = None  # where the group puts the sum together
        self._redo: Redo | None = None
        self._again = again or Continued(range(self.workers))
        self._at = handed.progress["version"] if handed is not None else self._again.version
        remembered = REMEMBERED if successors is not None or len(machines) > 1 else 0
        self.merged = self._again.merged or MergedEvents(remembered, emit, clock, self._again.numbers)

    def prepare(self, version: int, *, looks: bool = True) -> None:
        """Loads the first batches and learns the objective's terms; looks: at what worker 0 looks in a new run."""
        self.replica.enter(version)
        self._at = version
        looks = looks and version == 0 and self.worker == 0
        first = look_at_data(self.replica, lambda why: self._emit(events.WarnedEvent(why=why))) if looks else None
        probe = self.replica.learn_terms(version, first)
        if looks:
            look_at_objective(self.replica, probe)

    def sizes(self) -> Sizes:
        """Decides where the weights are to lie, and what a worker tells the others. The sizes of the group."""
        replica, reduction, why = self.replica, self.reduction, self._again.why_whole
        self.why_not_shared = why = why_each_makes_all(replica) if why is None else why
        self._seat = self._seat_of(self.worker)
        self.placement: Placement = choose(replica, reduction, self.worker, self._machine, self._shard, why)
        self._evaluation = SharedEvaluation(replica, self.worker, self._machine, self.workers, self._heartbeat.advance)
        most = most_nodes(reduction.microbatches) if (self._moves or self._regroups) and not limited() else 0
        longest = max(self._seat.nbytes(most), self._evaluation.nbytes, self.audit.nbytes if self.audit else 0)
        rows, sums, common = tuple(reduction.rows), tuple(reduction.sums), self.placement.weight_bytes
        self._undo = Undo(self.can_stand_in * self.workers, max(self.placement.room, reduction.room_bytes))
        spare = self.placement.state_bytes + self._undo.nbytes
        return Sizes(reduction.levels, rows, sums, self._layout.size, longest, common, spare, most)

    @property
    def terms(self) -> list[str]:
        """The objective's terms, once they are learnt."""
        return list(self.replica.objective.terms or ())

    @property
    def can_stand_in(self) -> bool:
        """Whether workers can stand in for each other, as all know. An audit shows what one process computed."""
        return self._successors is not None and 1 < self.workers == len(self._machine) and self.can_regroup

    @property
    def can_regroup(self) -> bool:
        """Whether the team can go on in another group, as all know alike."""
        return self.replica.device.type == "cpu" and self.audit is None and not self.replica.written.names

    def join(self, group: Group, redo: Redo | None = None) -> None:
        """Takes the team's group into use; as a successor, where who stood in for the one before has left it. redo: how
        it does its first step, where some of that is there already.
        """
        self._group, handed, self._redo = group, self._handed, redo
        if redo is not None:
            self.division.once(redo.ranges)
        self._others = Alone(self.placement)
        if self._successors is not None and self.can_stand_in:
            assert isinstance(group, SharedMemoryGroup), "the workers of a machine share memory"
            make, stop = self._seat_of, self._heartbeat.stop_wanted
            args = self.placement, group, self._successors, make, self._tell_stood_in, stop, self._catch_up, self._undo
            self._others = StandIn(self.worker, self.division, self.gradients, *args)
            if handed is not None:
                group.take_place(*handed.place)
                self._usual, self._evaluation.version = handed.usual, handed.evaluated
                self.merged.take(handed.updates)
        self.placement.attach(group, succeeds=handed is not None)
        self._others.note(self._at, JOINED)
        if self._moves and handed is None:
            self._others.until_told(lambda worker: torch.tensor([self._room(worker)]))
            self.division.follow(group.gather(torch.tensor([self._room(self.worker)])).flatten().tolist())
        self._take_ranges()
        of_all = self.placement, group, self._others, self._evaluation, self._say
        self.between = BetweenSteps(self.replica, self.worker, *of_all)
        late, early = self.division.ways
        shared = self.placement.shared
        self.marks = marks_in(group, self.worker - self._machine.start, seen=not self._others.possible)
        self._total = Total(late, early, self.worker, group, self.gradients, self.marks, self._adds, shared=shared)
        self._early, self._trial = False, Trial()

    def _room(self, worker: int) -> int:
        more = 0 if limited() else rows_to_spare(self._layout.size, len(self._machine))
        return len(self.reduction.nodes_of(worker)) + more

    def _catch_up(self) -> None:
        if self._successors is not None:
            self.merged.catch_up(self._successors.told)

    def _say(self, event: RangesMovedEvent | events.ChecksummedEvent) -> None:
        self.merged.say(event, tell=self.worker == 0 or 0 in self._others.holds)

    def _seat_of(self, worker: int) -> Seat:
        blocks = max(max(map(each.blocks_of, range(self.workers))) for each in self.division.ways if each)
        own = self.division, self._stopwatch, self._emit, self._clock
        return Seat(worker, self.replica, self.gradients, *own, blocks=blocks, number=self._again.numbers[worker])

    def _tell_stood_in(self, worker: int, version: int, again: range | None) -> None:
        microbatches = UNSET if again is None else [again.start, again.stop]
        of, by = (self._again.numbers[each] for each in (worker, self.worker))
        self._emit(StoodInEvent(worker=of, by_worker=by, version=version, microbatches=microbatches))

    def _take_ranges(self) -> None:
        """Takes the step's ranges into use."""
        self.reduction = reduction = self.division.now
        self._seat.facts.take(reduction.ranges)
        self._group.arrange(reduction.rows, reduction.sums)
        nodes, rows = reduction.nodes_of(self.worker), self._group.rows
        if self._redo is not None:
            nodes, rows = self._redo.nodes, self._redo.vectors
        self.gradients.assign(nodes, rows[: len(nodes)])

    def _divide(self, step: int) -> None:
        """Begins a step with its ranges."""
        if self.division.begin():
            self._redo = None
            self._take_ranges()
            self._total.take(*self.division.ways)
        if self.division.moved:
            ranges = self._again.by_number(list(map(list, self.reduction.ranges)), [0, 0])
            seconds = self._again.by_number(self.division.seconds, 0.0)
            self._say(RangesMovedEvent(version=step, ranges=ranges, microbatch_s=seconds))
        self.division.count(self.replica.size)

    def run(self, progress: Progress, after_step: Callable[[Progress, bool, bool], None], steps: int) -> bool:
        """Trains from `progress.version` to `steps`; `after_step(progress, last, timed)` comes after every update.

        Returns whether the run was asked to stop before; the watch may end it before as well, see `progress.stopped`.
        Raises ObjectiveError or NonFiniteError before the update that it would have spoilt, LeftTogether as `part`.
        """
        made, totals = None, dict[str, int]()
        if self._handed is None:
            self._seat.load(progress.version, self._seat.own)
            self._others.until_loaded(progress.version)
            totals = self._seat.facts.gather(self._group).totals
            self.placement.all_joined()
        else:
            made = self._handed.totals, self._handed.word
            self._handed = None  # all of it is taken: weights and state of before need no memory any more
            if progress.version < steps:
                self._seat.load_ahead(progress.version)
        while made is not None or progress.version < steps:
            totals, word = made or self._step(progress, totals, steps)
            made, stopped = None, word == STOP
            progress.checksum_s += self._seat.checksum_s
            last = stopped or bool(progress.stopped) or progress.version == steps
            if word <= SAVE:  # who comes takes no place in a group that is left
                self._others.between(partial(self._state, progress, totals, word))
            self.between.checksums(progress)
            after_step(progress, last, word == SAVE)
            if stopped or progress.stopped:
                return progress.version < steps and not progress.stopped
            if word > SAVE and not last:
                self.between.part(word)
        return False

    def _step(self, progress: Progress, totals: dict[str, int], steps: int) -> tuple[dict[str, int], int]:
        group, replica, seat, step, early = self._group, self.replica, self._seat, progress.version, self._early
        began = time.monotonic()
        replica.enter(step)
        self._at = step
        self._others.note(step, COMPUTING)
        self._divide(step)
        self.marks.step(step)
        self._total.begin(early=early)
        self._compute(step, totals)
        self._total.computed()
        if step + 1 < steps:
            seat.load_ahead(step + 1)
        self._others.until_rows(step, totals)
        own_norms = self._total.add().cpu().numpy()
        if self.audit is not None:
            self.audit.compare(step, group)
        self._others.until_facts(step, totals, self._usual, last=step + 1 == steps)
        left = seat.post_left(*self._usual)
        left.own["norms"][: len(own_norms)] = own_norms
        stop = what_comes(self._heartbeat) if self.worker == 0 else GO_ON
        wish = self.division.ways[1] is not None and self._trial.next()
        told = seat.facts.gather(group, left, stop=stop, early=wish)  # committed: the gradient is whole
        self._early = told.early
        self.division.decide(told.seconds)
        sums, (touched, off, changed, wrote), found = told.sums, told.flags, told.beside
        assert found is not None
        self._take(self._total.wait())
        norms, reduction = found["norms"].tolist(), self._total.reduction
        self._others.until_left(step, totals, changed)
        if (changed, wrote) != self._usual:
            found, self._usual = seat.post_left(changed, wrote).gather(group), (changed, wrote)
            if len(group.levels) > 1:
                group.meet()  # of a machine all make the update, or none
        norm = total_norm([norm for w, each in enumerate(norms) for norm in each[: reduction.blocks_of(w)]])
        written = replica.written.after(replica.written.merged(as_rows(found["written"]), step) if wrote else {})
        gradients = zip(replica.names, self.placement.gradients, touched, strict=True)
        wrong = wrong_in_step(replica, step, self.terms, sums, totals, norm, gradients)
        by_term = {name: sums[place :: len(self.terms)] for place, name in enumerate(self.terms)}
        added = Added(
            by_term, totals, norm, touched, written,
            bad=wrong, left_out=bool(wrong),
            off=off if off or replica.trainable.off else None,
            ends=told.ends if step == 0 else (),
        )  # fmt: skip
        self._others.until_settled()
        left_there = partial(take_left, replica, self._buffers, self.reduction, step, changed, found)
        self.marks.begin(UPDATE)
        update = self.updates.make(step, added, self._others, left_there)
        progress.merged(version=step + 1, steps=step + 1, items=update.items, objective=update.objective)
        self._heartbeat.advance()
        update.verdict.note(progress)
        took_s = time.monotonic() - began
        self._trial.ended(early=early, took_s=took_s)
        progress.train_s += took_s
        self.merged.made(step, update, self.reduction.ranges, progress.train_s, tell=self.worker == 0)
        if 0 in self._others.holds:
            self._catch_up()
        return told.totals, told.stop

    def _adds(self, done: bool) -> PiecesDone | None:
        return self._others.note(self._at, ADDED if done else ADDING)

    def _state(self, progress: Progress, totals: dict[str, int], word: int) -> Handed:
        """What the successor of a worker needs to go on from here."""
        assert isinstance(self._group, SharedMemoryGroup), "where others can stand in"
        watch, usual = self.updates.watcher.state(), self._usual
        place, evaluated = self._group.place, self._evaluation.version
        parts = self.division, place, asdict(progress), watch, totals, word, usual, evaluated, self.merged.last()
        return Handed(*parts, **self.placement.handed())

    def _compute(self, step: int, totals: dict[str, int]) -> None:
        """Computes the worker's microbatches, and posts what they came to."""
        objective = self.replica.objective
        self._seat.check_loaded()
        if not objective.has_items(totals) and not self.updates.watcher.skips:
            self.updates.watcher.left_out(Verdict(), [objective.no_items(step)], update=True)
        around = None if self.audit is None else self.audit.begin(step, totals, self.reduction.ranges)
        self._seat.compute(step, totals, self.slowness(step), early=self._early, around=around, redo=self._redo)
        if self._redo is not None:
            self._redo.fill(self.reduction.nodes_of(self.worker), self._group.rows)

    def _take(self, whole: Tensor) -> None:
        """Has the placement take the gradient from there."""
        if whole is not self._whole:
            self._whole = whole
            self.placement.take(whole)

    def agree(self, *answer: int) -> list[int]:
        """What worker 0 answers; all meet for it."""
        return [int(n) for n in self._group.gather(torch.tensor(answer, dtype=torch.int64))[0]]

    def stop(
        self, version: int, save: Callable[[dict[str, Any]], None], *, saved: int, needed: bool, written: bool
    ) -> int:
        """After this worker's code, or another's, has raised at `version`: has the weights saved if they are sound.

        All workers come here, wherever they were: who raised had not posted the next step, so nobody is further. Worker
        0 calls `save` with the training state, where it is `needed`; the newest checkpoint is that of version `saved`.
        `written`: a forward has written weights that no copy is kept of, so they are not sound.
        Returns the version of the newest checkpoint then, 0 if there is none.
        """
        try:
            sound = version + 1 if self.updates.sound and not written else 0
            self._buffers.put_back()
            self._others.until_stopped()
            self._group.interrupt()
            states = self._group.gather(torch.tensor([sound]))  # all have stopped: what they have is known
            save_it, saved = self.agree(self.worker == 0 and needed and bool((states == version + 1).all()), saved)
            if save_it:
                training = self.placement.training_state()
                if training is not None:
                    save(training)
                saved = self.agree(version)[0]
        except BaseException:
            self._group.interrupt()
            raise
        return saved

    def uncommitted(self, step: int) -> KeptOfStep | None:
        """After PeerLost, and before `close`: what this worker has of that step, which has not been committed."""
        computed, redo = self._seat.computed, self._redo
        if computed is None or computed[0] != step:
            return None if redo is None else redo.kept
        if redo is not None:
            return redo.keeps()
        where = self._group, self._total.reduction, self.worker, self._machine
        return kept_of(*where, step, computed[1], self.marks, self._buffers.swap())

    def close(self) -> None:
        """Leaves the group: another engine may go on with the replica, and with what lies here of it."""
        self.gradients.close()
        self._group.close()

    def told_of_audits(self) -> dict[str, Any]:
        """What `result.json` says of them, if there were any."""
        return {} if self.audit is None else {"audit": self.audit.summary()}

    @property
    def busy_s(self) -> float:
        """Seconds the worker has computed, slowness included."""
        return self._again.busy_s + self._seat.busy_s
