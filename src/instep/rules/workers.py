"""What a ledger holds of its workers: of each, and how far they all are under order "arrival"."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class ActiveWorker:
    """An active worker. `piece` is -1 while it has none; `doomed`: what it computes will be too old to merge."""

    number: int
    rounds: int
    piece: int = -1
    base: int = 0
    doomed: bool = False
    active: bool = True


class Pace:
    """How many active workers have done how many rounds. One whose work has become too old does not count."""

    __slots__ = ("_at",)

    def __init__(self) -> None:
        self._at: dict[int, int] = {}  # workers by rounds; none is 0

    def slowest(self, before: int) -> int:
        """The rounds of the slowest, who `before` had so many. Nobody at all leaves it as it was."""
        return min(self._at) if self._at and before not in self._at else before

    def add(self, rounds: int) -> None:
        """There is one more with so many."""
        self._at[rounds] = self._at.get(rounds, 0) + 1

    def remove(self, rounds: int) -> bool:
        """There is one less; whether it was the last with so many."""
        at = self._at
        at[rounds] = left = at[rounds] - 1
        if not left:
            del at[rounds]
        return not left
