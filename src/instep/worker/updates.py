"""One update, from what all contributions add up to: judged, clipped, made.

Every engine makes its updates here. How contributions are added, and whose parameters a process updates, is the
caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from instep.errors import NonFiniteError, ObjectiveError
from instep.objectives import exact_sum
from instep.reduce.buffers import APART, Buffers, about_means
from instep.reduce.reduction import clip
from instep.worker.gradients import not_finite
from instep.worker.replica import Replica
from instep.worker.spikes import Verdict, Watcher


@dataclass(frozen=True)
class Added:
    """What an update is made from, beside the gradient.

    sums: of each term, microbatch by microbatch, in any order. totals: items by term. norm: the gradient's L2 norm.
    touched: by parameter, whether it has a gradient. bad: what is not finite in it, and which batches have no items;
    left_out: whether the whole update is, for that. written: what it is to find in the parameters that forwards wrote,
    by name. off: the parameters that require no gradient from then on; None for those of before. ends: of the run's
    first batch, see `Buffers.ends`, by contribution.
    """

    sums: Mapping[str, Sequence[float]]
    totals: Mapping[str, int]
    norm: float
    touched: Sequence[bool]
    written: Mapping[str, Tensor]
    bad: Sequence[ObjectiveError] = ()
    left_out: bool = False
    off: Collection[int] | None = None
    ends: Iterable[Mapping[int, tuple[int, int]]] = ()


@dataclass(frozen=True)
class Update:
    """What an update came to: the objective over the items of its contributions, and its parts by term.

    objective: None where they hold no item of a term that is minimised. doubts: sentences to warn with.
    """

    objective: float | None
    terms: dict[str, float]
    items: int
    rate: float | None
    norm: float
    verdict: Verdict
    doubts: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """What a tape says of it."""
        return {
            "objective": self.objective, "terms": self.terms, "items": self.items, "lr": self.rate,
            "grad_norm": self.norm, **self.verdict.facts(),
        }  # fmt: skip


class Weights(Protocol):
    """Where weights and gradient lie, and which of them a process updates: engines differ in it."""

    def update(self, step: int, norm: float, touched: Sequence[bool]) -> float | None:
        """Clips the gradient, of L2 norm `norm`, and has the optimizer make its step; the first learning rate, if any.

        touched: by parameter, whether it has a gradient.
        """

    def settle(self) -> None:
        """Returns when the new weights, or those of before where they are kept, can be read."""


class Updates:
    """Makes the updates of one replica, and judges each before."""

    def __init__(self, replica: Replica, buffers: Buffers):
        self._replica, self._buffers = replica, buffers
        self.watcher = Watcher(replica, buffers)
        self.sound = True
        """Whether the weights are those of a version, with no update half made."""
        self._ends: dict[tuple[int, int], set[int]] = {}  # by buffer and start: what pieces of the first batch left
        self._told: set[int] = set()  # buffers that were warned of

    def make(self, step: int, added: Added, weights: Weights, take_buffers: Callable[[], None]) -> Update:
        """The update from `step`, batches of items so far. The replica's objective must know its terms.

        `take_buffers` gives each buffer what the microbatches come to; it is called where the update is made.
        The watch may have it left out. Raises NonFiniteError or ObjectiveError, before any change, where it does not.
        """
        verdict, objective, means = self._judge(step, added)
        rate: float | None = 0.0
        self.sound = False
        if verdict.updates:
            self._replica.written.take(added.written)
            rate = weights.update(step, added.norm, added.touched)
            if added.off is not None:
                self._replica.trainable.take(added.off)
            take_buffers()
        weights.settle()
        self.sound = True
        items = next(iter(added.totals.values()))
        return Update(objective, means, items, rate, added.norm, verdict, self._doubts(added.ends))

    def _judge(self, step: int, added: Added) -> tuple[Verdict, float | None, dict[str, float]]:
        """The verdict, the objective, and the mean of each term; no objective where the update is left out as bad."""
        verdict, objective = Verdict(), self._replica.objective
        if added.bad or added.left_out:
            verdict = self.watcher.left_out(verdict, added.bad, update=added.left_out)
        if added.left_out or not objective.has_items(added.totals):
            return verdict, None, {}
        means = {name: exact_sum(added.sums[name]) / total for name, total in added.totals.items() if total}
        whole = objective.whole(means, step)
        return verdict.also(self.watcher.judge(step, whole)), whole, means

    def _doubts(self, contributions: Iterable[Mapping[int, tuple[int, int]]]) -> tuple[str, ...]:
        """Warns, once, of buffers that pieces of the first batch left with different values of the same start."""
        found: set[int] = set()
        for each in contributions:
            for index, (start, end) in each.items():
                ends = self._ends.setdefault((index, start), set())
                ends.add(end)
                if index not in self._told and (APART in ends or len(ends) > 1):
                    found.add(index)
        self._told |= found
        return (about_means([self._buffers.names[index] for index in sorted(found)]),) if found else ()


def wrong_in_step(
    replica: Replica,
    step: int,
    terms: Sequence[str],
    sums: NDArray[np.float64],
    totals: Mapping[str, int],
    norm: float,
    gradients: Iterable[tuple[str, Tensor, bool]],
) -> list[ObjectiveError]:
    """The first thing that is not finite in a whole step, or that it has no items; nothing where all is right.

    sums: [microbatches, terms]. gradients: name, gradient, and whether there is one, of each parameter.
    """
    if not replica.objective.has_items(totals):
        return [replica.objective.no_items(step)]
    for microbatch in np.flatnonzero(~np.isfinite(sums).all(axis=1)).tolist():
        return [*not_finite(replica, dict(zip(terms, sums[microbatch].tolist(), strict=True)), step, microbatch)[:1]]
    if math.isfinite(norm):
        return []
    bad = next((name for name, view, seen in gradients if seen and not bool(torch.isfinite(view).all())), None)
    which = f"of '{bad}' is not finite" if bad else "is too large to square"
    return [NonFiniteError(f"the gradient {which} in step {step + 1}, though every term of the objective is.")]


def clipped_step(
    replica: Replica, step: int, gradient: Tensor, views: Sequence[Tensor], norm: float, touched: Sequence[bool]
) -> float | None:
    """Clips the whole flat `gradient`, of L2 norm `norm`, and makes the optimizer's step; its learning rate.

    views: of it, by parameter.
    """
    clip(gradient, norm, replica.recipe.clip_norm)
    return replica.update(step, [view if seen else None for view, seen in zip(views, touched, strict=True)])
