"""The server's part under any rule: from the contributions of one update to new weights.

The server engine, the virtual engine and the replay all make updates here, with the same bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from instep.errors import CheckpointError, NonFiniteError, ObjectiveError
from instep.objectives import exact_sum
from instep.record.shapes import COUNTS, misfit
from instep.reduce.buffers import APART, Buffers, about_means
from instep.reduce.checksums import checksum
from instep.reduce.layout import BLOCK, Layout
from instep.reduce.pack import Pack
from instep.reduce.reduction import clip, norm_of
from instep.reduce.tree import merge_plan
from instep.reduce.writes import Writes
from instep.rules.rule import UpdateRule
from instep.rules.work import Pieces, Work
from instep.worker.contributor import NOTHING, Facts, Vectors
from instep.worker.replica import Replica
from instep.worker.spikes import Verdict, Watcher
from instep.worker.updates import Update


@dataclass(frozen=True)
class Arrived:
    """One contribution at the server. `weight` and `staleness` as the ledger gave them.

    `base`: the weights it started from ([Pack.size_bytes], uint8), needed for delay compensation alone.
    """

    worker: int
    work: Work
    facts: Facts
    vectors: Vectors
    weight: float
    staleness: int
    base: Tensor | None = None


class Merger:
    """Holds the weights of a run, and the optimizer that changes them."""

    def __init__(self, replica: Replica, pieces: Pieces):
        self.replica, self.pieces, self.rule = replica, pieces, pieces.rule
        self.layout = Layout.of(replica.parameters, BLOCK[replica.device.type])
        self.pack = Pack(replica.module, replica.parameters, replica.written.frozen)
        self._writes = Writes(replica.written)
        self.buffers = Buffers(replica.module, replica.recipe.buffers)
        self.watcher = Watcher(replica, self.buffers)
        self.version = 0
        """Updates so far."""
        self.microbatches = 0
        """Microbatches merged so far."""
        self.sound = True
        """Whether the weights are those of a version, with no update half made."""
        self._outer = _Outer(self.rule, self.layout)
        self._empty: dict[int, int] = {}  # by batch: pieces that held no items
        self._ends: dict[tuple[int, int], set[int]] = {}  # by buffer and start: what pieces of the first batch left
        self._told: set[int] = set()  # buffers that were warned of

    def merge(self, contributions: Sequence[Arrived]) -> Update:
        """Makes one update, in the order given. May use the vectors up. The replica's objective must know its terms.

        The watch may have it left out. Raises NonFiniteError, or ObjectiveError for whole batches without items, before
        any change, where it does not; and RecipeError where contributions disagree on what forwards wrote.
        """
        self.replica.enter(self.version)
        step = self.microbatches // self.pieces.microbatches
        facts = [each.facts for each in contributions]
        objective, terms = self.replica.objective, self.replica.objective.terms or ()
        counts = {name: sum(each.counts[name] for each in facts) for name in terms}
        some = objective.has_items(counts)
        sums = {name: exact_sum(list(itertools.chain(*(each.sums[name] for each in facts)))) for name in terms}
        written = self._written(contributions, step)
        total = self._total(contributions, written)
        norm = norm_of(total, self.layout)
        bad, left_out = self._bad(contributions, norm, step)
        left_out = left_out or (self.watcher.skips and self.rule.gradients and not some)
        value = None
        means: dict[str, float] = {}
        verdict = self.watcher.left_out(Verdict(), bad, update=left_out) if bad or left_out else Verdict()
        if some and not left_out:
            means = {name: sums[name] / counts[name] for name in terms if counts[name]}
            value = objective.whole(means, step)
            verdict = verdict.also(self.watcher.judge(step, value))
        self._count_empty(facts)
        rate: float | None = 0.0
        self.sound = False
        self._writes.made(taken=verdict.updates)
        if verdict.updates:
            self.replica.written.take(written)
            rate = self._apply(total, set().union(*(each.touched for each in facts)), norm, step)
            self._take_buffers(contributions)
            self._take_flags(facts)
        self.sound = True
        self.version += 1
        self.microbatches += sum(each.work.microbatches for each in contributions)
        return Update(value, means, counts[terms[0]], rate, norm, verdict, self._doubts(facts))

    def _bad(self, contributions: Sequence[Arrived], norm: float, step: int) -> tuple[list[ObjectiveError], bool]:
        """What is not finite and which batches have no items; whether the update is to be left out for the former."""
        wrong: list[ObjectiveError] = [why for each in contributions for why in each.facts.bad]
        left_out = bool(wrong) and self.rule.gradients
        if left_out:
            wrong = wrong[:1]  # one update, one batch that is left out
        elif not math.isfinite(norm):
            wrong, left_out = [*wrong, NonFiniteError(self._about(contributions, step))], True
        found = {batch: 0 for each in contributions for batch in each.facts.empty}
        for batch in (batch for each in contributions for batch in each.facts.empty):
            found[batch] += 1
        # The last piece of a batch holds no items either, whenever the others came.
        empty = [batch for batch, more in found.items() if self._empty.get(batch, 0) + more == self.pieces.parts]
        return wrong + [self.replica.objective.no_items(batch) for batch in empty if not left_out], left_out

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
        written = self.replica.written
        return [*self.replica.names, *(name for name in written.names if name not in self.replica.names)]

    def training_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the weights."""
        return {
            **self.replica.training_state(), "outer": self._outer.state(), "watch": self.watcher.state(),
            "empty": dict(self._empty),
        }  # fmt: skip

    def load(self, model_state: Mapping[str, Tensor], training_state: Mapping[str, Any]) -> None:
        """Takes the state of a checkpoint. Raises CheckpointError where it does not fit."""
        self.replica.load(model_state, training_state)
        self.buffers.restart()
        self._writes = Writes(self.replica.written)
        self.watcher.load(training_state.get("watch"))
        empty = training_state.get("empty", {})
        wrong = misfit(empty, COUNTS)
        if wrong is not None:
            raise CheckpointError(f"of the batches without items in the checkpoint {wrong}; use an earlier checkpoint.")
        self._empty = dict(empty)
        if "outer" in training_state:  # the lockstep engine has none
            self._outer.load(training_state["outer"])

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

    def _apply(self, total: Tensor, touched: set[int], norm: float, step: int) -> float | None:
        if not self.rule.gradients:
            self._outer.step(total, self.replica.parameters)
            return self.rule.outer_lr
        clip(total, norm, self.replica.recipe.clip_norm)
        views = self.layout.views(total)
        return self.replica.update(step, [view if i in touched else None for i, view in enumerate(views)])

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
            filled = sum(each.facts.filled for each in holding)
            if filled:
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

    def _take_flags(self, facts: Sequence[Facts]) -> None:
        """Parameters cease to require a gradient where one contribution has them cease, and begin where all do."""
        filled, trainable = [each for each in facts if each.latest != NOTHING], self.replica.trainable
        if any(each.ceased or each.begun for each in filled):
            ceased = set().union(*(each.ceased for each in filled))
            begun = set(filled[0].begun).intersection(*(each.begun for each in filled))
            trainable.take((trainable.off | ceased) - begun)

    def _doubts(self, facts: Sequence[Facts]) -> tuple[str, ...]:
        """Warns, once, of buffers that pieces of the first batch left with different values of the same start."""
        found = []
        for each in facts:
            for index, (start, end) in each.ends.items():
                ends = self._ends.setdefault((index, start), set())
                ends.add(end)
                if index not in self._told and (APART in ends or len(ends) > 1):
                    self._told.add(index)
                    found.append(self.buffers.names[index])
        return (about_means(found),) if found else ()

    def _about(self, contributions: Sequence[Arrived], step: int) -> str:
        bad = next((each.worker for each in contributions if not bool(torch.isfinite(each.vectors.gradient).all())), -1)
        whose = f"of worker {bad} is not finite" if bad >= 0 else "is too large to square"
        samples = ""
        if bad >= 0:
            work = next(each.work for each in contributions if each.worker == bad)
            samples = f" (global batch {work.batch + 1}, microbatches {work.start} to {work.stop - 1})"
        return f"the contribution {whose} in step {step + 1}{samples}, though every term of the objective is."


