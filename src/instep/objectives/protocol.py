"""The protocol of an objective, see `instep.objectives`, and how a recipe names one."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast, get_type_hints, overload

from torch import Tensor, nn

from instep.components import Component
from instep.errors import ComponentError, ObjectiveError, cut
from instep.tables import coerce

TERM = "objective"
"""The name of the one term of an objective that answers with a bare tensor."""

Sums = Tensor | Mapping[str, Tensor]
Count = int | Tensor
Counts = Callable[[Any], Count | Mapping[str, Count]]
Weight = float | Callable[[int], float]


class Objective(Protocol):
    """The protocol. What may stand beside the call is optional and so not listed, see `instep.objectives`."""

    def __call__(self, model: nn.Module, batch: Any, /) -> Sums:
        """Sums over the items of `batch`, scalar tensors."""
        ...


@dataclass(frozen=True)
class Warmup:
    """A weight that rises linearly from 0 at step 0 to `weight` at step `steps`, and stays there.

    For the KL term of a VAE: Bowman et al., 2016, arXiv:1511.06349. Raises ObjectiveError for a negative `steps`.
    """

    weight: float = 1.0
    steps: int = 0

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.steps < 0:
            raise ObjectiveError(f"a warm-up of {self.steps} steps cannot be; give 0 for none, or more.")

    def __call__(self, step: int) -> float:
        """The weight in `step`."""
        return self.weight * min(1.0, step / self.steps) if self.steps else self.weight


@dataclass(frozen=True)
class Shared:
    """What the microbatches of a global batch share: each one's answer of ``share``, in order, without gradients.

    `own` is the place, among `parts`, of the microbatch that the objective is called with. Microbatches without samples
    are left out. Each was computed from the same weights and with the same random numbers as in the objective's call.
    """

    parts: Sequence[Any]
    own: int


F = TypeVar("F", bound=Callable[..., Any])


@overload
def objective(function: F, /) -> F: ...


@overload
def objective(
    *,
    counts: Counts | None = None,
    weights: Mapping[str, Weight] | None = None,
    metrics: Collection[str] = (),
    gathers: Mapping[str, Any] | None = None,
    outputs: Callable[..., Mapping[str, Tensor]] | None = None,
) -> Callable[[F], F]: ...


def objective(
    function: F | None = None,
    /,
    *,
    counts: Counts | None = None,
    weights: Mapping[str, Weight] | None = None,
    metrics: Collection[str] = (),
    gathers: Mapping[str, Any] | None = None,
    outputs: Callable[..., Mapping[str, Tensor]] | None = None,
) -> F | Callable[[F], F]:
    """Marks a function as an objective and tells how its items are counted.

    >>> @instep.objective(counts=lambda batch: batch[1].numel())
    ... def squares(model, batch):
    ...     inputs, targets = batch
    ...     return (model(inputs) - targets).square().sum()

    The function is returned as it is, with what is given as its attributes.
    Bare, as ``@instep.objective``, it only tells the reader: samples are counted.
    """
    given = {"counts": counts, "weights": weights, "metrics": metrics or None, "gathers": gathers, "outputs": outputs}

    def mark(function: F) -> F:
        for name, value in given.items():
            if value is not None:
                setattr(function, name, value)
        return function

    return mark if function is None else mark(function)


def attribute(target: Any, name: str) -> Any:
    """What stands beside the objective as `name`, or None; that of the function for a `functools.partial` of it."""
    found = getattr(target, name, None)
    if found is None and isinstance(target, functools.partial):
        found = attribute(target.func, name)
        if callable(found):
            shared = {key: value for key, value in target.keywords.items() if key in _parameters(found)}
            return functools.partial(found, **shared)
    return found


def _parameters(function: Any) -> list[str]:
    """The names of parameters after the first."""
    try:
        return list(inspect.signature(function).parameters)[1:]
    except (TypeError, ValueError):
        return []


def from_component(component: Component) -> Objective:
    """The objective that a recipe names.

    A class is built with the component's arguments. Any other callable is the objective itself; arguments are given
    to it by keyword, after model and batch, and those that its ``counts`` takes by name are given to that too.
    Raises ComponentError.
    """
    target = component.load()
    if inspect.isclass(target):
        target = component.built()
    elif component.args and callable(target):
        _check_arguments(component, target)
        target = functools.partial(target, **component.keywords())
    if isinstance(target, nn.modules.loss._Loss) or getattr(target, "__module__", None) == "torch.nn.functional":
        raise ComponentError(
            f"the objective {component.describe()} is a loss of (predictions, targets); give a function of "
            f"(model, batch) that calls it with reduction='sum', such as "
            f"lambda model, batch: cross_entropy(model(batch[0]), batch[1], reduction='sum')."
        )
    if isinstance(target, nn.Module) and any(parameter.requires_grad for parameter in target.parameters()):
        raise ComponentError(
            f"the objective {component.describe()} is a module with parameters of its own, which nothing would train; "
            f"hold them in the model, or freeze them with requires_grad_(False)."
        )
    if not callable(target):
        raise ComponentError(
            f"the objective {component.describe()} is a {type(target).__name__}, which cannot be called; "
            f"give a function of (model, batch), or a class of such."
        )
    return cast(Objective, target)


def _check_arguments(component: Component, target: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # some C callables have none
        return
    try:
        signature.bind(None, None, **component.keywords())
    except TypeError as error:
        names = ", ".join(signature.parameters)
        raise ComponentError(
            f"the objective {component.describe()} does not take the arguments given to it: {cut(error)}; it takes "
            f"{names}."
        ) from None


def check_numbers(objective: Any) -> None:
    """Raises RecipeError where a field of the dataclass `objective` that is to be a number, or a flag, is none.

    A whole number is taken for any number. For `__post_init__`.
    """
    hints = get_type_hints(type(objective))
    for field in dataclasses.fields(objective):
        hint = hints[field.name]
        if hint in (int, float, bool):
            value = coerce(hint, getattr(objective, field.name), f"{type(objective).__name__}.{field.name}")
            object.__setattr__(objective, field.name, value)
