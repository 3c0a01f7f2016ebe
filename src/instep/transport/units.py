"""Which microbatches are loaded ahead, by whom, and where they lie: a table in memory that a machine's processes share.

Workers say what they will need; loaders claim it, one microbatch each at a time, and say where it is; workers take it
from there. Who looks at several fields, or changes them, holds a lock that the system takes from a process which dies.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from instep.memory_file import memory_file
from instep.transport import futex
from instep.transport.memory import Region, attach, reserve

ROWS = 4096
"""Microbatches that the table can hold."""

MOST_TRIES = 3
"""Loaders that may die while they read one microbatch."""

_LOADED, _WANTED = range(2)

_DRAWN, _NOT_DRAWN = 1, 2
"""Of numbers that workers draw after a loader's; 0: nobody has said."""


class State:
    """Of a microbatch: to be read, being read, loaded, loaded and taken by a worker; to be read by the worker itself,
    since a loader could not; gone once it was taken; or who reads it dies. Numbers, for the table.
    """

    FREE, READING, LOADED, TAKEN, OWN, GONE, DEADLY = range(7)


class Unit(NamedTuple):
    """A row of the table. key: of the microbatch, see `Units.key_of`; 0: none. loader: who read it, with its process
    and the descriptor there; inode, nbytes, head: of the file. tries: loaders that have died of it, the last one, whose
    exit status was `code`, while it read `sample`, if that is known, else -1. entered: how many of the recipe's changes
    held when it was read.
    """

    key: int = 0
    state: int = State.FREE
    loader: int = 0
    pid: int = 0
    descriptor: int = 0
    inode: int = 0
    nbytes: int = 0
    head: int = 0
    tries: int = 0
    sample: int = -1
    code: int = 0
    entered: int = 0


_SAMPLE = Unit._fields.index("sample")


class Stream(NamedTuple):
    """Microbatches [start, stop) of batches that are needed one after the other: from `first` to `last`, the last one
    excluded. Those from `keep` on may still be asked for. entered: how many of the recipe's changes hold then; -1: what
    the batch says.
    """

    keep: int = 0
    first: int = 0
    last: int = 0
    start: int = 0
    stop: int = 0
    entered: int = -1

    def covers(self, batch: int, microbatch: int) -> bool:
        """Whether this microbatch is, or was, one of them."""
        return self.keep <= batch < self.last and self.start <= microbatch < self.stop


