"""A step that is done again: what workers have of it comes to the sums that it would have come to, bit for bit."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from instep.engines.kept import HERE, PUT, UPDATE, WHOLE, GroupMemory, KeptOfStep, Mark, Marks
from instep.engines.redo import CannotKeep, Redo, RedoPlan, ToldOfStep, ranges_of
from instep.reduce.buffers import Buffers
from instep.reduce.layout import Layout
from instep.reduce.levels import levels_of, machine_of
from instep.reduce.reduction import Reduction
from instep.reduce.tree import Node, maximal_nodes, tree_sum
from instep.worker.gradients import Computed

BLOCK = 8
LAYOUT = Layout.of([torch.zeros(100), torch.zeros(37)], block=BLOCK)


def leaf(microbatch: int) -> Tensor:
    """Its gradient: numbers that another order adds to others, among them both zeros."""
    values = torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(microbatch)) * 10.0 ** (microbatch % 5)
    values[::7], values[1::9] = -0.0, 0.0
    return values


def of_node(node: Node) -> Tensor:
    return tree_sum([leaf(microbatch) for microbatch in range(*node)], torch.add).clone()


class Step:
    """What workers of machines have in memory at a random moment of step 3. late: who has not computed, if any."""

    def __init__(self, draw: random.Random, machines: Sequence[int], microbatches: int, pieces: Sequence[int]):
        self.reduction = Reduction(LAYOUT, microbatches, levels_of(machines), pieces)
        self.teams = [machine_of(sum(machines[:place]), machines) for place in range(len(machines))]
        workers = range(sum(machines))
        self.rows = [[of_node(node) for node in self.reduction.nodes_of(worker)] for worker in workers]
        memories = [
            GroupMemory(self.reduction, t[0], [self.rows[w] for w in t], np.zeros(len(t), int)) for t in self.teams
        ]
        self.memory = {
            worker: memory for memory in memories for worker in range(memory.at, memory.at + len(memory.rows))
        }
        self.marks = [Marks(self.memory[worker].marks, worker - self.memory[worker].at) for worker in workers]
        self.late = draw.choice([None, *workers])
        for row in self.rows[self.late] if self.late is not None else ():
            row.fill_(float("nan"))
        for mark in self.marks:
            mark.step(3)
        for number in range(len(pieces)):
            for work in (self._add_here, self._add_whole, self._put):
                for worker in workers:
                    if draw.random() < 0.9:
                        work(worker, number)

    def done(self, worker: int, work: int) -> int:
        mark = self.marks[worker]
        return Mark.of(int(mark.all[worker - self.memory[worker].at]), 3).done[work]

    def _add_here(self, worker: int, number: int) -> None:
        team = self.team_of(worker)
        if len(self.reduction.levels) > 1 and self.late not in team and self.done(worker, HERE) == number:
            region = self.reduction.shares.region(self.reduction.pieces[number], worker)
            self.marks[worker].begin(HERE)
            self.reduction.add(worker, [row[region] for each in team for row in self.rows[each]])
            self.marks[worker].end(HERE)

    def _add_whole(self, worker: int, number: int) -> None:
        here = all(self.done(each, HERE) > number for each in range(len(self.rows)))
        able = here or len(self.reduction.levels) == 1
        if self.late is None and able and self.done(worker, WHOLE) == number:
            self.marks[worker].begin(WHOLE)
            self._has_whole(worker, number, worker)
            self.marks[worker].end(WHOLE)

    def _put(self, worker: int, number: int) -> None:
        """Of others that it knows by now: they are told together."""
        done = all(self.done(each, WHOLE) > number for each in range(len(self.rows)))
        if done and self.done(worker, PUT) == number and len(self.teams) > 1:
            self.marks[worker].put(True)
            machine = self.reduction.shares.machine_of(worker)
            for owner in set(range(len(self.rows))) - set(self.team_of(worker)):
                if self.reduction.shares.helper(machine, owner) == worker:
                    self._has_whole(worker, number, owner)
            self.marks[worker].put(False)

    def _has_whole(self, worker: int, number: int, owner: int) -> None:
        """Where its machine has the whole of the owner's cut, it has nothing else there."""
        team, cut = self.team_of(worker), self.reduction.pieces[number][owner]
        for row in [row for each in team for row in self.rows[each]]:
            row[cut] = float("nan")
        self.rows[team[0]][0][cut] = of_node((0, self.reduction.microbatches))[cut]

    def team_of(self, worker: int) -> range:
        return next(team for team in self.teams if worker in team)


def kept_of(step: Step, worker: int) -> KeptOfStep | None:
    own = range(*step.reduction.ranges[worker])
    if worker == step.late:
        return None
    computed = Computed({m: {"objective": float(m)} for m in own}, [True], [], None, {})
    return KeptOfStep(3, [(own.start, own.stop)], computed, {m: ([], True) for m in own}, step.memory[worker], worker)


def told(kept: KeptOfStep | None) -> ToldOfStep:
    if kept is None:
        return ToldOfStep([], [], [], [], 99)
    fields = [[(v.node, v.spans) for v in which] for which in (kept.own, kept.sums, kept.whole)]
    return ToldOfStep(kept.held, fields[0], fields[1], fields[2], 99)


