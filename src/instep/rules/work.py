"""The work of a run, cut into the pieces that workers take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from instep.ranges import equal_ranges
from instep.rules.rule import UpdateRule


class Work(NamedTuple):
    """One piece: microbatches [start, stop) of each of the global batches [batch, batch + local_steps)."""

    piece: int
    batch: int
    local_steps: int
    start: int
    stop: int

    @property
    def microbatches(self) -> int:
        """How many microbatches it holds."""
        return self.local_steps * (self.stop - self.start)

    def batches(self, before: int = 0) -> range:
        """The global batches, and so many before them, as far as there are."""
        return range(max(0, self.batch - before), self.batch + self.local_steps)

    def covers(self) -> dict[str, Any]:
        """What a tape says of it."""
        return {"batch": self.batch, "local_steps": self.local_steps, "microbatches": [self.start, self.stop]}


@dataclass(frozen=True)
class Pieces:
    """All pieces of a run, numbered from 0 to `count`. W workers, M microbatches a batch, `steps` global batches.

    A global batch is cut into ``parts = min(W, M)`` ranges of microbatches, as equal as may be. A piece is one such
    range of `rule.stride` batches in a row (of fewer at the run's end, of one before `local_after`). A round is W
    pieces: with W up to M, the whole of its batches.
    """

    rule: UpdateRule
    workers: int
    microbatches: int
    steps: int

    @cached_property
    def parts(self) -> int:
        """Ranges that each batch is cut into."""
        return min(self.workers, self.microbatches)

    @cached_property
    def groups(self) -> int:
        """Groups of batches that are worked on together."""
        single = self._single
        return single - (single - self.steps) // self.rule.stride

    @cached_property
    def count(self) -> int:
        """How many pieces there are."""
        return self.groups * self.parts

    @property
    def whole_rounds(self) -> bool:
        """Whether a round is the whole of its batches, so that its items can be counted beforehand."""
        return self.workers <= self.microbatches

    @property
    def in_tree_order(self) -> bool:
        """Whether updates add as lockstep does: divided by the items of the whole batch, in the canonical tree."""
        return self.rule.synchronous and self.whole_rounds

    def work(self, piece: int) -> Work:
        """Piece number `piece`."""
        group, part = divmod(piece, self.parts)
        batch, local_steps = self.batches_of(group)
        return Work(piece, batch, local_steps, self._edges[part], self._edges[part + 1])

    def after(self, work: Work) -> Work | None:
        """The piece that who has this one will probably get next: that of the next round; None where there is none."""
        piece = work.piece + self.workers
        return self.work(piece) if piece < self.count else None

    def microbatches_of(self, piece: int) -> int:
        """How many microbatches piece number `piece` holds: its `work(piece).microbatches`, faster."""
        group, part = divmod(piece, self.parts)
        size = self._sizes[part]
        return size if self.rule.stride == 1 else size * self.batches_of(group)[1]

    @cached_property
    def even_microbatches(self) -> int:
        """How many microbatches every piece holds; 0 where they differ."""
        last = self.groups - 1
        sizes = {
            size * self.batches_of(group)[1] for size in self._sizes for group in {0, min(self._single, last), last}
        }
        return sizes.pop() if len(sizes) == 1 else 0

    def batches_of(self, group: int) -> tuple[int, int]:
        """The first batch of a group, and how many there are."""
        single, length = self._single, self.rule.stride
        if group < single:
            return group, 1
        batch = single + (group - single) * length
        return batch, min(length, self.steps - batch)

    def round_of(self, piece: int) -> int:
        """The round that a piece belongs to."""
        return piece // self.workers

    def own(self, worker: int, number: int) -> int:
        """The piece of a round that has the worker's place in it; -1 where there is none."""
        piece = number * self.workers + worker
        return piece if worker < self.workers and piece < self.count else -1

    def size_of(self, number: int) -> int:
        """How many pieces a round has."""
        return min(self.workers, self.count - number * self.workers)

    @cached_property
    def _sizes(self) -> tuple[int, ...]:
        """Microbatches of each range of a batch."""
        return tuple(stop - start for start, stop in pairwise(self._edges))

    @cached_property
    def _edges(self) -> tuple[int, ...]:
        """Where the ranges of a batch begin, and the last one ends."""
        return (0, *(stop for _, stop in equal_ranges(self.microbatches, self.parts)))

    @cached_property
    def _single(self) -> int:
        """Groups of one batch, at the start."""
        return self.steps if self.rule.stride == 1 else min(self.rule.local_after, self.steps)
