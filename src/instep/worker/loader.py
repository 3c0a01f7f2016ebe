"""A loader: reads microbatches ahead, as a worker would, for all workers of its machine."""

from __future__ import annotations

import bisect
import dataclasses
import os
import pickle
import sys
import traceback

from instep import data
from instep.data.cursor import rows_of
from instep.data.mixture import cursor_over
from instep.randomness import key, key_of_step, seed_all
from instep.recipe import Recipe, Team
from instep.restore import random_state
from instep.transport import batch_files
from instep.transport.units import ROWS, State, Unit, Units
from instep.turns import each_of
from instep.worker.device import prepare_device
from instep.worker.loaded import Beside
from instep.worker.sample_reader import SampleReader

AHEAD = 2
"""Batches that are read ahead at least, where there is memory for so many."""

EACH = 3
"""Microbatches that each loader reads ahead at least."""

MOST_FILES = 200
"""Files that a loader keeps open at most: systems allow 1,024 or so."""


class Loader:
    """Loader number `number` of those of `units`. code: the exit status of the one before it, if that has died.

    Raises what building the data set raises; workers will raise it too.
    """

    def __init__(self, recipe: Recipe, team: Team, units: Units, number: int, code: int | None = None):
        self._recipe, self._units, self._number = recipe, units, number
        self._bytes = team.loader_bytes
        units.microbatches = recipe.microbatches
        if code is not None:
            units.recall(number, code)
        prepare_device("cpu", recipe.threads, deterministic=team.deterministic)
        seed_all(key(recipe.seed, "data"))
        self._data = data.from_component(recipe.data)
        self._reader = SampleReader(self._data.collate, team.restarts)
        cursor = cursor_over(
            self._data.train, batch=recipe.batch, microbatches=recipe.microbatches, seed=recipe.seed,
            ragged=recipe.ragged, drop_last=recipe.drop_last, order=recipe.order,
        )  # fmt: skip
        self._starts = [change.version for change in recipe.changes]
        starts = [0, *self._starts]
        self._cursors = [dataclasses.replace(cursor, skipped=recipe.phase(version).skipped) for version in starts]
        for component in (recipe.model, *each_of(recipe.objective)):  # what their modules change as they are imported
            component.load()
        self._own: list[Unit] = []  # what it has loaded, in this order
        batches = -(-units.loaders * EACH // recipe.microbatches)
        self._ahead = min(AHEAD + batches, max(1, ROWS // recipe.microbatches - 2))

    @property
    def has_work(self) -> bool:
        """Whether samples are worth it: rows of tensors are there already."""
        return rows_of(self._data.train, self._data.collate) is None

    def load(self) -> None:
        """Reads what is wanted, and what will be, as long as anything is loaded ahead."""
        while not self._units.closed:
            signs = self._units.signs()
            if not self._next():
                self._units.sleep(signs, loader=True)

    def _next(self) -> bool:
        """Reads one microbatch, if one is to be read and there is memory for it."""
        gone, untaken = self._units.unneeded(self._own, self._bytes if len(self._own) < MOST_FILES else 0)
        self._forget(gone)
        full = untaken >= self._bytes or len(self._own) >= MOST_FILES
        unit = self._units.claim(self._number, self._ahead, full=full)
        if unit is None:
            return False
        batch, microbatch = self._units.place_of(unit.key)
        entered = unit.entered if unit.entered >= 0 else bisect.bisect_right(self._starts, batch)
        try:
            found = self._read(unit._replace(entered=entered), batch, microbatch)
        except Exception:
            print(f"step {batch + 1}, microbatch {microbatch} is left to a worker:", file=sys.stderr)
            traceback.print_exc()
            found = unit._replace(state=State.OWN, entered=entered)
        if self._units.post(found):
            self._own += [found] * (found.state == State.LOADED)
        elif found.state == State.LOADED:
            os.close(found.descriptor)
        return True

    def _read(self, unit: Unit, batch: int, microbatch: int) -> Unit:
        indices = self._cursors[unit.entered].microbatch(batch, microbatch)
        if not indices:
            return unit._replace(state=State.OWN)
        seed = key_of_step(self._recipe.seed, batch, microbatch, "data")
        samples = self._reader.read(self._data.train, indices, seed, lambda index: self._units.reads(unit.key, index))
        state = pickle.dumps(random_state(), protocol=5) if self._units.states_wanted else b""
        file = batch_files.write(samples, Beside(state, self._reader.causes))
        return unit._replace(
            state=State.LOADED, descriptor=file.descriptor, inode=os.fstat(file.descriptor).st_ino, nbytes=file.nbytes,
            head=file.head,
        )  # fmt: skip

    def _forget(self, descriptors: set[int]) -> None:
        for descriptor in descriptors:
            os.close(descriptor)
        self._own = [unit for unit in self._own if unit.descriptor not in descriptors]
