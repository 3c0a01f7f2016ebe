"""What a plan comes to: plain data, which a program, a table and a document of JSON are made from. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from instep.monitors.progress import duration, nbytes, number
from instep.report.comparison import Range

SCHEMA = 1
"""The version of the document."""

_LISTED = 4
"""Ways in a sentence."""

By = Literal["time", "bytes"]


@dataclass(frozen=True)
class ToTarget:
    """What a way took to the target with one seed. objective: the held-out one that it then had."""

    seed: int
    step: int
    seconds: float
    bytes: float
    objective: float

    def cost(self, by: By) -> float:
        """What is to be least."""
        return self.seconds if by == "time" else self.bytes


@dataclass
class Way:
    """A rule and a number of workers.

    members: which workers of the cluster. state: see `instep.planning.race`; "refused" where it cannot be, for `why`.
    seconds_all, bytes_all, idle_share, staleness: of the whole recipe, from timing alone. computed: global batches
    with gradients, of all seeds. lowest: the lowest held-out objective of the first seed, None where none was computed.
    predicted: its expected cost, seconds or bytes, where it was neither computed to the target nor settled otherwise.
    """

    rule: str
    workers: int
    members: tuple[int, ...]
    state: str = "open"
    why: str = ""
    seconds_all: float | None = None
    bytes_all: int | None = None
    idle_share: float | None = None
    staleness: float | None = None
    computed: int = 0
    lowest: float | None = None
    predicted: float | None = None
    reached: list[ToTarget] = field(default_factory=list)

    @property
    def label(self) -> str:
        """As a person reads it."""
        return f"{self.rule}, {self.workers} worker{'' if self.workers == 1 else 's'}"

    def over_seeds(self, what: str) -> Range | None:
        """`what`, "seconds", "bytes" or "objective", at the target; None where no seed reached it."""
        return Range.of([getattr(each, what) for each in self.reached])

    def cost(self, by: By) -> Range | None:
        """What is to be least, at the target; None where no seed reached it."""
        return Range.of([each.cost(by) for each in self.reached])


@dataclass(frozen=True)
class Checkpoints:
    """How often: Daly's interval, in seconds and in global batches; None where nothing fails. why: in a sentence."""

    every_steps: int | None
    every_s: float | None
    checkpoint_s: float
    mean_between_s: float | None
    why: str


@dataclass(frozen=True)
class PlanWork:
    """Global batches with gradients: those of trying all ways to their ends, those allowed of them, and those made.

    timed: simulations without gradients. cpu_s: of the process that computed.
    """

    all: int
    allowed: int
    made: int
    timed: int
    cpu_s: float


@dataclass(frozen=True)
class Planned:
    """ways: all that were considered. pick: None where nothing reached the target. undecided: the others that may be
    as good or better. pareto: of those that reached the target, the ones that no other beats in seconds, bytes and
    objective at once, by rising cost.
    """

    recipe: str
    fingerprint: str
    cluster: dict[str, Any]
    target: float
    by: By
    seeds: tuple[int, ...]
    ways: tuple[Way, ...]
    pick: Way | None
    undecided: tuple[Way, ...]
    pareto: tuple[Way, ...]
    checkpoints: Checkpoints | None
    command: str
    work: PlanWork

    @property
    def decided(self) -> bool:
        """Whether one way is the best within the budget."""
        return self.pick is not None and not self.undecided

    @property
    def verdict(self) -> str:
        """What to take, in a sentence or two."""
        if self.pick is None:
            return self._nobody()
        cost = self.pick.cost(self.by)
        assert cost is not None, "it reached the target"
        said = f"{self._cost(cost)} to a held-out objective of {number(self.target)}"
        if self.undecided:
            among = _listed([self.pick, *self.undecided])
            return f"Undecided between {among}: {self.pick.label} took {said}, and the budget does not tell them apart."
        return f"{self.pick.label}: {said}."

    def _nobody(self) -> str:
        computed = [way for way in self.ways if way.lowest is not None]
        lowest = min(computed, key=lambda way: way.lowest or 0.0, default=None)
        near = f"; the lowest was {number(lowest.lowest)}, of {lowest.label}" if lowest and lowest.lowest else ""
        more = f" Undecided between {_listed(self.undecided)}." if self.undecided else ""
        return (
            f"No way reached a held-out objective of {number(self.target)} within the budget{near}; raise --budget, "
            f"--target or --steps.{more}"
        )

    def _cost(self, cost: Range) -> str:
        show = duration if self.by == "time" else lambda value: nbytes(round(value))
        assert self.pick is not None
        reached, asked = len(self.pick.reached), len(self.seeds)
        seeds = f"{asked} seeds" if reached == asked else f"{reached} of {asked} seeds"
        between = f"{show(cost.low)} to {show(cost.high)} over {seeds}" if reached > 1 else f"with {seeds}"
        return show(cost.mean) + (f" ({between})" if asked > 1 else "")

    def document(self) -> dict[str, Any]:
        """What ``instep plan --json`` prints, see docs/plan.md."""
        return {
            "schema": SCHEMA, "recipe": self.recipe, "fingerprint": self.fingerprint, "cluster": self.cluster,
            "target": self.target, "by": self.by, "seeds": list(self.seeds), "decided": self.decided,
            "verdict": self.verdict, "pick": None if self.pick is None else self.pick.label,
            "undecided": [way.label for way in self.undecided], "pareto": [way.label for way in self.pareto],
            "command": self.command, "work": asdict(self.work),
            "checkpoints": None if self.checkpoints is None else asdict(self.checkpoints),
            "ways": [{"label": way.label, **asdict(way)} for way in self.ways],
        }  # fmt: skip


def _listed(ways: Sequence[Way]) -> str:
    """The first few, those that are expected to cost least."""
    names = [way.label for way in ways[:_LISTED]]
    names += [f"{len(ways) - _LISTED} more"] if len(ways) > _LISTED else []
    return "; ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]


def pareto(ways: Sequence[Way], by: By) -> tuple[Way, ...]:
    """Those that reached the target and that no other one beats: is as good in seconds, bytes and objective, and better
    in one of them. By rising cost.
    """
    figures = {}
    for place, way in enumerate(ways):
        ranges = [way.over_seeds(what) for what in ("seconds", "bytes", "objective")]
        if all(each is not None for each in ranges):
            figures[place] = tuple(each.mean for each in ranges if each is not None)
    front = [
        place
        for place, own in figures.items()
        if not any(other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other in figures.values())
    ]
    first = 0 if by == "time" else 1
    return tuple(ways[place] for place in sorted(front, key=lambda place: figures[place][first]))


def choose(finalists: Sequence[Way], by: By) -> tuple[Way | None, tuple[Way, ...]]:
    """The cheapest over the seeds that all have, and those that were cheaper than it with one of the seeds."""
    if not finalists:
        return None, ()
    costs = [{each.seed: each.cost(by) for each in way.reached} for way in finalists]
    common = set.intersection(*map(set, costs))
    if not common:
        return None, tuple(finalists)
    means = [sum(each[seed] for seed in common) / len(common) for each in costs]
    best = means.index(min(means))
    rivals = [
        way
        for way, own in zip(finalists, costs, strict=True)
        if way is not finalists[best] and any(own[seed] < costs[best][seed] for seed in common)
    ]
    return finalists[best], tuple(rivals)
