"""A run computed again in one process, from its recipe and the events of its tape: the tape is the clock.

Every contribution is computed from the same weights and merged in the same order as it was, by the same code as in
the run, so the digest is the same too (contract C4). The virtual engine feeds the same machine with events of a
schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from instep.engines.contributor import Contributor, Facts, Vectors
from instep.engines.merger import Arrived, Merger, Update
from instep.engines.replica import Replica
from instep.recipe import Recipe
from instep.reduce.checksums import checksum
from instep.rules.work import Pieces, Work


class Replayer:
    """The weights of a run, event by event.

    The methods are the kinds of events on the tape, and take what these hold. Under rules without local steps one
    replica computes for all workers; otherwise each worker has its own, for its optimizer's state.
    """

    def __init__(self, recipe: Recipe, workers: int, build: Callable[[], Replica]):
        self.recipe, self._build = recipe, build
        self.pieces = Pieces(recipe.rule, workers, recipe.microbatches, recipe.steps)
        self.merger = Merger(build(), self.pieces)
        self._contributors: dict[int, Contributor] = {}
        self.terms = self._contributor(0).terms
        self.merger.replica.objective = self._contributor(0).replica.objective  # which knows its terms
        self._weights: dict[int, Tensor] = {}
        self._work: dict[int, tuple[int, int]] = {}
        self._arrived: dict[int, tuple[int, int, int, Facts, Vectors]] = {}

    def joined(self, worker: int) -> None:
        """The worker starts, with an optimizer of its own that has no state yet."""
        if not self.recipe.rule.gradients:
            self._contributors.pop(worker, None)  # the next contribution builds another

    def left(self, worker: int) -> None:
        """What the worker was computing is lost."""
        self._work.pop(worker, None)
        self._forget()

    def released(self, worker: int, piece: int, version: int) -> None:
        """The worker starts on a piece from the present weights, which `version` counts."""
        self._work[worker] = (piece, version)
        if version not in self._weights:
            self._weights[version] = self.merger.pack.empty()
            self.merger.pack.save(self._weights[version])

    def pushed(self, seq: int, worker: int) -> list[str]:
        """The worker has finished. Returns the checksums of what it sends."""
        piece, version = self._work.pop(worker)
        contributor = self._contributor(worker)
        vectors = contributor.empty()
        facts = contributor.compute(self.pieces.work(piece), self._weights[version], vectors)
        self._arrived[seq] = (worker, piece, version, facts, vectors)
        self._forget()
        return checksum(vectors.gradient[: len(facts.nodes)])

    @property
    def waiting(self) -> dict[int, int]:
        """The contributions that wait for their update: items of the objective's first term by seq."""
        return {seq: facts.counts[self.terms[0]] for seq, (*_, facts, _) in self._arrived.items()}

    def probe(self, work: Work) -> None:
        """Computes a piece from the present weights, for its time alone."""
        contributor = self._contributor(0)
        saved = self.merger.pack.empty()
        self.merger.pack.save(saved)
        contributor.compute(work, saved, contributor.empty())
        self._contributors = {} if not self.recipe.rule.gradients else self._contributors

    def everybody_left(self) -> None:
        """The run starts again: what was computed and not merged is lost."""
        self._work, self._arrived, self._weights = {}, {}, {}
        if not self.recipe.rule.gradients:
            self._contributors = {}

    def alone(self, step: int) -> None:
        """One step of a synchronous rule, computed whole by one worker."""
        assert self.pieces.workers == 1, "it has all pieces"
        self.released(0, step, step)
        self.pushed(step, 0)
        self.merged(step + 1, {step: (1.0, 0)})

    def dropped(self, seq: int) -> None:
        """A contribution is forgotten."""
        del self._arrived[seq]
        self._forget()

    def merged(self, version: int, contributions: Mapping[int, tuple[float, int]]) -> Update:
        """Update number `version`, from contributions by seq, in this order, each with weight and staleness."""
        arrived = []
        for seq, (weight, staleness) in contributions.items():
            worker, piece, base, facts, vectors = self._arrived.pop(seq)
            work = self.pieces.work(piece)
            arrived.append(Arrived(worker, work, facts, vectors, weight, staleness, self._weights[base]))
        update = self.merger.merge(arrived, self.terms)
        self._forget()
        return update

    def items(self, piece: int) -> int:
        """Items of the objective's first term in a piece, for a ledger that runs before the gradients are computed."""
        return self._contributor(0).counts(self.pieces.work(piece))[self.terms[0]]

    def _contributor(self, worker: int) -> Contributor:
        key = 0 if self.recipe.rule.gradients else worker
        if key not in self._contributors:
            contributor = Contributor(self._build(), self.pieces)
            contributor.prepare(0)
            self._contributors[key] = contributor
        return self._contributors[key]

    def _forget(self) -> None:
        """Lets go of weights that nobody computes from any more."""
        used = {version for _, version in self._work.values()} | {each[2] for each in self._arrived.values()}
        for version in [v for v in self._weights if v not in used]:
            del self._weights[version]


def state_of(replayer: Replayer) -> dict[str, Any]:
    """The module's state_dict as it is now."""
    return dict(replayer.merger.replica.module.state_dict())
