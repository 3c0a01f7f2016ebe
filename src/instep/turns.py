"""Objectives that take turns, each with the parameters that it trains: a recipe's, as for a GAN.

A step has the objective of its turn, and only the parameters of that turn have a gradient in it: the others are not
moved, decayed or counted in the gradient's norm, and their optimizers make no step. Which turn a step has follows from
its number alone, whoever computes it and wherever the run was stopped in between.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from instep.by_pattern import check_known, matches, patterns_of
from instep.components import Component
from instep.errors import ComponentError, RecipeError, cut, shown

_MOST_STEPS = 1 << 20
"""In a row, of one turn."""


@dataclass(frozen=True)
class Turn:
    """One of them. patterns: of `fnmatch`, for whole names of the parameters that it trains. steps: in a row."""

    name: str
    patterns: tuple[str, ...]
    objective: Component
    steps: int = 1

    @classmethod
    def of(cls, value: Any) -> Turn:
        """From a table ``{name, parameters, use, args, steps}``. Raises ComponentError."""
        if isinstance(value, Turn):
            return value
        if not isinstance(value, Mapping) or not {"name", "parameters"} <= value.keys():
            missing = "name" if not isinstance(value, Mapping) or "name" not in value else "parameters"
            raise ComponentError(
                f"{shown(value)} has no key '{missing}', which each of several objectives that take turns has; write "
                f'{{name = "generator", parameters = "generator.*", use = "package.module:name"}}.'
            )
        name, steps = value["name"], value.get("steps", 1)
        if not isinstance(name, str) or not name.isidentifier():
            raise ComponentError(
                f"'name' of an objective that takes turns is {shown(name)}; it must be letters, digits or underscores, "
                f"such as 'generator': its terms are called after it."
            )
        if type(steps) is not int or not 1 <= steps <= _MOST_STEPS:
            raise ComponentError(
                f"'steps' of the objective '{cut(name)}' is {shown(steps)}; it must be a whole number from 1, how many "
                f"steps its turn has."
            )
        rest = {key: item for key, item in value.items() if key not in ("name", "parameters", "steps")}
        patterns = patterns_of(value["parameters"], f"the objective '{name}'")
        return cls(name, patterns, Component.of(rest), steps)

    def trains(self, name: str) -> bool:
        """Whether one of its patterns is for the parameter."""
        return matches(name, self.patterns)


@dataclass(frozen=True)
class Turns:
    """Several, in the order in which they take turns, over and over."""

    parts: tuple[Turn, ...]

    @classmethod
    def of(cls, value: Any) -> Turns | Component:
        """`value` as one objective, or as several that take turns: a list of tables, see `Turn.of`.

        Raises ComponentError.
        """
        if isinstance(value, Turns):
            return value
        if type(value) in (list, tuple):
            return cls(tuple(map(Turn.of, value))).checked()
        return Component.of(value)

    def checked(self) -> Turns:
        """Itself. Raises ComponentError where there are none, or two have one name."""
        if not self.parts:
            raise ComponentError("'objective' is an empty list; give one objective, or several that take turns.")
        names = [turn.name for turn in self.parts]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ComponentError(f"two objectives that take turns have the name '{twice}'; name them apart.")
        return self

    def check(self, rule: str, *, together: bool) -> None:
        """Raises RecipeError unless under `rule` all workers wait for each other, with all weights at once."""
        if not together:
            names = " and ".join(f"'{turn.name}'" for turn in self.parts)
            raise RecipeError(
                f"the objectives {names} take turns, and under rule {shown(rule)} an update would mix them, or hold a "
                f"part of the weights; set rule to 'synchronous' or, for turns among the steps that each worker makes "
                f"by itself, to 'local_sgd:{self.cycle}'."
            )

    def describe(self) -> str:
        """The objectives' descriptions."""
        return " and ".join(turn.objective.describe() for turn in self.parts)

    def place(self, step: int) -> int:
        """Which of the `parts` has its turn in `step`, from 0."""
        left = step % self.cycle
        for place, turn in enumerate(self.parts):
            left -= turn.steps
            if left < 0:
                return place
        raise AssertionError("a cycle has no other steps")

    def firsts(self, start: int) -> list[int]:
        """By turn, its first step from `start` on."""
        ends = list(itertools.accumulate(turn.steps for turn in self.parts))
        at = start % self.cycle
        return [
            start if end - turn.steps <= at < end else start + (end - turn.steps - at) % self.cycle
            for turn, end in zip(self.parts, ends, strict=True)
        ]

    @property
    def cycle(self) -> int:
        """Steps until the first has its turn again."""
        return sum(turn.steps for turn in self.parts)

    def trained(self, names: Sequence[str], frozen: Sequence[str] = ()) -> list[list[bool]]:
        """By turn, which of the parameters `names` it trains; `frozen` are others, which nothing trains.

        Raises ComponentError for a pattern that matches none of either, for a turn that trains nothing, and for a
        parameter that no turn trains.
        """
        known = [*names, *frozen]
        for turn in self.parts:
            check_known(turn.patterns, known, f"'parameters' of the objective '{turn.name}'")
            if not any(map(turn.trains, names)):
                raise ComponentError(
                    f"the turn of the objective '{turn.name}' trains nothing, for all that its 'parameters' match are "
                    f"frozen; leave its table out, or train one of them."
                )
        idle = [name for name in names if not any(turn.trains(name) for turn in self.parts)]
        if idle:
            raise ComponentError(
                f"parameter '{idle[0]}' is trained in no turn of 'objective'; name it among the 'parameters' of one, "
                f"or freeze it (recipe.freeze)."
            )
        return [[turn.trains(name) for name in names] for turn in self.parts]


def each_of(objective: Turns | Component) -> list[Component]:
    """One objective, or all that take turns."""
    return [turn.objective for turn in objective.parts] if isinstance(objective, Turns) else [objective]
