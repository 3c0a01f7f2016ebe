"""The evaluation of a team in lockstep: each worker evaluates its share of the held-out data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from instep.engines.standing_in import OthersParts
from instep.objectives.gathers import Outputs
from instep.reduce.tree import worker_ranges
from instep.transport.group import Fields, Group
from instep.worker.evaluation import Evaluation, batches_held_out, evaluate, evaluate_alone
from instep.worker.parcels import packed, unpacked
from instep.worker.replica import Replica


class SharedEvaluation:
    """One worker's side. machine: the workers of its machine. `advance` is called after each batch."""

    def __init__(self, replica: Replica, worker: int, machine: range, workers: int, advance: Callable[[], None]):
        self._replica, self._worker, self._advance = replica, worker, advance
        self._tells = worker == machine.start  # or it is asked only where evaluations may end the run
        self._held_out = batches_held_out(replica)
        self._decays = None, *replica.recipe.ema  # the weights themselves, and each average of them
        self._shares = worker_ranges(len(self._held_out), workers)
        self.nbytes = self._made().nbytes
        """Of what each tells the others."""
        self.version = -1
        """Which was evaluated last."""

    def of(self, version: int, group: Group, others: OthersParts) -> Evaluation | None:
        """The objective on the held-out data, each with its share: for the first worker of each machine, or all where
        it may end the run, or one may have to speak for worker 0. What is gathered has worker 0 alone.
        """
        replica = self._replica
        if not self._held_out or version == self.version:  # worker 0, which notes it, does not ask again
            return None
        self.version = version
        replica.doing = f"evaluating version {version}"
        shares = {self._worker: self._evaluate(self._worker)}

        def share(worker: int) -> tuple[Fields, list[Outputs]]:
            shares[worker] = shares.get(worker) or self._evaluate(worker)
            return shares[worker]

        own, outputs = shares[self._worker]
        if replica.objective.gathers and group.size > 1:
            others.until_told(lambda worker: packed(share(worker)[1]))
            blobs = group.share(packed(outputs), to=0)
            outputs = [each for blob in blobs for each in unpacked(blob)]
        others.until_told(lambda worker: share(worker)[0].raw)
        gathered = own.gather(group)
        if not (self._tells or others.possible) and replica.watch.patience is None:
            return None
        counts = self._whole(gathered["counts"])
        sums, *averages = (self._whole(gathered["sums"][:, place]) for place in range(len(self._decays)))
        return Evaluation.of(replica, counts, sums, [] if self._worker else outputs, averages)

    def _whole(self, gathered: NDArray[Any]) -> NDArray[Any]:
        """Of all batches, from what each worker has told of its share."""
        return np.concatenate([gathered[w, : stop - start] for w, (start, stop) in enumerate(self._shares)])

    def alone(self) -> Evaluation | None:
        """The same by this worker alone, with what is gathered."""
        return evaluate_alone(self._replica, self._held_out, self._advance)

    def _evaluate(self, worker: int) -> tuple[Fields, list[Outputs]]:
        """A worker's share: what it tells, and its outputs."""
        fields, outputs, own = self._made(), list[Outputs](), self._shares[worker]
        for place, decay in enumerate(self._decays):
            for found in evaluate(self._replica, self._held_out, range(*own), self._advance, decay):
                fields.own["counts"][found.place - own[0]] = found.counts
                fields.own["sums"][place, found.place - own[0]] = found.sums
                outputs += [found.outputs] if decay is None else []
        return fields, outputs

    def _made(self) -> Fields:
        share, terms = max(1, -(-len(self._held_out) // len(self._shares))), len(self._replica.objective.terms or ())
        return Fields(counts=("int64", (share, terms)), sums=("float64", (len(self._decays), share, terms)))
