"""What is done about an objective that goes wrong: data, and the pure function that judges by it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from instep.errors import RecipeError
from instep.rules import UpdateRule
from instep.tables import added, at_least, check_types

SIGMA_PER_MAD = 1.4826
"""Standard deviations of a normal distribution in its median absolute deviation (Hampel, 1974)."""

LEAST_SCALE = 1e-3
"""The scale is at least this share of the median's size: an objective that stands still has no spread of its own."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """How the objective is watched. It is part of the recipe, for most answers change the result.

    Fields
    ------
    spike: what an update is answered with whose objective is a spike, see `limit`. "ignore" and "warn" make it all the
        same; "warn" warns of those that have none in the window before. "skip" leaves it out: weights, buffers and the
        optimizer's state stay, and its samples are used up. "stop" leaves it out and ends the run. "rollback" leaves it
        out and sets weights, buffers and the optimizer's state back to those last kept; the run goes on with the next
        samples, since the same ones would give the same spike.
    window: updates, the last ones, that a new objective is compared with. The first `window` are never spikes.
    deviations: how many robust standard deviations above their median a spike is.
    rollback_every: steps between states kept for a rollback, in the memory of every process that makes updates. The
        checkpoints on the disk are the team's affair, and would let it decide the result.
    rollbacks: how many there may be; the next spike stops the run.
    bad_batch: what is done where a term or the gradient is not finite, or a whole batch has no items. "stop" ends the
        run before the update. "skip" leaves it out, as for a spike; under a rule with local steps the worker's step.
    bad_batches: how many may be left out so in a run; the next one stops it.
    patience: evaluations without a new best held-out objective after which the run ends; None for no such end.

    Raises RecipeError for a value out of range.
    """

    spike: Literal["ignore", "warn", "skip", "stop", "rollback"] = "warn"
    window: int = 50
    deviations: float = 10.0
    rollback_every: int = 100
    rollbacks: int = 3
    bad_batch: Literal["stop", "skip"] = added("stop", default="stop")
    bad_batches: int = added(10, default=10)
    patience: int | None = None

    def __post_init__(self) -> None:
        check_types(self, "watch")
        for key, least in (("window", 3), ("rollback_every", 1), ("rollbacks", 1), ("bad_batches", 1), ("patience", 1)):
            if (value := getattr(self, key)) is not None:
                at_least(f"watch.{key}", value, least)
        if not 0 < self.deviations < float("inf"):
            raise RecipeError(f"'watch.deviations' is {self.deviations}; it must be a finite number above 0.")

    def check(self, rule: UpdateRule, evaluate_every: int) -> None:
        """Raises RecipeError where the recipe's rule or its evaluations give an answer no meaning."""
        if self.spike == "rollback" and not rule.synchronous:
            raise RecipeError(
                f"'watch.spike' is 'rollback' and the rule is '{rule.name}': contributions computed from the weights "
                f"that are taken back would still be merged; take the rule 'synchronous', or set watch.spike to 'stop'."
            )
        if self.spike == "skip" and not rule.gradients:
            raise RecipeError(
                f"'watch.spike' is 'skip' and the rule is '{rule.name}': the workers' own optimizers have taken their "
                f"steps already, which nobody can leave out; set watch.spike to 'stop' or 'warn'."
            )
        if self.patience is not None and not evaluate_every:
            raise RecipeError(
                f"'watch.patience' is {self.patience} evaluations, and 'recipe.evaluate_every' is 0, so there are none "
                f"before the end; set recipe.evaluate_every."
            )

    @property
    def ends_early(self) -> bool:
        """Whether a run may end before its last step."""
        return self.spike in ("stop", "rollback") or self.patience is not None


def limit(past: Sequence[float], deviations: float) -> float:
    """The objective above which an update is a spike: median + deviations * scale of those before it.

    scale: 1.4826 times the median absolute deviation from the median, which up to half of `past` cannot carry away,
    and at least a thousandth of the median.
    """
    middle = statistics.median(past)
    spread = statistics.median(abs(value - middle) for value in past)
    return middle + deviations * max(SIGMA_PER_MAD * spread, LEAST_SCALE * abs(middle))


def usual(objective: float, past: Sequence[float], deviations: float) -> bool:
    """Whether `objective` is no spike for sure, in a fraction of the time of `limit`; False where that is to tell.

    Fewer than half of `past` lie nearer to the median than both quartiles do, so the scale is at least the nearer one's
    distance. Rounding keeps order, so what lies within that bound lies within `limit`, to the bit.
    """
    ordered, quarter = sorted(past), len(past) // 4
    upper = ordered[quarter + len(past) // 2]
    if not math.isfinite(sum(ordered)):
        return False
    middle = statistics.median(ordered)
    spread = min(middle - ordered[quarter], upper - middle)
    return objective <= middle + deviations * max(SIGMA_PER_MAD * spread, LEAST_SCALE * abs(middle))
