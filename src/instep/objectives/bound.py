"""An objective as the engines call it, its answers checked."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from instep.errors import ObjectiveError, shown
from instep.objectives.gathers import gathers_of
from instep.objectives.protocol import TERM, Objective, Shared, attribute
from instep.restore import kept_module_state, kept_random_state


@dataclass(frozen=True)
class Bound:
    """An objective as the engine calls it, its answers checked. Built by `bind`.

    `terms` are the names of its terms, in order, metrics last, where they are known: see `learn_terms`.
    """

    objective: Objective
    terms: tuple[str, ...] | None = None

    @cached_property
    def metrics(self) -> frozenset[str]:
        """The names of the terms that are not minimised."""
        found = attribute(self.objective, "metrics") or ()
        if isinstance(found, str) or not isinstance(found, Collection):
            raise ObjectiveError(f"the objective's metrics are {_shown(found)}; give a tuple of names of terms.")
        return frozenset(found)

    @cached_property
    def shares(self) -> bool:
        """Whether each microbatch needs to see something of all others of its global batch."""
        return attribute(self.objective, "share") is not None

    @cached_property
    def counts_samples(self) -> bool:
        """Whether the items of every term are the samples, as where the objective has no ``counts``."""
        return attribute(self.objective, "counts") is None

    @cached_property
    def gathers(self) -> tuple[str, ...]:
        """The names of the metrics that one process computes from outputs of the whole held-out set."""
        return tuple(gathers_of(self.objective))

    @cached_property
    def minimised(self) -> tuple[str, ...]:
        """The names of the terms that the objective adds up, once they are known."""
        return tuple(name for name in self.terms or () if name not in self.metrics)

    @property
    def given(self) -> Any:
        """What the recipe names: one objective, or several that take turns."""
        return self.objective

    def at(self, step: int) -> Bound:
        """That of `step`: itself, unless several take turns."""
        return self

    @cached_property
    def without_turn(self) -> dict[str, Tensor]:
        """Where several take turns, sums of 0 for all terms, which stay so for those that have none in a step."""
        return {}

    def counts_at(self, step: int, batch: Any) -> dict[str, int]:
        """As `counts`, of a batch of `step`."""
        return self.counts(batch)

    def turn(self, counts: Mapping[str, int]) -> str:
        """Where several take turns, which had theirs, by the items in `counts`; joined by +, as after local steps."""
        return ""

    def by_turn(self, means: Mapping[str, float], step: int) -> dict[str, float]:
        """Where several take turns, the objective of each, as `whole`."""
        return {}

    def items(self, counts: Mapping[str, int]) -> int:
        """Of `counts`, by term, those of the first term: what an update is said to be made of."""
        return next((counts[name] for name in self.terms or ()), 0)

    def counts(self, batch: Any) -> dict[str, int]:
        """Items of `batch` by term. Raises ObjectiveError for anything but whole numbers from 0 up.

        While the terms are unknown, an objective that gives one number for all gives it as "objective".
        """
        answer = _samples(batch) if self.counts_samples else attribute(self.objective, "counts")(batch)
        if isinstance(answer, Mapping):
            counts = {str(name): _whole(value, f"of term {shown(name)}") for name, value in answer.items()}
            self._check_names(counts, "counts")
            return counts
        return dict.fromkeys(self.terms or (TERM,), _whole(answer, "of the objective"))

    def sums(self, model: nn.Module, batch: Any, shared: Shared | None = None) -> dict[str, Tensor]:
        """The sums by term: scalar tensors, with a gradient where gradients are recorded. Raises ObjectiveError.

        Metrics have no gradient. `shared` is for an objective with ``share``; without it, `batch` is a whole one.
        Whether the sums are finite is not looked at here.
        """
        if self.shares:
            shared = shared or Shared((self.share(model, batch),), 0)
            answer: Any = self.objective(model, batch, shared)  # type: ignore[call-arg]
        else:
            answer = self.objective(model, batch)
        sums = dict(answer) if isinstance(answer, Mapping) else {TERM: answer}
        for name, value in sums.items():
            _check_sum(name, value, minimised=name not in self.metrics)
            if name in self.metrics:
                sums[name] = value.detach()
        self._check_names(sums, "sums")
        return sums

    def share(self, model: nn.Module, batch: Any) -> Any:
        """What the other microbatches need to see of this one, without gradients. Leaves no trace on `model`.

        The random numbers are those that the objective's call has next.
        """
        with torch.no_grad(), kept_random_state(), kept_module_state(_written(model)):
            return attribute(self.objective, "share")(model, batch)

    def weights(self, step: int) -> dict[str, float]:
        """The weight in `step`, from 0, of each term that is minimised. Raises ObjectiveError."""
        given = attribute(self.objective, "weights") or {}
        if not isinstance(given, Mapping):
            raise ObjectiveError(
                f"the objective's weights are {_shown(given)}; give a mapping from names of terms to numbers or "
                f"functions of the step."
            )
        strange = given.keys() - set(self.minimised)
        if strange:
            raise ObjectiveError(
                f"the objective has weights for {_listed(strange)} and minimises {_listed(self.minimised)}; name "
                f"terms that are minimised."
            )
        return {name: _weight(name, given.get(name, 1.0), step) for name in self.minimised}

    def whole(self, means: Mapping[str, float], step: int) -> float:
        """The objective in `step` from the mean of each term; a term without items is not among them."""
        weights = self.weights(step)
        return exact_sum([weights[name] * means[name] for name in self.minimised if name in means])

    def has_items(self, counts: Mapping[str, int]) -> bool:
        """Whether `counts`, by term, hold an item of a term that is minimised."""
        return any(counts[name] for name in self.minimised)

    def no_items(self, step: int) -> ObjectiveError:
        """The error for a step whose whole batch has no item of a term that is minimised."""
        counted = " and ".join(f"0 for term '{name}'" for name in self.minimised)
        return ObjectiveError(
            f"step {step + 1} has no items to learn from: the objective counts {counted} over the whole batch."
        )

    def learnt(self, model: nn.Module, batch: Any) -> Bound:
        """As `learn_terms` gives it; its forward may leave traces."""
        names = tuple(self.sums(model, batch))
        absent = self.metrics - set(names)
        if absent or not set(names) - self.metrics:
            why = f"gave no {_listed(absent)}" if absent else "has no term that is minimised"
            raise ObjectiveError(
                f"the objective has the metrics {_listed(self.metrics)} and {why}: its terms are {_listed(names)}; "
                f"name as metrics those that it gives, and leave one at least to minimise."
            )
        known = dataclasses.replace(self, terms=tuple(sorted(names, key=lambda name: name in self.metrics)))
        known.counts(batch)
        known.weights(0)
        if twice := set(known.gathers) & set(names):
            raise ObjectiveError(
                f"the objective gathers {_listed(twice)}, and has a term of that name; name them apart."
            )
        return known

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

    Raises ObjectiveError where names of sums and counts differ, or metrics or weights name terms that are not there.
    A compiled model runs as it was written.
    """
    model = _written(model)
    with kept_random_state(), kept_module_state(model):
        return bound.learnt(model, batch)


