"""Which recomputed values a replica compares with the first pass after its first step, and what that takes."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from instep.errors import RecomputeError
from instep.gradient_checkpointing import Applied
from instep.turns import Turns

SHARE = 0.005
"""Of the run's seconds since its first step, what comparing may take."""

FREE_S = 0.1
"""Seconds of comparing that a run has besides, so that a short one too is looked at."""


class SpotChecks:
    """Has all blocks verified in a replica's first step, and then one block in one microbatch of a step.

    Which block and which microbatch follows from the step alone: every block once in as many steps as there are blocks,
    in an order drawn anew each time, so that no block is passed over where only some steps are checked. Whether
    it is done follows from the seconds: in a step that ends with a checkpoint, if this block's check is within `share`
    of the seconds of the run; in others, if a check of a checkpoint's step is besides. No bit depends on either.

    `workers`: how many wait for each other, and so for one that verifies.
    """

    def __init__(self, applied: Applied, *, microbatches: int, steps: int, checkpoint_every: int, workers: int = 1):
        self._applied, self._blocks = applied, sorted(applied.verify_s)
        self._microbatches, self._steps, self._checkpoint_every = microbatches, steps, checkpoint_every
        self._share, self._free_s = SHARE / workers, FREE_S / workers
        self._first: int | None = None
        self._began_s = 0.0  # after the first step
        self._first_s: dict[str, float] = {}  # what each block took in the first step, and
        self._first_passes = 0  # in how many microbatches
        self._told_s = 0.0
        self._right: dict[str, int] = {}  # the last step in which each block was verified
        self._now = ""

    def choose(self, step: int, microbatch: int) -> None:
        """Before a microbatch is computed: sets what is verified in it."""
        if self._first is None:
            self._first = step
        if step == self._first and not self._began_s:
            self._applied.verify = True
            self._first_passes += 1
            self._now = "*"
            return
        if not self._began_s:
            self._began_s = time.monotonic()
            self._first_s = dict(self._applied.verify_s)
            self._right = dict.fromkeys(self._blocks, self._first)
        self._now = self._block(step, microbatch)
        self._applied.verify = self._now

    def unchecked(self, step: int) -> None:
        """Before a microbatch of `step` is computed for another reason, of which nothing is chosen here."""

    def computed(self, step: int) -> None:
        """After it was computed, without an error."""
        if self._now and self._now != "*":
            self._right[self._now] = step

    def say(self, error: RecomputeError) -> RecomputeError:
        """The error with what it means for the steps before."""
        if not self._began_s or self._now not in self._right:
            return error
        return RecomputeError(
            f"{error.message} It was right in step {self._right[self._now] + 1}, when it was compared last; "
            f"gradients of the steps since then may be wrong too, and what they left in the weights.",
            detail=error.detail,
        )

    def took_s(self) -> float:
        """Seconds of comparing since this was asked last."""
        total_s = sum(self._applied.verify_s.values())
        seconds, self._told_s = total_s - self._told_s, total_s
        return seconds

    def _block(self, step: int, microbatch: int) -> str:
        """The block that is verified in this microbatch; "" for none."""
        if not self._blocks or microbatch != random.Random(step).randrange(self._microbatches):
            return ""
        turn, place = divmod(step, len(self._blocks))
        name = random.Random(turn).sample(self._blocks, len(self._blocks))[place]
        one_s = {block: seconds / self._first_passes for block, seconds in self._first_s.items()}
        spent_s = sum(self._applied.verify_s.values()) - sum(self._first_s.values())
        left_s = self._free_s + self._share * (time.monotonic() - self._began_s) - spent_s - one_s[name]
        at_checkpoint = (step + 1) % self._checkpoint_every == 0 or step + 1 == self._steps
        return name if left_s >= (0.0 if at_checkpoint else max(one_s.values())) else ""


class ChecksByTurn:
    """Of several plans, one for each of the objectives that take turns: which is on the model follows from the step.

    each: the plans in the order of the turns, with what is verified of them; None where nothing is.
    """

    def __init__(self, order: Turns, each: Sequence[tuple[Applied, SpotChecks | None]]):
        self._order, self._each = order, each
        self._on = -1

    def choose(self, step: int, microbatch: int) -> None:
        """As `SpotChecks.choose`."""
        if (checks := self._put_on(step)) is not None:
            checks.choose(step, microbatch)

    def computed(self, step: int) -> None:
        """As `SpotChecks.computed`."""
        if (checks := self._put_on(step)) is not None:
            checks.computed(step)

    def say(self, error: RecomputeError) -> RecomputeError:
        """As `SpotChecks.say`, of the plan that is on the model."""
        checks = self._each[self._on][1]
        return error if checks is None else checks.say(error)

    def took_s(self) -> float:
        """As `SpotChecks.took_s`."""
        return sum(checks.took_s() for _, checks in self._each if checks is not None)

    def unchecked(self, step: int) -> None:
        """As `SpotChecks.unchecked`."""
        self._put_on(step)

    def _put_on(self, step: int) -> SpotChecks | None:
        place = self._order.place(step)
        if place != self._on:
            self._each[place][0].put_on()
            self._on = place
        return self._each[place][1]
