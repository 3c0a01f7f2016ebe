"""How many items each term of the objective has in what is computed, counted before it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from instep.rules.work import Pieces
from instep.worker.replica import Replica

_COUNTED = 100_000
"""Microbatches whose items are remembered, for virtual teams, where many ask for the same."""

_KEPT_BYTES = 1 << 28
"""Of samples that were loaded to be counted, and are kept until they are computed, where one process does both."""


class ItemCounts:
    """Counts the items of microbatches, and loads their samples.

    `alone`: one process computes the pieces of all workers, so what it loads to count the items of others it will need
    itself, and others ask for what was counted; else nothing is remembered but the present batch.
    """

    def __init__(self, replica: Replica, pieces: Pieces, *, alone: bool):
        self._replica, self._pieces, self._alone = replica, pieces, alone
        self._most = _COUNTED if alone else pieces.microbatches
        self.forget()

    def forget(self) -> None:
        """What was counted and kept holds no longer: other samples are left out."""
        self._counted: dict[tuple[int, int], Mapping[str, int]] = {}  # by batch and microbatch, the latest ones
        self._whole: tuple[int, dict[str, int]] = (-1, {})  # the last batch that was counted whole, and its items
        self._kept: dict[tuple[int, int], Any] = {}  # samples by batch and microbatch, until they are computed
        self._room = 1  # how many of them may be kept

    def load(self, batch: int, microbatch: int) -> Any | None:
        """The samples of a microbatch, perhaps kept since they were counted. Whoever computes them may change them."""
        key = batch, microbatch
        return self._kept.pop(key) if key in self._kept else self._replica.batch(batch, microbatch)

    def of(self, batch: int, microbatches: range, loaded: Mapping[int, Any]) -> dict[str, int]:
        """Items by term in microbatches of one batch; `loaded`: samples that are there already."""
        totals = dict.fromkeys(self._replica.objective.terms or (), 0)
        for microbatch in microbatches:
            key = batch, microbatch
            if key not in self._counted:
                self._counted[key] = self._count(batch, microbatch, loaded)
                if len(self._counted) > self._most:
                    del self._counted[next(iter(self._counted))]
            for name, count in self._counted[key].items():
                totals[name] += count
        return totals

    def of_whole(self, batch: int, loaded: Mapping[int, Any]) -> dict[str, int]:
        """Items by term in a whole batch; for all workers of a virtual team, they are counted once."""
        if self._whole[0] != batch:
            self._whole = batch, self.of(batch, range(self._pieces.microbatches), loaded)
        return self._whole[1]

    def _count(self, batch: int, microbatch: int, loaded: Mapping[int, Any]) -> Mapping[str, int]:
        """Items of each term in a microbatch; none at all where it has no samples."""
        objective = self._replica.objective
        if self._replica.rows is not None:  # they need not be looked at
            size = self._replica.cursor.microbatch_size(batch, microbatch)
            return dict.fromkeys(objective.terms or (), size) if size else {}
        samples = loaded[microbatch] if microbatch in loaded else self._load_to_count(batch, microbatch)
        return {} if samples is None else objective.counts_at(batch, samples)

    def _load_to_count(self, batch: int, microbatch: int) -> Any | None:
        samples = self._replica.batch(batch, microbatch)
        if self._alone and len(self._kept) < self._room:
            if not self._kept:
                nbytes = sum(leaf.nbytes for leaf in tree_leaves(samples) if isinstance(leaf, Tensor))
                self._room = max(1, _KEPT_BYTES // max(1, nbytes))
            self._kept[batch, microbatch] = samples
        return samples
