"""What the command line says of a virtual cluster."""

from __future__ import annotations

from instep.cli.flags import Settings, UsageError
from instep.clock.network import Network
from instep.clock.slow import parse_slow
from instep.clock.times import Failures, WorkerTimes
from instep.clock.units import duration_s
from instep.errors import cut
from instep.offline.cluster import Cluster
from instep.recipe import MOST_WORKERS, Recipe
from instep.rules.work import Pieces


def cluster_of(
    workers: int,
    *,
    times: str | None,
    persistence: float,
    slow: str,
    failures: str | None,
    restart: str | None,
    bandwidth: str | None,
    latency: str | None,
    merge: str | None,
    collective: bool,
    seed: int,
) -> Cluster:
    """The cluster that the flags of ``instep simulate`` name. Raises RecipeError or UsageError."""
    if not 1 <= workers <= MOST_WORKERS:
        raise UsageError(f"--workers is {workers}; it must be from 1 to {MOST_WORKERS}.")
    if restart and not failures:
        raise UsageError("--restart says how long a failed worker is away; it goes with --failures.")
    worker_times = None
    if times is not None:
        away_s = duration_s(restart or "10s", "--restart")
        lasting = Failures(duration_s(failures, "--failures"), away_s) if failures else None
        worker_times = WorkerTimes.from_text(
            times, persistence=persistence, slow=parse_slow(slow) if slow else (), failures=lasting, seed=seed
        )
    elif failures or persistence:
        raise UsageError("--failures and --persistence go with --times, which says how long a microbatch takes.")
    network = Network.from_text(bandwidth, latency) if bandwidth or latency else None
    return Cluster(
        workers=workers, times=worker_times, network=network, collective=collective, slow=slow,
        merge_s=None if merge is None else duration_s(merge, "--merge"),
    )  # fmt: skip


def refuse_team(settings: Settings, why: str = "the virtual one has flags of its own, such as --workers") -> None:
    """Raises UsageError where a field of a real team is set, which would change nothing."""
    for name, _ in settings:
        if name.startswith("team."):
            raise UsageError(f"--{cut(name)} sets a real team; {why}.")


def steps_for(recipe: Recipe, workers: int, contributions: int) -> int:
    """The global batches of which each worker makes so many contributions, on average."""
    if contributions < 1:
        raise UsageError(f"--contributions is {contributions}; it must be at least 1.")
    pieces, rule = workers * contributions, recipe.rule
    groups = -(-pieces // Pieces(rule, workers, recipe.microbatches, 1).parts)
    single = min(groups, rule.local_after) if rule.stride > 1 else groups
    return single + (groups - single) * rule.stride
