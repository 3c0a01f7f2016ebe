"""Samples in files, whatever their format: one file after the other, in the order of the numbers in their names."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from instep.data import Codec, Collate, Data
from instep.data.files import check_share, found_apart
from instep.data.order import Groups, take
from instep.errors import DataError, told


class Shard(Protocol):
    """A file of samples. It is opened when it is first read, in each process anew, and pickled by path."""

    @property
    def path(self) -> Path: ...

    def __len__(self) -> int: ...

    def read(self, place: int, /) -> Any:
        """Sample `place` of the file. Raises DataError, which names the file."""
        ...

    def digest(self, *, full: bool = False) -> str:
        """Text that changes whenever its content does; without `full`, by some pieces of it."""
        ...


class Shards(Dataset[Any]):
    """The samples of several files.

    map: makes the sample of what a file holds; None takes it as it is. samples: those of all that are meant; None for
    all of them. mixed: they come in an order at random, always the same, so that the first few are a fair sample.
    full_digest: covers all bytes. together: of files that hold their samples in groups, had at once, so many are mixed;
    0 mixes all samples. Raises DataError.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        map: Callable[[Any], Any] | None = None,
        samples: range | None = None,
        mixed: bool = False,
        full_digest: bool = False,
        together: int = 0,
    ) -> None:
        self.shards = list(shards)
        self._ends = list(itertools.accumulate((len(shard) for shard in self.shards), initial=0))[1:]
        self.samples = range(self._ends[-1] if self._ends else 0) if samples is None else samples
        self._map, self._mixed, self._full, self._together = map, mixed, full_digest, together

    @cached_property
    def groups(self) -> Groups | None:
        """Those of all files, as far as their samples are meant."""
        if not self._together:
            return None
        ends = np.cumsum(np.concatenate([[0], *(shard.group_sizes for shard in self.shards)]))  # type: ignore[attr-defined]
        return Groups(np.diff(np.clip(ends, self.samples.start, self.samples.stop)), self._together)

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the files' digests, which samples are meant, and how their groups are mixed."""
        files = " ".join(f"{len(shard)}:{shard.digest(full=self._full)}" for shard in self.shards)
        how = f"{self.samples} {self._mixed}{f' {self._together}' if self._together else ''}"
        return hashlib.sha256(f"{files} {how}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Several samples, read in the order in which they lie; one that is asked for twice is read twice, since `map`
        may change what it is given. Raises DataError, IndexError.
        """
        places = [self._place(index) for index in indices]
        read = {at: self._read(places[at], indices[at]) for at in sorted(range(len(places)), key=places.__getitem__)}
        return [self._mapped(read[at], places[at], index) for at, index in enumerate(indices)]

    def _place(self, index: int) -> int:
        """Where a sample is among all of the files."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is not from 0 to {len(self) - 1}")
        if self._mixed:
            index = int(take("keyed", len(self), 0, 0, range(index, index + 1), self.groups)[0])
        return self.samples[index]

    def _shard(self, place: int) -> tuple[Shard, int]:
        number = bisect.bisect_right(self._ends, place)
        return self.shards[number], place - (self._ends[number - 1] if number else 0)

    def _read(self, place: int, index: int) -> Any:
        shard, within = self._shard(place)
        try:
            return shard.read(within)
        except DataError as error:
            raise DataError(f"sample {index} cannot be read: {error.message}") from error

    def _mapped(self, read: Any, where: int, index: int) -> Any:
        if self._map is None:
            return read
        try:
            return self._map(read)
        except Exception as error:
            shard, within = self._shard(where)
            raise DataError(
                f"'map' failed on sample {index}, the one of number {within} (from 0) in {shard.path} "
                f"({told(error)}); mend the function, or what lies there."
            ) from error


def sharded(
    open_all: Callable[[list[Path]], Sequence[Shard]],
    pattern: str | Sequence[str],
    held_out: float | str,
    *,
    map: Callable[[Any], Any] | None,
    collate: Collate | None,
    codec: Codec | None,
    full_digest: bool,
    together: int = 0,
) -> Data:
    """The data of the files of `pattern`, opened by `open_all`, with what is held out apart. Raises DataError."""
    paths, held = found_apart(pattern, held_out)
    return apart(
        open_all(paths), open_all(held) if held else [], held_out,
        map=map, collate=collate, codec=codec, full_digest=full_digest, together=together,
    )  # fmt: skip


def apart(
    shards: Sequence[Shard],
    held: Sequence[Shard],
    held_out: float | str,
    *,
    map: Callable[[Any], Any] | None,
    collate: Collate | None,
    codec: Codec | None,
    full_digest: bool,
    together: int = 0,
) -> Data:
    """The data of these shards, with `held` held out, or a share. Raises DataError, RecipeError."""
    check_share(held_out)
    part = partial(Shards, map=map, full_digest=full_digest, together=together)
    train, rest = part(shards), None
    if isinstance(held_out, str):
        rest = part(held, mixed=True)
    elif held_out:
        every = train.samples
        cut = max(0, len(every) - max(1, int(len(every) * held_out)))
        train, rest = part(shards, samples=every[:cut]), part(shards, samples=every[cut:], mixed=True)
    for samples, name in ((train, "training"), (rest, "held-out")):
        if samples is not None and not len(samples):
            files = samples.shards
            total = sum(len(shard) for shard in files)
            raise DataError(
                f"no {name} sample is left of the {total:,} in {len(files)} files, the first of them {files[0].path}; "
                f"give more, or another 'held_out'."
            )
    return Data(train, rest, collate, codec)
