"""What another tells in the place of worker 0 that the tape has already is left out."""

from __future__ import annotations

from instep.record.event_kinds import SampledEvent
from instep.record.events import CheckpointedEvent, Event, WarnedEvent
from instep.team.retold import Retold


def saved(version: int) -> Event:
    return CheckpointedEvent(version=version, path="there", bytes=1, digest="")


def sampled(version: int) -> Event:
    return SampledEvent(version=version, sample="a", files=[], figures={}, took_s=0.0)


def warned(why: str, version: int | None = None) -> Event:
    return WarnedEvent(why=why) if version is None else WarnedEvent(why=why, version=version)


def test_only_where_others_stand_in_is_anything_left_out() -> None:
    twice = [saved(4), saved(4), sampled(4), sampled(4), warned("a"), warned("a")]
    retold = Retold()
    assert retold.without(twice) == twice
    retold.expected = True
    assert retold.without(twice) == []


def test_what_is_new_stays() -> None:
    retold = Retold()
    retold.without([saved(4), warned("a", 4), warned("b")])
    retold.expected = True
    told = [saved(4), saved(6), warned("a", 4), warned("a", 6), warned("b"), warned("c")]
    assert retold.without(told) == [saved(6), warned("a", 6), warned("c")]
