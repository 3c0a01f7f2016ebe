"""What a run, or its replay, came to. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Proof:
    """What a replay compared with the tape: the weights at so many checkpoints; so many updates, by objective, items
    and learning rate; and where a server made them, their weights, staleness and so many contributions, by piece, items
    and the checksum of their vectors.
    """

    checkpoints: int = 0
    updates: int = 0
    contributions: int = 0

    def __str__(self) -> str:
        parts = [
            f"{count:,} {what}{'' if count == 1 else 's'}"
            for count, what in (
                (self.contributions, "contribution"), (self.updates, "update"), (self.checkpoints, "checkpoint")
            )
            if count
        ]  # fmt: skip
        return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]])) or "nothing"


@dataclass(frozen=True)
class Replayed:
    """What a replay came to. `recorded`: the digest on the tape, None if the run never ended.

    divergence: a sentence on the first place where the replay and the tape differ, or "". proof: what was compared
    up to there.
    """

    digest: str
    recorded: str | None
    versions: int
    divergence: str
    proof: Proof = field(default_factory=Proof, compare=False)

    @property
    def same(self) -> bool:
        """Whether the replay gave the run's own digest."""
        return self.digest == self.recorded and not self.divergence