def done_again(keepers: Sequence[KeptOfStep | None], microbatches: int) -> list[Redo]:
    """What the workers of another group come to, with what they keep."""
    for each in keepers:
        assert each is None or each.settle()
    plan = RedoPlan([told(each) for each in keepers], microbatches, LAYOUT.size)
    buffers, rows, counted = Buffers(nn.Linear(1, 1)), list[Tensor](), list[int]()
    redone = [Redo(plan, rank, each, 3, LAYOUT.size) for rank, each in enumerate(keepers)]
    for redo, (start, stop) in zip(redone, plan.ranges, strict=True):
        for node, vector in zip(redo.nodes, redo.vectors, strict=True):
            vector.copy_(of_node(node))
        buffers.swap(([[] for _ in redo.microbatches], [True for _ in redo.microbatches]))
        sums = {m: {"objective": float(m)} for m in redo.microbatches}
        counted += sorted(redo.complete(Computed(sums, [True], [], None, {}), buffers).sums)
        nodes = maximal_nodes(start, stop, microbatches)
        rows += (own := [torch.full((LAYOUT.size,), 5.0) for _ in nodes])
        redo.fill(nodes, own)
    assert counted == list(range(microbatches))
    (whole,) = Reduction(LAYOUT, microbatches, len(keepers), ranges=plan.ranges).add(0, rows)
    assert whole.view(torch.int32).equal(of_node((0, microbatches)).view(torch.int32))
    return redone


def test_what_is_kept_at_any_moment_of_a_step_comes_to_the_same_bits() -> None:
    """And once more, where another is lost then."""
    draw, seen = random.Random(16), Counter[str]()
    for _ in range(200):
        microbatches = draw.choice([8, 11, 16])
        machines = draw.choice([(1, 1), (1, 1, 1), (2, 2), (3, 1), (2, 1, 2), (3,)])
        step = Step(draw, machines, microbatches, draw.choice([(1,), (1, 2, 1)]))
        left = sorted(draw.sample(range(sum(machines)), draw.randint(1, sum(machines) - 1)))
        keepers = [kept_of(step, worker) for worker in left]
        if draw.random() < 0.5:  # one that has nothing comes in anywhere
            keepers.insert(draw.randint(0, len(keepers)), None)
        if not any(keepers):
            continue
        redone = done_again(keepers, microbatches)
        again = {microbatch for redo in redone for microbatch in redo.microbatches}
        kept = {microbatch for each in keepers if each for microbatch in range(*each.held[0])}
        assert sorted([*again, *kept]) == list(range(microbatches)), "what is kept is not computed again"
        seen.update(claim.kind for claims in redone[0]._plan.claims for claim in claims)
        lost = draw.randrange(len(redone))
        if others := [redo.keeps() for rank, redo in enumerate(redone) if rank != lost and redo.holds]:
            done_again(others, microbatches)
    assert min(seen["whole"], seen["sums"]) > 20


@pytest.mark.parametrize("work", [HERE, WHOLE])
def test_a_machine_one_of_whose_workers_died_while_it_changed_rows_has_nothing(work: int) -> None:
    step = Step(random.Random(1), (2, 2), 8, (1,))
    step.marks[0].begin(work)
    assert step.memory[1].settled(1, 3) is None
    assert step.memory[2].settled(2, 3) is not None


def test_a_machine_one_of_whose_workers_is_further_has_nothing_of_the_step_before() -> None:
    """It may have scaled the sum already, or computed other rows."""
    for further in (lambda mark: mark.begin(UPDATE), lambda mark: mark.step(4)):
        step = Step(random.Random(1), (2, 2), 8, (1,))
        further(step.marks[0])
        assert step.memory[1].settled(1, 3) is None


def test_what_does_not_fit_together_is_not_kept() -> None:
    with pytest.raises(CannotKeep, match="order"):
        ranges_of([[(4, 8)], [(0, 4)]], 8)
    whole = ToldOfStep([(0, 4)], [((0, 4), [(0, 8)])], [], [], 9)
    with pytest.raises(CannotKeep, match="memory"):
        RedoPlan([whole, ToldOfStep([], [], [], [], 0)], 8, 8)
    with pytest.raises(CannotKeep, match="nobody"):
        RedoPlan([ToldOfStep([(0, 4)], [((0, 4), [(0, 4)])], [], [], 9)], 8, 8)


@pytest.mark.parametrize(
    ("held", "found"),
    [
        ([[(0, 4)], [(8, 12)]], [(0, 6), (6, 16)]),
        ([[(4, 8)]], [(0, 16)]),
        ([[], [(4, 8)], []], [(0, 2), (2, 12), (12, 16)]),
        ([[(0, 8)], [], [(8, 16)]], [(0, 8), (8, 8), (8, 16)]),
    ],
)
def test_what_nobody_has_goes_to_neighbours(held: Any, found: list[Node]) -> None:
    assert ranges_of(held, 16) == found
