"""The loss scale of a run under float16, as it stands: a function of the updates so far, and so the same for any team.

In lockstep every worker keeps it; a server keeps it for all, and tells each worker which one to compute with; under
rules with local steps each worker has its own, as it has an optimizer of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from instep.errors import CheckpointError
from instep.loss_scale import MOST_SCALE, LossScale, is_power_of_two
from instep.record.shapes import SCALER, misfit


class Scaler:
    """What the objective is multiplied by for backward, `value`; by 1, always, without a `LossScale`."""

    def __init__(self, how: LossScale | None):
        self._how = how
        self.value = 1.0 if how is None else how.init
        self._good = 0  # updates in a row

    @property
    def scales(self) -> bool:
        """Whether there is a scale at all."""
        return self._how is not None

    def yields(self, used: float | None = None) -> bool:
        """Whether a gradient that is not finite may be the fault of the scale that it was computed with, `used` or the
        present one: a lower one is left to try."""
        return self._how is not None and (used or self.value) > self._how.least

    def scaled(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The weights of an objective's terms for backward."""
        return {name: self.value * weight for name, weight in weights.items()}

    def said(self) -> str:
        """That it is as low as it may be, for a sentence on a gradient; "" without one."""
        return "" if self._how is None else f", with a loss scale of {self.value:g}, the least,"

    def take(self, value: float) -> None:
        """Computes with this scale, which another process keeps."""
        self.value = value

    def made(self, *, finite: bool, used: float | None = None) -> None:
        """Notes an update that was made, or, where its gradient was not `finite`, left out.

        used: the scale that the gradient was computed with, if not the present one: of several that were on their way
        with one scale, only the first lowers it.
        """
        how = self._how
        if how is None:
            return
        if not finite:
            self.value = min(self.value, max(how.least, (used or self.value) * how.backoff))
            self._good = 0
            return
        self._good += 1
        if self._good >= how.growth_interval:
            self.value = min(self.value * how.growth, MOST_SCALE)
            self._good = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it, as "loss_scale", if there is one."""
        return {"loss_scale": {"scale": self.value, "good": self._good}} if self.scales else {}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Takes back what `state` gave as "loss_scale"; None starts anew. Raises CheckpointError where it is none."""
        if self._how is None:
            return
        state = {"scale": self._how.init, "good": 0} if state is None else state
        wrong = misfit(state, SCALER)
        if wrong is None and not is_power_of_two(state["scale"]):
            wrong = f"'scale' is {state['scale']}, and it must be a power of two"
        if wrong is not None:
            raise CheckpointError(f"of the loss scale in the checkpoint {wrong}; use an earlier checkpoint.")
        self.value, self._good = float(state["scale"]), state["good"]
