"""Which parameters are frozen, and in which steps: `Recipe.freeze`, from patterns of their names to steps.

A frozen parameter is as with ``requires_grad_(False)`` in a loop: no gradient of it is computed, so it is in no norm,
and the optimizer neither moves nor decays it. What the optimizer keeps of it stays, or begins with its first gradient.

all: the whole run. No memory is there for its gradient, and the optimizer is built without it.
..B: the steps before step B, its first B ones, as for gradual unfreezing.
A..: from step A on.
A..B: from step A up to step B.
none: never, as an exception from a pattern that comes later.

Steps are counted from 0, and are global batches, as for the schedule: a step's gradient lacks what is frozen in it. A
pattern is one of `fnmatch`, for whole names of parameters, such as ``blocks.0.*``; the first that matches a parameter
decides. What the model itself builds with ``requires_grad=False`` stays so.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from instep.by_pattern import check_known, matches
from instep.errors import RecipeError, shown

_MOST = 1 << 53
"""Steps that a run may have."""


@dataclass(frozen=True)
class FrozenSteps:
    """The steps in which a parameter is frozen: from `first` up to `end`, None for no end."""

    first: int = 0
    end: int | None = None

    @property
    def always(self) -> bool:
        """Whether these are all steps."""
        return self.first == 0 and self.end is None

    def holds(self, step: int) -> bool:
        """Whether `step` is one of them."""
        return self.first <= step and (self.end is None or step < self.end)

    def __str__(self) -> str:
        if self.always:
            return "all"
        return "none" if self == NEVER else f"{self.first or ''}..{'' if self.end is None else self.end}"


NEVER = FrozenSteps(0, 0)
"""No steps."""


def parse(patterns: Mapping[str, object]) -> dict[str, FrozenSteps]:
    """The steps of each pattern, in their order. Raises RecipeError for what are none."""
    return {pattern: _steps(pattern, text) for pattern, text in patterns.items()}


def _steps(pattern: str, text: object) -> FrozenSteps:
    if text in ("all", "none"):
        return FrozenSteps() if text == "all" else NEVER
    found = re.fullmatch(r"([0-9]{0,16})\.\.([0-9]{0,16})", text) if isinstance(text, str) else None
    if found is None or not any(found.groups()):
        near = difflib.get_close_matches(text, ("all", "none"), 1) if isinstance(text, str) else []
        number = f"'..{text}' for the first {text} steps, '{text}..'" if type(text) is int else "'..200', '200..'"
        hint = f"did you mean {near[0]!r}?" if near else f"write 'all', 'none', {number} or '100..200'."
        raise RecipeError(f"'recipe.freeze' has {shown(text)} for {shown(pattern)}, which are no steps; {hint}")
    first, end = (int(number) if number else None for number in found.groups())
    if max(first or 0, end or 0) > _MOST or (end is not None and end <= (first or 0)):
        raise RecipeError(
            f"'recipe.freeze' has {shown(text)} for {shown(pattern)}, in which there is no step of a run; the number "
            f"before the dots is below that after them, and 'none' freezes nothing."
        )
    return FrozenSteps(first or 0, end)


def frozen_steps(patterns: Mapping[str, str], names: Sequence[str]) -> list[FrozenSteps]:
    """The steps in which each of `names` is frozen. Raises RecipeError for a pattern that matches none of them."""
    steps = parse(patterns)
    check_known(steps, names, "'recipe.freeze'", RecipeError)
    matching = (next((pattern for pattern in steps if matches(name, [pattern])), None) for name in names)
    return [NEVER if pattern is None else steps[pattern] for pattern in matching]


def changes(frozen: Iterable[FrozenSteps]) -> list[int]:
    """The steps from which on others are frozen than before, and the first one, in order."""
    return sorted({0, *(number for each in frozen for number in (each.first, each.end) if number is not None)})


def check_some_train(frozen: Iterable[FrozenSteps], steps: int) -> None:
    """Raises RecipeError where all parameters, each frozen in the steps given, are so in one of the run's `steps`."""
    each = set(frozen)
    for step in changes(each):
        if step < steps and all(one.holds(step) for one in each):
            raise RecipeError(
                f"'recipe.freeze' has all parameters of the model frozen in step {step}, counted from 0, so there is "
                f"nothing to train; leave some out, or give other steps to one of its patterns."
            )
