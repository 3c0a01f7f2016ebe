"""What a ledger holds of a worker."""

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
