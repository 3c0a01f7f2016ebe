"""What the client asks of the processes that it starts, and what a replay answers. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instep.clock.network import Network
from instep.clock.recorded import RecordedTimes
from instep.clock.slow import parse_slow
from instep.clock.times import WorkerTimes
from instep.clock.units import number
from instep.engines.pickling import Pickled
from instep.errors import RecipeError, shown
from instep.recipe import MOST_WORKERS, Team
from instep.rules import UpdateRule


@dataclass(frozen=True)
class Request:
    """One run. `recipe` is pickled, into memory that all workers map, so that only they run the user's code;
    `recipe_table` and `recipe_file`, the file to save, are for the record.

    `fingerprints` are those with none of the recipe's changes, with the first, and so on. `notices` are sentences to
    warn with at the start.

    `began`, in seconds on the machine's monotonic clock, is the zero of the tape's times.
    """

    recipe: Pickled
    recipe_table: Mapping[str, Any]
    recipe_file: str
    fingerprint: str
    team: Team
    rule: UpdateRule
    engine: str
    folder: Path
    resumed: bool
    import_paths: tuple[str, ...]
    began: float
    fingerprints: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cluster:
    """Who trains, on the virtual clock.

    times: None measures a microbatch of the recipe on this machine, and gives every worker that time; `slow` then
    says who takes longer. `merge_s`: of an update at the server; None measures it. `collective`: rules in lockstep
    run on all-reduce instead of a server. `batched`: gradients of many workers are computed at once, many times faster
    for small models, with other bits than those of a real run; rules without local steps only.

    Raises RecipeError for what cannot be.
    """

    workers: int
    times: WorkerTimes | RecordedTimes | None = None
    network: Network | None = None
    merge_s: float | None = None
    collective: bool = True
    slow: str = ""
    batched: bool = False

    def __post_init__(self) -> None:
        if type(self.workers) is not int or not 1 <= self.workers <= MOST_WORKERS:
            raise RecipeError(
                f"'cluster.workers' is {_shown(self.workers)}; it must be a whole number from 1 to {MOST_WORKERS}."
            )
        if not isinstance(self.times, WorkerTimes | RecordedTimes | None):
            raise RecipeError(
                f"'cluster.times' is {shown(self.times)}; give instep.clock.times.WorkerTimes, or None to measure them."
            )
        if self.merge_s is not None and not 0 <= number(self.merge_s) < math.inf:
            raise RecipeError(f"'cluster.merge_s' is {_shown(self.merge_s)}; it must be a finite time from 0, or None.")
        if self.slow and isinstance(self.times, WorkerTimes) and self.times.slow != parse_slow(self.slow):
            raise RecipeError(
                f"'cluster.slow' is {shown(self.slow)}, and 'cluster.times' name other workers as slow, or none; where "
                f"times are given, say it there: WorkerTimes.from_text(..., slow=parse_slow({self.slow!r}))."
            )


def _shown(value: Any) -> str:
    """Its value for a message; of very large whole numbers, which Python does not write down, about how large."""
    return f"{number(value):g}" if isinstance(value, int) and abs(value) >= 1 << 64 else repr(value)


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
