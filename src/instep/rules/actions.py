"""What a ledger tells an engine to do."""

from __future__ import annotations

from typing import Any, NamedTuple


class Contribution(NamedTuple):
    """What a worker sent, as the ledger knows it. `seq` counts the contributions of the run in order of arrival."""

    seq: int
    worker: int
    piece: int
    base: int
    """The version it was computed from."""
    items: int

    def facts(self) -> dict[str, Any]:
        """What a tape says of it."""
        return {
            "seq": self.seq, "worker": self.worker, "piece": self.piece, "version": self.base, "items": self.items,
        }  # fmt: skip


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

    def facts(self) -> dict[str, Any]:
        """What a tape says of it."""
        return {
            "version": self.version,
            "contributions": [contribution.facts() for contribution in self.contributions],
            "weights": list(self.weights),
            "staleness": list(self.staleness),
        }


class Drop(NamedTuple):
    """Forget a contribution. Its piece is given out again."""

    contribution: Contribution
    why: str


class Finish(NamedTuple):
    """Every piece is merged: the run is done."""

    version: int


Action = Release | Merge | Drop | Finish
