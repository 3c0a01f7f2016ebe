"""C7: the bytes that a simulation tells beforehand are those that real runs then send."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from instep.clock.network import Network
from instep.clock.times import WorkerTimes
from instep.offline.cluster import Cluster
from instep.offline.schedule import simulate as schedule
from instep.offline.simulation import simulate
from instep.recipe import Recipe, Team
from instep.reduce.layout import Layout
from instep.reduce.reduction import Reduction
from instep.rules import parse
from instep.rules.work import Pieces
from support.harness import train_here
from support.kinds import quick
from support.serving import RULES
from support.workloads import convnet, gpt


def simulated(recipe: Recipe, workers: int, *, collective: bool) -> dict[str, Any]:
    cluster = Cluster(workers=workers, times=WorkerTimes.constant(0.01), merge_s=0.0, collective=collective)
    return simulate(recipe, cluster, False, None, lambda event: None)


def check_bytes(recipe: Recipe, workers: int, engine: str, path: Path) -> None:
    """Where contributions are dropped, and so done again, their number is a matter of chance: their size is not."""
    real = train_here(recipe, Team(workers=workers, engine=engine), path).result
    told = simulated(recipe, workers, collective=engine == "lockstep")
    push_and_pull = told["bytes_sent"] // told["contributions"]
    assert real["bytes_sent"] == told["bytes_sent"] + push_and_pull * (real["dropped"] - told["dropped"])


WORKERS = quick(range(2, 9), 3, 5)


@pytest.mark.processes
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("engine", ["lockstep", "server"])
def test_synchronous_runs_send_what_was_told(engine: str, workers: int, tmp_path: Path) -> None:
    """With 3, 5, 6 and 7 workers some own several nodes of the canonical tree over 8 microbatches."""
    check_bytes(gpt(steps=2), workers, engine, tmp_path / "run")


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_runs_under_every_preset_send_what_was_told(name: str, tmp_path: Path) -> None:
    check_bytes(convnet(rule=RULES[name], steps=4), 3, "server", tmp_path / "run")


@pytest.mark.parametrize("microbatches", [4, 8, 12])
@pytest.mark.parametrize("workers", range(1, 9))
def test_a_schedule_counts_every_node_of_the_canonical_tree(workers: int, microbatches: int) -> None:
    """As the reduction over shared memory has them."""
    rule = parse("synchronous")
    pieces, size_bytes = Pieces(rule, workers, microbatches, 3), 840
    whole = pieces.whole_rounds
    nodes = len(Reduction(Layout((), (), (), 1, 1), microbatches, workers).nodes) if whole else pieces.parts
    more: dict[str, Any] = {"contribution_bytes": size_bytes, "weights_bytes": 1000}
    served = schedule(rule, pieces, WorkerTimes.constant(1.0), **more)
    assert served.bytes_pushed == 3 * size_bytes * nodes
    assert served.bytes_pulled == 3 * pieces.parts * 1000
    if whole:
        reduced = schedule(rule, pieces, WorkerTimes.constant(1.0), collective=True, **more)
        assert reduced.bytes_pushed == 3 * (size_bytes * nodes * (workers - 1) // workers)
        assert reduced.bytes_pulled == 3 * size_bytes * (workers - 1)


def test_a_worker_with_several_nodes_takes_longer_to_send_them() -> None:
    """3 workers over 8 microbatches own 1, 2 and 2 nodes."""
    rule, network = parse("synchronous"), Network(bandwidth_bytes_per_s=1000.0, latency_s=0.01)
    more: dict[str, Any] = {"contribution_bytes": 300, "weights_bytes": 300}
    pieces = Pieces(rule, 3, 8, 1)
    served = schedule(rule, pieces, WorkerTimes.constant(1.0), network, **more)
    # 3 pulls share the link; the first push is alone on it for 0.3 of the second before the others come.
    assert served.wall_s == pytest.approx(3 * 0.3 + 0.01 + 3.0 + 0.01 + 2 * 0.6)
    reduced = schedule(rule, pieces, WorkerTimes.constant(1.0), network, collective=True, **more)
    assert reduced.wall_s == pytest.approx(3.0 + (2 + 1) * 2 / 3 * 0.3 + 4 * 0.01)
