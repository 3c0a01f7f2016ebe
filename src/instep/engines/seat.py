"""A worker's part of each step in lockstep: its microbatches, and what it tells the others of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from msgspec import UNSET
from numpy.typing import NDArray

from instep.engines.division import Division, Stopwatch
from instep.engines.redo import Redo
from instep.engines.step_facts import StepFacts
from instep.record import events
from instep.reduce.buffers import Buffers
from instep.reduce.reduction import Reduction
from instep.transport.group import Fields, as_rows
from instep.worker.gradients import Around, Computed, Gradients
from instep.worker.replica import Replica


class Seat:
    """That of worker number `worker`, whichever process computes it.

    terms: those of the objective, which are known. `emit(event)` writes to the tape; `clock()` is seconds since the
    run's start. stopwatch: what `gradients` tells of each microbatch. blocks: of the gradient, the most that a worker
    tells the norms of. number: the worker's on the tape, where that is another.
    """

    def __init__(
        self,
        worker: int,
        replica: Replica,
        gradients: Gradients,
        division: Division,
        stopwatch: Stopwatch,
        emit: Callable[[events.Event], None],
        clock: Callable[[], float],
        *,
        blocks: int,
        number: int | None = None,
    ):
        self._number = worker if number is None else number
        self.worker, self._division, self._stopwatch = worker, division, stopwatch
        self._replica, self._gradients = replica, gradients
        self._most_blocks = blocks
        self._buffers, self._emit, self._clock = gradients.buffers, emit, clock
        self.terms = list(replica.objective.terms or ())
        parameters, buffers = len(replica.parameters), len(self._buffers.names)
        self.facts = StepFacts(division.now.ranges, worker, self.terms, parameters, buffers)
        self._lefts: dict[tuple[bool, bool, int], Fields] = {}
        self._samples: dict[int, Any] = {}  # of the next step, by microbatch
        self._late: tuple[str, Exception] | None = None  # what loading the next step raised, and where
        self.busy_s = 0.0
        """Seconds it has computed, slowness included."""
        self.checksum_s = 0.0
        """Seconds that checksums of its nodes took in the last step."""
        self.computed: tuple[int, Computed] | None = None
        """What its microbatches came to, and in which step."""

    @property
    def own(self) -> range:
        """The worker's microbatches in the present step."""
        return range(*self._reduction.ranges[self.worker])

    @property
    def _reduction(self) -> Reduction:
        return self._division.now

    def nbytes(self, most_nodes: int) -> int:
        """Of the longest fact that it tells in a step, whose microbatches may all be its own. most_nodes: that one may
        come to have; 0 where there is memory for no more than its first.
        """
        nodes = max(most_nodes, *self._reduction.rows)
        facts = self.facts.nbytes_of(self._reduction.microbatches)
        return facts + self._left(buffers=True, written=True, nodes=nodes).nbytes

    def load(self, step: int, own: range) -> None:
        """Loads these microbatches of `step`, the worker's own, and notes their item counts."""
        if (reader := self._replica.reader).loaded is not None:
            reader.expect(step, self._replica.recipe.steps, self._division.beside(self.worker))
        self._samples, counts = {}, []
        for microbatch in own:
            self._samples[microbatch] = samples = self._replica.batch(step, microbatch)
            if samples is not None:  # counted at once: what draws here too knows the place, never the worker
                counts.append(self._replica.objective.counts_at(step, samples))
        self.facts.counts = [sum([each[name] for each in counts]) for name in self.terms]

    def load_ahead(self, step: int) -> None:
        """Loads the next step's batches. What that raises waits until it is that step's turn: this one is sound."""
        self._replica.enter(step)
        try:
            self.load(step, range(*self._division.next.ranges[self.worker]))
        except Exception as error:
            self._late = self._replica.doing, error
        self._replica.enter(step - 1)  # which is not made yet

    def check_loaded(self) -> None:
        """Raises what loading the batches of the present step has raised."""
        if self._late is not None:
            self._replica.doing, error = self._late
            raise error

    def compute(
        self,
        step: int,
        totals: Mapping[str, int],
        slowness: float = 1.0,
        *,
        early: bool = False,
        around: Around | None = None,
        redo: Redo | None = None,
    ) -> None:
        """Computes the worker's microbatches, as `Gradients` was assigned to, and notes what they came to.

        slowness: how many times as long as it needs it is to take. early: whether gradients travel early, and so may be
        on their way already when the tape would get checksums of them. around: as `Gradients.compute` says. redo: of a
        step some of which is there already.
        """
        if not self._replica.objective.has_items(totals):
            self._samples = dict.fromkeys(self.own)  # nothing is computed: the update will be left out
        runs = [(self.own.start, self.own.stop)] if redo is None else redo.lacking
        samples = {microbatch: self._samples[microbatch] for run in runs for microbatch in range(*run)}
        from_s, filled = self._clock(), [some is not None for some in samples.values()]
        self._stopwatch.begin()
        computed = self._gradients.compute(step, samples, totals, around)
        self._samples = {}
        if redo is not None:
            computed = redo.complete(computed, self._buffers)
        self.computed = step, computed
        usual = self._replica.cursor.size(step) == self._replica.recipe.batch  # else a microbatch may be a small one
        seconds = slowness * self._stopwatch.seconds(filled) if usual else 0.0
        self.facts.note(computed, wrote=self._replica.written.wrote, seconds=seconds)
        if slowness > 1:
            time.sleep((slowness - 1) * (self._clock() - from_s))
        to_s = self._clock()
        self.busy_s += to_s - from_s
        due = not early and redo is None and (step + 1) % self._replica.recipe.checksum_every == 0
        sums = self._gradients.checksum() if due else []
        self.checksum_s = self._clock() - to_s if due else 0.0
        for run in runs if self.own else ():
            span: dict[str, Any] = {"from_s": from_s, "to_s": to_s, "microbatches": list(run)}
            self._emit(events.ComputedEvent(worker=self._number, version=step, **span, **self._replica.verified()))
            from_s = to_s  # of several, the first took it
        if self.own:
            self._report(step, totals, sums)

    def _report(self, step: int, totals: Mapping[str, int], sums: list[str]) -> None:
        nbytes = 4 * self._replica.size * len(self._reduction.nodes_of(self.worker))
        items, checksum = self._replica.objective.items(totals), sums or UNSET
        self._emit(events.PushedEvent(worker=self._number, version=step, bytes=nbytes, items=items, checksum=checksum))

    def post_left(self, changed: list[int], wrote: bool) -> Fields:
        """Notes what the worker's microbatches left in these buffers, and in written parameters, if any wrote some."""
        fields = self._left(buffers=bool(changed), written=wrote, nodes=max(self._reduction.rows))
        if changed:
            nodes = self._reduction.nodes_of(self.worker)
            rows, integers = as_rows(fields.own["buffers"])[: len(nodes)], torch.from_numpy(fields.own["integers"])
            self._buffers.post(changed, self.own.start, nodes, rows, integers)
        if wrote:
            self._replica.written.post(torch.from_numpy(fields.own["written"]))
        return fields

    def _left(self, *, buffers: bool, written: bool, nodes: int) -> Fields:
        """What goes with the norms of a cut: what microbatches left in buffers and in written parameters, if at all;
        nodes: that a worker has at most.
        """
        key = buffers, written, nodes
        self._lefts[key] = self._lefts.get(key) or Fields(
            integers=("int64", (self._buffers.integer_layout.size * buffers,)),
            buffers=("float32", (nodes * buffers, self._buffers.row_size * buffers)),
            norms=("float32", (self._most_blocks,)),
            written=("uint8", (self._replica.written.row_bytes * written,)),
        )  # fmt: skip
        return self._lefts[key]


def take_left(
    replica: Replica, buffers: Buffers, reduction: Reduction, step: int, changed: list[int], found: NDArray[Any]
) -> None:
    """Gives these buffers what all workers' microbatches of a step come to, as all have told it (`Seat.post_left`)."""
    if not changed:
        return
    rows = [row for w, count in enumerate(reduction.rows) for row in as_rows(found["buffers"][w])[:count]]
    filled = [m for m in range(replica.recipe.microbatches) if replica.cursor.microbatch_size(step, m)]
    worker = next(w for w, (start, stop) in enumerate(reduction.ranges) if start <= filled[-1] < stop)
    last = reduction.slots_of(worker)[0], worker  # where the worker that has the last of them posts its buffers
    buffers.finish(changed, reduction.plan, rows, as_rows(found["integers"]), len(filled), last)
