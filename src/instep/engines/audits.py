"""A duplicate now and then: workers in lockstep compute microbatches of each other's again, and compare bits.

Which ones follows from the recipe's seed and the step: every worker has the same share of its microbatches looked at,
in the same steps, each by another worker, so that nobody waits for one that has more to do. What a microbatch comes to
is noted by its owner before it is folded, and by the other from the same weights. Equal code on equal bits gives equal
bits, so there is no threshold, and no alarm that is none. Where the two differ a third computation decides, before the
step is committed: by another worker or, of two, by a process that is built for it.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from instep.errors import WorkerError
from instep.randomness import key
from instep.record.event_kinds import AuditedEvent
from instep.record.events import Event
from instep.reduce.tree import Node
from instep.transport.group import Group
from instep.worker.gradients import Around, Gradients
from instep.worker.noting import NBYTES, NOTHING, NotedGradients, noted_alone
from instep.worker.replica import Replica

Judge = Callable[[int, int, Mapping[str, int]], bytes]
"""What (step, microbatch, totals) comes to in a process that is neither worker's, see `noting.computed_alone`."""


_TURN = 0x9E3779B97F4A7C15
"""The golden section, in parts of 2**64: its multiples come back to any part of a turn as soon as can be."""


class WrongWorker(Exception):
    """A worker has computed a microbatch wrong, which two others, `by`, have computed alike. since: the version after
    which the weights are uncertain: of the worker's last good audit, or that it began with; back: that of before this
    audit, or the same.
    """

    def __init__(self, worker: int, step: int, microbatch: int, since: int, back: int, by: str):
        super().__init__(worker, step, microbatch)
        self.worker, self.step, self.microbatch = worker, step, microbatch
        self.since, self.back, self.by = since, back, by


@dataclass(frozen=True)
class Looked:
    """A microbatch of worker `owner` that `auditor` computes again."""

    owner: int
    auditor: int
    microbatch: int


def looked_at(seed: int, share: float, step: int, ranges: Sequence[Node]) -> list[Looked]:
    """Which microbatches are in this step, owner by owner: of each the share, rounded down or up alike in one step.

    Whether up is spread evenly over the steps, so that of no worker more than about three times as many microbatches
    pass unseen as do in the mean. ranges: the microbatches of each worker, of which there are several.
    """
    chance, first = random.Random(key(seed, "audit", step)), key(seed, "audit")
    rounding, shift = (first + step * _TURN) % (1 << 64) / (1 << 64), chance.randrange(1, len(ranges))
    found = []
    for owner, (start, stop) in enumerate(ranges):
        count = min(stop - start, math.floor(share * (stop - start) + rounding))
        auditor = (owner + shift) % len(ranges)
        found += [Looked(owner, auditor, m) for m in sorted(chance.sample(range(start, stop), count))]
    return found


