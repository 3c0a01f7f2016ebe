"""What is minimised: functions of (model, batch) that give sums, and how many items each sum runs over.

An *objective* is a callable ``f(model, batch)`` whose answer is a scalar tensor, the term "objective", or a mapping
from names of terms to scalar tensors. Each is a **sum** over items: tokens, samples, pixels, whatever the term counts.
An objective never divides. The engine divides each sum by the number of items in the whole global batch, over all
microbatches and workers, and minimises the sum of these quotients; so uneven microbatches weigh what they should.

How many items there are must be known before the first forward, from the batch alone. An objective that counts other
things than samples has ``counts(batch)``, as a method or an attribute, which gives a whole number, for every term, or
a mapping from the same names to whole numbers. Without it, each term counts samples: the length of the batch's first
tensor.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from instep.components import Component
from instep.errors import ComponentError, ObjectiveError
from instep.randomness import seed_all
from instep.restore import kept_module_state, kept_random_state

TERM = "objective"
"""The name of the one term of an objective that answers with a bare tensor."""

Sums = Tensor | Mapping[str, Tensor]
Count = int | Tensor
Counts = Callable[[Any], Count | Mapping[str, Count]]


class Objective(Protocol):
    """The protocol, see the module's docstring. ``counts(batch)`` is optional and so not listed."""

    def __call__(self, model: nn.Module, batch: Any, /) -> Sums:
        """Sums over the items of `batch`, scalar tensors."""
        ...


F = TypeVar("F", bound=Callable[..., Any])


@overload
def objective(function: F, /) -> F: ...


@overload
def objective(*, counts: Counts | None = None) -> Callable[[F], F]: ...


def objective(function: F | None = None, /, *, counts: Counts | None = None) -> F | Callable[[F], F]:
    """Marks a function as an objective and tells how its items are counted.

    ::

        @instep.objective(counts=lambda batch: (batch["labels"] != -100).sum())
        def next_word(model, batch):
            ...

    The function is returned as it is, with `counts` as its attribute. Bare, as ``@instep.objective``, it only tells
    the reader: samples are counted.
    """

    def mark(function: F) -> F:
        if counts is not None:
            function.counts = counts  # type: ignore[attr-defined]
        return function

    return mark if function is None else mark(function)


def from_component(component: Component) -> Objective:
    """The objective that a recipe names.

    A class is built with the component's arguments. Any other callable is the objective itself; arguments are given
    to it by keyword, after model and batch, and those that its ``counts`` takes by name are given to that too.
    Raises ComponentError.
    """
    target = component.load()
    if inspect.isclass(target):
        target = component.build()
    elif component.args and callable(target):
        _check_arguments(component, target)
        target = functools.partial(target, **component.keywords())
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
            f"the objective {component.describe()} does not take the arguments given to it: {error}; it takes {names}."
        ) from None


