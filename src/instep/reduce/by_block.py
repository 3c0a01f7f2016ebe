"""Adding a cut so that whoever adds may be killed at any moment, and another go on.

Rows are never changed but the one that the sum comes to lie in, and that one a block at a time: the sum of a block is
put together beside it, and copied over once it is whole. So of each block either the rows are as they were, or its sum
lies there ready.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Tracked(Protocol):
    """Some work in pieces, and how much of it is done, for whoever goes on with it."""

    done: int
    """How many pieces were done when it was taken up."""
    begun: bool
    """Whether the next one was begun then: what is needed to end it, or to take it back, lies in `room`."""
    room: Tensor
    """uint8, to keep it in."""

    def begin(self, piece: int) -> None:
        """Notes that piece number `piece` is begun."""

    def end(self, piece: int) -> None:
        """Notes that it is done."""


def room_for(microbatches: int, block: int) -> int:
    """How many bytes the sums of a block, of so many elements, take in `Tracked.room` at most."""
    return 4 * block * microbatches.bit_length()  # as deep as the tree is


def steps_of(plan: Sequence[tuple[int, int]], rows: int) -> list[tuple[int, int, int]]:
    """In-place additions (into, from) of so many rows as (one, other, sum), where sums are no rows but come after them,
    as few as will do. a + b is b + a, to the bit.

    >>> steps_of([(0, 1), (2, 3), (0, 2)], 4)
    [(0, 1, 4), (2, 3, 5), (4, 5, 4)]
    """
    at: dict[int, int] = {}
    free: list[int] = []
    steps, most = [], rows
    for into, source in plan:
        one, other = at.get(into, into), at.get(source, source)
        sums = [each for each in (one, other) if each >= rows]
        if not sums:
            sums = [free.pop() if free else most]
            most = max(most, sums[0] + 1)
        free += sums[1:]
        at[into] = sums[0]
        steps.append((one, other, sums[0]))
    return steps


def add_by_block(
    rows: Sequence[Tensor], plan: Sequence[tuple[int, int]], home: int, block: int, tracked: Tracked
) -> None:
    """Adds whole blocks of rows, float32, by a plan of at least one addition; the sum of all lies in the row `home`."""
    steps = steps_of(plan, len(rows))
    slots = tracked.room[: _bytes_of(steps, len(rows), block)].view(torch.float32).view(-1, block).unbind(0)
    whole = slots[steps[-1][2] - len(rows)]
    blocks = zip(*(row.view(-1, block).unbind(0) for row in rows), strict=True)
    for number, parts in enumerate(blocks):
        if number < tracked.done:
            continue
        if number > tracked.done or not tracked.begun:
            values = (*parts, *slots)
            for one, other, into in steps:
                torch.add(values[one], values[other], out=values[into])
            tracked.begin(number)
        parts[home].copy_(whole)
        tracked.end(number)


def _bytes_of(steps: Sequence[tuple[int, int, int]], rows: int, block: int) -> int:
    """How many bytes the sums of these steps take."""
    return 4 * block * (1 + max(into for _, _, into in steps) - rows)
