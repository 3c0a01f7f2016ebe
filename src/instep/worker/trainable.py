"""Which parameters require a gradient, as forwards may change it while the model trains, and as the recipe says.

Every microbatch of a step starts with the step's flags, as it does with the step's buffers, so that what comes of them
does not know the team. A parameter that a microbatch leaves without one ceases: from the next step on it is without a
gradient, until all microbatches of a step leave it with one. Only those that required one when the model was built are
trained, but for those that `Recipe.freeze` has frozen all the time. Those that it has frozen in some steps are without
a gradient there, whatever was before and comes after.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence

from torch import nn

from instep.errors import RecipeError
from instep.freezing import NEVER, FrozenSteps, check_some_train, frozen_steps
from instep.recipe import Recipe
from instep.worker.out_of_turn import OutOfTurn

_requires_grad = operator.attrgetter("requires_grad")  # of all parameters after every microbatch: the quickest way


def freeze(module: nn.Module, recipe: Recipe) -> list[FrozenSteps]:
    """Freezes the parameters that the recipe has frozen all the time, and gives the steps in which each of the others
    that require a gradient is frozen, in their order. Raises RecipeError.
    """
    named = list(module.named_parameters())
    frozen = frozen_steps(recipe.freeze, [name for name, _ in named])
    trained = [(parameter, when) for (_, parameter), when in zip(named, frozen, strict=True) if parameter.requires_grad]
    if trained and recipe.freeze:
        check_some_train([when for _, when in trained], recipe.steps)
    for parameter, when in trained:
        if when.always:
            parameter.requires_grad_(False)
    return [when for _, when in trained if not when.always]


class Trainable:
    """The flags of one model. Parameters are known by their index in `parameters`, those that are trained.

    off: those without a gradient, when a step starts, but for those `frozen` in it, each in the steps given. ended:
    those that a microbatch of it left so; None where none had samples.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        parameters: Sequence[nn.Parameter],
        frozen: Sequence[FrozenSteps | OutOfTurn] = (),
    ):
        self._module, self._names, self._parameters = module, names, parameters
        trained = {id(parameter) for parameter in parameters}
        others = [(name, p) for name, p in module.named_parameters() if id(p) not in trained]
        self._others = [p for _, p in others]
        self.others = [name for name, _ in others]
        """The names of the parameters that are not trained."""
        self._by_step = {index: when for index, when in enumerate(frozen) if when != NEVER}
        self._now: frozenset[int] = frozenset()  # frozen in the step that is begun
        self._known: tuple[int, frozenset[int]] = -1, frozenset()  # a step, and those frozen in it
        self._flags = [True] * len(parameters)
        self.off: frozenset[int] = frozenset()
        self.ended: frozenset[int] | None = None

    @property
    def by_step(self) -> bool:
        """Whether the recipe has some of them frozen in some steps."""
        return bool(self._by_step)

    def frozen_in(self, steps: Collection[int]) -> frozenset[int]:
        """Those that the recipe has frozen in all of these steps."""
        return frozenset(index for index, when in self._by_step.items() if all(map(when.holds, steps)))

    def frozen_at(self, step: int) -> frozenset[int]:
        """Those of this step: found once, though an update in pieces asks for each."""
        if self._known[0] != step:
            self._known = step, self.frozen_in([step])
        return self._known[1]

    def begin(self, step: int) -> None:
        """Starts a step."""
        self.ended = None
        if self._by_step and (now := self.frozen_at(step)) != self._now:
            self._now = now
            self.take(self.off)
        if list(map(_requires_grad, self._parameters)) != self._flags:
            self._put_back()

    def leave(self, step: int) -> None:
        """After a microbatch with samples: notes what it changed, and sets the flags back.

        Raises RecipeError where a parameter that is not trained requires a gradient.
        """
        others = list(map(_requires_grad, self._others))
        if any(others):
            name = self.others[others.index(True)]
            raise RecipeError(
                f"parameter '{name}' began to require a gradient in step {step + 1}, and which are trained is "
                f"settled when the model is built; build it requiring one and freeze it after the first step, "
                f"with requires_grad_(False) or by 'recipe.freeze' in some steps: then it may begin again."
            )
        flags, off = list(map(_requires_grad, self._parameters)), self.off
        if flags != self._flags:
            begun = next((self._names[index] for index in sorted(self._now) if flags[index]), None)
            if begun is not None:
                raise RecipeError(
                    f"parameter '{begun}' began to require a gradient in step {step + 1}, in which 'recipe.freeze' has "
                    f"it frozen, or it has no turn; leave it to one of the two, the recipe or the model's own code."
                )
            off = (frozenset(index for index, flag in enumerate(flags) if not flag) - self._now) | (off & self._now)
            self._put_back()
        self.ended = off if self.ended is None else self.ended | off

    @property
    def ceased(self) -> tuple[int, ...]:
        """What a microbatch of the step left without a gradient, and did not start without."""
        return () if self.ended is None else tuple(sorted(self.ended - self.off))

    @property
    def begun(self) -> tuple[int, ...]:
        """What all microbatches of the step left with a gradient, and started without."""
        return () if self.ended is None else tuple(sorted(self.off - self.ended))

    def take(self, off: Iterable[int]) -> None:
        """The next step starts with these without a gradient."""
        self.off = frozenset(off)
        without = self.off | self._now
        self._flags = [index not in without for index in range(len(self._parameters))]

    def require_all(self) -> None:
        """Until the next step begins all require a gradient, as what is to see their gradients later asks for."""
        for parameter in self._parameters:
            parameter.requires_grad_(True)

    @property
    def off_names(self) -> list[str]:
        """The names of `off`, for a checkpoint."""
        return [self._names[index] for index in sorted(self.off)]

    def take_names(self, off: Collection[str]) -> None:
        """Takes back what `off_names` gave."""
        self.take(index for index, name in enumerate(self._names) if name in off)

    def replaced(self) -> list[str]:
        """The names under which the model now has other parameters than those that are trained."""
        now = dict(self._module.named_parameters())
        return [name for name, p in zip(self._names, self._parameters, strict=True) if now.get(name, p) is not p]

    def _put_back(self) -> None:
        for parameter, flag in zip(self._parameters, self._flags, strict=True):
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
