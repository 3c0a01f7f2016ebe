"""What the workers of a team in lockstep tell each other in every step, beside tensors."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from instep.engines.signs_of_life import SignsOfLife
from instep.reduce.buffers import APART
from instep.reduce.layout import padded
from instep.reduce.tree import Node
from instep.transport.group import Fields, Group
from instep.worker.gradients import Computed

GO_ON, STOP, SAVE, PART, HAND_IN = range(5)
"""What comes after a step, as worker 0 says; in this order the first three are of a group that stays."""


def what_comes(signs: SignsOfLife) -> int:
    """That, as the team is asked for it."""
    if signs.stop_wanted():
        return STOP
    if signs.regroup_wanted():
        return HAND_IN if signs.fewer_wanted() else PART
    return SAVE if signs.save_wanted() else GO_ON


_OFF = 2
"""Beside 1, for a gradient, in the flag of a parameter: a microbatch left it requiring none."""


class Flags(NamedTuple):
    """touched: by parameter, whether it has a gradient. off: the parameters that a microbatch left requiring none.
    changed: the buffers that one changed. wrote: whether one wrote parameters."""

    touched: list[bool]
    off: list[int]
    changed: list[int]
    wrote: bool


class TeamFacts(NamedTuple):
    """What all workers tell. seconds: by worker, what a microbatch of the step took it, 0 for none. sums: of the step's
    microbatches, term by term. totals: the next step's items, by term. ends: by worker, `Buffers.ends` of the first
    step. stop: whether the run is to end after the step, `STOP`, the state to be saved, `SAVE`, or the team to go on in
    another group, `PART`, or without some, `HAND_IN`. early: whether the next step's gradients are to travel early.
    beside: what `StepFacts.gather` was given, of all workers; good until the next gather."""

    seconds: list[float]
    sums: list[float]
    totals: dict[str, int]
    flags: Flags
    ends: list[Mapping[int, tuple[int, int]]]
    stop: int
    early: bool
    beside: NDArray[Any] | None


class StepFacts:
    """One worker's side. ranges: the microbatches of each worker, `ranges[worker]` its own. All is few numbers, which
    Python packs in less time than it takes to make arrays of them."""

    def __init__(self, ranges: Sequence[Node], worker: int, terms: Sequence[str], parameters: int, buffers: int):
        self._worker, self._terms, self._parameters, self._buffers = worker, terms, parameters, buffers
        self._flags, self._ends, self._seconds = bytes(parameters + buffers + 1), b"", 0.0
        self.counts: Sequence[int] = [0] * len(terms)
        """The worker's items in the next step, by term."""
        self.take(ranges)

    def take(self, ranges: Sequence[Node]) -> None:
        """From the next step on, the workers have these microbatches."""
        self._own = range(*ranges[self._worker])
        self._of_each = [(stop - start) * len(self._terms) for start, stop in ranges]
        self._most = max(self._of_each)
        self._layout, self.nbytes = self._packed(self._most)
        self._sums = [0.0] * self._most

    def nbytes_of(self, microbatches: int) -> int:
        """The bytes of what a worker tells, where one has so many microbatches."""
        return self._packed(microbatches * len(self._terms))[1]

    def _packed(self, sums: int) -> tuple[struct.Struct, int]:
        flags = f"{len(self._flags)}s{8 * self._buffers}s"
        layout = struct.Struct(f"{sums}d{len(self._terms)}qd{flags}B?")
        return layout, padded(layout.size)

    def note(self, computed: Computed, *, wrote: bool, seconds: float) -> None:
        """What the worker's microbatches came to, whether they wrote parameters, and the seconds that one took."""
        self._seconds = seconds
        none = dict.fromkeys(self._terms, 0.0)
        each = [computed.sums.get(microbatch, none) for microbatch in self._own]
        self._sums = [sums[name] for sums in each for name in self._terms]
        self._sums += [0.0] * (self._most - len(self._sums))
        flags = bytearray([*computed.touched, *computed.changed, wrote])
        for index in computed.ended or ():
            flags[index] |= _OFF
        self._flags, self._ends = bytes(flags), b""
        if computed.ends:
            ends = np.zeros(len(computed.changed), np.int64)
            for index, (_, end) in computed.ends.items():
                ends[index] = end if end == APART else end + 1  # 0 is no word
            self._ends = ends.tobytes()

    def gather(
        self, group: Group, beside: Fields | None = None, *, stop: int = GO_ON, early: bool = False
    ) -> TeamFacts:
        """A barrier: what all tell; of `stop` and `early` what worker 0 says. beside: what else each tells."""
        if group.size > 1:
            gathered = group.gather(self.packed(beside, stop=stop, early=early))
            rows: list[Any] = [self._layout.unpack_from(row) for row in gathered.numpy()]
            found = None if beside is None else beside.read(gathered[:, self.nbytes :])
        else:
            rows = [self._told(stop=stop, early=early)]
            found = None if beside is None else beside.read(beside.raw[None])
        sums = [value for row, count in zip(rows, self._of_each, strict=True) for value in row[:count]]
        counts = zip(*(row[self._most : -5] for row in rows), strict=True)
        flags = _together(tuple(row[-4] for row in rows), self._parameters)
        totals = dict(zip(self._terms, map(sum, counts), strict=True))
        stop, early = rows[0][-2:]
        seconds, ends = [row[-5] for row in rows], [_ends(row[-3]) for row in rows]
        return TeamFacts(seconds, sums, totals, flags, ends, stop, early, found)

    def packed(self, beside: Fields | None, *, stop: int, early: bool = False) -> Tensor:
        """What this worker tells, as `gather` sends it."""
        told = self._told(stop=stop, early=early)
        packed = bytearray(self._layout.pack(*told).ljust(self.nbytes, b"\0"))
        fact = torch.frombuffer(packed, dtype=torch.uint8)
        return fact if beside is None else torch.cat([fact, beside.raw])

    def _told(self, *, stop: int, early: bool) -> tuple[Any, ...]:
        return (*self._sums, *self.counts, self._seconds, self._flags, self._ends, stop, early)


@lru_cache(maxsize=1)  # they are seldom others than in the step before
def _together(flags: tuple[bytes, ...], parameters: int) -> Flags:
    seen = np.bitwise_or.reduce([np.frombuffer(each, np.uint8) for each in flags])
    of_parameters, of_buffers = seen[:parameters], seen[parameters:-1]
    off, changed = np.flatnonzero(of_parameters & _OFF), np.flatnonzero(of_buffers)
    return Flags((of_parameters & 1).astype(bool).tolist(), off.tolist(), changed.tolist(), bool(seen[-1]))


@lru_cache(maxsize=1)
def _ends(ends: bytes) -> Mapping[int, tuple[int, int]]:
    """How a worker's microbatches left the buffers, from what all started with."""
    each = np.frombuffer(ends, np.int64)
    return {int(index): (0, int(each[index])) for index in np.flatnonzero(each)}