@dataclass(frozen=True)
class Bound:
    """An objective as the engine calls it, its answers checked. Built by `bind`.

    `terms` are the names of its terms, in order, where they are known: see `learn_terms`.
    """

    objective: Objective
    terms: tuple[str, ...] | None = None

    def counts(self, batch: Any) -> dict[str, int]:
        """Items of `batch` by term. Raises ObjectiveError for anything but whole numbers from 0 up.

        While the terms are unknown, an objective that gives one number for all gives it as "objective".
        """
        count = _counts_of(self.objective)
        answer = _samples(batch) if count is None else count(batch)
        if isinstance(answer, Mapping):
            counts = {str(name): _whole(value, f"of term {name!r}") for name, value in answer.items()}
            self._check_names(counts, "counts")
            return counts
        return dict.fromkeys(self.terms or (TERM,), _whole(answer, "of the objective"))

    def sums(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The sums by term: scalar tensors, with a gradient where gradients are recorded. Raises ObjectiveError.

        Whether they are finite is not looked at here.
        """
        answer: Any = self.objective(model, batch)
        sums = dict(answer) if isinstance(answer, Mapping) else {TERM: answer}
        for name, value in sums.items():
            _check_sum(name, value)
        self._check_names(sums, "sums")
        return sums

    def _check_names(self, found: Mapping[str, Any], kind: str) -> None:
        if not found:
            raise ObjectiveError(f"the objective gave no {kind}; it must give one for each of its terms.")
        if self.terms is not None and set(found) != set(self.terms):
            raise ObjectiveError(
                f"the objective gave {kind} named {_listed(found)} and has the terms {_listed(self.terms)}; "
                f"its sums and counts must have the same names in every batch."
            )


def bind(objective: Objective) -> Bound:
    """`objective`, such as `from_component` gives it, as the engine calls it."""
    return Bound(objective)


def learn_terms(bound: Bound, model: nn.Module, batch: Any) -> Bound:
    """`bound` with the names of its terms, which one forward tells. Leaves no trace on `model`.

    Raises ObjectiveError where names of sums and counts differ. A compiled model runs as it was written.
    """
    model = getattr(model, "_orig_mod", model)
    with kept_random_state(), kept_module_state(model):
        known = dataclasses.replace(bound, terms=tuple(bound.sums(model, batch)))
    known.counts(batch)
    return known


def no_items(step: int, terms: Iterable[str]) -> ObjectiveError:
    """The error for a step whose whole batch has no items of any of `terms`."""
    counted = " and ".join(f"0 for term '{name}'" for name in terms)
    return ObjectiveError(
        f"step {step} has no items to learn from: the objective counts {counted} over the whole batch; leave such "
        f"samples out of the data set, or take a larger batch."
    )


def check_is_sum(bound: Bound, model: nn.Module, batch: Any) -> None:
    """Raises ObjectiveError where a term looks like a mean: the batch twice over leaves it as it is.

    The batch and the batch doubled along dimension 0 are evaluated in eval mode with the same random seed. A sum
    doubles, a mean stays. A term is blamed where its count doubled and its value changed by under 2 %, with three
    seeds. A batch that cannot be doubled, or an objective that cannot take it, is let pass. `model` and the random
    state are left as they were. A compiled model runs as it was written, so that no other shape is compiled.
    """
    doubled = _doubled(batch)
    if doubled is None:
        return
    model = getattr(model, "_orig_mod", model)
    suspects: list[dict[str, tuple[float, float]]] = []
    with torch.no_grad(), kept_random_state(), kept_module_state(model, training=False):
        for seed in range(3):
            try:
                suspects.append(_unmoved(bound, model, batch, doubled, seed))
            except Exception:  # a check must not fail where training might not
                return
            if not suspects[-1]:
                return
    for name, (once, twice) in suspects[0].items():
        if all(name in found for found in suspects):
            raise ObjectiveError(
                f"term {name!r} of the objective is a mean, not a sum: it is {once:.6g} for a batch and {twice:.6g} "
                f"for the same samples twice over; return the sum over its items (reduction='sum'), which the engine "
                f"divides by their count."
            )


def _unmoved(bound: Bound, model: nn.Module, batch: Any, doubled: Any, seed: int) -> dict[str, tuple[float, float]]:
    """The terms whose count doubles while the value stays, with the values for `batch` and `doubled`."""
    counts, counts_doubled = bound.counts(batch), bound.counts(doubled)
    values = []
    for each in (batch, doubled):
        seed_all(seed)
        values.append({name: value.item() for name, value in bound.sums(model, each).items()})
    found: dict[str, tuple[float, float]] = {}
    for name, once in values[0].items():
        twice = values[1][name]
        count = counts.get(name, counts.get(TERM, 0))
        count_doubled = counts_doubled.get(name, counts_doubled.get(TERM, 0))
        stays = once != 0 and math.isfinite(once) and abs(twice - once) <= 0.02 * abs(once)
        if stays and count > 0 and count_doubled == 2 * count:
            found[name] = (once, twice)
    return found


def _doubled(batch: Any) -> Any:
    """`batch` with every tensor concatenated with itself along dimension 0, or None where that has no clear meaning."""
    leaves, structure = pytree.tree_flatten(batch)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]
    if not tensors or len({len(tensor) for tensor in tensors}) > 1:
        return None
    if not all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves):
        return None  # names, lengths or a batch class of the user's: what else counts samples is unknown
    try:
        doubled = [torch.cat((leaf, leaf)) if leaf is not None and leaf.dim() else leaf for leaf in leaves]
    except (RuntimeError, TypeError):  # sparse or nested layouts
        return None
    return pytree.tree_unflatten(doubled, structure)


def _counts_of(objective: Any) -> Counts | None:
    count: Counts | None = getattr(objective, "counts", None)
    if count is None and isinstance(objective, functools.partial):
        count = _counts_of(objective.func)
        if count is None:
            return None
        shared = {name: value for name, value in objective.keywords.items() if name in _parameters(count)}
        return functools.partial(count, **shared)
    return count


def _parameters(function: Any) -> list[str]:
    """The names of parameters after the first, the batch."""
    try:
        return list(inspect.signature(function).parameters)[1:]
    except (TypeError, ValueError):
        return []


def _samples(batch: Any) -> int:
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return len(leaf)
    raise ObjectiveError(
        f"no samples can be counted in a batch of type {type(batch).__name__}, which holds no tensor that is not a "
        f"scalar; give the objective a 'counts(batch)'."
    )


def _whole(value: Any, whose: str) -> int:
    tensor = isinstance(value, Tensor)
    fits = not isinstance(value, bool) and not (tensor and (value.dim() > 0 or value.dtype == torch.bool))
    try:
        count = operator.index(value) if fits else -1
    except TypeError:
        count = -1
    if count < 0:
        raise ObjectiveError(f"the count {whose} is {_shown(value)}; it must be a whole number, at least 0.")
    return count


def _check_sum(name: Any, value: Any) -> None:
    if not isinstance(name, str):
        raise ObjectiveError(f"the objective named a term {name!r}; names of terms must be text.")
    if not isinstance(value, Tensor):
        raise ObjectiveError(
            f"term {name!r} of the objective is {_shown(value)}; it must be a tensor, computed from the model's answer."
        )
    if value.dim() > 0:
        raise ObjectiveError(
            f"term {name!r} of the objective has shape {list(value.shape)}; it must be a scalar: sum it over its items."
        )
    if torch.is_grad_enabled() and not value.requires_grad:
        raise ObjectiveError(
            f"term {name!r} of the objective has no gradient; compute it from the model's answer without detach, item "
            f"or no_grad."
        )


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.dim() == 0:
            return f"{value.item()!r} ({value.dtype})"
        return f"a tensor of shape {list(value.shape)} and {value.dtype}"
    return f"{value!r}, of type {type(value).__name__}" if len(repr(value)) <= 60 else f"of type {type(value).__name__}"


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in sorted(names, key=str))
