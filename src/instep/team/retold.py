"""What is told twice where another speaks for worker 0, which has died and may have told it before."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET

from instep.record.event_kinds import RangesMovedEvent, SampledEvent
from instep.record.events import (
    CheckpointedEvent,
    ChecksummedEvent,
    EvaluatedEvent,
    Event,
    MergedEvent,
    RunStartedEvent,
    WarnedEvent,
)

_ONCE = MergedEvent | EvaluatedEvent | CheckpointedEvent | ChecksummedEvent | RangesMovedEvent | SampledEvent
"""Of each kind there is one for a version at most, and versions rise, from one start of the team to the next."""

_WARNINGS = 1000
"""That are remembered, the last ones."""


class Retold:
    """Since the last start of the team. `expected`: whether anything may be told twice."""

    def __init__(self) -> None:
        self.expected = False
        self._versions: dict[type, int] = {}  # the last one, by kind
        self._warned: dict[str, int] = {}  # by sentence, the version, 0 where it is of none

    def without(self, happened: Sequence[Event]) -> list[Event]:
        """What is new of it. All that happens is to come here."""
        return [event for event in happened if self._new(event)]

    def _new(self, event: Event) -> bool:
        if isinstance(event, RunStartedEvent):
            self.expected = False
            self._versions.clear()
            return True
        if isinstance(event, _ONCE):
            known, self._versions[type(event)] = self._versions.get(type(event), -1), event.version
            return not self.expected or event.version > known
        if isinstance(event, WarnedEvent):
            version = 0 if event.version is UNSET else event.version
            told, self._warned[event.why] = self._warned.pop(event.why, -1), version
            if len(self._warned) > _WARNINGS:
                del self._warned[next(iter(self._warned))]
            return not self.expected or version > told
        return True
