"""Which parameters require a gradient, as forwards may change it while the model trains.

Every microbatch of a step starts with the step's flags, as it does with the step's buffers, so that what comes of them
does not know the team. A parameter that a microbatch leaves without one ceases: from the next step on it is without a
gradient, until all microbatches of a step leave it with one. Only those that required one when the model was built are
trained.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence

from torch import nn

from instep.errors import RecipeError

_requires_grad = operator.attrgetter("requires_grad")  # of all parameters after every microbatch: the quickest way


class Trainable:
    """The flags of one model. Parameters are known by their index in `parameters`, those that are trained.

    off: those without a gradient, when a step starts. ended: those that a microbatch of it left so; None where none
    had samples.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], parameters: Sequence[nn.Parameter]):
        self._module, self._names, self._parameters = module, names, parameters
        trained = {id(parameter) for parameter in parameters}
        others = [(name, p) for name, p in module.named_parameters() if id(p) not in trained]
        self._others, self._other_names = [p for _, p in others], [name for name, _ in others]
        self._flags = [True] * len(parameters)
        self.off: frozenset[int] = frozenset()
        self.ended: frozenset[int] | None = None

    def begin(self) -> None:
        """Starts a step."""
        self.ended = None
        if list(map(_requires_grad, self._parameters)) != self._flags:
            self._put_back()

    def leave(self, step: int) -> None:
        """After a microbatch with samples: notes what it changed, and sets the flags back.

        Raises RecipeError where a parameter that is not trained requires a gradient.
        """
        others = list(map(_requires_grad, self._others))
        if any(others):
            name = self._other_names[others.index(True)]
            raise RecipeError(
                f"parameter '{name}' began to require a gradient in step {step + 1}, and which are trained is "
                f"settled when the model is built; build it requiring one and freeze it after the first step, "
                f"with requires_grad_(False): then it may begin again."
            )
        flags, off = list(map(_requires_grad, self._parameters)), self.off
        if flags != self._flags:
            off = frozenset(index for index, flag in enumerate(flags) if not flag)
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
        self._flags = [index not in self.off for index in range(len(self._parameters))]

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
