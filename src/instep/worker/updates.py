"""Updates: from what all contributions of one add up to, to new weights.

Every engine makes its updates by `Updates`, and no other way: the lockstep engine's workers and, by `Merger`, the
server engine, the virtual engine and the replay. How contributions are added, and which parameters a process updates,
is the caller's.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from instep.errors import CheckpointError, NonFiniteError, ObjectiveError
from instep.objectives import exact_sum
from instep.record.shapes import COUNTS, misfit
from instep.reduce.buffers import APART, Buffers, about_means
from instep.reduce.checksums import checksum
from instep.reduce.layout import BLOCK, Layout, Pack
from instep.reduce.reduction import clip, norm_of
from instep.reduce.tree import merge_plan
from instep.reduce.writes import Writes
from instep.rules.fragments import Fragments
from instep.rules.work import Pieces
from instep.worker.contribution import NOTHING, Arrived, Facts
from instep.worker.outer_optimizer import OuterOptimizers, OuterStep
from instep.worker.replica import Replica
from instep.worker.spikes import Verdict, Watcher
from instep.worker.wire import WayDown


class Added(NamedTuple):
    """What an update is made from, beside the gradient.

    sums: of each term, microbatch by microbatch, in any order. totals: items by term. norm: the gradient's L2 norm.
    touched: by parameter, whether it has a gradient. bad: what is not finite in it, and which batches have no items;
    left_out: whether the whole update is, for that; else a norm that is not finite is the loss scale's doing. written:
    what it is to find in the parameters that forwards wrote, by name. off: the parameters that require no gradient from
    then on; None for those of before. ends: of the run's first batch, see `Buffers.ends`, by contribution. scale: the
    loss scale that the gradient was computed with, the largest one of several; None for the present one. overflows:
    local steps that workers left out because of it.
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
    scale: float | None = None
    overflows: int = 0


