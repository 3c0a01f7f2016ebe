"""How the learning rate changes by step, and what a resume may change from a version on: data, and what it means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from instep.errors import RecipeError
from instep.tables import added, at_least, check_types
from instep.watch import Watch


@dataclass(frozen=True)
class Schedule:
    """How the learning rate changes by step: a factor on the optimizer's own rate.

    All kinds rise linearly from 0 over `warmup_steps`. Then ``constant`` stays at 1; ``cosine`` falls along half a
    cosine to `final` at the last step (Loshchilov and Hutter, 2017); ``wsd``, warm-up, stable, decay, stays at 1 and
    falls linearly to `final` over the last `decay_steps`, by default a fifth of all (Hu et al., 2024). All of it is
    times `scale`, whatever the optimizer.
    """

    kind: Literal["constant", "cosine", "wsd"] = "constant"
    warmup_steps: int = 0
    final: float = 0.1
    decay_steps: int | None = None
    scale: float = added(1.0, default=1.0)

    def __post_init__(self) -> None:
        check_types(self, "schedule")
        at_least("schedule.warmup_steps", self.warmup_steps, 0)
        if not 0 <= self.final <= 1:
            raise RecipeError(f"'schedule.final' is {self.final}; it is a share of the learning rate, from 0 to 1.")
        if not 0 < self.scale < math.inf:
            raise RecipeError(f"'schedule.scale' is {self.scale}; it must be a finite number above 0.")
        if self.decay_steps is not None:
            at_least("schedule.decay_steps", self.decay_steps, 1)
            if self.kind != "wsd":
                raise RecipeError(f"'schedule.decay_steps' goes with kind 'wsd' only, and kind is {self.kind!r}.")

    @property
    def changes(self) -> bool:
        """Whether the factor is ever another than 1."""
        return self.kind != "constant" or self.warmup_steps > 0 or self.scale != 1

    def factor(self, step: int, steps: int) -> float:
        """The factor for the update from version `step` to ``step + 1``, of `steps` in all."""
        return self.scale * self._factor(step, steps)

    def _factor(self, step: int, steps: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "cosine":
            done = (step + 1 - self.warmup_steps) / max(1, steps - self.warmup_steps)
            return self.final + (1 - self.final) * (1 + math.cos(math.pi * min(1.0, done))) / 2
        if self.kind == "wsd":
            decay_steps = self.decay_steps if self.decay_steps is not None else max(1, steps // 5)
            left = max(0, steps - (step + 1)) / decay_steps
            return self.final + (1 - self.final) * min(1.0, left)
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a resume changed: it holds from `version` on, and nothing before it is rewritten. Part of the recipe.

    Fields
    ------
    version: updates that the weights had had. Under a synchronous rule that is a step.
    schedule, watch: those of the recipe from there on.
    lr: the argument `lr` of the recipe's optimizer from there on; what the optimizer keeps stays.
    skip_samples: more samples, by index, that are left out of their batches.

    None changes nothing. Raises RecipeError for a value out of range.
    """

    version: int
    schedule: Schedule | None = None
    watch: Watch | None = None
    lr: float | None = None
    skip_samples: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip_samples", tuple(sorted(set(self.skip_samples))))
        check_types(self, "changes")
        at_least("changes.version", self.version, 0)
        if any(index < 0 for index in self.skip_samples):
            raise RecipeError(
                f"skip_samples (--skip-samples) holds {min(self.skip_samples)}; samples are counted from 0."
            )


@dataclass(frozen=True)
class Phase:
    """What of a recipe holds at one version, after the changes up to it. `lr`: None for the optimizer's own."""

    schedule: Schedule
    watch: Watch
    lr: float | None = None
    skipped: frozenset[int] = frozenset()

    def after(self, changes: Sequence[Change]) -> Phase:
        """What holds after `changes`, one after the other."""
        phase = self
        for change in changes:
            phase = Phase(
                change.schedule or phase.schedule,
                change.watch or phase.watch,
                phase.lr if change.lr is None else change.lr,
                phase.skipped.union(change.skip_samples),
            )
        return phase


def what_changed(table: Mapping[str, Any], version: int) -> str:
    """In words, what the changes in a recipe's table made of it at `version`: "learning rate 0.01, scale 0.5"."""
    now: dict[str, Any] = {"schedule": table.get("schedule", {}), "watch": table.get("watch", {})}
    words: list[str] = []
    for change in table.get("changes", ()):
        here = change["version"] == version
        for key in ("schedule", "watch"):
            after = change.get(key, now[key])
            differing = [name for name in {**now[key], **after} if now[key].get(name) != after.get(name)]
            words += [f"{key}.{name} {after.get(name, 'none')}" for name in differing] if here else []
            now[key] = after
        if here and "lr" in change:
            words.append(f"learning rate {change['lr']:g}")
        if here and change.get("skip_samples"):
            left = len(change["skip_samples"])
            words.append(f"without {left:,} sample{'' if left == 1 else 's'}")
    return ", ".join(words)
