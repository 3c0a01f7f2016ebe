"""What the workers of a team in lockstep do together between two steps: checksums, evaluations, checkpoints, the end.

Where others can stand in for one that has died, all of them know what worker 0 told and decided, and what it still does
by itself: whoever holds its place does that again from its beginning, and the tape leaves out what was told before.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection
from typing import Any, NoReturn, TypeVar

import torch

from instep.engines.sharding import Placement
from instep.engines.shared_evaluation import SharedEvaluation
from instep.engines.standing_in import OthersParts
from instep.engines.step_facts import HAND_IN
from instep.record.events import ChecksummedEvent
from instep.transport.group import LEFT, Group, LeftTogether
from instep.worker.evaluation import Evaluation
from instep.worker.milestones import Progress
from instep.worker.replica import Replica
from instep.worker.tensor_checksums import checksum_when_due

T = TypeVar("T")


class BetweenSteps:
    """One worker's side of it. `say(event)` writes to the tape, now or where another's place is held then."""

    def __init__(
        self,
        replica: Replica,
        worker: int,
        placement: Placement,
        group: Group,
        others: OthersParts,
        evaluation: SharedEvaluation,
        say: Callable[[ChecksummedEvent], None],
    ):
        self._replica, self._worker, self._placement, self._group = replica, worker, placement, group
        self._others, self._evaluation, self._say = others, evaluation, say
        self.handed_in: dict[str, Any] | None = None
        """Where some have left for good: the training state of all, at worker 0; nothing of it at the others."""

    @property
    def others_can_lead(self) -> bool:
        """Whether others can stand in for worker 0, so that all know what it decides."""
        return self._others.possible

    @property
    def holds(self) -> Collection[int]:
        """The workers that this one stands in for at present."""
        return self._others.holds

    def lead(self, do: Callable[[], None]) -> None:
        """Worker 0 does this; whoever holds its place does, if it dies before all have come to what follows."""
        if self._worker == 0:
            do()
        else:
            self._others.owes(do)

    def answer(self, make: Callable[[], T]) -> T:
        """What worker 0 makes, or who holds its place, at all of them; each its own where nobody can stand in."""
        if not self._others.possible:
            return make()
        self._others.until_told(lambda worker: b"" if worker else pickle.dumps(make()))
        told: T = pickle.loads(self._group.share(b"" if self._worker else pickle.dumps(make()))[0])
        return told

    def agree(self, flag: bool) -> bool:
        """As `Placement.agree`; where worker 0 has told its `answer`, all know."""
        return flag if self._others.possible else self._placement.agree(flag)

    def meet(self) -> None:
        """Waits until all are there."""
        self._others.until_told(lambda worker: torch.empty(0))
        self._group.meet()

    def part(self, word: int) -> NoReturn:
        """Leaves the group with all others, as worker 0 has told by `word`: nobody waits for any part of the step any
        more. Raises LeftTogether.
        """
        if word == HAND_IN:
            self.handed_in = self.training_state() or {}
        self.meet()
        raise LeftTogether(LEFT)

    def checksums(self, progress: Progress) -> None:
        """Has the tape tell those of this version, if they are due."""
        self._others.until_told(self._placement.checksums_by)
        to = None if self._others.possible else 0
        checksum_when_due(self._replica, progress, self._say, lambda: self._placement.checksums(to))

    def evaluate(self, version: int) -> Evaluation | None:
        """The objective on the held-out data, see `SharedEvaluation`; at all, but for what it gathers, where others can
        stand in for worker 0."""
        return self._evaluation.of(version, self._group, self._others)

    def evaluated(self, version: int) -> None:
        """That version is not to be evaluated any more."""
        self._evaluation.version = version

    def evaluate_alone(self) -> Evaluation | None:
        """All of it by this worker, with what the objective gathers."""
        return self._evaluation.alone()

    def training_state(self) -> dict[str, Any] | None:
        """As `Placement.training_state`."""
        self._others.until_told(lambda worker: self._placement.told_by(worker) if worker else b"")
        return self._placement.training_state()
