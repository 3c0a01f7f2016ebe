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

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from instep.clock.network import gather_bytes, reduce_bytes
from instep.engines.sharding import Placement, choose
from instep.errors import NonFiniteError
from instep.reduce.buffers import APART, Buffers, about_means, changed_by_any
from instep.reduce.fold import Fold
from instep.reduce.layout import BLOCK, Layout
from instep.reduce.reduction import Reduction, total_norm
from instep.reduce.tree import worker_ranges
from instep.transport.exchange import LEFT, Exchange, regions
from instep.transport.parcels import ROOM, Parcels
from instep.transport.shared_memory import Region, as_tensors, mark, wait_for
from instep.worker.evaluation import (
    Evaluation,
    Progress,
    batches_held_out,
    evaluate,
    is_saved_after,
    packed,
    unpacked,
)
from instep.worker.first_look import look_at_data, look_at_objective
from instep.worker.replica import Replica
from instep.worker.spikes import Verdict, Watcher
from instep.worker.stopping import OtherRaised

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

    `emit(kind, **fields)` writes to the tape; `clock()` is seconds since the run's start. Raises FirstWrite while a
    forward writes parameters that were not known to be written.
    """

    def __init__(
        self,
        replica: Replica,
        worker: int,
        workers: int,
        pulse: Pulse,
        emit: Callable[..., None],
        clock: Callable[[], float],
        checkpoint_every: int = 0,
    ):
        recipe = replica.recipe
        self.replica, self.worker, self.workers = replica, worker, workers
        self._pulse, self._emit, self._clock = pulse, emit, clock
        self._checkpoint_every, self._looked = checkpoint_every, False
        self._layout = Layout.of(replica.parameters, BLOCK[replica.device.type])
        self.reduction = Reduction(self._layout, recipe.microbatches, workers)
        self.buffers = Buffers(replica.module, recipe.buffers)
        self._own = range(*self.reduction.ranges[worker])
        self.watcher = Watcher(replica, self.buffers)
        self._held_out = batches_held_out(replica)
        self.terms: list[str] = []
        self.looked = True
        """Whether the last step was one in which all weights were read, to see whether a forward writes them."""
        self.slowness = 1.0
        """How many times as long as it needs the worker is to take for its computing."""
        self.busy_s = 0.0
        """Seconds it has computed, slowness included."""
        self._batches: list[Any] = []
        self._exchange: Exchange
        self._sound = True  # whether the weights are those of a version, with no update or other change half made
        self._stopping = False
        self._late: tuple[str, Exception] | None = None  # what loading the next step raised, and where

    def prepare(self, version: int) -> None:
        """Loads the first batches and learns the objective's terms."""
        self.replica.enter(version)
        looks = version == 0 and self.worker == 0
        first = look_at_data(self.replica, lambda why: self._emit("warned", why=why)) if looks else None
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
            buffers=self.buffers,
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
        self._fold = Fold(
            self._layout, self.replica.parameters, self.reduction.nodes_of(self.worker), [self._slots[i] for i in own]
        )

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
        exchange, replica, step = self._exchange, self.replica, progress.version
        began = time.monotonic()
        replica.enter(step)
        if self._late is not None:
            self.replica.doing, error = self._late
            raise error
        some = replica.objective.has_items(totals)
        if not some:
            if not self.watcher.skips:
                self.watcher.left_out(Verdict(), [replica.objective.no_items(step)], update=True)
            self._batches = [None] * len(self._own)  # nothing is computed: the update will be left out

        from_s = self._clock()
        with replica.written.kept(f"step {step + 1}", closely=self._closely(step, steps)):
            self._compute(step, totals)
        if self.slowness > 1:
            time.sleep((self.slowness - 1) * (self._clock() - from_s))
        to_s = self._clock()
        self.busy_s += to_s - from_s
        if step + 1 < steps:
            self._load_ahead(step + 1)
        if self.worker == 0:
            exchange.stop[0] = self._pulse.stop_wanted()
        self._report(step, totals, from_s, to_s)

        self._barrier(exchange.posted, step + 2)  # posted: what the others wrote can be read
        sums, stopped = exchange.sums.copy(), bool(exchange.stop[0])
        seen = np.bitwise_or.reduce(exchange.touched, axis=0)
        touched, off = (seen & 1).tolist(), np.flatnonzero(seen & _OFF)
        next_totals = self._totals()
        changed = changed_by_any(exchange.changed)
        written = replica.written.after(replica.written.merged(as_tensors(exchange.written), step))
        own_slots = self.reduction.slots_of(self.worker)
        if changed:
            rows = as_tensors(exchange.buffers)
            self.buffers.post(
                changed, self._own.start, self.reduction.nodes_of(self.worker), [rows[i] for i in own_slots],
                torch.from_numpy(exchange.integers[self.worker]),
            )  # fmt: skip
        norms = self.placement.add_slice(self._slots)
        blocks = self._layout.slice_of(self.worker, self.workers)
        exchange.norms[blocks.start : blocks.stop] = norms.cpu().numpy()

        self._barrier(exchange.done, step + 2)  # committed: the gradient is whole
        norm = total_norm(exchange.norms)
        objective: float | None = None
        terms: dict[str, float] = {}
        wrong = self._wrong(sums, norm, touched, step) if some else replica.objective.no_items(step)
        if wrong is None:
            terms = self._terms_of(sums, totals)
            objective = replica.objective.whole(terms, step)
            verdict = self.watcher.judge(step, objective)
        else:
            verdict = self.watcher.left_out(Verdict(), [wrong], update=True)
        self._sound = False
        if verdict.updates:
            replica.written.take(written)
        rate = self.placement.update(step, norm, touched) if verdict.updates else 0.0
        if verdict.updates and (off.size or replica.trainable.off):
            replica.trainable.take(off.tolist())
        if changed and verdict.updates:
            self.buffers.finish(
                changed, self.reduction.plan, as_tensors(exchange.buffers), as_tensors(exchange.integers),
                *self._filled(step),
            )  # fmt: skip
        self.placement.settle()  # settled: the weights can be read
        self._pulse.advance()
        items = totals[self.terms[0]]
        progress.merged(version=step + 1, steps=step + 1, items=items, objective=objective)
        self._sound = True
        verdict.note(progress)
        progress.train_s += time.monotonic() - began
        if self.worker == 0:
            self._emit_merged(step, objective, terms, items, rate, norm, verdict, progress.train_s)
            if step == 0 and (apart := self._apart()):
                self._emit("warned", why=about_means(apart), version=1)
        return next_totals, stopped

    def _filled(self, step: int) -> tuple[int, tuple[int, int]]:
        """How many microbatches have samples, and where the worker that has the last of them posts its buffers."""
        filled = [m for m in range(self.replica.recipe.microbatches) if self.replica.cursor.microbatch_size(step, m)]
        worker = next(w for w, (start, stop) in enumerate(self.reduction.ranges) if start <= filled[-1] < stop)
        return len(filled), (self.reduction.slots_of(worker)[0], worker)

    def _apart(self) -> list[str]:
        """The buffers that ended differently from piece to piece in the first step, and take the mean unasked."""
        named = zip(self.buffers.names, self._exchange.ends.T.tolist(), strict=True)
        return [name for name, ends in named if APART in ends or len(set(ends) - {0}) > 1]

    def _compute(self, step: int, totals: dict[str, int]) -> None:
        self._fold.begin()
        self.buffers.begin()
        self.replica.trainable.begin()
        written = self.replica.written
        found: list[Mapping[str, Tensor]] = []
        for microbatch, batch in zip(self._own, self._batches, strict=True):
            self._fold.begin_leaf()
            found.append({} if batch is None else self.replica.compute(step, microbatch, batch, totals))
            self._fold.end_leaf()
            self.buffers.leave(filled=batch is not None)
            written.leave()
            if batch is not None:
                self.replica.trainable.leave(step)
            self._pulse.advance()
        self._batches = []
        written.post(torch.from_numpy(self._exchange.written[self.worker]))
        for microbatch, sums in zip(self._own, found, strict=True):
            for place, name in enumerate(self.terms):
                self._exchange.sums[microbatch, place] = float(sums[name]) if sums else 0.0
        self._exchange.touched[self.worker] = self._fold.touched
        if ended := self.replica.trainable.ended:
            self._exchange.touched[self.worker, list(ended)] |= _OFF
        self._exchange.changed[self.worker] = self.buffers.changed()
        if step == 0:
            for index, (_, end) in self.buffers.ends().items():
                self._exchange.ends[self.worker, index] = end if end == APART else end + 1  # 0 is no word

    def _closely(self, step: int, steps: int) -> bool:
        """Whether all weights are read, to see whether a forward writes them: first, and before checkpoints, those of
        the best too."""
        first, self._looked = not self._looked, True
        saved = self._checkpoint_every, self.replica.recipe.evaluate_every
        self.looked = first or is_saved_after(step, steps, saved)
        return self.looked

    def unwritten(self, version: int) -> Callable[[], None] | None:
        """What raises FirstWrite where others' forwards have written into the shared weights since this call.

        They go on while worker 0 saves; but not before it has all their state. None where they share no weights.
        """
        if self.worker or not self.placement.weight_bytes:
            return None
        before = self.replica.written.look(closely=True)
        return lambda: self.replica.written.check(before, f"the step after version {version}")

    def _load(self, step: int) -> None:
        """Loads the worker's batches of `step` and posts their item counts."""
        self._batches = [self.replica.batch(step, microbatch) for microbatch in self._own]
        for microbatch, batch in zip(self._own, self._batches, strict=True):
            counts = dict.fromkeys(self.terms, 0) if batch is None else self.replica.objective.counts(batch)
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
            exchange.sound[self.worker] = version + 1 if self._sound and not written else 0
            self.buffers.put_back()
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

    def _terms_of(self, sums: Any, totals: dict[str, int]) -> dict[str, float]:
        return {name: math.fsum(sums[:, place]) / totals[name] for place, name in enumerate(self.terms) if totals[name]}

    def _wrong(self, sums: Any, norm: float, touched: Any, step: int) -> NonFiniteError | None:
        """What is not finite, if anything is."""
        bad = np.argwhere(~np.isfinite(sums))
        if len(bad):
            microbatch, place = (int(index) for index in bad[0])
            return self.replica.not_finite(self.terms[place], float(sums[microbatch, place]), step, microbatch)
        return None if math.isfinite(norm) else NonFiniteError(self._about_gradient(step, touched))

    def _about_gradient(self, step: int, touched: Any) -> str:
        named = zip(self.replica.names, self.placement.gradients, touched, strict=True)
        bad = next((name for name, view, seen in named if seen and not bool(torch.isfinite(view).all())), None)
        which = f"of '{bad}' is not finite" if bad else "is too large to square"
        return f"the gradient {which} in step {step + 1}, though every term of the objective is."

    @property
    def bytes_a_step(self) -> int:
        """Bytes that pass between the team's workers in a step: a reduce-scatter of all nodes, and an all-gather.

        With one node a worker it is ``2 (W - 1)`` times the gradient, as with a ring all-reduce. The all-gather is of
        the sum or, where they are shared, of the weights.
        """
        size_bytes = 4 * self.replica.size
        reduced = reduce_bytes(self.workers, size_bytes, len(self.reduction.nodes))
        return reduced + gather_bytes(self.workers, size_bytes)

    def _report(self, step: int, totals: dict[str, int], from_s: float, to_s: float) -> None:
        own = [self._own.start, self._own.stop]
        nbytes = 4 * self.replica.size * len(self.reduction.nodes_of(self.worker))
        self._emit(
            "computed", worker=self.worker, version=step, from_s=from_s, to_s=to_s, microbatches=own,
            **self.replica.verified(),
        )  # fmt: skip
        self._emit("pushed", worker=self.worker, version=step, bytes=nbytes, items=totals[self.terms[0]])

    def _emit_merged(
        self, step: int, objective: float | None, terms: dict[str, float], items: int, rate: float | None, norm: float,
        verdict: Verdict, train_s: float,
    ) -> None:  # fmt: skip
        contributions = [
            {"worker": worker, "version": step, "microbatches": list(bounds)}
            for worker, bounds in enumerate(self.reduction.ranges)
        ]
        if verdict.why:
            self._emit("warned", why=verdict.why, version=step + 1)
        self._emit(
            "merged", version=step + 1, step=step + 1, contributions=contributions, weights=[1.0] * self.workers,
            staleness=[0] * self.workers, objective=objective, terms=terms, items=items, lr=rate, grad_norm=norm,
            train_s=round(train_s, 6), **verdict.facts(),
        )  # fmt: skip

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