class _Outer:
    """The outer optimizer: SGD along the mean delta, with momentum as `UpdateRule.outer` says.

    "sgd" and "nesterov" are those of torch.optim.SGD. "delayed_nesterov" is algorithm 3 of Liu et al., 2024,
    arXiv:2401.09135, with c = 0: each update moves by a part of outer_buffer of its delta, and once in outer_buffer
    updates the momentum takes in the mean of the deltas since, a running sum, and moves the weights.
    """

    def __init__(self, rule: UpdateRule, layout: Layout):
        self._rule, self._layout = rule, layout
        self._momentum: Tensor | None = None
        self._sum: Tensor | None = None
        self._updates = 0

    def step(self, delta: Tensor, parameters: Sequence[Tensor]) -> None:
        """Moves `parameters` against `delta` ([layout.size] float32)."""
        rule = self._rule
        if rule.outer == "delayed_nesterov":
            move = self._delayed(delta)
        elif rule.outer_momentum:
            if self._momentum is None:
                self._momentum = delta.clone()
            else:
                self._momentum.mul_(rule.outer_momentum).add_(delta)
            nesterov = rule.outer == "nesterov"
            move = delta.add_(self._momentum, alpha=rule.outer_momentum) if nesterov else self._momentum
        else:
            move = delta
        with torch.no_grad():
            for parameter, view in zip(parameters, self._layout.views(move), strict=True):
                parameter.sub_(view.to(parameter.dtype), alpha=rule.outer_lr)

    def _delayed(self, delta: Tensor) -> Tensor:
        length, decay = self._rule.outer_buffer, self._rule.outer_momentum
        if self._momentum is None or self._sum is None:
            self._momentum, self._sum = torch.zeros_like(delta), torch.zeros_like(delta)
        self._sum.add_(delta)
        self._updates += 1
        delta.div_(length)
        if self._updates % length == 0:
            self._momentum.mul_(decay).add_(self._sum, alpha=1 / length)
            self._sum.zero_()
            delta.add_(self._momentum, alpha=decay)
        return delta

    def state(self) -> dict[str, Any]:
        """For a checkpoint: tensors and numbers."""
        return {"momentum": self._momentum, "sum": self._sum, "updates": self._updates}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` gave. Raises CheckpointError where it is none."""
        if not isinstance(state, Mapping) or type(state.get("updates")) is not int:
            raise CheckpointError("the outer optimizer's state is not in the checkpoint; use an earlier one.")
        for name in ("momentum", "sum"):
            value = state.get(name)
            if value is None:
                continue
            if not isinstance(value, Tensor) or (value.shape, value.dtype) != ((self._layout.size,), torch.float32):
                raise CheckpointError(f"the outer optimizer's '{name}' in the checkpoint is none; use an earlier one.")
        self._momentum, self._sum, self._updates = state.get("momentum"), state.get("sum"), state["updates"]
