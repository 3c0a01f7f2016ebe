"""What a worker has done of a contribution before it has the update of its last one, under rules with `overlap`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from instep.errors import RecipeError
from instep.reduce.buffers import Buffers
from instep.reduce.written import WrittenParameters
from instep.rules.rule import UpdateRule
from instep.rules.work import Work
from instep.worker.local_steps import LocalSteps
from instep.worker.trainable import Trainable


@dataclass(frozen=True)
class Begun:
    """A piece whose first steps are made.

    before, after: the module's buffers at their begin and end. off_before, off_after: see `Trainable`.
    """

    work: Work
    made: LocalSteps
    before: Sequence[Tensor]
    after: Sequence[Tensor]
    off_before: frozenset[int]
    off_after: frozenset[int]

    def carry_over(self, buffers: Buffers, trainable: Trainable) -> None:
        """Brings what the steps changed beside the weights into what the update says, which the module has by now."""
        buffers.carry_over(sorted(self.made.changed), self.before, self.after, self.made.steps)
        ceased, begun = self.off_after - self.off_before, self.off_before - self.off_after
        trainable.take((trainable.off | ceased) - begun)


def check_overlap(rule: UpdateRule, written: WrittenParameters) -> None:
    """Raises RecipeError where forwards write parameters: what they write between an update and its arrival is lost."""
    if rule.overlap and written.names:
        raise RecipeError(
            f"'rule.overlap' is {rule.overlap} and a forward writes parameter '{written.names[0]}', of which an update "
            f"and what is written while it is on its way do not go together; leave overlap out, or make it a buffer."
        )
