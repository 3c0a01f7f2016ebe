"""Exponential moving averages of a replica's weights beside them: one for each decay of `Recipe.ema`.

They follow the versions: whoever makes an update of the weights makes that of the averages, of the same parameters, as
a part of it. So where others end an update of a worker that died, they end both; and in shared memory they lie as the
weights do, for all to see, each written by whoever updates its parameter. Floating buffers are averaged by each process
that holds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from instep.ema import decay_at, name_of
from instep.errors import CheckpointError, RecipeError
from instep.record.digest import digest_of_state

if TYPE_CHECKING:
    from instep.recipe import Recipe
    from instep.worker.replica import Replica


class Averages:
    """Those of trained `parameters`, which `names` names in the same order, and of the floating buffers of `module`.

    A process that makes no updates has none: they take their memory in `begin`. The average of a narrow type, such as
    bfloat16, is in float32, or nothing would come of small changes. own: the kind of an optimizer that averages weights
    itself, or "". Raises RecipeError for both.
    """

    def __init__(
        self, recipe: Recipe, module: nn.Module, names: Sequence[str], parameters: Sequence[nn.Parameter], own: str
    ):
        self._decays, self._warmup = recipe.ema, recipe.ema_warmup
        self._names, self._parameters = names, parameters
        self._buffers = {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}
        self._of_parameters: list[list[Tensor]] = []  # by decay
        self._of_buffers: list[dict[str, Tensor]] = []
        self._updates = 0
        self._shared = False
        if own and self._decays:
            raise RecipeError(
                f"'recipe.ema' is {list(self._decays)}, and the optimizer {own} averages the weights itself, which are "
                f"those that are evaluated and saved; leave recipe.ema out, or take another optimizer."
            )

    def begin(self) -> None:
        """Starts from the present weights, unless there are averages already."""
        if not self._of_parameters:
            self._of_parameters = [[_wide(parameter) for parameter in self._parameters] for _ in self._decays]
            self._of_buffers = [{n: _wide(buffer) for n, buffer in self._buffers.items()} for _ in self._decays]

    @property
    def tensors(self) -> list[Tensor]:
        """Those of parameters: of the first decay in the parameters' order, then of the next."""
        return [average for of_decay in self._of_parameters for average in of_decay]

    def lie_in(self, views: Sequence[Tensor]) -> None:
        """From now on `tensors` lie there, where others see them too, and each updates some: see `follow`."""
        count, self._shared = len(self._parameters), True
        self._of_parameters = [list(views[at * count : (at + 1) * count]) for at in range(len(self._decays))]

    def lie_apart(self) -> None:
        """From now on they lie in memory that this process has alone."""
        if self._shared:
            self._shared = False
            self._of_parameters = [[average.clone() for average in each] for each in self._of_parameters]

    @torch.no_grad()
    def follow(self, which: Iterable[int]) -> None:
        """After an update of these parameters, by index: their averages move towards them."""
        for decay, averages in zip(self._decays, self._of_parameters, strict=True):
            weight = 1 - decay_at(decay, self._updates, warmup=self._warmup)
            for index in which:
                average = averages[index]
                average.lerp_(self._parameters[index].detach().to(average.dtype), weight)

    @torch.no_grad()
    def settle(self, *, made: bool) -> None:
        """Ends an update, if it was `made`: averages buffers, and parameters that no worker has for all."""
        if not (made and self._decays):
            return
        if not self._shared:
            self.follow(range(len(self._parameters)))
        for decay, averages in zip(self._decays, self._of_buffers, strict=True):
            weight = 1 - decay_at(decay, self._updates, warmup=self._warmup)
            for name, average in averages.items():
                value = self._buffers[name].to(average.dtype)
                if not torch.equal(average, value):  # what is equal stays, infinities too, as in masks
                    average.copy_(torch.where(average == value, average, torch.lerp(average, value, weight)))
        self._updates += 1

    @contextmanager
    def applied(self, decay: float) -> Iterator[None]:
        """In the block the model has this average, in memory of this process; afterwards its own weights, to the bit.
        Buffers that hold no floating numbers stay as they are.
        """
        place = self._decays.index(decay)
        parameters = list(zip(self._parameters, self._of_parameters[place], strict=True))
        buffers = [(buffer, self._of_buffers[place][name]) for name, buffer in self._buffers.items()]
        buffers = [each for each in buffers if not torch.equal(each[1], each[0].to(each[1].dtype))]  # constants stay
        homes = [parameter.data for parameter, _ in parameters]
        copied = buffers if self._shared else [*parameters, *buffers]
        before = [tensor.detach().clone() for tensor, _ in copied]
        try:
            if self._shared:  # others read the weights that lie there
                for parameter, average in parameters:
                    parameter.data = average.to(parameter.dtype, copy=True)
            _copy(copied)
            yield
        finally:
            for (parameter, _), home in zip(parameters, homes, strict=True) if self._shared else ():
                parameter.data = home
            _copy([(tensor, value) for (tensor, _), value in zip(copied, before, strict=True)])

    def named(self, *, parameters: bool = True) -> Iterator[tuple[str, str, int | None, Tensor]]:
        """Each with the names of its decay and of its tensor, and the parameter's index, None for a buffer."""
        for decay, own, buffers in zip(self._decays, self._of_parameters, self._of_buffers, strict=False):
            if parameters:
                for index, name in enumerate(self._names):
                    yield name_of(decay), name, index, own[index]
            yield from ((name_of(decay), name, None, average) for name, average in buffers.items())

    def state(self, *, parameters: bool = True) -> dict[str, Any]:
        """What a checkpoint holds of them, as "ema", if there are any; without `parameters`, for who shares these."""
        if not self._of_parameters:
            return {}
        averages: dict[str, dict[str, Tensor]] = {name_of(decay): {} for decay in self._decays}
        for decay, name, _, average in self.named(parameters=parameters):
            averages[decay][name] = average
        return {"ema": {"updates": self._updates, "averages": averages}}

    @torch.no_grad()
    def load(self, saved: Any) -> None:
        """Takes back what `state` gave as "ema"; with None there are none until they begin. Raises CheckpointError."""
        if saved is None:
            self._of_parameters, self._of_buffers, self._updates, self._shared = [], [], 0, False
            return
        self.begin()
        averages = saved.get("averages") if isinstance(saved, Mapping) else None
        count = saved.get("updates") if isinstance(saved, Mapping) else None
        known = isinstance(averages, Mapping) and set(averages) == set(map(name_of, self._decays))
        if type(count) is not int or not isinstance(averages, Mapping) or not known:
            raise CheckpointError(
                f"the checkpoint does not hold the averages of recipe.ema, {list(self._decays)}; use another one."
            )
        only_buffers = all(set(each) == set(self._buffers) for each in averages.values())
        for decay, name, _, average in self.named(parameters=not only_buffers):
            value = averages[decay].get(name)
            if not isinstance(value, Tensor) or (value.shape, value.dtype) != (average.shape, average.dtype):
                raise CheckpointError(
                    f"the average {decay} of '{name}' in the checkpoint is none of what the recipe builds; use another "
                    f"one."
                )
            average.copy_(value)
        self._updates = count


class StateDigests(NamedTuple):
    """Of the weights that are to be used; averages: of the model with each of their averages in it, by decay."""

    weights: str
    averages: dict[str, str]


def digests_of(replica: Replica) -> StateDigests:
    """Of the present version."""
    averages = {name_of(decay): digest_of_state(replica.saved_state(decay)) for decay in replica.recipe.ema}
    return StateDigests(digest_of_state(replica.saved_state()), averages)


def _wide(tensor: Tensor) -> Tensor:
    """A copy in at least 32 bits."""
    return tensor.detach().to(tensor.dtype if tensor.element_size() >= 4 else torch.float32, copy=True)


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, value in pairs:
            tensor.copy_(value)
