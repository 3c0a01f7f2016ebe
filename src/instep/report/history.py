"""What a run's tape tells, in arrays: the objective over items, seconds and bytes, what each worker did, and the rest.

Seconds begin when the first worker is there, and go on over sessions: those of a resumed run follow the last of the
session before. After a restart or a resume from an earlier version the updates beyond it are gone, with their items;
the seconds and bytes that they took are not.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instep.record.hardware import hosts_of, in_words
from instep.rules.presets import text_of
from instep.rules.rule import UpdateRule
from instep.tables import as_saved, from_table


@dataclass(frozen=True)
class Point:
    """The held-out objective of one version, after so many items, seconds and bytes."""

    version: int
    items: int
    seconds: float
    bytes: int
    objective: float


@dataclass(frozen=True)
class MadeAt:
    """What the model of one version made. text: a sample, or None. files: relative to the run folder. figures: by name.
    seconds: None for the one at the end.
    """

    version: int
    seconds: float | None
    text: str | None
    files: Sequence[str]
    figures: Mapping[str, Any]


@dataclass
class Curve:
    """The training objective at each update, in order. Arrays and a list of one length.

    items, seconds, bytes: until then, from the start. own_items: of that update alone.
    """

    version: array[int] = field(default_factory=lambda: array("q"))
    items: array[int] = field(default_factory=lambda: array("q"))
    own_items: array[int] = field(default_factory=lambda: array("q"))
    seconds: array[float] = field(default_factory=lambda: array("d"))
    bytes: array[int] = field(default_factory=lambda: array("q"))
    objective: array[float] = field(default_factory=lambda: array("d"))
    turn: list[str] = field(default_factory=list)
    """Whose it was, where objectives take turns; else ""."""

    def __len__(self) -> int:
        return len(self.version)

    def back_to(self, version: int) -> None:
        """Takes back what came after `version`."""
        keep = len(self.version)
        while keep and self.version[keep - 1] > version:
            keep -= 1
        for column in vars(self).values():
            del column[keep:]


@dataclass
class Strip:
    """What one worker did: intervals [from, to) in seconds with the version that it worked on; when it came and went.

    computing, communicating, evaluating: each a flat array from, to, from, to, ... `evaluating` is where it did nothing
    else while held-out data were looked at, or artifacts made: by it in lockstep, else by the server.
    """

    computing: array[float] = field(default_factory=lambda: array("d"))
    computing_version: array[int] = field(default_factory=lambda: array("q"))
    communicating: array[float] = field(default_factory=lambda: array("d"))
    communicating_version: array[int] = field(default_factory=lambda: array("q"))
    evaluating: array[float] = field(default_factory=lambda: array("d"))
    evaluating_version: array[int] = field(default_factory=lambda: array("q"))
    there: array[float] = field(default_factory=lambda: array("d"))
    """from, to, ..."""
    events: list[tuple[float, str]] = field(default_factory=list)
    """(seconds, what) of joins and losses"""


@dataclass(eq=False)
class History:
    """A run as its tape tells it. `path`: its folder."""

    path: Path
    start: Mapping[str, Any]
    """The first ``run_started``."""
    curve: Curve
    held_out: list[Point]
    strips: dict[int, Strip]
    busy_s: dict[int, float]
    there_s: dict[int, float]
    staleness: Counter[int]
    hosts: list[str]
    planned: Mapping[str, Any] | None
    problems: list[str]
    """Warnings and losses, in order, each once."""
    result: Mapping[str, Any] | None
    """What the run came to; None where its tape has no end."""
    failed: str
    seconds: float
    bytes: int
    dropped: int
    sessions: int
    restarts: int
    shown: list[MadeAt] = field(default_factory=list)
    """What its models made, during the run and at its end."""
    held_out_by_turn: Mapping[str, list[Point]] = field(default_factory=dict)
    """Where objectives take turns, that of each."""
    torn: str = ""
    """Why the tape was read no further, or ""."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The resolved recipe."""
        found: Mapping[str, Any] = self.start["recipe"]
        return found

    @property
    def name(self) -> str:
        """Of the recipe."""
        return str(self.recipe.get("name") or "a recipe")

    @property
    def rule(self) -> str:
        """As a person writes it, such as ``diloco:20``."""
        made = self.made_rule
        return text_of(made) if made else str(self.recipe["rule"]["name"])

    @property
    def made_rule(self) -> UpdateRule | None:
        """None where its tape holds a rule that this version does not know."""
        table = self.recipe["rule"]
        try:
            return from_table(UpdateRule, as_saved(UpdateRule, table), "rule") if "quorum" in table else None
        except Exception:  # of another version's
            return None

    @property
    def workers(self) -> int:
        """Of the team at the start."""
        return int(self.start["team"].get("workers", 1))

    @property
    def hardware(self) -> str:
        """Of its hosts, each kind once; "" where its tape does not tell."""
        return "; ".join(dict.fromkeys(in_words(told) for _, told in hosts_of(self.start)))

    @property
    def virtual(self) -> bool:
        """Whether its seconds are those of a virtual clock."""
        return bool(self.start["clock"] == "virtual")

    @property
    def state(self) -> str:
        """How it stands: "ended", "interrupted", "failed", or "going on or killed" where its tape has no end."""
        if self.failed:
            return "failed"
        if self.result is None:
            return "going on or killed"
        return "interrupted" if self.result.get("interrupted") else "ended"

    @property
    def updates(self) -> int:
        """Versions that it reached."""
        return self.curve.version[-1] if len(self.curve) else 0

    @property
    def idle_share(self) -> float | None:
        """The mean share of its time, evaluations left out, in which a worker did not compute."""
        evaluating = {
            who: sum(strip.evaluating[1::2]) - sum(strip.evaluating[::2]) for who, strip in self.strips.items()
        }
        usual = sum(evaluating.values()) / len(evaluating) if evaluating else 0.0
        times = {who: there - evaluating.get(who, usual) for who, there in self.there_s.items()}
        shares = [1 - min(1.0, self.busy_s.get(who, 0.0) / time_s) for who, time_s in times.items() if time_s > 0]
        return sum(shares) / len(shares) if shares else None


def windows(curve: Curve, most: int, turn: str | None = None) -> list[Point]:
    """The training objective in at most `most` windows of about equal items: the mean by items, at each window's end.

    Updates without an objective, and those that are not finite, are left out; those of all turns but `turn` if given.
    """
    found: list[Point] = []
    total = curve.items[-1] if len(curve) else 0
    if not total:
        return found
    edge, weight, sum_ = total / most, 0, 0.0
    last = len(curve) - 1
    for place in range(len(curve)):
        objective, items = curve.objective[place], curve.own_items[place]
        if math.isfinite(objective) and items and turn in (None, curve.turn[place]):
            weight += items
            sum_ += objective * items
        if weight and (curve.items[place] >= edge * (len(found) + 1) * (1 - 1e-12) or place == last):
            found.append(
                Point(curve.version[place], curve.items[place], curve.seconds[place], curve.bytes[place], sum_ / weight)
            )
            weight, sum_ = 0, 0.0
    return found
