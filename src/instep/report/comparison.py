"""Runs side by side: by rule, over seeds; what each took to a target, what it ended at, and who wins, in a sentence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from instep.differences import flat
from instep.monitors.progress import duration, nbytes, number
from instep.report.history import History, Point, windows

WINDOWS = 50
"""In so many windows of equal items a run's training objective is averaged."""

FEW_UPDATES = 20
"""A rule with fewer updates of the weights has hardly begun."""

_MOST_FIELDS = 3
"""That a label names."""

_WITHIN = 0.1
"""Rules that end this share above the best one do not decide what the target is."""


@dataclass(frozen=True)
class Cost:
    """What a run took until it reached the target."""

    seconds: float
    bytes: int
    items: int


@dataclass(frozen=True)
class Range:
    """A figure over seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Range | None:
        """None where there is no value, or where one is not finite."""
        if not values or not all(map(math.isfinite, values)):
            return None
        return cls(statistics.fmean(values), min(values), max(values))

    def meets(self, other: Range) -> bool:
        """Whether the two overlap."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True, eq=False)
class RuleRuns:
    """The runs of one rule, one for each seed.

    costs: of each run, None where it never reached the target. final: what its runs ended at.
    """

    label: str
    runs: tuple[History, ...]
    costs: tuple[Cost | None, ...]
    final: Range | None

    @property
    def reached(self) -> int:
        """How many of its runs reached the target."""
        return sum(cost is not None for cost in self.costs)

    def to_target(self, what: str) -> Range | None:
        """`what`, "seconds", "bytes" or "items", until the target; None where not all of its runs reached it."""
        found = [getattr(cost, what) for cost in self.costs if cost is not None]
        return Range.of(found) if len(found) == len(self.costs) else None

    @property
    def idle(self) -> Range | None:
        """The share of its time in which a worker did not compute."""
        return Range.of([run.idle_share for run in self.runs if run.idle_share is not None])

    @property
    def updates(self) -> int:
        """Of the run that has the fewest."""
        return min(run.updates for run in self.runs)

    @property
    def peak_bytes(self) -> int | None:
        """Of activations, measured, where the recipe has a plan; the largest of its runs."""
        return max((run.planned["measured_bytes"] or 0 for run in self.runs if run.planned), default=0) or None


@dataclass(frozen=True)
class Comparison:
    """Groups in the order of their first runs.

    held_out: whether the target is of the held-out objective, else of the training objective in `WINDOWS` windows.
    final_held_out: the same of what groups ended at.
    target: None where no run has an objective. chosen: whether a person gave it.
    """

    groups: tuple[RuleRuns, ...]
    held_out: bool
    final_held_out: bool
    target: float | None
    chosen: bool

    @property
    def runs(self) -> list[History]:
        """All, by group."""
        return [run for group in self.groups for run in group.runs]

    @property
    def what(self) -> str:
        """The objective that the target is of, in words."""
        return _objective(self.held_out)

    @property
    def final_what(self) -> str:
        """The objective that groups ended at, in words."""
        return _objective(self.final_held_out)


def _objective(held_out: bool) -> str:
    return "held-out objective" if held_out else "training objective"


def compare(runs: Sequence[History], target: float | None = None) -> Comparison:
    """Groups `runs` by what tells them apart but the seed, and finds what each took to the target.

    target: of the objective; by default the highest that a rule ended with, of those within 10 % of the best.
    """
    several = all(sum(1 for point in run.held_out if point.version) >= 3 for run in runs)
    ended = all(run.held_out for run in runs)
    labels = _labels(runs)
    chosen = target is not None
    series = [run.held_out if several else windows(run.curve, WINDOWS) for run in runs]
    last = [_last(run.held_out if ended else windows(run.curve, WINDOWS)) for run in runs]
    members = {label: [place for place, other in enumerate(labels) if other == label] for label in labels}
    if target is None:
        compared = last if several == ended else [_last(points) for points in series]
        target = _target([[compared[place] for place in places] for places in members.values()])
    groups = tuple(
        RuleRuns(
            label, tuple(runs[place] for place in places),
            tuple(None if target is None else _cost(series[place], target) for place in places),
            Range.of([last[place] for place in places]),
        )
        for label, places in members.items()
    )  # fmt: skip
    return Comparison(groups, several, ended, target, chosen)


def _last(points: Sequence[Point]) -> float:
    return points[-1].objective if points else math.nan


def _target(finals: Sequence[Sequence[float]]) -> float | None:
    worst = [max(values) for values in finals if all(map(math.isfinite, values))]
    if not worst:
        return None
    best = min(worst)
    return max(value for value in worst if value <= best + _WITHIN * abs(best))


