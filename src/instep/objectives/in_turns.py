"""Objectives that take turns (`instep.turns`), as the engines call them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from instep.components import Component
from instep.errors import ComponentError, ObjectiveError
from instep.objectives.bound import Bound, bind
from instep.objectives.protocol import Objective, Sums, attribute, from_component
from instep.turns import Turns


class OneTurn:
    """The objective of one turn, with terms called after it: "generator", or "generator.real" of a mapping."""

    def __init__(self, name: str, objective: Objective):
        self._name, self._objective = name, objective

    def __call__(self, model: nn.Module, batch: Any, /) -> Sums:
        """Its sums."""
        return cast(Sums, self._named(self._objective(model, batch)))

    @property
    def counts(self) -> Any:
        """As its objective has it."""
        counts = attribute(self._objective, "counts")
        return None if counts is None else lambda batch: self._named(counts(batch), alone=False)

    @property
    def weights(self) -> Any:
        """Of its terms."""
        given = attribute(self._objective, "weights")
        return self._named(given, alone=False) if given else None

    @property
    def metrics(self) -> Any:
        """Of its terms."""
        given = attribute(self._objective, "metrics")
        return given if not given or isinstance(given, str) else tuple(map(self._term, given))

    def _named(self, answer: Any, *, alone: bool = True) -> Any:
        """With names of terms as this turn has them; what is no mapping is the one term, if it can stand `alone`."""
        if isinstance(answer, Mapping):
            return {self._term(name): value for name, value in answer.items()}
        return {self._name: answer} if alone else answer

    def _term(self, name: Any) -> Any:
        return f"{self._name}.{name}" if isinstance(name, str) else name


class AllTurns:
    """All of them as one objective, with the terms of each, as it is evaluated on held-out data."""

    def __init__(self, turns: Sequence[Bound]):
        self.turns = turns

    def __call__(self, model: nn.Module, batch: Any, /) -> Sums:
        """The sums of all turns."""
        return {name: value for turn in self.turns for name, value in turn.sums(model, batch).items()}

    def counts(self, batch: Any) -> dict[str, int]:
        """The items of all turns."""
        return {name: count for turn in self.turns for name, count in turn.counts(batch).items()}

    @property
    def weights(self) -> dict[str, Any]:
        """Of the terms of all turns."""
        given = [attribute(turn.objective, "weights") or {} for turn in self.turns]
        return {name: weight for each in given for name, weight in each.items()}

    @property
    def metrics(self) -> frozenset[str]:
        """Those of all turns."""
        return frozenset().union(*(turn.metrics for turn in self.turns))


@dataclass(frozen=True)
class BoundTurns(Bound):
    """All turns as the engine calls them: with the terms of all on held-out data, and those of one in each step."""

    order: Turns = field(kw_only=True)

    @property
    def turns(self) -> Sequence[Bound]:
        """Each by itself."""
        return cast(AllTurns, self.objective).turns

    @property
    def given(self) -> Any:
        """As of one."""
        return [turn.objective for turn in self.turns]

    def at(self, step: int) -> Bound:
        """That which has its turn in `step`."""
        return self.turns[self.order.place(step)]

    @cached_property
    def without_turn(self) -> dict[str, Tensor]:
        return {name: torch.zeros(()) for name in self.terms or ()}

    def counts_at(self, step: int, batch: Any) -> dict[str, int]:
        """Of all terms: those of other turns have none."""
        return dict.fromkeys(self.terms or (), 0) | self.at(step).counts(batch)

    def items(self, counts: Mapping[str, int]) -> int:
        """Those of the first term of each turn."""
        return sum(turn.items(counts) for turn in self.turns)

    def turn(self, counts: Mapping[str, int]) -> str:
        """As of one."""
        pairs = zip(self.order.parts, self.turns, strict=True)
        return "+".join(part.name for part, turn in pairs if any(counts[name] for name in turn.terms or ()))

    def by_turn(self, means: Mapping[str, float], step: int) -> dict[str, float]:
        """As of one."""
        pairs = zip(self.order.parts, self.turns, strict=True)
        return {part.name: turn.whole(means, step) for part, turn in pairs}

    def no_items(self, step: int) -> ObjectiveError:
        """As that of its turn says it."""
        return self.at(step).no_items(step)

    def learnt(self, model: nn.Module, batch: Any) -> Bound:
        """With the terms of all turns."""
        turns = [turn.learnt(model, batch) for turn in self.turns]
        names = [name for turn in turns for name in turn.terms or ()]
        whole = dataclasses.replace(self, objective=cast(Objective, AllTurns(turns)))
        return dataclasses.replace(whole, terms=tuple(sorted(names, key=lambda name: name in whole.metrics)))


_WHOLE = {
    "share": "compares each sample with its whole global batch",
    "gathers": "gathers metrics over the whole of the held-out data",
}
"""What only an objective without others may have beside it."""


def of_recipe(given: Component | Turns) -> Bound:
    """The objective of a recipe, as the engine calls it. Raises ComponentError, also where one of several shares or
    gathers.
    """
    if not isinstance(given, Turns):
        return bind(from_component(given))
    bounds = []
    for turn in given.parts:
        objective = from_component(turn.objective)
        for name, what in _WHOLE.items():
            if attribute(objective, name):
                raise ComponentError(
                    f"the objective {turn.objective.describe()} {what}, which one that takes turns with others cannot; "
                    f"take it as the only one."
                )
        bounds.append(bind(cast(Objective, OneTurn(turn.name, objective))))
    return BoundTurns(cast(Objective, AllTurns(bounds)), order=given)
