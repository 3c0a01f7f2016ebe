"""Runs on the virtual clock that are computed no further than they are asked for."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from instep.errors import InstepError
from instep.offline.cluster import Cluster
from instep.offline.schedule import simulate as schedule
from instep.offline.simulated_run import SimulatedRun
from instep.offline.simulation import VirtualRun, sizes_of
from instep.planning.race import CurvePoint
from instep.recipe import Recipe
from instep.reduce.written import FirstWrite
from instep.rules.actions import Drop, Merge
from instep.rules.work import Pieces
from instep.tables import to_table
from instep.worker.replica import Replica
from instep.worker.updates import Merger


@dataclass
class CourseTimes:
    """What a run takes, without its gradients: seconds and bytes until so many global batches are merged."""

    found: SimulatedRun
    steps: int
    merged: list[int] = field(default_factory=list)
    """Global batches merged by each update, those before included."""
    t_s: list[float] = field(default_factory=list)

    def seconds(self, step: int) -> float:
        """Until the first update after which so many global batches are merged."""
        place = bisect_left(self.merged, step)
        return self.t_s[place] if place < len(self.t_s) else self.found.wall_s

    def bytes(self, step: int) -> float:
        """The same; they are taken as even over the run."""
        place = bisect_left(self.merged, step)
        done = self.merged[place] if place < len(self.merged) else self.steps
        return self.found.bytes_sent * min(1.0, done / self.steps)


class _Clock:
    """Hears when updates are made."""

    def __init__(self, pieces: Pieces):
        self._pieces, self._microbatches = pieces, 0
        self.merged_steps: list[int] = []
        self.t_s: list[float] = []

    def merged(self, t_s: float, action: Merge) -> None:
        self._microbatches += sum(self._pieces.microbatches_of(each.piece) for each in action.contributions)
        self.merged_steps.append(self._microbatches // self._pieces.microbatches)
        self.t_s.append(t_s)

    def joined(self, t_s: float, worker: int) -> None: ...
    def left(self, t_s: float, worker: int, why: str) -> None: ...
    def released(self, t_s: float, worker: int, version: int, piece: int) -> None: ...
    def pushed(self, *args: Any) -> None: ...
    def dropped(self, t_s: float, action: Drop) -> None: ...
    def grace_ended(self, t_s: float, version: int, waiting: int) -> None: ...


def timing(recipe: Recipe, cluster: Cluster, replica: Replica) -> CourseTimes:
    """Of the recipe's rule, without gradients. replica: of the recipe under any rule. Raises RecipeError."""
    pieces = Pieces(recipe.rule, cluster.workers, recipe.microbatches, recipe.steps)
    clock = _Clock(pieces)
    assert cluster.merge_s is not None
    found = schedule(
        recipe.rule, pieces, cluster.times, cluster.network, **sizes_of(Merger(replica, pieces)),  # type: ignore[arg-type]
        merge_s=cluster.merge_s, collective=cluster.collective, listener=clock,  # type: ignore[arg-type]
    )  # fmt: skip
    return CourseTimes(found, recipe.steps, clock.merged_steps, clock.t_s)


class Course:
    """A run with real gradients, as far as it is computed."""

    def __init__(self, recipe: Recipe, cluster: Cluster):
        self._recipe, self._cluster = recipe, cluster
        self._written: set[str] = set()
        self.failed = ""
        """Why it goes no further, in a sentence."""
        self._begin()

    def _begin(self) -> None:
        self.points: list[CurvePoint] = []
        """The held-out objective after so many global batches."""
        assert self._cluster.times is not None
        assert self._cluster.merge_s is not None
        while True:
            try:
                self._simulation = VirtualRun(self._recipe, self._cluster, True, None, self._hear, self._written)
                self._simulation.lay_out(self._cluster.times, self._cluster.merge_s)
                break
            except FirstWrite as found:
                self._written |= set(found.names)
        self._next, self._evaluated = 0, -1

    @property
    def step(self) -> int:
        """Global batches that are computed."""
        return self._simulation.progress.steps

    @property
    def ended(self) -> bool:
        """Whether there is no more to compute."""
        return bool(self.failed) or self._next >= len(self._simulation.events)

    def to(self, step: int) -> None:
        """Computes on to the first evaluation at or after `step`, or to the end."""
        while not self.ended and (self.step < step or self._evaluated < step):
            self._one()
        if not self.failed and self.ended and self._evaluated < self.step:
            self._simulation.evaluate(self._simulation.progress.version, 0.0)

    def _one(self) -> None:
        event = self._simulation.events[self._next]
        self._next += 1
        try:
            self._simulation.live(event)
        except FirstWrite as found:
            self._written |= set(found.names)
            again = self._next
            self._begin()
            while self._next < again and not self.failed:
                self._one()
        except InstepError as error:
            self.failed = error.message

    def _hear(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "evaluated":
            self._evaluated = self.step
            self.points.append(CurvePoint(self.step, event["objective"]))


def order_of(recipe: Recipe, cluster: Cluster) -> str:
    """Names what decides the bits of all weights of a recipe and seed: who computes what from which weights, and what
    merges when. In lockstep that is the rule and, unless it is synchronous, the workers, if none fails; otherwise it
    follows from every time of the cluster, and there is no name: "".
    """
    rule, workers = recipe.rule, cluster.workers
    if Pieces(rule, workers, recipe.microbatches, recipe.steps).in_tree_order:
        return "synchronous"
    failing = cluster.times is not None and cluster.times.failures is not None
    return f"{workers} {to_table(rule)}" if rule.lockstep and not failing else ""