class Units:
    """The table, for so many workers and loaders of one machine at most; each worker has two streams. Raises
    ResourceError.

    Each process that uses it says of how many `microbatches` a batch is.
    """

    def __init__(self, workers: int, loaders: int):
        self.workers, self.loaders = workers, loaders
        regions = {
            "microbatches": Region((1,), "int64"),
            "signs": Region((2,), "int64"),
            "closed": Region((1,), "int64"),
            "draws": Region((1,), "int64"),
            "read": Region((loaders,), "int64"),
            "asked": Region((workers,), "int64"),
            "streams": Region((2 * workers, len(Stream._fields)), "int64"),
            "rows": Region((ROWS, len(Unit._fields)), "int64"),
        }
        self._file = memory_file()
        reserve(self._file, regions)
        arrays = attach(self._file, regions)
        self._signs, self._closed, self._draws, self._asked, self._streams, self._rows = (
            arrays[name].view(np.int64) for name in ("signs", "closed", "draws", "asked", "streams", "rows")
        )
        self._shared_microbatches = arrays["microbatches"].view(np.int64)
        self.microbatches = 1
        self.read = arrays["read"].view(np.int64)
        """How many microbatches each loader has read."""

    @property
    def microbatches(self) -> int:
        """Of a batch."""
        return self._microbatches

    @microbatches.setter
    def microbatches(self, count: int) -> None:
        self._microbatches = self._shared_microbatches[0] = count

    def key_of(self, batch: int, microbatch: int) -> int:
        """Of a microbatch."""
        return batch * self.microbatches + microbatch + 1

    def place_of(self, key: int) -> tuple[int, int]:
        """Batch and microbatch."""
        return divmod(key - 1, self.microbatches)

    # A worker's

    def expect(self, stream: int, what: Stream) -> None:
        """Has the loaders read this. Another worker may say the same of the stream at the same time."""
        if self._stream(stream) != what:
            self._streams[stream] = what
            self.sign(_WANTED)

    def expected(self, batch: int, microbatch: int) -> bool:
        """Whether somebody has said that it is needed, or was."""
        return _covered(self._all_streams(), batch, microbatch)

    def look(self, key: int) -> Unit:
        """What is known of a microbatch."""
        with self._locked():
            found = self._row(key)
            return found if found.key == key else Unit(key)

    def ask(self, worker: int, key: int) -> None:
        """The worker cannot go on without this one, as long as that is expected; 0: it can. One that dies leaves it."""
        self._asked[worker] = key
        if key:
            self.sign(_WANTED)

    def took(self, key: int) -> None:
        """It is mapped where it is needed."""
        with self._locked():
            row = self._rows[key % ROWS]
            if row[0] == key and row[1] == State.LOADED:
                row[1] = State.TAKEN
        self.sign(_WANTED)

    def note_draws(self, draws: bool) -> None:
        """Says whether the generators go on from where a loader has left them. Where workers differ, they do."""
        if not self._draws[0] or (draws and self._draws[0] == _NOT_DRAWN):
            self._draws[0] = _DRAWN if draws else _NOT_DRAWN

    # A loader's

    @property
    def states_wanted(self) -> bool:
        """Whether a worker may want to know where the generators were once samples were read."""
        return bool(self._draws[0] != _NOT_DRAWN)

    def recall(self, loader: int, code: int) -> None:
        """Another loader of this number has died, with this exit status: what it read is to be read again."""
        with self._locked():
            for row in self._rows[(self._rows[:, 2] == loader) & (self._rows[:, 0] > 0)]:
                unit = Unit(*row.tolist())
                if unit.state == State.READING:
                    tries = unit.tries + 1
                    state = State.DEADLY if tries >= MOST_TRIES else State.FREE
                    self._put(unit._replace(state=state, tries=tries, code=code))
                elif unit.state in (State.LOADED, State.TAKEN):
                    state = State.FREE if unit.state == State.LOADED else State.GONE
                    self._put(unit._replace(state=state))
        self.sign(_LOADED)

    def claim(self, loader: int, ahead: int, *, full: bool) -> Unit | None:
        """What this loader is to read next, up to so many batches ahead. full: only what a worker waits for."""
        with self._locked():
            for key in self._asked.tolist():
                if key and self.expected(*self.place_of(key)) and self._is_free(key, asked=True):
                    return self._claimed(loader, key, self._entered(key))
            for entered, key in () if full else self._ahead(ahead):
                if self._is_free(key):
                    return self._claimed(loader, key, entered)
        return None

    def awaited(self) -> list[tuple[int, int]]:
        """Loaders and the microbatches that they read and a worker waits for."""
        rows = map(self._row, self._asked[self._asked > 0].tolist())
        asked = {*self._asked.tolist()}
        return [(row.loader, row.key) for row in rows if row.state == State.READING and row.key in asked]

    def reads(self, key: int, sample: int) -> None:
        """Its loader is about to read this sample of it."""
        self._rows[key % ROWS, _SAMPLE] = sample

    def post(self, unit: Unit) -> bool:
        """What has become of it. Whether somebody may still want it."""
        with self._locked():
            row = self._rows[unit.key % ROWS]
            wanted = bool(row[0] == unit.key and row[2] == unit.loader)
            if wanted:
                self._put(unit)
            self.read[unit.loader] += 1
        self.sign(_LOADED)
        return wanted

    def unneeded(self, own: Sequence[Unit], most_bytes: int) -> tuple[set[int], int]:
        """Of what a loader has loaded, the descriptors of what nobody needs, and of what was taken, all beyond so many
        bytes; and the bytes of what is left and is not taken yet.
        """
        gone, held, untaken = set[int](), 0, 0
        with self._locked():
            streams = self._all_streams()
            rows = self._rows[[unit.key % ROWS for unit in own], :5].tolist() if own else []
            for unit, (key, state, loader, _, descriptor) in zip(reversed(own), reversed(rows), strict=True):
                at = unit.key % ROWS
                mine = (key, loader, descriptor) == (unit.key, unit.loader, unit.descriptor)
                if not mine or not _covered(streams, *self.place_of(unit.key)):
                    gone.add(unit.descriptor)
                    if mine:
                        self._rows[at] = Unit()
                elif state == State.TAKEN and held + unit.nbytes > most_bytes:
                    gone.add(unit.descriptor)
                    self._rows[at, 1] = State.GONE
                else:
                    held += unit.nbytes
                    untaken += unit.nbytes * (state == State.LOADED)
        return gone, untaken

    # Anybody's

    def close(self) -> None:
        """Nothing is loaded ahead any more, since the loaders cannot."""
        self._closed[0] = 1
        self.sign(_LOADED)

    @property
    def closed(self) -> bool:
        """Whether nothing is loaded ahead any more."""
        return bool(self._closed[0])

    def of_loader(self, loader: int) -> tuple[tuple[int, int] | None, int, int]:
        """The batch and microbatch that a loader reads at present, if any; how many it has loaded that no worker has
        taken yet; and their bytes. Of anybody, who need not have said of how many microbatches a batch is.
        """
        rows = self._rows[(self._rows[:, 0] > 0) & (self._rows[:, 2] == loader)]
        reading, ahead = (rows[rows[:, 1] == state] for state in (State.READING, State.LOADED))
        at = divmod(int(reading[0, 0]) - 1, int(self._shared_microbatches[0])) if len(reading) else None
        return at, len(ahead), int(ahead[:, 6].sum())

    def sign(self, which: int) -> None:
        """Wakes loaders (1) or workers (0)."""
        self._signs[which] += 1
        futex.wake(self._signs, which)

    def signs(self) -> tuple[int, int]:
        """Numbers that change when something is loaded, and when something is wanted."""
        return int(self._signs[_LOADED]), int(self._signs[_WANTED])

    def sleep(self, signs: tuple[int, int], *, loader: bool) -> None:
        """Returns soon after the number has changed that is for loaders, or else workers; or a little later."""
        which = _WANTED if loader else _LOADED
        if not futex.sleep_while(self._signs, which, signs[which]) and int(self._signs[which]) == signs[which]:
            time.sleep(0.001)

    def free(self) -> None:
        """Closes the file, in the process that has made the table."""
        os.close(self._file)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _row(self, key: int) -> Unit:
        return Unit(*self._rows[key % ROWS].tolist())

    def _stream(self, number: int) -> Stream:
        return Stream(*self._streams[number].tolist())

    def _all_streams(self) -> list[Stream]:
        return [Stream(*row) for row in self._streams[self._streams[:, 2] != 0].tolist()]

    def _ahead(self, ahead: int) -> Iterator[tuple[int, int]]:
        """What is expected next: by which of the recipe's changes, and the key."""
        streams = self._all_streams()
        for offset in range(ahead + 1):
            for stream in streams:
                batch = stream.first + offset
                if batch < stream.last:
                    keys = np.arange(self.key_of(batch, stream.start), self.key_of(batch, stream.stop))
                    rows = self._rows[keys % ROWS]
                    free = (rows[:, 0] != keys) | (rows[:, 1] == State.FREE)
                    yield from ((stream.entered, key) for key in keys[free].tolist())

    def _entered(self, key: int) -> int:
        place = self.place_of(key)
        return next((stream.entered for stream in self._all_streams() if stream.covers(*place)), -1)

    def _is_free(self, key: int, *, asked: bool = False) -> bool:
        there = self._row(key)
        if not there.key:
            return True
        if there.key == key:
            return there.state == State.FREE
        if not self.expected(*self.place_of(there.key)):
            return True  # nobody needs what is there
        if asked:
            return there.state not in (State.READING, State.DEADLY)
        return there.state in (State.FREE, State.GONE)

    def _claimed(self, loader: int, key: int, entered: int) -> Unit:
        there = self._row(key)
        tries = there.tries if there.key == key else 0
        unit = Unit(key, State.READING, loader, os.getpid(), tries=tries, entered=entered)
        self._put(unit)
        return unit

    def _put(self, unit: Unit) -> None:
        """There is no key meanwhile: who dies in this leaves no row that is of two microbatches."""
        row = self._rows[unit.key % ROWS]
        row[0] = 0
        row[1:] = unit[1:]
        row[0] = unit.key


def _covered(streams: Sequence[Stream], batch: int, microbatch: int) -> bool:
    return any(stream.covers(batch, microbatch) for stream in streams)
