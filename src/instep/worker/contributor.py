"""A worker's contributions, computed from weights that it is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from instep.errors import NonFiniteError
from instep.reduce.layout import BLOCK, Pack
from instep.reduce.reduction import norm_of
from instep.reduce.tree import Node, nodes_of
from instep.reduce.written import WrittenParameters
from instep.rules.fragments import Fragments
from instep.rules.work import Pieces, Work
from instep.transport.memory import Region
from instep.worker.ahead import Begun, check_overlap
from instep.worker.contribution import Facts, Vectors, latest_of
from instep.worker.gradients import Computed, Gradients
from instep.worker.item_counts import ItemCounts
from instep.worker.local_steps import LocalSteps, places
from instep.worker.replica import Replica
from instep.worker.streamed import Streamed
from instep.worker.updates import clipped_step
from instep.worker.wire import WayUp


@dataclass(frozen=True)
class Inputs:
    """What a piece of work is computed from, under a rule without local steps.

    batches: the samples by microbatch, None where there are none. counts: items by term. totals: what the sums are
    divided by. nodes: the microbatches of each row of the contribution.
    """

    batches: Mapping[int, Any]
    counts: Mapping[str, int]
    totals: Mapping[str, int]
    nodes: Sequence[Node]


class Contributor:
    """Computes contributions with one replica, from weights that it is given.

    `advance` is called after each microbatch. Under a rule with local steps the optimizer's state stays from one
    contribution to the next, and so do weights of its own, see `Streamed`; they are new when a worker joins, as what a
    narrow wire has lost is 0.

    `alone`: it computes the pieces of all workers, see `ItemCounts`. `checkpoint_every`: see `Gradients`. `merged_on`:
    the device where contributions are merged, and wanted, if it is another. `worker`: its number; under a rule with
    `overlap` the piece that it begins by itself follows from that.
    """

    def __init__(
        self,
        replica: Replica,
        pieces: Pieces,
        advance: Callable[[], None] = lambda: None,
        *,
        alone: bool = False,
        checkpoint_every: int = 0,
        merged_on: str = "",
        worker: int = 0,
    ):
        self.replica, self.pieces, self.rule = replica, pieces, pieces.rule
        self._home = torch.device(merged_on) if merged_on else replica.device
        block, what = BLOCK[self._home.type], "global batch"
        self._gradients = Gradients(replica, advance, checkpoint_every=checkpoint_every, what=what, block=block)
        self._staged: Tensor | None = None  # [most_nodes, layout.size], where contributions are wanted elsewhere
        self._items, self._advance = ItemCounts(replica, pieces, alone=alone), advance
        self.written: WrittenParameters = replica.written
        self.layout, self.buffers = self._gradients.layout, self._gradients.buffers
        self.pack = Pack(replica.module, replica.parameters, self.written.frozen)
        self.terms: tuple[str, ...] = ()
        self.changing: set[int] = set()
        """The buffers that training changes, by index."""
        self.way_up = WayUp(self.rule, self.layout, replica.device) if self.rule.narrow else None
        self.fragments = Fragments([parameter.nbytes for parameter in replica.parameters], self.rule.fragments)
        self._streamed: Streamed | None = None
        if self.rule.streams:
            mix = self.rule.mix if self.rule.overlap else 0.0
            self._streamed = Streamed(replica.parameters, self.layout, self.fragments, mix)
        self._worker, self._next = worker, -1  # the piece that it is to begin by itself
        self._begun: Begun | None = None
        self._version = 0
        self._summed: Tensor | None = None

    @cached_property
    def most_nodes(self) -> int:
        """The rows that the vectors of any contribution need at most."""
        return max(len(nodes_of(self.pieces.work(part), self.pieces)) for part in range(self.pieces.parts))

    def regions(self, contributions: int) -> dict[str, Region]:
        """The memory that so many contributions need."""
        nodes = self.most_nodes
        return {
            "gradient": Region((contributions, nodes, self.layout.size), "float32"),
            "buffers": Region((contributions, nodes, self.buffers.row_size), "float32"),
            "integers": Region((contributions, self.buffers.integer_layout.size), "int64"),
            "written": Region((contributions, self.written.row_bytes), "uint8"),
            "lost": Region((contributions, self.way_up.kept if self.way_up else 0), "float32"),
        }

    def empty(self) -> Vectors:
        """Vectors for one contribution, in private memory; its gradient where it is merged."""
        gradient, *others = (
            torch.zeros(region.shape[1:], dtype=getattr(torch, region.dtype)) for region in self.regions(1).values()
        )
        return Vectors(gradient.to(self._home), *others)

    def prepare(self, batch: int, samples: Any | None = None) -> Any:
        """Learns the objective's terms, which parameters its forwards write and which buffers training changes, from a
        first forward; the batch of it.

        `samples`: those of its first microbatch, if they were read already. Raises RecipeError where the rule does not
        go with what forwards write.
        """
        samples = self.replica.learn_terms(batch, samples)
        self.terms = tuple(self.replica.objective.terms or ())
        self.buffers.begin()
        if self.buffers.names:
            with self.written.probing(learn=False), torch.no_grad():
                self.replica.objective.sums(self.replica.module, samples)
        self.buffers.leave(filled=True)
        self.replica.trainable.begin(batch)
        self.changing = {index for index, changed in enumerate(self.buffers.changed()) if changed}
        self.buffers.begin()
        self.pack = Pack(self.replica.module, self.replica.parameters, self.written.frozen)
        check_overlap(self.rule, self.written)
        return samples

    def load(self, saved: Tensor) -> None:
        """Gives the replica the weights and buffers of the version entered to start from ([pack.size_bytes], uint8)."""
        if self._streamed is None:
            self.pack.load(saved)
        else:
            self._streamed.pull(self.pack, saved, self._version)
        self.buffers.restart()

    def enter(self, version: int) -> None:
        """What is computed next starts from weights of `version`: what the recipe's changes say up to it holds.

        Not for what it begins by itself, which it does before, as in `go_ahead`.
        """
        self.go_ahead()
        self._version = version
        if self.replica.enter(version):
            self._items.forget()

    def compute(self, work: Work, saved: Tensor, into: Vectors, off: Collection[int] = (), scale: float = 0.0) -> Facts:
        """The contribution of `work` from the weights `saved`, written into `into`. off: see `Trainable`. Their
        version must be entered. scale: the loss scale of a gradient, if it is kept elsewhere.

        A term or, with local steps, a gradient that is not finite is told of, and such a local step left out.
        Raises RecipeError where forwards disagree on what they wrote, and FirstWrite.
        """
        self.load(saved)
        self.replica.trainable.take(off)
        if scale and self.rule.gradients:
            self.replica.scaler.take(scale)
        here = into if self._at_home else self._beside(into)
        facts = self._gradient(work, here) if self.rule.gradients else self._delta(work, saved, here)
        if self.rule.overlap:
            self._next = self.pieces.own(self._worker, self.pieces.round_of(work.piece) + 1)
        if here is not into:
            into.gradient[: len(facts.nodes)].copy_(here.gradient[: len(facts.nodes)])
        return facts

    def go_ahead(self) -> int:
        """Begins its piece of the next round, with as many steps as the rule's `overlap`, before it has the update of
        the last one. Returns which it is; -1 where it does nothing, for it has begun, or there is none.
        """
        piece, self._next = self._next, -1
        if piece < 0 or self._begun is not None:
            return -1
        work, before, trainable = self.pieces.work(piece), self.buffers.start, self.replica.trainable
        off, made = trainable.off, self._nothing_made()
        for batch in range(work.batch, work.batch + min(self.rule.overlap, work.local_steps)):
            self._local_step(work, batch, made)
        self._begun = Begun(work, made, before, self.buffers.start, off, trainable.off)
        return piece

    @property
    def _at_home(self) -> bool:
        """Whether contributions are merged on the replica's device."""
        return self._home.type == self.replica.device.type

    def _beside(self, into: Vectors) -> Vectors:
        """The same, with a gradient on the replica's device."""
        if self._staged is None:
            self._staged = torch.zeros(self.most_nodes, self.layout.size, device=self.replica.device)
        return replace(into, gradient=self._staged)

    def counts(self, work: Work) -> dict[str, int]:
        """Items of each term in a piece of work, without computing it."""
        totals = dict.fromkeys(self.terms, 0)
        for batch in range(work.batch, work.batch + work.local_steps):
            for name, count in self._items.of(batch, range(work.start, work.stop), {}).items():
                totals[name] += count
        return totals

    def inputs(self, work: Work, load: Callable[[int, int], Any | None] | None = None) -> Inputs:
        """Loads what `work` is computed from, under a rule without local steps.

        `load`: what gives a microbatch of a batch; its answer must do for counting items.
        """
        own = range(work.start, work.stop)
        batches = {m: (load or self._items.load)(work.batch, m) for m in own}
        counts = self._items.of(work.batch, own, batches)
        totals = self._items.of_whole(work.batch, batches) if self.pieces.in_tree_order else counts
        return Inputs(batches, counts, totals, nodes_of(work, self.pieces))

    def _gradient(self, work: Work, into: Vectors) -> Facts:
        inputs = self.inputs(work)
        nodes, batches = inputs.nodes, inputs.batches
        if self.passes_over(inputs.totals):
            batches = dict.fromkeys(batches)
        self._gradients.assign(nodes, list(into.gradient[: len(nodes)]))
        computed = self._gradients.compute(work.batch, batches, inputs.totals)
        changed = places(computed.changed)
        posted = tuple(sorted({*changed, *self.changing}))
        self.buffers.post(posted, work.start, nodes, list(into.buffers[: len(nodes)]), into.integers)
        self.written.post(into.written, self.written.own(work.batch))
        return Facts(
            tuple(nodes), inputs.counts, self._by_term(computed), len(computed.sums), places(computed.touched), posted,
            changed, latest=latest_of(work.batch, computed.sums), ends=computed.ends,
            ceased=self.replica.trainable.ceased, begun=self.replica.trainable.begun,
            bad=tuple(self._bad(computed, work.batch)[:1]), empty=self.without_items(work.batch, inputs.counts),
            scale=self.replica.scaler.value,
        )  # fmt: skip

    def _by_term(self, computed: Computed) -> dict[str, tuple[float, ...]]:
        return {name: tuple(each[name] for each in computed.sums.values()) for name in self.terms}

    def _bad(self, computed: Computed, batch: int) -> list[NonFiniteError]:
        """What is not finite among the terms."""
        return [why for m, sums in computed.sums.items() for why in self.replica.not_finite(sums, batch, m)]

    def passes_over(self, totals: Mapping[str, int]) -> bool:
        """Whether nothing is computed where these are the items of what would be."""
        return self.replica.watch.bad_batch == "skip" and not self.replica.objective.has_items(totals)

    def without_items(self, batch: int, counts: Mapping[str, int]) -> tuple[int, ...]:
        """The batch, if its microbatches here have no items."""
        return () if self.replica.objective.has_items(counts) else (batch,)

    def _delta(self, work: Work, saved: Tensor, into: Vectors) -> Facts:
        began, trainable, off = self.buffers.start, self.replica.trainable, self.replica.trainable.off
        made, done = self._nothing_made(), 0
        if self._begun is not None and self._begun.work == work:
            begun, self._begun = self._begun, None
            begun.carry_over(self.buffers, trainable)
            made, done = begun.made, min(self.rule.overlap, work.local_steps)
        for batch in range(work.batch + done, work.batch + work.local_steps):
            self._local_step(work, batch, made)
        self._moved(work, saved, into)
        self.written.post(into.written, self.written.differences(self.pack.frozen(saved)))
        posted = tuple(sorted({*made.changed, *self.changing}))  # a constant one would be rounded in the mean
        self.buffers.untouched([True])
        self.buffers.post(posted, 0, [(0, 1)], [into.buffers[0]], into.integers, start=began, steps=made.steps)
        return Facts(
            ((0, 1),), made.counts, made.sums, 1, tuple(sorted(made.moved)), posted, tuple(sorted(made.changed)),
            latest=made.latest, ends=made.ends,
            ceased=tuple(sorted(trainable.off - off)), begun=tuple(sorted(off - trainable.off)),
            made=made.steps, bad=tuple(made.bad), empty=tuple(made.empty), overflows=made.overflows,
        )  # fmt: skip

    def _nothing_made(self) -> LocalSteps:
        return LocalSteps(dict.fromkeys(self.terms, 0), dict.fromkeys(self.terms, ()))

    def _moved(self, work: Work, saved: Tensor, into: Vectors) -> None:
        """Writes how far the weights have moved, and what arrives of it over the wire."""
        row = into.gradient[0]
        row.zero_()
        fragment = self.fragments.of_round(self.pieces.round_of(work.piece))
        if self._streamed is not None:
            self._streamed.send(fragment, row)
        else:
            pulled = self.pack.parameters(saved)
            with torch.no_grad():
                for view, before, now in zip(self.layout.views(row), pulled, self.replica.parameters, strict=True):
                    torch.sub(before.to(view.device, view.dtype), now.to(view.device, view.dtype), out=view)
        if self.way_up is not None:
            self.way_up.send(row, into.lost, fragment)

    def _local_step(self, work: Work, batch: int, made: LocalSteps) -> None:
        """One step of the worker's own optimizer, unless its part of the batch has no items, or is not finite."""
        own = range(work.start, work.stop)
        batches = {m: self.replica.batch(batch, m) for m in own}
        counts = self._items.of(batch, own, batches)
        made.empty += self.without_items(batch, counts)
        if self.passes_over(counts):
            self._advance()
            return
        if self._summed is None:
            self._summed = torch.zeros(self.layout.size, device=self.replica.device)
        self._gradients.assign(nodes_of(work, self.pieces), [self._summed])
        computed = self._gradients.compute(batch, batches, counts)
        wrong, norm, scaler = self._bad(computed, batch), norm_of(self._summed, self.layout), self.replica.scaler
        finite, yields, said = math.isfinite(norm), scaler.yields(), scaler.said()
        scaler.made(finite=finite)
        if not (wrong or finite or yields):
            wrong = [NonFiniteError(
                f"the gradient is not finite{said} in local step {batch - work.batch + 1} of {work.local_steps}, on "
                f"global batch {batch + 1}."
            )]  # fmt: skip
        if wrong or not finite:
            made.bad += wrong[:1]
            made.overflows += not wrong
            return
        trainable = self.replica.trainable
        self.written.take(self.written.after(self.written.own(batch)))
        views = self.layout.views(self._summed)
        clipped_step(self.replica, batch, self._summed, views, norm, computed.touched)
        trainable.take(trainable.off if computed.ended is None else computed.ended)
        made.add(batch, counts, self._by_term(computed), computed, self._take_own_buffers(computed, batches))

    def _take_own_buffers(self, computed: Computed, batches: Mapping[int, Any]) -> list[int]:
        """After a local step: the buffers take from this worker's microbatches what those of one worker alone would.

        Returns which buffers the step changed.
        """
        which = list(places(computed.changed))
        if not computed.sums:
            which = [index for index in self.buffers.decaying if index in self.changing]  # as others do in this step
        if not which:
            return []
        row = torch.zeros(self.buffers.row_size)
        integers = torch.zeros(self.buffers.integer_layout.size, dtype=torch.int64)
        self.buffers.post(which, 0, [(0, len(batches))], [row], integers)
        self.buffers.finish(which, [], [row], [integers], len(computed.sums))
        return which