class Audit:
    """One worker's side.

    version: where this team begins. `emit(event)` writes to the tape. Nothing of it is seen in a step without audits.
    """

    def __init__(
        self,
        replica: Replica,
        gradients: Gradients,
        worker: int,
        workers: int,
        share: float,
        version: int,
        emit: Callable[[Event], None],
        judge: Judge,
    ):
        self._replica, self._gradients, self._worker, self._workers = replica, gradients, worker, workers
        self._share, self._emit, self._judge = share, emit, judge
        self._good = [(version, version)] * workers  # by worker, see `WrongWorker`: since, back
        self._looked: list[Looked] = []  # in the present step
        self._idle: list[int] = []  # workers without microbatches of their own in the present step
        self._totals: Mapping[str, int] = {}
        self._own: dict[int, bytes] = {}  # what own microbatches came to, of those that are looked at
        self._others: dict[int, bytes] = {}
        self._took_s = self._all_took_s = 0.0
        self._count = 0

    @property
    def nbytes(self) -> int:
        """Of what a worker tells the others, at most."""
        most = math.floor(self._share * self._replica.recipe.microbatches) + 1
        return 8 + 2 * NBYTES * most

    def begin(self, step: int, totals: Mapping[str, int], ranges: Sequence[Node]) -> Around | None:
        """Before a step's own microbatches: computes those of others that it is to look at. What is to be around its
        own, and notes what they come to; None where nothing is looked at.
        """
        self._idle = [worker for worker, (start, stop) in enumerate(ranges) if start == stop]
        self._looked = looked_at(self._replica.recipe.seed, self._share, step, ranges)
        if not self._looked or not self._replica.objective.has_items(totals):
            self._looked = []
            return None
        self._totals, began = totals, time.monotonic()
        mine = [each.microbatch for each in self._looked if each.auditor == self._worker]
        self._others = {microbatch: self._again(step, microbatch) for microbatch in mine}
        self._took_s = time.monotonic() - began
        self._own = {each.microbatch: NOTHING for each in self._looked if each.owner == self._worker}
        return partial(self._noted, step)

    def _again(self, step: int, microbatch: int) -> bytes:
        """What another's microbatch comes to here."""
        return noted_alone(self._replica, self._gradients, step, microbatch, self._totals)

    def _noted(
        self, step: int, microbatch: int, batch: Any, compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Computes one of its own microbatches."""
        if microbatch not in self._own:
            return compute()
        with NotedGradients(self._replica.parameters) as noted:
            sums = compute()
        began = time.monotonic()
        self._own[microbatch] = noted.digest(sums, self._replica.objective.counts_at(step, batch))
        self._took_s += noted.took_s + time.monotonic() - began
        return sums

    def compare(self, step: int, group: Group) -> None:
        """Before the step is committed: all meet, if anything was looked at. Raises WrongWorker at all of them."""
        if self._looked:
            self._meet(step, group)
        for worker in self._idle:
            if self._good[worker][0] == step:  # it was right, and has done nothing since
                self._good[worker] = (step + 1, step)

    def _meet(self, step: int, group: Group) -> None:
        most = max(sum(each.owner == worker for each in self._looked) for worker in range(self._workers))
        both = b"".join(self._own.values()), b"".join(self._others.values())
        told = b"".join(each.ljust(most * NBYTES, b"\0") for each in both)
        took = torch.tensor([self._took_s], dtype=torch.float64).view(torch.uint8)
        rows = group.gather(torch.cat([took, torch.frombuffer(bytearray(told), dtype=torch.uint8)]))
        self._all_took_s += float(rows[:, :8].contiguous().view(torch.float64).sum())
        owns, others = _digests(rows[:, 8:], most)
        at = [0] * self._workers
        seen = [0] * self._workers
        for each in self._looked:
            own, other = owns[each.owner][at[each.owner]], others[each.auditor][seen[each.auditor]]
            at[each.owner] += 1
            seen[each.auditor] += 1
            if own != other:
                raise self._wrong(step, each, own, other, group)
        for worker in {each.owner for each in self._looked}:
            self._good[worker] = (step + 1, step)
        self._count += len(self._looked)
        self._tell(step)

    def _tell(self, step: int) -> None:
        for owner in dict.fromkeys(each.owner for each in self._looked if each.auditor == self._worker):
            mine = [e.microbatch for e in self._looked if (e.owner, e.auditor) == (owner, self._worker)]
            took_s = round(self._took_s, 6)
            self._emit(AuditedEvent(worker=self._worker, version=step, owner=owner, looked_at=mine, took_s=took_s))

    def _wrong(self, step: int, looked: Looked, own: bytes, other: bytes, group: Group) -> WrongWorker:
        """Who it is: all meet for a third computation."""
        free = [worker for worker in range(self._workers) if worker not in (looked.owner, looked.auditor)]
        third = random.Random(key(self._replica.recipe.seed, "third", step)).choice(free) if free else None
        found = NOTHING
        if third == self._worker:
            found = self._again(step, looked.microbatch)
        elif third is None and self._worker == 0:
            found = self._judge(step, looked.microbatch, self._totals)
        rows = group.gather(torch.frombuffer(bytearray(found), dtype=torch.uint8))
        found = rows[0 if third is None else third].numpy().tobytes()
        if found not in (own, other):
            raise WorkerError(
                f"microbatch {looked.microbatch} of step {step + 1} came to three different results in three "
                f"computations, so that none is known to be right: the recipe does not repeat, see 'instep check', or "
                f"the machine is faulty."
            )
        wrong, right = (looked.auditor, looked.owner) if found == own else (looked.owner, looked.auditor)
        judged = f"worker {third}" if third is not None else "a process of its own"
        by = f"worker {right} and {judged}"
        return WrongWorker(wrong, step, looked.microbatch, *self._good[wrong], by)

    def summary(self) -> dict[str, Any]:
        """What `result.json` tells of this start of the team."""
        return {
            "share": self._share, "looked_at": self._count, "extra_s": round(self._all_took_s, 6),
            "uncertain_since": min(since for since, _ in self._good),
        }  # fmt: skip


def _digests(rows: Tensor, most: int) -> tuple[list[list[bytes]], list[list[bytes]]]:
    """By worker: what its own microbatches came to, and those that it looked at."""
    raw = [row.numpy().tobytes() for row in rows.cpu()]
    parts = [[row[at : at + NBYTES] for at in range(0, len(row), NBYTES)] for row in raw]
    return [each[:most] for each in parts], [each[most:] for each in parts]
