"""What the tape tells of updates is told by another where worker 0 died with it untold."""

from __future__ import annotations

import pickle

from instep.engines.merged_events import HANDED_S, MergedEvents
from instep.record.event_kinds import RangesMovedEvent
from instep.record.events import ChecksummedEvent, Event, MergedEvent
from instep.worker.spikes import Verdict
from instep.worker.updates import Update

UPDATE = Update(1.0, {"loss": 1.0}, 4, 0.1, 2.0, Verdict())


class Worker:
    def __init__(self) -> None:
        self.now_s, self.told = 0.0, list[Event]()
        self.merged = MergedEvents(1000, self.told.append, lambda: self.now_s, range(2))

    def makes(self, step: int) -> None:
        self.now_s += HANDED_S / 3
        self.merged.say(RangesMovedEvent(version=step, ranges=[[0, 1], [1, 2]], microbatch_s=[1.0, 1.0]), tell=False)
        self.merged.made(step, UPDATE, [(0, 1), (1, 2)], 0.5, tell=False)
        self.merged.say(ChecksummedEvent(version=step + 1, weights={}, optimizer={}, took_s=0.0), tell=False)

    @property
    def kinds(self) -> list[tuple[str, int]]:
        return [(each.kind, each.version) for each in self.told if isinstance(each, MergedEvent | _Other)]


_Other = RangesMovedEvent | ChecksummedEvent


def test_what_was_not_told_is_told_in_order_once() -> None:
    worker = Worker()
    for step in range(4):
        worker.makes(step)
    worker.merged.catch_up(2)
    worker.merged.catch_up(2)
    assert worker.kinds == [
        ("checksummed", 2), ("ranges_moved", 2), ("merged", 3), ("checksummed", 3), ("ranges_moved", 3), ("merged", 4),
        ("checksummed", 4),
    ]  # fmt: skip


def test_a_successor_can_tell_of_the_updates_of_just_before_its_time() -> None:
    worker, successor = Worker(), Worker()
    for step in range(9):
        worker.makes(step)
    successor.merged.take(pickle.loads(pickle.dumps(worker.merged.last())))
    successor.merged.catch_up(7)
    assert [kind for kind in successor.kinds if kind[0] == "merged"] == [("merged", 8), ("merged", 9)]
    assert len(worker.merged.last()[0]) < 9, "no more than those that may be untold"
