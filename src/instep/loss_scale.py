"""By what the objective is multiplied for backward under float16: data, checked. The state is `instep.worker.scaler`'s.

The smallest number of float16 is 2^-24, and gradients that are smaller come out as 0. So backward starts from the
objective times a power of two, and the gradient is divided by it in float32, which changes none of its bits. Where it
was too large a gradient is not finite: that update is not made, and the factor falls (Micikevicius et al., 2018,
arXiv:1710.03740, section 3.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from instep.errors import RecipeError
from instep.tables import at_least, check_types

MOST_SCALE = 2.0**126
"""Twice as much would be the largest power of two in float32."""


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """The loss scale by update, as `torch.amp.GradScaler` has it. It is part of the recipe, for it decides the result.

    >>> instep.LossScale(init=1024.0).backoff
    0.5

    Fields
    ------
    init: the scale of the first update.
    growth: by what it is multiplied after so many good updates in a row.
    backoff: by what it is multiplied after an update that was left out, since its gradient was not finite.
    growth_interval: those good updates.
    least: it falls no lower; a gradient that is not finite there is a bad batch, see `Watch.bad_batch`.

    All scales and factors are powers of two, for these alone change no bit of a gradient. Raises RecipeError else.
    """

    init: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    growth_interval: int = 2000
    least: float = 2.0**-14

    def __post_init__(self) -> None:
        check_types(self, "loss_scale")
        for key in ("init", "growth", "backoff", "least"):
            value = getattr(self, key)
            if not is_power_of_two(value):
                raise RecipeError(
                    f"'loss_scale.{key}' is {value:g}; it must be a power of two, such as {_nearest(value):g}: others "
                    f"would round what they scale."
                )
        if not self.growth > 1:
            raise RecipeError(f"'loss_scale.growth' is {self.growth:g}; it must be above 1, as 2 is.")
        if not self.backoff < 1:
            raise RecipeError(f"'loss_scale.backoff' is {self.backoff:g}; it must be below 1, as 0.5 is.")
        at_least("loss_scale.growth_interval", self.growth_interval, 1)
        if not 1 / MOST_SCALE <= self.least <= self.init <= MOST_SCALE:
            raise RecipeError(
                f"'loss_scale.init' is {self.init:g} and 'loss_scale.least' {self.least:g}; the first must be at least "
                f"the second, and both lie from 2^-126 to 2^126."
            )


def of_precision(precision: str, given: LossScale | None) -> LossScale | None:
    """What a recipe has: float16 with none `given` has the defaults. Raises RecipeError for one without float16."""
    if precision == "float16":
        return given or LossScale()
    if given is not None:
        raise RecipeError(
            f"'recipe.loss_scale' is given and 'recipe.precision' is '{precision}', whose gradients need none; leave "
            f"it out, or set recipe.precision to 'float16'."
        )
    return None


def is_power_of_two(value: float) -> bool:
    """Whether it is one, and so changes no bit of what it scales."""
    return value > 0 and math.isfinite(value) and math.frexp(value)[0] == 0.5


def _nearest(value: float) -> float:
    """A power of two beside any number."""
    if not (value > 0 and math.isfinite(value)):
        return 2.0
    return 2.0 ** max(-126, min(126, round(math.log2(value))))
