"""Whose fault it is: which worker's contribution to an update, or share of it, is not what it should be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from instep.apart.sides import Away, Side
from instep.components import importable
from instep.equivalences.forks import Body, Say, alone
from instep.ranges import owners
from instep.record import checkpoint
from instep.reduce.tree import maximal_nodes
from instep.worker.gradients import Gradients
from instep.worker.replica import Replica
from instep.worker.standalone import replica_before


def with_worker(side: Side, away: Away, before: Path) -> Away:
    """`away` with the worker, where the tape has checksums of what each contributed to that update.

    before: the checkpoint of the version before it.
    """
    told, ranges = side.pushed.get(away.version, {}), side.ranges.get(away.version, {})
    if side.start_of(away.version)["team"].get("workers", 1) == 1:
        return replace(away, worker=0)
    if not told or away.worker is not None:
        return away
    with importable(side.import_paths):
        found: tuple[dict[int, list[str]], dict[str, int]] = alone(_Contributions(side, away.version, before, ranges))
    own, shares = found
    wrong = [worker for worker in sorted(told) if worker in own and list(told[worker]) != own[worker]]
    known = away.since == away.version - 1  # else the weights before may be others too, and so all contributions
    if wrong:
        return replace(away, worker=wrong[0]) if known or len(wrong) < len(told) else away
    whose = {shares[name] for tensor in away.tensors for name in shares if f"{tensor}.".startswith(f"{name}.")}
    if side.shared and len(whose) == 1 and own.keys() == told.keys():
        return replace(away, worker=whose.pop(), owner=True)
    return away


class _Contributions(Body):
    """Gives, by worker, the checksums of what it should have contributed, and by parameter whose share it is."""

    def __init__(self, side: Side, version: int, before: Path, ranges: Mapping[int, tuple[int, int]]):
        self._side, self._version, self._before, self._ranges = side, version, before, ranges

    def run(self, rank: int, ask: Say) -> tuple[dict[int, list[str]], dict[str, int]]:
        side, step = self._side, self._version - 1
        saved = checkpoint.load(self._before)
        session = side.start_of(self._version)

        def load(replica: Replica) -> None:
            self.replica = replica
            replica.load(saved.model_state, saved.training_state)

        replica = replica_before(step, side.recipe_at(self._version), "cpu", session.get("written", ()), load)
        gradients, microbatches = Gradients(replica), replica.recipe.microbatches
        batches = {m: replica.batch(step, m) for m in range(microbatches)}
        counts = [replica.objective.counts_at(step, batch) for batch in batches.values() if batch is not None]
        totals = {name: sum(each[name] for each in counts) for name in counts[0]}
        found: dict[int, list[str]] = {}
        for worker, (start, stop) in self._ranges.items():
            nodes = maximal_nodes(start, stop, microbatches)
            gradients.assign_own(nodes)
            gradients.compute(step, {m: batches[m] for m in range(start, stop)}, totals)
            found[worker] = gradients.checksum()
        whose = owners([parameter.numel() for parameter in replica.parameters], session["team"].get("workers", 1))
        return found, dict(zip(replica.names, whose, strict=True))
