"""Reading samples as a worker does: with random numbers of their own, again where the system refuses one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from instep.data import Collate, MapStyle
from instep.data.cursor import load
from instep.errors import DataError
from instep.randomness import seed_all

RETRY_S = 0.1
"""Seconds before samples are read again; twice as many before each further try."""


class SampleReader:
    """Reads batches, collated. `retries`: how often samples are read again that the system refuses."""

    def __init__(self, collate: Collate | None, retries: int = 0):
        self._collate, self._retries = collate, retries
        self._read_again = set[str]()

    def read(self, samples: MapStyle, indices: Sequence[int], seed: int) -> Any:
        """The batch of `samples` at `indices`, read with random numbers from `seed`.

        Where the system refuses a sample, as a network's file system does now and then, all is read again after a
        while, as often as `retries` says. Raises DataError.
        """
        for tries in range(self._retries + 1):
            seed_all(seed)  # each time: a second reading draws what the first one drew
            try:
                return load(samples, indices, self._collate)
            except (DataError, OSError) as error:
                if not isinstance(why := _first_cause(error), OSError) or tries == self._retries:
                    raise
                self._read_again.add(str(why))
                time.sleep(RETRY_S * 2**tries)
        raise AssertionError("the last try returns or raises")

    def doubts(self) -> list[str]:
        """Sentences on what was read again."""
        return [f"samples were read again, after an error of the system: {why}." for why in sorted(self._read_again)]


def _first_cause(error: BaseException) -> BaseException:
    """Of an error, which data sets of data sets have wrapped in several others."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