def exact_sum(values: Sequence[float]) -> float:
    """As `math.fsum`, which does not take infinities of both signs."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def _written(model: nn.Module) -> nn.Module:
    """A compiled model as it was written."""
    return getattr(model, "_orig_mod", model)


def _weight(name: str, given: Any, step: int) -> float:
    value = given(step) if callable(given) else given
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits:
        raise ObjectiveError(
            f"the weight of term {shown(name)} is {_shown(value)} in step {step + 1}; it must be a finite number."
        )
    return float(value)


def _samples(batch: Any) -> int:
    if type(batch) in (list, tuple) and batch and type(batch[0]) is Tensor and batch[0].dim() > 0:
        return len(batch[0])  # as below, at once
    for leaf in pytree.tree_leaves(batch, is_leaf=lambda part: isinstance(part, PackedSequence)):
        if isinstance(leaf, PackedSequence):  # its tensors are by time
            return int(leaf.batch_sizes[0])
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


def _check_sum(name: Any, value: Any, *, minimised: bool) -> None:
    if not isinstance(name, str):
        raise ObjectiveError(f"the objective named a term {shown(name)}; names of terms must be text.")
    if not isinstance(value, Tensor):
        raise ObjectiveError(
            f"term {shown(name)} of the objective is {_shown(value)}; it must be a tensor, computed from the model's "
            "answer."
        )
    if value.dim() > 0:
        raise ObjectiveError(
            f"term {shown(name)} of the objective has shape {list(value.shape)}; it must be a scalar: sum it over its "
            "items."
        )
    if minimised and torch.is_grad_enabled() and not value.requires_grad:
        raise ObjectiveError(
            f"term {shown(name)} of the objective has no gradient; compute it from the model's answer without detach, "
            f"item or no_grad, or name it among the objective's metrics."
        )


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.dim() == 0:
            return f"{value.item()!r} ({value.dtype})"
        return f"a tensor of shape {list(value.shape)} and {value.dtype}"
    return f"{value!r}, of type {type(value).__name__}" if len(repr(value)) <= 60 else f"of type {type(value).__name__}"


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in sorted(names, key=str))