class Update(NamedTuple):
    """What an update came to: the objective over the items of its contributions, and its parts by term.

    objective: None where they hold no item of a term that is minimised. doubts: to warn with. turn: see `Bound.turn`.
    scale: the loss scale that its gradient was computed with, if there is one.
    """

    objective: float | None
    terms: dict[str, float]
    items: int
    rate: float | None
    norm: float
    verdict: Verdict
    doubts: tuple[str, ...] = ()
    turn: str = ""
    scale: float | None = None

    def facts(self) -> dict[str, Any]:
        """What a tape says of it."""
        return {
            "objective": self.objective, "terms": self.terms, "items": self.items, "lr": self.rate,
            "grad_norm": self.norm, **self.verdict.facts(), **({"turn": self.turn} if self.turn else {}),
            **({} if self.scale is None else {"loss_scale": self.scale}),
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
        replica.averages.begin()

    def make(self, step: int, added: Added, weights: Weights, take_buffers: Callable[[], None]) -> Update:
        """The update from `step`, batches of items so far. The replica's objective must know its terms.

        `take_buffers` gives each buffer what the microbatches come to; it is called where the update is made.
        The watch may have it left out. Raises NonFiniteError or ObjectiveError, before any change, where it does not.
        """
        scale = self._scale_of(added)  # before a rollback takes it back
        verdict, objective, means = self._judge(step, added)
        rate: float | None = 0.0
        self.sound = False
        if verdict.updates:
            if added.written:
                self._replica.written.take(added.written)
            rate = weights.update(step, added.norm, added.touched)
            if added.off is not None:
                self._replica.trainable.take(added.off)
            take_buffers()
        weights.settle()
        self._replica.averages.settle(made=verdict.updates)
        if scale is not None and self._replica.objective.has_items(added.totals):
            self._replica.scaler.made(finite=math.isfinite(added.norm), used=scale)
        self.sound = True
        items = self._replica.objective.items(added.totals)
        turn = self._replica.objective.turn(added.totals)
        return Update(objective, means, items, rate, added.norm, verdict, self._doubts(added.ends), turn, scale)

    def _scale_of(self, added: Added) -> float | None:
        """The loss scale that the gradient was computed with; None without any, or where each worker has its own."""
        scaler = self._replica.scaler
        return (added.scale or scaler.value) if scaler.scales and self._replica.recipe.rule.gradients else None

    def _judge(self, step: int, added: Added) -> tuple[Verdict, float | None, dict[str, float]]:
        """The verdict, the objective, and the mean of each term; no objective where the update is left out as bad."""
        verdict, objective = Verdict(overflows=added.overflows), self._replica.objective
        if added.bad or added.left_out:
            verdict = self.watcher.left_out(verdict, added.bad, update=added.left_out)
        if added.left_out or not objective.has_items(added.totals):
            return verdict, None, {}
        means = {name: exact_sum(added.sums[name]) / total for name, total in added.totals.items() if total}
        whole = objective.whole(means, step)
        judged = self.watcher.judge(step, whole, objective.turn(added.totals))
        if not math.isfinite(added.norm):
            verdict = verdict._replace(left_out=True, overflows=1)
        return verdict.also(judged) if added.bad or verdict.overflows else judged, whole, means

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


def clipped_step(
    replica: Replica, step: int, gradient: Tensor, views: Sequence[Tensor], norm: float, touched: Sequence[bool]
) -> float | None:
    """Clips the whole flat `gradient`, of L2 norm `norm`, and makes the optimizer's step; its learning rate.

    views: of it, by parameter.
    """
    clip(gradient, norm, replica.recipe.clip_norm)
    return replica.update(step, [view if seen else None for view, seen in zip(views, touched, strict=True)])


class Merger:
    """Holds the weights of a run, and makes updates from contributions."""

    def __init__(self, replica: Replica, pieces: Pieces):
        self.replica, self.pieces, self.rule = replica, pieces, pieces.rule
        self.layout = Layout.of(replica.parameters, BLOCK[replica.device.type])
        self.pack = Pack(replica.module, replica.parameters, replica.written.frozen)
        self.fragments = Fragments([parameter.nbytes for parameter in replica.parameters], self.rule.fragments)
        self.way_down = WayDown(self.rule, replica.parameters, self.pack, self.fragments) if self.rule.narrow else None
        self._writes = Writes(replica.written)
        self.buffers = Buffers(replica.module, replica.recipe.buffers)
        self._updates = Updates(replica, self.buffers)
        self.version = 0
        """Updates so far."""
        self.microbatches = 0
        """Microbatches merged so far."""
        self._outer = OuterOptimizers(self.rule, self.layout, self.fragments)
        self._empty: dict[int, int] = {}  # by batch: pieces that held no items

    def merge(self, contributions: Sequence[Arrived]) -> Update:
        """Makes one update, in the order given. May use the vectors up. The replica's objective must know its terms.

        The watch may have it left out. Raises NonFiniteError, or ObjectiveError for whole batches without items, before
        any change, where it does not; and RecipeError where contributions disagree on what forwards wrote.
        """
        self.replica.enter(self.version)
        step = self.microbatches // self.pieces.microbatches
        facts = [each.facts for each in contributions]
        terms = self.replica.objective.terms or ()
        counts = {name: sum(each.counts[name] for each in facts) for name in terms}
        sums = {name: list(itertools.chain(*(each.sums[name] for each in facts))) for name in terms}
        written = self._written(contributions, step)
        total = self._total(contributions, written)
        norm = norm_of(total, self.layout)
        bad, left_out = self._bad(contributions, norm, step)
        skips = self._updates.watcher.skips and self.rule.gradients
        left_out = left_out or (skips and not self.replica.objective.has_items(counts))
        touched = set().union(*(each.touched for each in facts))
        added = Added(
            sums, counts, norm, [index in touched for index in range(len(self.replica.parameters))], written,
            bad=bad, left_out=left_out, off=self._off(facts), ends=[each.ends for each in facts],
            scale=max(each.scale for each in facts), overflows=sum(each.overflows for each in facts),
        )  # fmt: skip
        more = self.rule.local_steps - self.rule.stride  # a fragment is moved along all since it was sent last
        still = self.replica.trainable.frozen_in([batch for each in contributions for batch in each.work.batches(more)])
        outer = None if self.rule.gradients else self._outer.of_round(self.version, still)
        weights = _Whole(self.replica, self.layout, total, outer)
        update = self._updates.make(step, added, weights, lambda: self._take_buffers(contributions))
        self._writes.made(taken=update.verdict.updates)
        if self.way_down is not None:
            self.way_down.merged(contributions)
        self._count_empty(facts)
        self.version += 1
        self.microbatches += sum(each.work.microbatches for each in contributions)
        return update

    @property
    def sound(self) -> bool:
        """Whether the weights are those of a version, with no update half made."""
        return self._updates.sound

    def _bad(self, contributions: Sequence[Arrived], norm: float, step: int) -> tuple[list[ObjectiveError], bool]:
        """What is not finite and which batches have no items; whether the update is to be left out for the former."""
        wrong: list[ObjectiveError] = [why for each in contributions for why in each.facts.bad]
        left_out = bool(wrong) and self.rule.gradients
        if left_out:
            wrong = wrong[:1]  # one update, one batch that is left out
        elif not (math.isfinite(norm) or self._yields(contributions)):
            wrong, left_out = [*wrong, NonFiniteError(self._about(contributions, step))], True
        found = Counter(batch for each in contributions for batch in each.facts.empty)
        # The last piece of a batch holds no items either, whenever the others came.
        empty = [batch for batch, more in found.items() if self._empty.get(batch, 0) + more == self.pieces.parts]
        return wrong + [self.replica.objective.no_items(batch) for batch in empty if not left_out], left_out

    def _yields(self, contributions: Sequence[Arrived]) -> bool:
        """Whether a gradient that is not finite is left out for the loss scale, which is lowered."""
        return self.rule.gradients and self.replica.scaler.yields(max(each.facts.scale for each in contributions))

    def _count_empty(self, facts: Sequence[Facts]) -> None:
        for batch in (batch for each in facts for batch in each.empty):
            self._empty[batch] = self._empty.get(batch, 0) + 1
            if self._empty[batch] == self.pieces.parts:
                del self._empty[batch]

    def checksum(self) -> list[str]:
        """Of the present weights, one for each of `names`."""
        return checksum([*self.replica.parameters, *self.replica.written.frozen])

    @property
    def names(self) -> list[str]:
        """Of the parameters that updates change."""
        return [*self.replica.names, *(n for n in self.replica.written.names if n not in self.replica.names)]

    def training_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the weights."""
        return {
            **self.replica.training_state(), "outer": self._outer.state(), "watch": self._updates.watcher.state(),
            "empty": dict(self._empty), **(self.way_down.state() if self.way_down is not None else {}),
        }  # fmt: skip

    def load(self, model_state: Mapping[str, Tensor], training_state: Mapping[str, Any]) -> None:
        """Takes the state of a checkpoint. Raises CheckpointError where it does not fit."""
        self.replica.load(model_state, training_state)
        self.buffers.restart()
        self._writes = Writes(self.replica.written)
        self._updates.watcher.load(training_state.get("watch"))
        empty = training_state.get("empty", {})
        wrong = misfit(empty, COUNTS)
        if wrong is not None:
            raise CheckpointError(f"of the batches without items in the checkpoint {wrong}; use an earlier checkpoint.")
        self._empty = dict(empty)
        if "outer" in training_state:  # the lockstep engine has none
            self._outer.load(training_state["outer"])
        if self.way_down is not None:
            self.way_down.load(training_state.get("wire"))

    def _written(self, contributions: Sequence[Arrived], step: int) -> dict[str, Tensor]:
        """What the update is to find in the parameters that forwards wrote, by name."""
        rows = [each.vectors.written for each in contributions]
        if self.rule.gradients:
            return self._writes.values(rows, [each.staleness for each in contributions], step)
        return self._writes.means(rows, [each.weight for each in contributions], step)

    def _total(self, contributions: Sequence[Arrived], written: Mapping[str, Tensor]) -> Tensor:
        """The update's gradient or delta, flat."""
        if self.pieces.in_tree_order:
            rows = [row for each in contributions for row in each.vectors.gradient.unbind(0)[: len(each.facts.nodes)]]
            for into, source in self._plan(contributions):
                rows[into].add_(rows[source])
            whole: Tensor = rows[0]
            return whole
        first = contributions[0]
        total = self._compensated(first, written)
        if first.weight != 1.0:
            total.mul_(first.weight)
        for each in contributions[1:]:
            total.add_(self._compensated(each, written), alpha=each.weight)
        return total

    def _compensated(self, each: Arrived, written: Mapping[str, Tensor]) -> Tensor:
        """Its gradient, corrected by how far the weights are now from those that it was computed at."""
        gradient = each.vectors.gradient[0]
        if self.rule.compensation and each.staleness:
            assert each.base is not None
            bases = self.pack.parameters(each.base)
            names, changes = self.replica.names, self.replica.written.read(each.vectors.written, 0)
            with torch.no_grad():
                for view, name, base in zip(self.layout.views(gradient), names, bases, strict=True):
                    now, at = written.get(name, self.replica.written.value(name)), base.to(view.device)
                    at = changes[name].applied_to(at) if name in changes else at
                    moved = now.to(view.dtype) - at.to(view.dtype)
                    view.addcmul_(view * view, moved, value=self.rule.compensation)
        return gradient

    def _plan(self, contributions: Sequence[Arrived]) -> list[tuple[int, int]]:
        nodes = [node for each in contributions for node in each.facts.nodes]
        return merge_plan(nodes, self.pieces.microbatches)

    def _take_buffers(self, contributions: Sequence[Arrived]) -> None:
        """Each buffer takes its value from the microbatches of those contributions that hold it."""
        for index in sorted(set().union(*(each.facts.changed for each in contributions))):
            if self.pieces.in_tree_order:
                self._complete(contributions, index)
            holding = [each for each in contributions if self.pieces.in_tree_order or index in each.facts.posted]
            rows = [row for each in holding for row in each.vectors.buffers[: len(each.facts.nodes)]]
            plan = self._plan(holding) if self.pieces.in_tree_order else [(0, place) for place in range(1, len(rows))]
            newest = max(range(len(holding)), key=lambda place: holding[place].facts.latest)
            first_row = sum(len(each.facts.nodes) for each in holding[:newest])
            if filled := sum(each.facts.filled for each in holding):
                self.buffers.finish(
                    [index], plan, rows, [each.vectors.integers for each in holding], filled, (first_row, newest),
                    steps=max(each.facts.made for each in holding),
                )  # fmt: skip

    def _complete(self, contributions: Sequence[Arrived], index: int) -> None:
        """Has those contributions too hold a buffer whose workers had not seen it change before."""
        for each in contributions:
            if index not in each.facts.posted:
                work, vectors = each.work, each.vectors
                sizes = [self.replica.cursor.microbatch_size(work.batch, m) for m in range(work.start, work.stop)]
                self.buffers.untouched([size > 0 for size in sizes])
                rows = list(vectors.buffers[: len(each.facts.nodes)])
                self.buffers.post([index], work.start, each.facts.nodes, rows, vectors.integers)

    def _off(self, facts: Sequence[Facts]) -> frozenset[int] | None:
        """Parameters cease to require a gradient where one contribution has them cease, and begin where all do."""
        filled = [each for each in facts if each.latest != NOTHING]
        if not any(each.ceased or each.begun for each in filled):
            return None
        ceased = set().union(*(each.ceased for each in filled))
        begun = set(filled[0].begun).intersection(*(each.begun for each in filled))
        return (self.replica.trainable.off | ceased) - begun

    def _about(self, contributions: Sequence[Arrived], step: int) -> str:
        bad = next((each.worker for each in contributions if not bool(torch.isfinite(each.vectors.gradient).all())), -1)
        whose = f"of worker {bad} is not finite" if bad >= 0 else "is too large to square"
        samples = ""
        if bad >= 0:
            work = next(each.work for each in contributions if each.worker == bad)
            samples = f" (global batch {work.batch + 1}, microbatches {work.start} to {work.stop - 1})"
        whose += self.replica.scaler.said() if self.rule.gradients else ""
        return f"the contribution {whose} in step {step + 1}{samples}, though every term of the objective is."


class _Whole:
    """All weights, moved by one process along the flat `total`: a gradient or, by the `outer` optimizer, a delta."""

    def __init__(self, replica: Replica, layout: Layout, total: Tensor, outer: OuterStep | None):
        self._replica, self._layout, self._total, self._outer = replica, layout, total, outer

    def update(self, step: int, norm: float, touched: Sequence[bool]) -> float | None:
        if self._outer is not None:
            return self._outer(self._total, self._replica.parameters)
        return clipped_step(self._replica, step, self._total, self._layout.views(self._total), norm, touched)

    def settle(self) -> None:
        pass
