"""A run computed again in one process, from its recipe and the events of its tape: the tape is the clock.

Every contribution is computed from the same weights and merged in the same order as it was, by the same code as in
the run, so the digest is the same too (contract C4). The virtual engine feeds the same machine with events of a
schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from torch import Tensor

from instep.errors import RecipeError
from instep.recipe import Recipe
from instep.rules.work import Pieces, Work
from instep.worker.batched import Together
from instep.worker.contribution import Arrived, Facts, Vectors
from instep.worker.contributor import Contributor
from instep.worker.first_look import look_at_data, look_at_objective
from instep.worker.replica import Replica
from instep.worker.updates import Merger, Update


class Replayer:
    """The weights of a run, event by event.

    The methods are the kinds of events on the tape, and take what these hold. Under rules without local steps one
    replica computes for all workers; otherwise each worker has its own, for its optimizer's state.

    With `batched`, the first contribution that is needed is computed together with all that other workers have in
    hand, see `Together`; this follows from the events alone, so it too gives the same bits again.

    `written`: the parameters that forwards are known to write. Raises FirstWrite, as its methods may, where they write
    others. `checkpoint_every`: see `Contributor`. `merged_on`: the device that updates are made on, if it is another.
    """

    def __init__(
        self,
        recipe: Recipe,
        workers: int,
        device: str,
        *,
        batched: bool = False,
        written: Collection[str] = (),
        checkpoint_every: int = 0,
        merged_on: str = "",
    ):
        self.recipe, self._device, self._home = recipe, device, merged_on or device
        self.pieces = Pieces(recipe.rule, workers, recipe.microbatches, recipe.steps)
        self._replica = Replica(recipe, merged_on or device, written=written)
        self._checkpoint_every = checkpoint_every
        self._contributors: dict[int, Contributor] = {}
        first = self._contributor(0)
        self.terms = first.terms
        self._replica.objective = first.replica.objective  # which knows its terms
        self._replica.written.learn(first.written.names)
        self.merger = Merger(self._replica, self.pieces)
        self._together: Together | None = None
        if batched:
            if not recipe.rule.gradients:
                raise RecipeError(
                    f"workers compute one at a time under rule '{recipe.rule.name}', whose local steps each have an "
                    f"optimizer; leave out --batched."
                )
            self._together = Together(self._contributor(0))
        self._made: dict[int, tuple[Facts, Vectors]] = {}  # by worker: computed before it is pushed
        self._weights: dict[int, Tensor] = {}
        self._uses: dict[int, int] = {}  # of weights, by contributions in hand
        self._work: dict[int, tuple[int, int]] = {}
        self._off: dict[int, tuple[Collection[int], float]] = {}  # by version: what requires no gradient; loss scale
        self._arrived: dict[int, tuple[int, int, int, Facts, Vectors]] = {}
        self._spare: list[Vectors] = []  # of contributions that are merged, for others: fresh memory takes time

    def left(self, worker: int) -> None:
        """What the worker was computing is lost, its optimizer's state, and what it has of the weights."""
        if self.merger.way_down is not None:
            self.merger.way_down.left(worker)
        if not self.recipe.rule.gradients:
            self._contributors.pop(worker, None)  # the next worker of this number builds another
        self._made.pop(worker, None)
        if worker in self._work:
            self._forget(self._work.pop(worker)[1])

    def released(self, worker: int, piece: int, version: int) -> None:
        """The worker starts on a piece from the present weights, which `version` counts."""
        self._work[worker] = (piece, version)
        self._uses[version] = self._uses.get(version, 0) + 1
        way_down = self.merger.way_down
        if way_down is not None:
            if (lost := way_down.lost_of(worker)) is not None and (way_up := self._contributor(worker).way_up):
                way_up.take(lost)
            way_down.give(worker, version)
        if version not in self._off:
            self._off[version] = self.merger.replica.trainable.off, self.merger.replica.scaler.value
            if way_down is None:
                self._weights[version] = self.merger.pack.empty()
                self.merger.pack.save(self._weights[version])

    def pushed(self, seq: int, worker: int) -> None:
        """The worker has finished."""
        facts, vectors = self._compute(worker)
        piece, version = self._work.pop(worker)
        self._arrived[seq] = (worker, piece, version, facts, vectors)

    def checksum(self, seq: int) -> list[str]:
        """Of a contribution that was pushed and waits for its update."""
        *_, facts, vectors = self._arrived[seq]
        return vectors.checksum(len(facts.nodes))

    def _compute(self, worker: int) -> tuple[Facts, Vectors]:
        """What the worker has in hand, computed."""
        if self._together is None:
            piece, version = self._work[worker]
            contributor = self._contributor(worker)
            contributor.enter(version)
            vectors = self._spare.pop() if self._spare else contributor.empty()
            way_down, off = self.merger.way_down, self._off[version]
            weights = self._weights[version] if way_down is None else way_down.weights(worker)
            return contributor.compute(self.pieces.work(piece), weights, vectors, *off), vectors
        if worker not in self._made:
            others = [other for other in self._work if other not in self._made]
            tasks = [(self.pieces.work(piece), self._weights[v]) for piece, v in map(self._work.__getitem__, others)]
            self._made.update(zip(others, self._together.compute(tasks), strict=True))
        return self._made.pop(worker)

    def given(self, worker: int) -> tuple[int, int]:
        """The piece that the worker has in hand, and the version that it computes from."""
        return self._work[worker]

    def pushed_as(self, seq: int) -> dict[str, int]:
        """What a contribution is, which was pushed and waits for its update."""
        worker, piece, version, facts, _ = self._arrived[seq]
        return {
            "worker": worker,
            "piece": piece,
            "version": version,
            "items": self._replica.objective.items(facts.counts),
        }

    @property
    def computing(self) -> set[int]:
        """The workers that have work in hand."""
        return set(self._work)

    @property
    def waiting(self) -> dict[int, int]:
        """The contributions that wait for their update: items of the objective's first term by seq."""
        return {seq: self._replica.objective.items(facts.counts) for seq, (*_, facts, _) in self._arrived.items()}

    def probe(self, work: Work) -> None:
        """Computes a piece from the present weights, for its time alone."""
        contributor = self._contributor(0)
        saved = self.merger.pack.empty()
        self.merger.pack.save(saved)
        contributor.compute(work, saved, contributor.empty())
        self._contributors = {} if not self.recipe.rule.gradients else self._contributors

    def look(self, warn: Callable[[str], None]) -> None:
        """Raises DataError or ObjectiveError where a run would be refused before its first step, see `first_look`."""
        replica = self._contributor(0).replica  # its weights are set anew for each piece
        batch = look_at_data(replica, warn)
        look_at_objective(replica, replica.batch(0, 0) if batch is None else batch)

    def everybody_left(self) -> None:
        """The run starts again: what was computed and not merged is lost."""
        self._work, self._arrived, self._weights, self._uses, self._made, self._off = {}, {}, {}, {}, {}, {}
        if not self.recipe.rule.gradients:
            self._contributors = {}
        if self.merger.way_down is not None:
            self.merger.way_down.everybody_left()

    def alone(self, step: int) -> Update:
        """One step of a synchronous rule, computed whole by one worker."""
        assert self.pieces.workers == 1, "it has all pieces"
        self.released(0, step, step)
        self.pushed(step, 0)
        return self.merged(step + 1, {step: (1.0, 0)})

    def dropped(self, seq: int) -> None:
        """A contribution is forgotten."""
        *_, version, _, vectors = self._arrived.pop(seq)
        self._forget(version)
        self._reuse(vectors)

    def merged(self, version: int, contributions: Mapping[int, tuple[float, int]]) -> Update:
        """Update number `version`, from contributions by seq, in this order, each with weight and staleness."""
        arrived, bases = [], list[int]()
        for seq, (weight, staleness) in contributions.items():
            worker, piece, base, facts, vectors = self._arrived.pop(seq)
            work = self.pieces.work(piece)
            arrived.append(Arrived(worker, work, facts, vectors, weight, staleness, self._weights.get(base), seq))
            bases.append(base)
        update = self.merger.merge(arrived)
        for base, each in zip(bases, arrived, strict=True):
            self._forget(base)
            self._reuse(each.vectors)
        return update

    def items(self, piece: int) -> int:
        """Items of the objective's first term in a piece, for a ledger that runs before the gradients are computed."""
        work = self.pieces.work(piece)
        return self._replica.objective.items(self._contributor(0).counts(work))

    def _contributor(self, worker: int) -> Contributor:
        key = 0 if self.recipe.rule.gradients else worker
        if key not in self._contributors:
            known = self._replica.written.names
            replica = Replica(self.recipe, self._device, like=self._replica, written=known)
            alone, every = self.recipe.rule.gradients, self._checkpoint_every
            contributor = Contributor(
                replica, self.pieces, alone=alone, checkpoint_every=every, merged_on=self._home, worker=key
            )  # fmt: skip
            contributor.prepare(0)
            if self._contributors:
                contributor.written.agree(known, "a first forward")
            self._contributors[key] = contributor
        return self._contributors[key]

    def _forget(self, version: int) -> None:
        """One contribution less needs these weights."""
        self._uses[version] -= 1
        if not self._uses[version]:
            del self._uses[version], self._off[version]
            self._weights.pop(version, None)

    def _reuse(self, vectors: Vectors) -> None:
        if self._together is None:  # it makes its own, parts of one large tensor
            self._spare.append(vectors)
