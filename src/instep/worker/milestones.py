"""How far a run is, and what is due then: when it evaluates, saves, marks the best and ends, in every engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from instep.errors import CheckpointError
from instep.recipe import Recipe
from instep.record.checkpoint import Loaded


@dataclass
class Progress:
    """What has been done so far, beside the weights. It travels in checkpoints. `steps` are global batches of items;
    under a synchronous rule they are the versions.
    """

    version: int = 0
    steps: int = 0
    items: int = 0
    train_s: float = 0.0
    objective_first: float | None = None
    objective_last: float | None = None
    held_out: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)  # version and objective of the best evaluation
    evaluations_since: int = 0
    skipped: int = 0  # updates that were left out because of a spike
    bad_batches: int = 0  # that were left out because they were not finite, or had no items
    overflows: int = 0  # updates, or local steps, that were left out since the loss scale was too large
    stopped: str = ""  # why the run ended before its last step
    checksum_s: float = 0.0  # of train_s, spent on the tape's checksums by tensor
    unevaluated: bool = False  # an evaluation was due at this version, and raised: a resume makes up for it

    @classmethod
    def resumed(cls, saved: Loaded, recipe: Recipe) -> Progress:
        """Where the run stood at a checkpoint. Another watch from there on lets one go on that its watch has ended.

        Raises CheckpointError where it tells of what nobody here knows.
        """
        told = saved.meta.get("progress", {})
        unknown = sorted(told.keys() - {each.name for each in fields(cls)})
        if unknown:
            raise CheckpointError(
                f"the checkpoint of version {saved.version} tells of '{unknown[0]}', which this version of Instep does "
                f"not know; go on with the version that wrote it."
            )
        progress = cls(**{**told, "version": saved.version})
        if any(change.watch is not None and change.version == saved.version for change in recipe.changes):
            progress.stopped = ""
        return progress

    def merged(self, *, version: int, steps: int, items: int, objective: float | None) -> None:
        """Notes an update; `objective` is None for one without items."""
        self.version, self.steps = version, steps
        self.items += items
        if objective is not None:
            self.objective_first = objective if self.objective_first is None else self.objective_first
            self.objective_last = objective

    def evaluated(self, facts: Mapping[str, Any], steps: int, patience: int | None) -> None:
        """Notes an evaluation of a run of `steps`, and ends it where the watch's `patience` is at its end."""
        self.held_out = dict(facts)
        if self.steps == steps:
            return  # the last one: a run that is prolonged has not seen it
        if facts["objective"] < self.best.get("objective", math.inf):
            self.best = {"version": facts["version"], "objective": facts["objective"]}
            self.evaluations_since = 0
            return
        self.evaluations_since += 1
        if patience is not None and self.evaluations_since >= patience and not self.stopped:
            best = self.best
            known = f"{best['objective']:.6g} at version {best['version']}" if best else "none that is finite"
            self.stopped = (
                f"the held-out objective, {facts['objective']:.6g}, is no better than {known}, "
                f"{patience} evaluation{'' if patience == 1 else 's'} before; the run ends, as watch.patience says."
            )


@dataclass(frozen=True)
class Milestones:
    """What is due in a run of `steps` global batches: every so many an evaluation, a checkpoint, artifacts; 0 for
    none.
    """

    steps: int
    evaluate_every: int
    checkpoint_every: int = 0
    artifacts_every: int = 0

    def evaluates(self, before: int, now: int) -> bool:
        """Whether the updates that have brought the run from batch `before` to `now` make an evaluation due.

        Not those that end it: the last evaluation comes after the last checkpoint, see `end`.
        """
        return now < self.steps and _passes(self.evaluate_every, before, now)

    def saves(self, before: int, now: int) -> bool:
        """Whether they make a checkpoint due. The one that the run ends with is the engine's."""
        return now < self.steps and _passes(self.checkpoint_every, before, now)

    def shows(self, before: int, now: int) -> bool:
        """Whether they make artifacts due; those that the run ends with are the engine's."""
        return now < self.steps and _passes(self.artifacts_every, before, now)

    def may_save(self, batch: int) -> bool:
        """Whether the weights after `batch`, from 0, may be saved: as due, as the best, or as the last."""
        now = batch + 1
        return (
            now == self.steps or _passes(self.checkpoint_every, batch, now) or _passes(self.evaluate_every, batch, now)
        )

    def reached(
        self, progress: Progress, before: int, evaluate: Callable[[], bool], keep: Callable[[bool, bool], None]
    ) -> None:
        """After updates: has what is due done, and what an evaluation that raised has left undone.

        `evaluate` tells whether this version is to be kept as the best so far; `keep` (due, best) saves it.
        """
        progress.unevaluated |= self.evaluates(before, progress.steps)
        best = progress.unevaluated and progress.steps < self.steps and evaluate()
        progress.unevaluated = False
        keep(self.saves(before, progress.steps), best)

    def ended(self, progress: Progress, evaluate: Callable[[], bool], mark_best: Callable[[], None]) -> None:
        """After the last checkpoint of a run that was not interrupted: what the end adds to it.

        Nothing that was learnt can be lost by it.
        """
        if progress.held_out.get("version") != progress.version and evaluate():
            mark_best()


def _passes(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` steps lies after `before` and up to `now`; 0 has none."""
    return bool(every) and before // every != now // every