def _cost(points: Sequence[Point], target: float) -> Cost | None:
    """Until the first of `points` at or below `target`."""
    for point in points:
        if point.objective <= target:
            return Cost(point.seconds, point.bytes, point.items)
    return None


def _labels(runs: Sequence[History]) -> list[str]:
    """A rule's text, with the fields beside the seed that tell its runs from others under the same rule."""
    told = [_told(run) for run in runs]
    labels = []
    for run, mine in zip(runs, told, strict=True):
        alike = [theirs for other, theirs in zip(runs, told, strict=True) if other.rule == run.rule]
        if len(alike) == 1:
            labels.append(run.rule)
            continue
        keys = dict.fromkeys(key for theirs in alike for key in theirs)
        fields = [key for key in keys if _tells_apart(key, alike)]
        if len(fields) > _MOST_FIELDS:  # the table of differences has them
            labels.append(f"{run.rule}, {run.name if 'name' in fields else run.path.name}")
            continue
        labels.append(
            ", ".join([run.rule, *(f"{key.rpartition('.')[2]} {_short(mine.get(key, ''))}" for key in fields)])
        )
    seen: dict[tuple[str, Any], int] = {}
    for place, run in enumerate(runs):  # the same recipe, team and seed twice: two runs of their own
        key = labels[place], run.recipe.get("seed")
        seen[key] = seen.get(key, 0) + 1
    return [
        f"{label}, {run.path.name}" if seen[label, run.recipe.get("seed")] > 1 else label
        for label, run in zip(labels, runs, strict=True)
    ]


def _tells_apart(key: str, alike: Sequence[Mapping[str, Any]]) -> bool:
    told = {str(theirs.get(key)) for theirs in alike}
    return len(told - {"None"} if key == "ranges" else told) > 1  # one worker has no ranges


def _told(run: History) -> dict[str, Any]:
    """What may tell a run from another under the same rule."""
    recipe = {key: value for key, value in run.recipe.items() if key not in ("seed", "rule")}
    team = run.start["team"]
    found = {"workers": run.workers, "slow": team.get("slow", ""), "clock": run.start["clock"]}
    found["memory"] = team.get("memory", "")
    if run.start["engine"] == "lockstep" and run.workers > 1:  # older tapes know no other ranges
        found["ranges"] = "equal" if team.get("balance", "off") == "off" else "balanced"
    return {**flat(recipe), **found}


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else (str(value) or "none")


