"""The evaluation of a team in lockstep: each worker evaluates its share of the held-out data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from instep.reduce.tree import worker_ranges
from instep.transport.group import Fields, Group
from instep.worker.evaluation import Evaluation, batches_held_out, evaluate, packed, unpacked
from instep.worker.replica import Replica


class SharedEvaluation:
    """One worker's side. machine: the workers of its machine. `advance` is called after each batch."""

    def __init__(self, replica: Replica, worker: int, machine: range, workers: int, advance: Callable[[], None]):
        self._replica, self._worker, self._advance = replica, worker, advance
        self._tells = worker == machine.start  # or it is asked only where evaluations may end the run
        self._held_out = batches_held_out(replica)
        self._shares = worker_ranges(len(self._held_out), workers)
        share, terms = max(1, -(-len(self._held_out) // workers)), len(replica.objective.terms or ())
        self._fields = Fields(counts=("int64", (share, terms)), sums=("float64", (share, terms)))
        self.nbytes = self._fields.nbytes
        """Of what each tells the others."""
        self.version = -1
        """Which was evaluated last."""

    def of(self, version: int, group: Group) -> Evaluation | None:
        """The objective on the held-out data, each with its share: for the first worker of each machine, or all where
        it may end the run."""
        replica = self._replica
        if not self._held_out or version == self.version:  # worker 0, which notes it, does not ask again
            return None
        self.version = version
        replica.doing = f"evaluating version {version}"
        own, outputs = self._shares[self._worker], []
        for found in evaluate(replica, self._held_out, range(*own), self._advance):
            self._fields.own["counts"][found.place - own[0]] = found.counts
            self._fields.own["sums"][found.place - own[0]] = found.sums
            outputs.append(found.outputs)
        if replica.objective.gathers and group.size > 1:
            blobs = group.share(packed(outputs), to=0)
            outputs = [each for blob in blobs for each in unpacked(blob)]
        gathered = self._fields.gather(group)
        if not self._tells and replica.watch.patience is None:
            return None
        counts, sums = (
            np.concatenate([gathered[name][w, : stop - start] for w, (start, stop) in enumerate(self._shares)])
            for name in ("counts", "sums")
        )
        return Evaluation.of(replica, counts, sums, [] if self._worker else outputs)
