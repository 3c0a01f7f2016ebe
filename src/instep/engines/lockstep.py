"""The lockstep engine: every worker in every update, on collectives over shared memory, without a server.

A step goes in one direction: load, compute and fold, post, add the slices, commit, update, settle. Gradients are
shared. So are the weights, each worker updating its share of them, wherever `instep.engines.sharding` finds that this
changes no bit; else weights and the whole update are private to each worker. A step is committed when every slice is
marked done, and that mark is never taken back. Before it no weight of the step is changed, after it all are, and they
are read again only when all have settled; a team that loses a worker in between starts again from a checkpoint, in
other memory.

Why a worker may read shared weights after a step (to evaluate, to write a checkpoint) though others go on: they can
compute the next step meanwhile, but update nothing before it is committed, and for that each worker must have posted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from instep.clock.network import gather_bytes, reduce_bytes
from instep.engines.sharding import Placement, choose
from instep.record import events
from instep.reduce.buffers import APART, changed_by_any
from instep.reduce.reduction import Reduction, total_norm
from instep.reduce.tree import worker_ranges
from instep.transport.exchange import LEFT, Exchange, regions
from instep.transport.parcels import ROOM, Parcels
from instep.transport.shared_memory import Region, as_tensors, mark, wait_for
from instep.worker.evaluation import (
    Evaluation,
    batches_held_out,
    evaluate,
    packed,
    unpacked,
)
from instep.worker.first_look import look_at_data, look_at_objective
from instep.worker.gradients import Computed, Gradients
from instep.worker.milestones import Progress
from instep.worker.replica import Replica
from instep.worker.spikes import Verdict
from instep.worker.stopping import OtherRaised
from instep.worker.updates import Added, Update, Updates, wrong_in_step

_OFF = 2
"""Beside 1, for a gradient, in what workers tell of a parameter: a microbatch left it requiring none."""


class Pulse(Protocol):
    """How a worker shows that it lives and gets on."""

    def advance(self) -> None:
        """A piece of work is finished."""

    def waiting(self, flag: bool) -> None:
        """Whether the worker waits for others."""

    def stop_wanted(self) -> bool:
        """Whether the run was asked to end after the present step."""


class Lockstep:
    """One worker's side of the lockstep engine.

    `emit(event)` writes to the tape; `clock()` is seconds since the run's start. Raises FirstWrite while a
    forward writes parameters that were not known to be written.
    """

    def __init__(
        self,
        replica: Replica,
        worker: int,
        workers: int,
        pulse: Pulse,
        emit: Callable[[events.Event], None],
        clock: Callable[[], float],
        checkpoint_every: int = 0,
    ):
        recipe = replica.recipe
        self.replica, self.worker, self.workers = replica, worker, workers
        self._pulse, self._emit, self._clock = pulse, emit, clock
        self.gradients = Gradients(replica, pulse.advance, checkpoint_every=checkpoint_every)
        self._layout, self._buffers = self.gradients.layout, self.gradients.buffers
        self.updates = Updates(replica, self._buffers)
        self.reduction = Reduction(self._layout, recipe.microbatches, workers)
        self._own = range(*self.reduction.ranges[worker])
        self._held_out = batches_held_out(replica)
        self.terms: list[str] = []
        self.slowness = 1.0
        """How many times as long as it needs the worker is to take for its computing."""
        self.busy_s = 0.0
        """Seconds it has computed, slowness included."""
        self._samples: dict[int, Any] = {}  # of the next step, by microbatch
        self._exchange: Exchange
        self._stopping = False
        self._late: tuple[str, Exception] | None = None  # what loading the next step raised, and where

    def prepare(self, version: int) -> None:
        """Loads the first batches and learns the objective's terms."""
        self.replica.enter(version)
        looks = version == 0 and self.worker == 0
        first = look_at_data(self.replica, lambda why: self._emit(events.WarnedEvent(why=why))) if looks else None
        probe = self.replica.learn_terms(version, first)
        self.terms = list(self.replica.objective.terms or ())
        if looks:
            look_at_objective(self.replica, probe)

    def memory(self) -> dict[str, Region]:
        """Decides where the weights are to lie. Returns what memory the team must share."""
        self.placement: Placement = choose(self.replica, self.reduction, self.worker)
        return regions(
            reduction=self.reduction,
            microbatches=self.replica.recipe.microbatches,
            terms=len(self.terms),
            parameters=len(self.replica.parameters),
            buffers=self._buffers,
            evaluations=len(self._held_out),
            weight_bytes=self.placement.weight_bytes,
            parcel_bytes=ROOM if self.replica.objective.gathers and self._held_out and self.workers > 1 else 0,
            written_bytes=self.replica.written.row_bytes,
            on_device=self.replica.device.type != "cpu",
        )

    def join(self, descriptor: int, memory: Mapping[str, Region]) -> None:
        """Maps the team's memory."""
        self._exchange = Exchange.attach(descriptor, memory)
        self._parcels = Parcels(self._exchange, self.worker, self._barrier)
        if self.replica.device.type == "cpu":
            self._slots = as_tensors(self._exchange.slots)
        else:
            size = self._layout.size
            self._slots = [torch.zeros(size, device=self.replica.device) for _ in self.reduction.nodes]
        self.placement.attach(self._exchange, self._slots, self._barrier)
        own = self.reduction.slots_of(self.worker)
        self.gradients.assign(self.reduction.nodes_of(self.worker), [self._slots[i] for i in own])

    def run(self, progress: Progress, after_step: Callable[[Progress, bool], None], steps: int) -> bool:
        """Trains from `progress.version` to `steps`; `after_step(progress, last)` comes after every update.

        Returns whether the run was asked to stop before; the watch may end it before as well, see `progress.stopped`.
        Raises ObjectiveError or NonFiniteError before the update that it would have spoilt.
        """
        self._load(progress.version)
        self._barrier(self._exchange.posted, progress.version + 1)
        totals = self._totals()
        self._barrier(self._exchange.done, progress.version + 1)  # or a fast worker would post the next step's counts
        while progress.version < steps:
            totals, stopped = self._step(progress, totals, steps)
            stopped = stopped or bool(progress.stopped)
            after_step(progress, stopped or progress.version == steps)
            if stopped or progress.stopped:
                return progress.version < steps and not progress.stopped
        return False

    def _step(self, progress: Progress, totals: dict[str, int], steps: int) -> tuple[dict[str, int], bool]:
        exchange, step = self._exchange, progress.version
        began = time.monotonic()
        self.replica.enter(step)
        self._compute(step, totals)
        if step + 1 < steps:
            self._load_ahead(step + 1)
        if self.worker == 0:
            exchange.stop[0] = self._pulse.stop_wanted()

        self._barrier(exchange.posted, step + 2)  # posted: what the others wrote can be read
        sums, stopped, next_totals = exchange.sums.copy(), bool(exchange.stop[0]), self._totals()
        seen = np.bitwise_or.reduce(exchange.touched, axis=0)
        touched, off = (seen & 1).astype(bool).tolist(), np.flatnonzero(seen & _OFF)
        written = self.replica.written.after(self.replica.written.merged(as_tensors(exchange.written), step))
        changed = changed_by_any(exchange.changed)
        self._post_buffers(changed)
        norms = self.placement.add_slice(self._slots)
        blocks = self._layout.slice_of(self.worker, self.workers)
        exchange.norms[blocks.start : blocks.stop] = norms.cpu().numpy()

        self._barrier(exchange.done, step + 2)  # committed: the gradient is whole
        norm = total_norm(exchange.norms)
        gradients = zip(self.replica.names, self.placement.gradients, touched, strict=True)
        wrong = wrong_in_step(self.replica, step, self.terms, sums, totals, norm, gradients)
        added = Added(
            dict(zip(self.terms, sums.T.tolist(), strict=True)), totals, norm, touched, written,
            bad=wrong, left_out=bool(wrong),
            off=off.tolist() if off.size or self.replica.trainable.off else None,
            ends=self._ends() if step == 0 else (),
        )  # fmt: skip
        update = self.updates.make(step, added, self.placement, partial(self._take_buffers, step, changed))
        progress.merged(version=step + 1, steps=step + 1, items=update.items, objective=update.objective)
        self._pulse.advance()
        update.verdict.note(progress)
        progress.train_s += time.monotonic() - began
        if self.worker == 0:
            self._emit_merged(step, update, progress.train_s)
        return next_totals, stopped

    def _compute(self, step: int, totals: dict[str, int]) -> None:
        """Computes the worker's microbatches, and posts what they came to."""
        objective = self.replica.objective
        if self._late is not None:
            self.replica.doing, error = self._late
            raise error
        if not objective.has_items(totals):
            if not self.updates.watcher.skips:
                self.updates.watcher.left_out(Verdict(), [objective.no_items(step)], update=True)
            self._samples = dict.fromkeys(self._own)  # nothing is computed: the update will be left out
        from_s = self._clock()
        computed = self.gradients.compute(step, self._samples, totals)
        self._samples = {}
        self._post(step, computed)
        if self.slowness > 1:
            time.sleep((self.slowness - 1) * (self._clock() - from_s))
        to_s = self._clock()
        self.busy_s += to_s - from_s
        self._report(step, totals, from_s, to_s)

    def _post(self, step: int, computed: Computed) -> None:
        """Writes into the shared arrays what the others must know of the worker's microbatches."""
        exchange, worker = self._exchange, self.worker
        self.replica.written.post(torch.from_numpy(exchange.written[worker]))
        for microbatch in self._own:
            sums = computed.sums.get(microbatch)
            exchange.sums[microbatch] = [sums[name] for name in self.terms] if sums else 0.0
        exchange.touched[worker] = computed.touched
        if computed.ended:
            exchange.touched[worker, list(computed.ended)] |= _OFF
        exchange.changed[worker] = computed.changed
        for index, (_, end) in computed.ends.items():
            exchange.ends[worker, index] = end if end == APART else end + 1  # 0 is no word

    def _post_buffers(self, changed: list[int]) -> None:
        """Writes what the worker's microbatches left in these buffers."""
        if changed:
            rows, own = as_tensors(self._exchange.buffers), self.reduction.slots_of(self.worker)
            self._buffers.post(
                changed, self._own.start, self.reduction.nodes_of(self.worker), [rows[i] for i in own],
                torch.from_numpy(self._exchange.integers[self.worker]),
            )  # fmt: skip

    def _take_buffers(self, step: int, changed: list[int]) -> None:
        """Gives these buffers what all workers' microbatches come to."""
        if changed:
            self._buffers.finish(
                changed, self.reduction.plan, as_tensors(self._exchange.buffers), as_tensors(self._exchange.integers),
                *self._filled(step),
            )  # fmt: skip

    def _filled(self, step: int) -> tuple[int, tuple[int, int]]:
        """How many microbatches have samples, and where the worker that has the last of them posts its buffers."""
        filled = [m for m in range(self.replica.recipe.microbatches) if self.replica.cursor.microbatch_size(step, m)]
        worker = next(w for w, (start, stop) in enumerate(self.reduction.ranges) if start <= filled[-1] < stop)
        return len(filled), (self.reduction.slots_of(worker)[0], worker)

    def _ends(self) -> list[dict[int, tuple[int, int]]]:
        """How each worker's microbatches left the buffers, in the first step, from what all started with."""
        return [{int(i): (0, int(ends[i])) for i in np.flatnonzero(ends)} for ends in self._exchange.ends]

    def unwritten(self, version: int) -> Callable[[], None] | None:
        """What raises FirstWrite where others' forwards have written into the shared weights since this call.

        They go on while worker 0 saves; but not before it has all their state. None where they share no weights.
        """
        if self.worker or not self.placement.weight_bytes:
            return None
        before = self.replica.written.look(closely=True)
        return lambda: self.replica.written.check(before, f"the step after version {version}")

    def _load(self, step: int) -> None:
        """Loads the worker's samples of `step` and posts their item counts."""
        self._samples = {microbatch: self.replica.batch(step, microbatch) for microbatch in self._own}
        for microbatch, samples in self._samples.items():
            counts = dict.fromkeys(self.terms, 0) if samples is None else self.replica.objective.counts(samples)
            self._exchange.counts[microbatch] = [counts[name] for name in self.terms]

    def _load_ahead(self, step: int) -> None:
        """Loads the next step's batches. What that raises waits until it is that step's turn: this one is sound."""
        self.replica.enter(step)
        try:
            self._load(step)
        except Exception as error:
            self._late = self.replica.doing, error
        self.replica.enter(step - 1)  # which is not made yet

    def _totals(self) -> dict[str, int]:
        return dict(zip(self.terms, (int(n) for n in self._exchange.counts.sum(axis=0)), strict=True))

    def _barrier(self, marks: Any, value: int) -> None:
        mark(marks, self.worker, value)
        self._wait(marks, value)

    def _wait(self, marks: Any, value: int) -> None:
        """Waits for marks. Raises OtherRaised where somebody will never set them."""
        self._pulse.waiting(True)
        came = wait_for(marks, value, self._exchange.raised, 1 + self._stopping)
        self._pulse.waiting(False)
        if not came:
            raise OtherRaised

    def stop(
        self, version: int, save: Callable[[dict[str, Any]], None], *, saved: int, needed: bool, written: bool
    ) -> int:
        """After this worker's code, or another's, has raised at `version`: has the weights saved if they are sound.

        All workers come here, wherever they were: who raised had not posted the next step, so nobody is further. Worker
        0 calls `save` with the training state, where it is `needed`; the newest checkpoint is that of version `saved`.
        `written`: a forward has written weights that no copy is kept of, so they are not sound.
        Returns the version of the newest checkpoint then, 0 if there is none.
        """
        exchange, lead = self._exchange, self.worker == 0
        try:
            exchange.sound[self.worker] = version + 1 if self.updates.sound and not written else 0
            self._buffers.put_back()
            exchange.raised[self.worker] = 1
            self._stopping = True
            self._barrier(exchange.stopped, 1)  # all have stopped: what they have is known, and nobody meets any more
            sound = exchange.sound.tolist()
            self.placement.rejoin()
            if lead:
                exchange.said[0] = needed and sound == [version + 1] * self.workers
                exchange.saved[0] = saved
            self._barrier(exchange.stopped, 2)
            if exchange.said[0]:
                training = self.placement.training_state()
                if training is not None:
                    save(training)
                    exchange.saved[0] = version
                mark(exchange.stopped, self.worker, LEFT)
                self._wait(exchange.stopped[:1], LEFT)
        except BaseException:
            exchange.raised[self.worker] = 2
            raise
        return int(exchange.saved[0])

    def leave(self, version: int) -> None:
        """The worker has done its part, and version is saved: whoever raises later need not wait for it."""
        self._exchange.sound[self.worker] = version + 1
        if self.worker == 0:
            self._exchange.said[0], self._exchange.saved[0] = False, version
        mark(self._exchange.stopped, self.worker, LEFT)

    @property
    def bytes_a_step(self) -> int:
        """Bytes that pass between the team's workers in a step: a reduce-scatter of all nodes, and an all-gather.

        With one node a worker it is ``2 (W - 1)`` times the gradient, as with a ring all-reduce. The all-gather is of
        the sum or, where they are shared, of the weights.
        """
        size = 4 * self.replica.size
        return reduce_bytes(self.workers, size, len(self.reduction.nodes)) + gather_bytes(self.workers, size)

    def _report(self, step: int, totals: dict[str, int], from_s: float, to_s: float) -> None:
        nbytes = 4 * self.replica.size * len(self.reduction.nodes_of(self.worker))
        span: dict[str, Any] = {"from_s": from_s, "to_s": to_s, "microbatches": [self._own.start, self._own.stop]}
        self._emit(events.ComputedEvent(worker=self.worker, version=step, **span, **self.replica.verified()))
        self._emit(events.PushedEvent(worker=self.worker, version=step, bytes=nbytes, items=totals[self.terms[0]]))

    def _emit_merged(self, step: int, update: Update, train_s: float) -> None:
        contributions = [
            events.MergedContribution(worker=worker, version=step, microbatches=list(bounds))
            for worker, bounds in enumerate(self.reduction.ranges)
        ]
        if why := update.verdict.why:
            self._emit(events.WarnedEvent(why=why, version=step + 1))
        self._emit(
            events.MergedEvent(
                version=step + 1, step=step + 1, contributions=contributions, weights=[1.0] * self.workers,
                staleness=[0] * self.workers, train_s=round(train_s, 6), **update.facts(),
            )
        )  # fmt: skip
        for why in update.doubts:
            self._emit(events.WarnedEvent(why=why, version=step + 1))

    def evaluate(self, version: int) -> Evaluation | None:
        """The objective on the held-out data. Only worker 0 waits for it and gets it; the others give their share.

        Where it may end the run, all wait for it, and where outputs are gathered, until worker 0 has these.
        """
        exchange, replica = self._exchange, self.replica
        if not self._held_out:
            return None
        replica.doing = f"evaluating version {version}"
        own = range(*worker_ranges(len(self._held_out), self.workers)[self.worker])
        outputs = []
        for found in evaluate(replica, self._held_out, own, self._pulse.advance):
            exchange.evaluation_counts[found.place] = found.counts
            exchange.evaluation_sums[found.place] = found.sums
            outputs.append(found.outputs)
        if replica.objective.gathers and self.workers > 1:
            parcels = self._parcels.send(packed(outputs))
            outputs = [each for parcel in parcels for each in unpacked(parcel)]
        mark(exchange.evaluated, self.worker, version + 1)
        if self.worker and replica.watch.patience is None:
            return None
        self._wait(exchange.evaluated, version + 1)
        return Evaluation.of(
            replica, exchange.evaluation_counts, exchange.evaluation_sums, [] if self.worker else outputs
        )
