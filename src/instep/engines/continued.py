"""What an engine in lockstep goes on from that is not its process's first one: the team has formed another group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from instep.engines.merged_events import MergedEvents

Value = TypeVar("Value")


@dataclass(frozen=True)
class Continued:
    """numbers: by rank, those of the workers on the tape. why_whole: as the first placement found it, for weights that
    have been placed are not what they were; None where nobody has looked. merged, busy_s: of the engine of before.
    version: that this worker has.
    """

    numbers: Sequence[int]
    why_whole: str | None = None
    merged: MergedEvents | None = None
    busy_s: float = 0.0
    version: int = 0

    def by_number(self, of_each: Sequence[Value], none: Value) -> list[Value]:
        """What there is of each rank as the tape has it, by number; `none` of those that are not there."""
        if not of_each:
            return []
        found = [none] * (max(self.numbers) + 1)
        for number, value in zip(self.numbers, of_each, strict=True):
            found[number] = value
        return found
