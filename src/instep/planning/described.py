"""A cluster as a person describes it in a file, ``cluster.toml``. No torch."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from instep.clock.network import Network
from instep.clock.slow import Slow, parse_slow, slow_factors
from instep.clock.times import Failures, WorkerTimes
from instep.clock.units import duration_s
from instep.errors import RecipeError, cut, shown
from instep.offline.cluster import Cluster
from instep.recipe import MOST_WORKERS
from instep.tables import check_types, from_table


@dataclass(frozen=True, kw_only=True)
class Description:
    """Who could train, and over what. Times, rates and who is slow are texts as ``instep simulate`` takes them.

    Fields
    ------
    workers: how many there are.
    microbatch: seconds a microbatch of the recipe, such as "100ms" or "lognormal:100ms,20ms"; "" measures it here.
    persistence: from 0, each contribution draws a time anew, to 1, a worker keeps its own.
    speeds: of each worker, as a multiple of that of `microbatch`; () for 1 each.
    slow: slow workers instead of `speeds`, such as "1:4x" or "25%:2x".
    failures: mean time between the failures of one worker's machine, such as "6h"; "" for none.
    restart: how long a failed worker is away.
    bandwidth, latency: of each machine's link, such as "1Gb/s" and "1ms"; "" for no limit, and for none.
    update: seconds that an update takes at the server; "" measures it here.
    checkpoint: seconds that training stands still for a checkpoint; "" measures it here.
    server: rules in lockstep too run on a server, not on all-reduce.

    Raises RecipeError.
    """

    workers: int
    microbatch: str = ""
    persistence: float = 0.0
    speeds: tuple[float, ...] = ()
    slow: str = ""
    failures: str = ""
    restart: str = "10s"
    bandwidth: str = ""
    latency: str = ""
    update: str = ""
    checkpoint: str = ""
    server: bool = False

    def __post_init__(self) -> None:
        check_types(self, "cluster")
        if not 1 <= self.workers <= MOST_WORKERS:
            raise RecipeError(
                f"'cluster.workers' is {shown(self.workers)}; somebody has to train: it must be from 1 to "
                f"{MOST_WORKERS}."
            )
        if self.speeds and self.slow:
            raise RecipeError("'cluster.speeds' and 'cluster.slow' both say who is slow; give one of them.")
        if self.speeds and len(self.speeds) != self.workers:
            raise RecipeError(
                f"'cluster.speeds' has {len(self.speeds)} numbers and 'cluster.workers' is {self.workers}; give one "
                f"number for each worker."
            )
        for worker, speed in enumerate(self.speeds):
            if not 0 < speed < math.inf:
                raise RecipeError(
                    f"'cluster.speeds' has {speed:g} for worker {worker}; a speed must be above 0 and finite (2 is "
                    f"twice as fast as 'microbatch' says, 0.5 half as fast)."
                )
        self.cluster(range(self.workers), 1.0, 0.0, 0)  # which raises for all else
        for name in ("update", "checkpoint"):
            if text := getattr(self, name):
                duration_s(text, f"'cluster.{name}'")

    @property
    def factors(self) -> list[float]:
        """How many times as long each worker takes. Raises RecipeError."""
        if self.speeds:
            return [1 / speed for speed in self.speeds]
        found: list[float] = slow_factors(parse_slow(self.slow) if self.slow else (), self.workers).tolist()
        return found

    @property
    def failing(self) -> Failures | None:
        """Raises RecipeError."""
        if not self.failures:
            return None
        mean_s = duration_s(self.failures, "'cluster.failures'")
        return Failures(mean_s, duration_s(self.restart, "'cluster.restart'"))

    def fastest(self, workers: int) -> tuple[int, ...]:
        """The numbers of so many workers, the fastest ones, in their order."""
        factors = self.factors
        return tuple(sorted(sorted(range(self.workers), key=factors.__getitem__)[:workers]))

    def cluster(self, members: Sequence[int], microbatch_s: float, update_s: float, seed: int) -> Cluster:
        """The workers of these numbers, as a simulation takes them.

        microbatch_s, update_s: what is measured here, for what is not described. Raises RecipeError.
        """
        factors = self.factors
        slow = tuple(
            Slow(factors[member], worker, 0.0, f"{worker}:{factors[member]:g}x")
            for worker, member in enumerate(members)
            if factors[member] != 1
        )
        failing = self.failing
        if self.microbatch:
            times = WorkerTimes.from_text(
                self.microbatch, persistence=self.persistence, slow=slow, failures=failing, seed=seed
            )
        else:
            if self.persistence:
                raise RecipeError(
                    "'cluster.persistence' goes with a 'cluster.microbatch' that varies, such as "
                    "'lognormal:100ms,20ms'."
                )
            times = WorkerTimes.constant(microbatch_s, slow=slow, failures=failing, seed=seed)
        network = Network.from_text(self.bandwidth or None, self.latency or None)
        merge_s = duration_s(self.update, "'cluster.update'") if self.update else update_s
        return Cluster(
            workers=len(members), times=times, merge_s=merge_s, collective=not self.server,
            network=network if self.bandwidth or self.latency else None,
        )  # fmt: skip


def read(path: Path) -> Description:
    """The description in a TOML file. Raises RecipeError for what cannot be read, unknown keys and wrong values."""
    try:
        table = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise RecipeError(
            f"{cut(path)} cannot be read: {error.strerror}; name a TOML file that describes a cluster, with at least "
            f"'workers = 4' in it."
        ) from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{cut(path)} is not valid TOML: {cut(error)}.") from None
    return from_table(Description, table, "cluster")
