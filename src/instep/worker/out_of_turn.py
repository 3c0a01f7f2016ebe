"""Which parameters are at rest in a step since their objective has no turn in it, see `instep.turns`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from instep.errors import ComponentError
from instep.freezing import FrozenSteps, changes
from instep.recipe import Recipe
from instep.turns import Turns


@dataclass(frozen=True)
class OutOfTurn:
    """The steps in which a parameter is at rest: all but those of its `own` turns, and where it is `frozen`."""

    order: Turns
    own: frozenset[int]
    frozen: FrozenSteps

    def holds(self, step: int) -> bool:
        """Whether `step` is one of them."""
        return self.order.place(step) not in self.own or self.frozen.holds(step)


def out_of_turn(recipe: Recipe, module: nn.Module, frozen: Sequence[FrozenSteps]) -> Sequence[FrozenSteps | OutOfTurn]:
    """The steps in which each parameter of `module` that requires a gradient is at rest, under the recipe's turns too.

    Raises ComponentError where a turn has nothing to train, or a parameter no turn.
    """
    order = recipe.objective
    if not isinstance(order, Turns):
        return frozen
    named = list(module.named_parameters())
    names = [name for name, parameter in named if parameter.requires_grad]
    others = [name for name, parameter in named if not parameter.requires_grad]
    trains = zip(*order.trained(names, others), strict=True)
    own = [frozenset(place for place, flag in enumerate(flags) if flag) for flags in trains]
    resting = [OutOfTurn(order, *each) for each in zip(own, frozen, strict=True)]
    for start in changes(frozen):
        for step in sorted(order.firsts(start)):
            if step < recipe.steps and all(each.holds(step) for each in resting):
                name = order.parts[order.place(step)].name
                raise ComponentError(
                    f"all that the turn of the objective '{name}' trains is frozen in step {step}, counted from 0; "
                    f"leave a part of it out of recipe.freeze, or give other steps there."
                )
    return resting
