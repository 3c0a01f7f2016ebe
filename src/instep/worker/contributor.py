"""A worker's part under any rule: from weights and a piece of work to a contribution.

The server engine's workers, the virtual engine and the replay all compute contributions here, with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from instep.errors import NonFiniteError
from instep.reduce.buffers import Buffers
from instep.reduce.checksums import checksum
from instep.reduce.fold import Fold
from instep.reduce.layout import BLOCK, Layout
from instep.reduce.pack import Pack
from instep.reduce.reduction import clip, norm_of
from instep.reduce.tree import Node, nodes_of
from instep.reduce.written import Written
from instep.rules.work import Pieces, Work
from instep.transport.shared_memory import Region
from instep.worker.evaluation import is_saved_after
from instep.worker.replica import Replica

_COUNTED = 100_000
"""Microbatches whose items are remembered, for virtual teams, where many ask for the same."""

_KEPT_BYTES = 1 << 28
"""Of samples that were loaded to be counted, and are kept until they are computed, where one process does both."""


NOTHING = (-1, -1)
"""In place of a batch and a microbatch, where none had samples."""


@dataclass
class Vectors:
    """The tensors of a contribution. N tree nodes (1 but under a synchronous rule).

    gradient: [N, layout.size] float32; a delta instead where the rule has local steps.
    buffers: [N, row_size] float32 and integers: [size] int64, as `Buffers.post` writes them. written:
    [Written.row_bytes] uint8, what forwards wrote into parameters.
    """

    gradient: Tensor
    buffers: Tensor
    integers: Tensor
    written: Tensor

    def checksum(self, nodes: int) -> list[str]:
        """Of its gradient at so many nodes, and of what forwards wrote if they do."""
        return checksum([*self.gradient[:nodes], *([self.written] if self.written.numel() else [])])

    def clone(self) -> Vectors:
        """A copy in memory of its own."""
        return Vectors(self.gradient.clone(), self.buffers.clone(), self.integers.clone(), self.written.clone())


@dataclass(frozen=True)
class Facts:
    """What a contribution tells beside its vectors.

    nodes: the microbatches of each row. counts: by term, in the objective's order, over all it covers. sums: by term,
    of each microbatch by itself, so that an update adds up all of them at once, whoever sent them. filled:
    microbatches with samples. touched: indices of the parameters that had a gradient. posted: indices of the buffers
    that the rows hold; changed: of those that were changed. latest: batch and microbatch of the last samples. ends: of
    the run's first batch, `Buffers.ends`. ceased, begun: of the parameters, see `Trainable`. made: local steps
    that were made. bad: what is not finite in it, though it is to be left out. empty: the batches of which its
    microbatches have no items.
    """

    nodes: tuple[Node, ...]
    counts: Mapping[str, int]
    sums: Mapping[str, tuple[float, ...]]
    filled: int
    touched: tuple[int, ...]
    posted: tuple[int, ...]
    changed: tuple[int, ...] = ()
    latest: tuple[int, int] = NOTHING
    ends: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    made: int = 1
    ceased: tuple[int, ...] = ()
    begun: tuple[int, ...] = ()
    bad: tuple[NonFiniteError, ...] = ()
    empty: tuple[int, ...] = ()

    @property
    def items(self) -> int:
        """Of the objective's first term."""
        return next(iter(self.counts.values()))


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
    """Computes contributions with one replica.

    `advance` is called after each microbatch. Under a rule with local steps the optimizer's state stays from one
    contribution to the next; it is new when a worker joins.

    `alone`: it computes the pieces of all workers, so what it loads to count the items of others it will need itself.
    `checkpoint_every`: global batches between two close looks at what forwards write, see `Written.look`; 0: only one,
    at the first batch.
    """

    def __init__(
        self,
        replica: Replica,
        pieces: Pieces,
        advance: Callable[[], None] = lambda: None,
        *,
        alone: bool = False,
        checkpoint_every: int = 0,
    ):
        self.replica, self.pieces, self.rule = replica, pieces, pieces.rule
        self._alone, self._checkpoint_every, self._looked = alone, checkpoint_every, False
        self.written: Written = replica.written
        self.layout = Layout.of(replica.parameters, BLOCK[replica.device.type])
        self.pack = Pack(replica.module, replica.parameters, self.written.frozen)
        self.buffers = Buffers(replica.module, replica.recipe.buffers)
        self.terms: tuple[str, ...] = ()
        self.changing: set[int] = set()
        """The buffers that training changes, by index."""
        self._advance = advance
        self._fold: Fold | None = None
        self._summed: Tensor | None = None
        self._counted: dict[tuple[int, int], Mapping[str, int]] = {}  # items by batch and microbatch, the latest ones
        self._whole: tuple[int, dict[str, int]] = (-1, {})  # the last batch that was counted whole, and its items
        self._kept: dict[tuple[int, int], Any] = {}  # samples by batch and microbatch, until they are computed
        self._room = 1  # how many of them may be kept

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
        }

    def empty(self) -> Vectors:
        """Vectors for one contribution, in private memory; its gradient on the replica's device."""
        gradient, buffers, integers, written = (
            torch.zeros(region.shape[1:], dtype=getattr(torch, region.dtype)) for region in self.regions(1).values()
        )
        return Vectors(gradient.to(self.replica.device), buffers, integers, written)

    def prepare(self, batch: int, samples: Any | None = None) -> Any:
        """Learns the objective's terms, which parameters its forwards write and which buffers training changes, from a
        first forward; the batch of it.

        `samples`: those of its first microbatch, if they were read already.
        """
        samples = self.replica.learn_terms(batch, samples)
        self.terms = tuple(self.replica.objective.terms or ())
        self.buffers.begin()
        if self.buffers.names:
            with self.written.probing(learn=False), torch.no_grad():
                self.replica.objective.sums(self.replica.module, samples)
        self.buffers.leave(filled=True)
        self.replica.trainable.begin()
        self.changing = {index for index, changed in enumerate(self.buffers.changed()) if changed}
        self.buffers.begin()
        self.pack = Pack(self.replica.module, self.replica.parameters, self.written.frozen)
        return samples

    def load(self, saved: Tensor) -> None:
        """Gives the replica the weights and buffers to start from ([pack.size_bytes], uint8)."""
        self.pack.load(saved)
        self.buffers.restart()

    def enter(self, version: int) -> None:
        """What is computed next starts from weights of `version`: what the recipe's changes say up to it holds."""
        if self.replica.enter(version):
            self._counted, self._whole, self._kept = {}, (-1, {}), {}

    def compute(self, work: Work, saved: Tensor, into: Vectors, off: Collection[int] = ()) -> Facts:
        """The contribution of `work` from the weights `saved`, written into `into`. off: see `Trainable`. Their
        version must be entered.

        A term or, with local steps, a gradient that is not finite is told of, and such a local step left out.
        Raises RecipeError where forwards disagree on what they wrote, and FirstWrite.
        """
        self.load(saved)
        self.replica.trainable.take(off)
        return self._gradient(work, into) if self.rule.gradients else self._delta(work, saved, into)

    def counts(self, work: Work) -> dict[str, int]:
        """Items of each term in a piece of work, without computing it."""
        totals = dict.fromkeys(self.terms, 0)
        for batch in range(work.batch, work.batch + work.local_steps):
            for name, count in self._counts(batch, range(work.start, work.stop), {}).items():
                totals[name] += count
        return totals

    def inputs(self, work: Work, load: Callable[[int, int], Any | None] | None = None) -> Inputs:
        """Loads what `work` is computed from, under a rule without local steps.

        `load`: what gives a microbatch of a batch; its answer must do for counting items.
        """
        own = range(work.start, work.stop)
        batches = {m: (load or self._load)(work.batch, m) for m in own}
        counts = self._counts(work.batch, own, batches)
        totals = counts
        if self.pieces.in_tree_order:
            if self._whole[0] != work.batch:  # for all workers of a virtual team, they are counted once
                self._whole = work.batch, self._counts(work.batch, range(self.pieces.microbatches), batches)
            totals = self._whole[1]
        return Inputs(batches, counts, totals, nodes_of(work, self.pieces))

    def _gradient(self, work: Work, into: Vectors) -> Facts:
        inputs = self.inputs(work)
        nodes, batches = inputs.nodes, inputs.batches
        rows = list(into.gradient[: len(nodes)])
        if self.passes_over(inputs.totals):
            batches = dict.fromkeys(batches)
        sums, touched, bad = self._microbatches(work.batch, batches, inputs.totals, nodes, rows)
        changed = self._changed()
        posted = tuple(sorted({*changed, *self.changing}))
        self.buffers.post(posted, work.start, nodes, list(into.buffers[: len(nodes)]), into.integers)
        self.written.post(into.written, self.written.own(work.batch))
        filled = len(_filled(batches))
        return Facts(
            tuple(nodes), inputs.counts, sums, filled, touched, posted, changed,
            latest=latest_of(work.batch, _filled(batches)), ends=self.buffers.ends() if work.batch == 0 else {},
            ceased=self.replica.trainable.ceased, begun=self.replica.trainable.begun,
            bad=tuple(bad[:1]), empty=self.without_items(work.batch, inputs.counts),
        )  # fmt: skip

    def passes_over(self, totals: Mapping[str, int]) -> bool:
        """Whether nothing is computed where these are the items of what would be."""
        return self.replica.watch.bad_batch == "skip" and not self.replica.objective.has_items(totals)

    def without_items(self, batch: int, counts: Mapping[str, int]) -> tuple[int, ...]:
        """The batch, if its microbatches here have no items."""
        return () if self.replica.objective.has_items(counts) else (batch,)

    def _delta(self, work: Work, saved: Tensor, into: Vectors) -> Facts:
        counts = dict.fromkeys(self.terms, 0)
        sums: dict[str, tuple[float, ...]] = dict.fromkeys(self.terms, ())
        nodes = nodes_of(work, self.pieces)
        if self._summed is None:
            self._summed = torch.zeros(self.layout.size, device=self.replica.device)
        moved: set[int] = set()
        changed: set[int] = set()
        began, latest, ends = self.buffers.start, NOTHING, dict[int, tuple[int, int]]()
        trainable, off = self.replica.trainable, self.replica.trainable.off
        bad: list[NonFiniteError] = []
        empty: list[int] = []
        made = 0
        for batch in range(work.batch, work.batch + work.local_steps):
            batches = {m: self.replica.batch(batch, m) for m in range(work.start, work.stop)}
            own = self._counts(batch, range(work.start, work.stop), batches)
            empty += self.without_items(batch, own)
            if self.passes_over(own):
                self._advance()
                continue
            found, touched, wrong = self._microbatches(batch, batches, own, nodes, [self._summed])
            norm = norm_of(self._summed, self.layout)
            if not (wrong or math.isfinite(norm)):
                wrong = [NonFiniteError(
                    f"the gradient is not finite in local step {batch - work.batch + 1} of {work.local_steps}, on "
                    f"global batch {batch + 1}."
                )]  # fmt: skip
            if wrong:
                bad += wrong[:1]
                continue
            clip(self._summed, norm, self.replica.recipe.clip_norm)
            self.written.take(self.written.after(self.written.own(batch)))
            views = self.layout.views(self._summed)
            self.replica.update(batch, [view if i in touched else None for i, view in enumerate(views)])
            made += 1
            latest = max(latest, latest_of(batch, _filled(batches)))
            ends = self.buffers.ends() if batch == 0 else ends
            trainable.take(trainable.off if trainable.ended is None else trainable.ended)
            changed.update(self._own_buffers(batches))
            moved.update(touched)
            for name in self.terms:
                counts[name] += own[name]
                sums[name] += found[name]
        row = into.gradient[0]
        row.zero_()
        pulled = self.pack.parameters(saved)
        with torch.no_grad():
            for view, before, parameter in zip(self.layout.views(row), pulled, self.replica.parameters, strict=True):
                torch.sub(before.to(view.dtype), parameter.to(view.device, view.dtype), out=view)
        self.written.post(into.written, self.written.differences(self.pack.frozen(saved)))
        posted = tuple(sorted({*changed, *self.changing}))  # no others: what is constant would be rounded in the mean
        self.buffers.untouched([True])
        self.buffers.post(posted, 0, [(0, 1)], [into.buffers[0]], into.integers, start=began, steps=made)
        return Facts(
            ((0, 1),), counts, sums, 1, tuple(sorted(moved)), posted, tuple(sorted(changed)), latest=latest, ends=ends,
            ceased=tuple(sorted(trainable.off - off)), begun=tuple(sorted(off - trainable.off)),
            made=made, bad=tuple(bad), empty=tuple(empty),
        )  # fmt: skip

    def _microbatches(
        self,
        batch: int,
        batches: Mapping[int, Any],
        totals: Mapping[str, int],
        nodes: Sequence[Node],
        rows: Sequence[Tensor],
    ) -> tuple[dict[str, tuple[float, ...]], tuple[int, ...], list[NonFiniteError]]:
        """Folds the gradients of a batch's microbatches into `rows`.

        Returns sums, the parameters touched, and what is not finite.
        """
        if self._fold is None:
            self._fold = Fold(self.layout, self.replica.parameters, nodes, rows)
        else:
            self._fold.assign(nodes, rows)
        self._fold.begin()
        self.buffers.begin()
        self.replica.trainable.begin()
        found: list[dict[str, float]] = []
        bad: list[NonFiniteError] = []
        with self.written.kept(f"global batch {batch + 1}", closely=self._closely(batch)):
            for microbatch, samples in batches.items():
                self._fold.begin_leaf()
                if samples is not None:
                    sums = self.replica.compute(batch, microbatch, samples, totals)
                    found.append({name: float(value) for name, value in sums.items()})
                    bad += self.check(found[-1], batch, microbatch)
                self._fold.end_leaf()
                self.buffers.leave(filled=samples is not None)
                self.written.leave()
                if samples is not None:
                    self.replica.trainable.leave(batch)
                self._advance()
        touched = tuple(index for index, seen in enumerate(self._fold.touched) if seen)
        return {name: tuple(each[name] for each in found) for name in self.terms}, touched, bad

    def _closely(self, batch: int) -> bool:
        first, self._looked = not self._looked, True
        saved = self._checkpoint_every, self.replica.recipe.evaluate_every  # the best checkpoints too
        return first or is_saved_after(batch, self.pieces.steps, saved)

    def check(self, sums: Mapping[str, float], batch: int, microbatch: int) -> list[NonFiniteError]:
        """What is not finite among the terms."""
        return [
            self.replica.not_finite(name, value, batch, microbatch)
            for name, value in sums.items()
            if not math.isfinite(value)
        ]

    def _own_buffers(self, batches: Mapping[int, Any]) -> list[int]:
        """After a local step: the buffers take from this worker's microbatches what those of one worker alone would.

        Returns which buffers the step changed.
        """
        which = list(self._changed())
        if all(samples is None for samples in batches.values()):
            which = [index for index in self.buffers.decaying if index in self.changing]  # as others do in this step
        if not which:
            return []
        row = torch.zeros(self.buffers.row_size)
        integers = torch.zeros(self.buffers.integer_layout.size, dtype=torch.int64)
        self.buffers.post(which, 0, [(0, len(batches))], [row], integers)
        self.buffers.finish(which, [], [row], [integers], sum(b is not None for b in batches.values()))
        return which

    def _changed(self) -> tuple[int, ...]:
        return tuple(index for index, flag in enumerate(self.buffers.changed()) if flag)

    def _load(self, batch: int, microbatch: int) -> Any | None:
        """The samples of a microbatch, perhaps kept since they were counted. Whoever computes them may change them."""
        key = batch, microbatch
        return self._kept.pop(key) if key in self._kept else self.replica.batch(batch, microbatch)

    def _load_to_count(self, batch: int, microbatch: int) -> Any | None:
        samples = self.replica.batch(batch, microbatch)
        if self._alone and len(self._kept) < self._room:
            if not self._kept:
                nbytes = sum(leaf.nbytes for leaf in tree_leaves(samples) if isinstance(leaf, Tensor))
                self._room = max(1, _KEPT_BYTES // max(1, nbytes))
            self._kept[batch, microbatch] = samples
        return samples

    def _count(self, batch: int, microbatch: int, loaded: Mapping[int, Any]) -> Mapping[str, int]:
        """Items of each term in a microbatch; none at all where it has no samples."""
        if self.replica.rows is not None:  # they need not be looked at
            size = self.replica.cursor.microbatch_size(batch, microbatch)
            return dict.fromkeys(self.terms, size) if size else {}
        samples = loaded[microbatch] if microbatch in loaded else self._load_to_count(batch, microbatch)
        return {} if samples is None else self.replica.objective.counts(samples)

    def _counts(self, batch: int, microbatches: range, loaded: Mapping[int, Any]) -> dict[str, int]:
        totals = dict.fromkeys(self.terms, 0)
        for microbatch in microbatches:
            key = batch, microbatch
            if key not in self._counted:
                self._counted[key] = self._count(batch, microbatch, loaded)
                if len(self._counted) > _COUNTED:
                    del self._counted[next(iter(self._counted))]
            for name, count in self._counted[key].items():
                totals[name] += count
        return totals


def latest_of(batch: int, filled: Iterable[int]) -> tuple[int, int]:
    """A batch and the last of its microbatches `filled` with samples; `NOTHING` where there are none."""
    return max(((batch, microbatch) for microbatch in filled), default=NOTHING)


def _filled(batches: Mapping[int, Any]) -> list[int]:
    return [microbatch for microbatch, samples in batches.items() if samples is not None]
