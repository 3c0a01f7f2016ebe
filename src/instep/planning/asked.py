"""What goes to the process that computes a plan, and what comes back. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from instep.planning.described import Description
from instep.planning.found import By, Way
from instep.planning.race import Outcome
from instep.rules.rule import UpdateRule


@dataclass(frozen=True)
class PlanAsked:
    """What a plan is asked. rules: by their texts. share: of the work of trying all."""

    described: Description
    rules: Mapping[str, UpdateRule]
    workers: Sequence[int]
    target: float
    by: By
    seeds: Sequence[int]
    share: float


@dataclass
class Computation:
    """What was found. spent, allowed, all: global batches with gradients. checkpoint_s: measured, or described."""

    ways: list[Way]
    outcome: Outcome
    finalists: list[int]
    rivals: list[int]
    spent: int
    allowed: int
    all: int
    timed: int
    checkpoint_s: float
    cpu_s: float