def differences(runs: Sequence[History]) -> list[tuple[str, list[str]]]:
    """What is not the same in all runs: a name, and the value in each."""
    told = all(run.start["libraries"] for run in runs)  # a simulation names none
    tables = [
        {
            **{f"recipe.{key}": value for key, value in flat(run.recipe).items()},
            **{f"team.{key}": value for key, value in run.start["team"].items()},
            **{f"version of {key}": value for key, value in run.start["libraries"].items() if told},
            "data digest": run.start["data_digest"][:12], "clock": run.start["clock"], "engine": run.start["engine"],
            "hosts": ", ".join(run.hosts),
            **({"hardware": run.hardware} if all(run.hardware for run in runs) else {}),
        }
        for run in runs
    ]  # fmt: skip
    names = list(dict.fromkeys(name for table in tables for name in table))
    rows = [(name, [_short(table[name]) if name in table else "not set" for table in tables]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def verdict(found: Comparison) -> str:
    """Who wins, in a sentence or three."""
    groups = found.groups
    if found.target is None and len(groups) > 1:
        return _without_objective(groups)
    if len(groups) == 1:
        only = groups[0]
        ended = f", and ended at a {found.final_what} of {figure(only.final)}" if only.final else ""
        return f"{only.label} made {only.updates:,} updates in {duration(_seconds(only))}{ended}."
    reached = {group: seconds for group in groups if (seconds := group.to_target("seconds"))}
    if not reached:
        return f"No rule reached a {found.what} of {number(found.target)}."
    return " ".join(filter(None, [_first(found, reached), _fewest(found), _lowest(found)]))


def _first(found: Comparison, reached: Mapping[RuleRuns, Range]) -> str:
    first = min(reached, key=lambda group: reached[group].mean)
    said = (
        f"{first.label} reached a {found.what} of {number(found.target)} first, after {duration(reached[first].mean)}"
    )
    if _synchronous(first):
        said = f"{first.label} wins: it{said.removeprefix(first.label)}"
    others = [group for group in reached if group is not first]
    if not others:
        return f"{said}; no other rule did."
    other = min(others, key=lambda group: (_synchronous(first) or not _synchronous(group), reached[group].mean))
    times = reached[other].mean / reached[first].mean
    near = ", which these seeds do not tell apart" if reached[other].meets(reached[first]) else ""
    return f"{said}; {other.label} took {times:.2g} times as long, {duration(reached[other].mean)}{near}."


def _synchronous(group: RuleRuns) -> bool:
    return group.runs[0].rule == "synchronous"


def _fewest(found: Comparison) -> str:
    sent = {group: each for group in found.groups if (each := group.to_target("bytes"))}
    if len(sent) < 2:
        return ""
    least = min(sent, key=lambda group: sent[group].mean)
    most = max(sent, key=lambda group: sent[group].mean)
    if sent[least].mean == sent[most].mean:
        return ""
    return (
        f"{least.label} sent the fewest bytes until then, {nbytes(round(sent[least].mean))}; "
        f"{most.label} sent {nbytes(round(sent[most].mean))}."
    )


def _lowest(found: Comparison) -> str:
    ends = {group: group.final for group in found.groups if group.final}
    if len(ends) < 2:
        return ""
    lowest = min(ends, key=lambda group: ends[group].mean)
    return f"The lowest {found.final_what} at the end is {lowest.label}'s, {figure(ends[lowest])}."


def _without_objective(groups: Sequence[RuleRuns]) -> str:
    first = min(groups, key=_seconds)
    said = f"No run computed an objective, so only times and bytes are compared: {first.label} took the least time, "
    return f"{said}{duration(_seconds(first))}."


def _seconds(group: RuleRuns) -> float:
    return statistics.fmean(run.seconds for run in group.runs)


def figure(each: Range | None, show: Callable[[float], str] = number) -> str:
    """0.1234, or with the spread over seeds 0.1234 (0.1200 to 0.1300)."""
    if each is None:
        return "none"
    said = show(each.mean)
    return said if each.low == each.high else f"{said} ({show(each.low)} to {show(each.high)})"


def facts(found: Comparison) -> str:
    """How long the runs were, in a line."""
    runs = found.runs
    steps = sorted({run.start["steps"] for run in runs})
    workers = sorted({run.workers for run in runs})
    seconds = sorted(run.seconds for run in runs)
    seeds = {run.recipe.get("seed") for run in runs}
    clocks = {"virtual" if run.virtual else "wall" for run in runs}
    long = " to ".join(dict.fromkeys(map(duration, (seconds[0], seconds[-1]))))
    clock = {frozenset({"virtual"}): "a virtual clock", frozenset({"wall"}): "the wall clock"}
    return (
        f"{_count(len(runs), 'run')} of {_span(steps)} steps by {_span(workers)} "
        f"{'worker' if workers == [1] else 'workers'}, {long} on {clock.get(frozenset(clocks), 'different clocks')}, "
        f"{_count(len(seeds), 'seed')}."
    )


def doubts(found: Comparison) -> list[str]:
    """What a reader must know before believing the verdict, in sentences."""
    said = []
    few = [group for group in found.groups if group.updates < FEW_UPDATES]
    for group in few:
        said.append(
            f"{group.label} made only {_count(group.updates, 'update')} of the weights; with fewer than {FEW_UPDATES} "
            f"a rule has hardly begun, so train longer before you judge it."
        )
    for run in found.runs:
        if run.state != "ended":
            why = f": {run.failed}" if run.failed else ""
            said.append(f"The run in {run.path} is {run.state}{why}{'' if why.endswith('.') else '.'}")
        if run.torn:
            said.append(f"The tape of {run.path} was read as far as it goes: {run.torn}")
    if len({run.virtual for run in found.runs}) > 1:
        said.append("Some runs have seconds of a virtual clock and some of the wall clock, which do not compare.")
    names = [name for name, _ in differences(found.runs)]
    other = [name for name in names if _unlike(name)]
    if other:
        listed = ", ".join(other[:6]) + (f" and {len(other) - 6} more" if len(other) > 6 else "")
        said.append(f"The runs differ in more than the rule: {listed}.")
    if len(found.groups) > 1 and all(len(group.runs) == 1 for group in found.groups):
        said.append("Each rule ran with one seed: differences of a few percent may be chance.")
    return said


_OF_THE_RULE_OR_THE_MACHINE = ("recipe.rule.", "recipe.seed", "engine", "hosts", "hardware", "version of", "team.")


def _unlike(name: str) -> bool:
    return not name.startswith(_OF_THE_RULE_OR_THE_MACHINE) or name in (
        "team.workers", "team.slow", "team.device", "team.memory",
    )  # fmt: skip


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _span(values: Sequence[int]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"
