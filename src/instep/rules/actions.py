"""What a ledger tells an engine to do."""

from __future__ import annotations

from typing import NamedTuple


class Contribution(NamedTuple):
    """What a worker sent, as the ledger knows it. `seq` counts the contributions of the run in order of arrival."""

    seq: int
    worker: int
    piece: int
    base: int
    """The version it was computed from."""
    items: int


class Release(NamedTuple):
    """Give `worker` the weights of `version` and let it compute `piece`."""

    worker: int
    piece: int
    version: int


class Merge(NamedTuple):
    """Make update number `version` out of `contributions`, in this order, with these weights."""

    version: int
    contributions: tuple[Contribution, ...]
    weights: tuple[float, ...]
    staleness: tuple[int, ...]


class Drop(NamedTuple):
    """Forget a contribution. Its piece is given out again."""

    contribution: Contribution
    why: str


class Finish(NamedTuple):
    """Every piece is merged: the run is done."""

    version: int


Action = Release | Merge | Drop | Finish
