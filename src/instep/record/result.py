"""What a run, or its replay, came to. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from msgspec import UNSET, UnsetType

from instep.record.team import BytesOfHost


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What an update rule cost: bytes, versions that contributions were behind, rounds that workers were ahead, the
    share of its time in which each worker did not compute, contributions that were dropped.

    Under a rule in lockstep none is behind, ahead or dropped. There `moves` is how often microbatches have moved
    between workers, and `ranges` are those of each at the end, where any may move.
    """

    bytes_sent: int
    staleness_mean: float = 0.0
    staleness_max: int = 0
    delayed_max: int = 0
    lead_max: int = 0
    idle_share: Sequence[float]
    dropped: int = 0
    moves: int = 0
    ranges: Sequence[Sequence[int]] | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What ``result.json`` holds, see docs/record.md; without what is not set, for only some runs have it."""

    recipe: str
    digest: str | None
    rule: str
    engine: str
    steps: int
    versions: int
    items: int | None
    workers: int
    microbatches: int
    parameters: int | UnsetType = UNSET
    contributions: int | UnsetType = UNSET
    objective_first: float | None
    objective_last: float | None
    held_out: float | None
    held_out_terms: Mapping[str, float] | None
    bits_per_byte: float | None
    gathered: Mapping[str, float] | None
    ema: Mapping[str, Any] | UnsetType = UNSET
    items_per_s: float | None
    wall_s: float
    checksum_s: float | UnsetType = UNSET
    restarts: int
    stood_in: int | UnsetType = UNSET
    bytes_sent: int
    staleness_mean: float
    staleness_max: int
    delayed_max: int
    lead_max: int
    idle_share: Sequence[float]
    dropped: int
    moves: int
    ranges: Sequence[Sequence[int]] | None
    wire_bytes: Sequence[BytesOfHost] | UnsetType = UNSET
    interrupted: bool | UnsetType = UNSET
    stopped: str | UnsetType | None = UNSET
    skipped: int
    bad_batches: int
    overflows: int | UnsetType = UNSET
    data_digest: str | UnsetType = UNSET
    sample: str | UnsetType | None = UNSET
    artifacts: Mapping[str, Any] | UnsetType | None = UNSET
    audit: Mapping[str, Any] | UnsetType = UNSET
    simulated_in_s: float | UnsetType = UNSET
    scheduled_in_s: float | UnsetType = UNSET

    @classmethod
    def of(
        cls, progress: Mapping[str, Any], costs: Costs, averages: Mapping[str, str] | None = None, **more: Any
    ) -> Result:
        """From the fields of a run's `instep.worker.milestones.Progress` and what its rule cost; `more` is the rest.

        averages: digests of the averages of the weights, by decay.
        """
        held_out = progress["held_out"]
        return cls(
            objective_first=progress["objective_first"],
            objective_last=progress["objective_last"],
            held_out=held_out.get("objective"),
            held_out_terms=held_out.get("terms"),
            bits_per_byte=held_out.get("bits_per_byte"),
            gathered=held_out.get("gathered"),
            ema=_averages_told(averages, held_out.get("ema", {})) if averages else UNSET,
            skipped=progress["skipped"],
            bad_batches=progress["bad_batches"],
            overflows=progress["overflows"] or UNSET,
            **{each.name: getattr(costs, each.name) for each in fields(costs)},
            **more,
        )

    def table(self) -> dict[str, Any]:
        """The fields that are set, in their order."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in found.items() if value is not UNSET}


def digests_of_averages(result: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the averages of the weights that a result tells of, by decay."""
    return {decay: told["digest"] for decay, told in (result.get("ema") or {}).items()}


def _averages_told(digests: Mapping[str, str], held_out: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By decay: what the result says of each average, as of the weights."""
    found = {decay: held_out.get(decay, {}) for decay in digests}
    return {
        decay: {
            "digest": digest,
            "held_out": found[decay].get("objective"),
            "held_out_terms": found[decay].get("terms"),
            "bits_per_byte": found[decay].get("bits_per_byte"),
        }
        for decay, digest in digests.items()
    }


@dataclass(frozen=True)
class Proof:
    """What a replay compared with the tape: the weights at so many checkpoints; so many updates, by objective, items
    and learning rate; of synchronous ones, so many checksums, of a tensor each; and where a server made them, their
    weights, staleness and so many contributions, by piece, items and the checksum of their vectors.
    """

    checkpoints: int = 0
    updates: int = 0
    contributions: int = 0
    checksums: int = 0

    def __str__(self) -> str:
        parts = [
            f"{count:,} {what}{'' if count == 1 else 's'}"
            for count, what in (
                (self.contributions, "contribution"), (self.updates, "update"), (self.checksums, "tensor checksum"),
                (self.checkpoints, "checkpoint"),
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
