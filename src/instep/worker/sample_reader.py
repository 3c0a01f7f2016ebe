"""Reading samples as a worker does: with random numbers of their own, again where the system refuses one."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from typing import Any

from instep.data import Collate, MapStyle
from instep.data.cursor import load
from instep.errors import DataError
from instep.randomness import seed_all
from instep.restore import take_random_state
from instep.rules.work import Work
from instep.transport.units import Stream
from instep.worker.loaded import REMEDY, LoadedAhead

RETRY_S = 0.1
"""Seconds before samples are read again; twice as many before each further try."""


class SampleReader:
    """Reads batches, collated. `retries`: how often samples are read again that the system refuses."""

    def __init__(self, collate: Collate | None, retries: int = 0):
        self._collate, self._retries = collate, retries
        self._read_again = set[str]()
        self.loaded: LoadedAhead | None = None
        """What loaders have read, if there are any."""

    def read(
        self,
        samples: MapStyle,
        indices: Sequence[int],
        seed: int,
        reading: Callable[[int], None] = lambda index: None,
    ) -> Any:
        """The batch of `samples` at `indices`, read with random numbers from `seed`. reading: as for `load`.

        Where the system refuses a sample, as a network's file system does now and then, all is read again after a
        while, as often as `retries` says. Raises DataError.
        """
        for tries in range(self._retries + 1):
            seed_all(seed)  # each time: a second reading draws what the first one drew
            try:
                return load(samples, indices, self._collate, reading)
            except (DataError, OSError) as error:
                if not isinstance(why := _first_cause(error), OSError) or tries == self._retries:
                    raise
                self._read_again.add(str(why))
                time.sleep(RETRY_S * 2**tries)
        raise AssertionError("the last try returns or raises")

    def batch(
        self, samples: MapStyle, indices: Sequence[int], seed: int, place: tuple[int, int, int], *, draws: bool
    ) -> Any:
        """The same, or what a loader has read of it. place: the step, the microbatch, and how many of the recipe's
        changes hold. draws: the user's code may go on with the random numbers. Raises DataError, with a remedy.
        """
        loaded = self.loaded
        found = None if loaded is None else loaded.take(*place, draws=draws)
        if loaded is not None and found is not None and loaded.compared:
            batch, (state, causes) = found
            self._read_again.update(causes)
            if draws:
                seed_all(seed)  # those of GPUs, with which loaders read nothing
                take_random_state(pickle.loads(state))
            return batch
        try:
            batch = self.read(samples, indices, seed)
        except DataError as error:
            raise DataError(f"{error.message.rstrip('.')}; {REMEDY}.", detail=error.detail) from error.__cause__
        if loaded is not None and found is not None:
            loaded.compare(*place[:2], found[0], batch)
        return batch

    def expect(self, step: int, steps: int, microbatches: range) -> None:
        """Has loaders, if there are any, read these of each step from `step` to `steps`; those of the step before may
        be asked for again.
        """
        if self.loaded is not None:
            self.loaded.expect(Stream(step - 1, step, steps, microbatches.start, microbatches.stop))

    def expect_own(self, now: Work, then: Work | None, entered: int) -> None:
        """Has loaders, if there are any, read a piece that this worker computes, and the one that it will probably get
        then, as is right where so many of the recipe's changes hold.
        """
        if self.loaded is not None:
            self.loaded.expect_own(_stream(now, entered), Stream() if then is None else _stream(then, entered))

    @property
    def causes(self) -> list[str]:
        """The errors of the system after which something was read again."""
        return sorted(self._read_again)

    def doubts(self) -> list[str]:
        """Sentences on what was read again, and on loaders."""
        again = [f"samples were read again, after an error of the system: {why}." for why in self.causes]
        return again + ([] if self.loaded is None else self.loaded.doubts())


def _stream(work: Work, entered: int) -> Stream:
    return Stream(work.batch, work.batch, work.batch + work.local_steps, work.start, work.stop, entered)


def _first_cause(error: BaseException) -> BaseException:
    """Of an error, which data sets of data sets have wrapped in several others."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
