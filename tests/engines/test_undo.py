"""What a worker has begun to change in place when it is killed, another ends, with the same bits."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn, optim

from engines.test_sharding import OPTIMIZERS, recipe_with
from instep.engines import piecewise
from instep.engines.sharding import Sharded
from instep.engines.undo import PiecesDone, Undo
from instep.memory_file import memory_file
from instep.recipe import Recipe
from instep.reduce.by_block import steps_of
from instep.reduce.layout import Layout
from instep.reduce.levels import levels_of
from instep.reduce.reduction import Reduction, clip
from instep.reduce.tree import merge_plan
from instep.transport.group import Sizes
from instep.transport.memory import reserve
from instep.transport.shared_memory import SharedMemoryGroup, regions
from instep.worker.replica import Replica
from support.kinds import quick
from support.sharding import assert_same

NORMS = 0.5, 1e6
"""Of the gradients of even and odd steps, as far as their updates know: the latter are clipped."""

WORK = 4
"""By which the number of a worker's work rises from step to step."""


class Killed(BaseException):
    """Stands for the end of a process."""


class Machine:
    """The shared memory of two workers, of which number 0 is killed again and again."""

    def __init__(self, recipe: Recipe):
        self.recipe, first = recipe, Replica(recipe, "cpu")
        self.layout = Layout.of(first.parameters, 1 << 15)
        self.reduction = Reduction(self.layout, 2, 2)
        self.of_first = Sharded(first, self.reduction, 0, range(2))
        spare = self.of_first.state_bytes + self._undo().nbytes
        self._sizes = Sizes(
            levels_of([2]), tuple(self.reduction.rows), (), self.layout.size, 64, self.of_first.weight_bytes, spare
        )
        self._file = memory_file()
        reserve(self._file, regions(self._sizes))
        self.one = Side(self, first, self.of_first, 0)
        self.memory = self.one.group

    def _undo(self) -> Undo:
        return Undo(2, max(self.of_first.room, self.reduction.room_bytes))

    def group(self, worker: int) -> tuple[SharedMemoryGroup, Undo]:
        group, undo = SharedMemoryGroup(self._file, self._sizes, worker), self._undo()
        undo.attach(group.spare[self.of_first.state_bytes :], (group.common, group.spare))
        return group, undo

    def other(self) -> Side:
        """A worker that has stood in for nobody yet."""
        replica = Replica(self.recipe, "cpu")
        return Side(self, replica, Sharded(replica, self.reduction, 1, range(2)), 1)

    def close(self) -> None:
        os.close(self._file)


class Side:
    """One process's view of it."""

    def __init__(self, machine: Machine, replica: Replica, placement: Sharded, worker: int):
        self._machine, self.replica, self._placement = machine, replica, placement
        self.group, self._undo = machine.group(worker)
        placement.attach(self.group, succeeds=worker > 0)
        self._rows = self.group._all
        placement.take(self._rows[0])

    def write_rows(self, step: int) -> None:
        write(self._rows, step)

    def add(self, step: int) -> None:
        """What is lacking of the sums of both workers' cuts."""
        for worker, cut in enumerate(self._machine.reduction.pieces[0]):
            tracked = self._undo.track(worker, WORK * step + 1)
            self._machine.reduction.add(worker, [row[cut] for row in self._rows], tracked=tracked)

    def update(self, step: int, *, mine: bool) -> None:
        """What is lacking of the update of worker 0's share: its own, or in its place."""
        placement, given = self._placement, (step, NORMS[step % 2], touched(step, len(self.replica.parameters)))
        tracked = self._undo.track(0, WORK * step + 2)
        if mine:
            placement.update(*given, tracked)
        else:
            placement.update_for(0, *given, tracked)

    def state(self) -> dict[str, Any]:
        """Of worker 0's share."""
        return state_of(self.replica, self._placement._of[0])


def touched(step: int, count: int) -> list[bool]:
    """All but one, which has no gradient in the first steps, and one that has none every third step."""
    return [not ((index == 0 and step < 2) or (index == 1 and step % 3 == 2)) for index in range(count)]


@lru_cache(maxsize=2)
def noise(place: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(place))


def write(rows: Sequence[Tensor], step: int) -> None:
    for place, row in enumerate(rows):
        torch.mul(noise(place, len(row)), 1 + (step % 7), out=row)


def undisturbed(machine: Machine) -> Callable[[], dict[str, Any]]:
    """By steps: what one process that updates all of worker 0's share at once comes to."""
    replica, own, layout = Replica(machine.recipe, "cpu"), machine.of_first._of[0], machine.layout
    steps = itertools.count()

    def after_one_more() -> dict[str, Any]:
        step, rows = next(steps), [torch.empty(layout.size) for _ in range(2)]
        write(rows, step)
        rows[0].add_(rows[1])
        clip(rows[0], NORMS[step % 2], machine.recipe.clip_norm)
        known = zip(layout.views(rows[0]), touched(step, len(own)), own, strict=True)
        replica.update(step, [view if seen and of else None for view, seen, of in known])
        return state_of(replica, own)

    return after_one_more


def state_of(replica: Replica, own: Sequence[bool]) -> dict[str, Any]:
    """The weights of a share, and its optimizers' state."""
    known = [(index, p) for index, p in enumerate(replica.parameters) if own[index]]
    states = [one.of_torch.state for one in replica.optimizer.each]
    return {
        "weights": {index: parameter.detach() for index, parameter in known},
        "states": [{index: state[p] for index, p in known if p in state} for state in states],
    }


# ------------------------------------------------------------------------------- at every call, whatever the optimizer


class Death:
    """Ends a process at the nth of the calls of what changes something, or keeps it, before or after it."""

    def __init__(self, nth: int, *, after: bool):
        self._left, self._after, self.came = nth, after, False

    def of(self, owner: Any, name: str, spoil: Callable[..., None] = lambda *args: None) -> Any:
        """`spoil` is called where the process ends in the middle of it."""
        whole = getattr(owner, name)

        def dying(*args: Any, **named: Any) -> Any:
            self._left -= 1
            if self._left == 0 and not self._after:
                self.came = True
                spoil(*args)
                raise Killed
            found = whole(*args, **named)
            if self._left == 0:
                self.came = True
                raise Killed
            return found

        return mock.patch.object(owner, name, dying)


def spoil_update(replica: Replica, step: int, gradients: Any, some: Any) -> None:
    """Half of what an update would have changed has other bits."""
    for one in replica.optimizer.each:
        for parameter in some.parameters:
            for tensor in (parameter.data, *one.of_torch.state.get(parameter, {}).values()):
                if isinstance(tensor, Tensor) and tensor.numel():
                    tensor.view(-1)[: (tensor.numel() + 1) // 2] += 1


@pytest.mark.parametrize("name", quick(OPTIMIZERS, "SGD, Nesterov", "AdamW, fused", "Rprop", "Muon"))
def test_an_update_whose_worker_is_killed_anywhere_is_ended_by_another_with_the_same_bits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each step it is killed at another call, and so is who goes on; who ends it is killed in the next step."""
    monkeypatch.setattr(piecewise, "PIECE", 20)
    machine = Machine(recipe_with(OPTIMIZERS[name]))
    expected, side, deaths = undisturbed(machine), machine.one, 0
    for step, nth in enumerate(NTH):
        side.write_rows(step)
        side.add(step)
        for death in (Death(nth, after=step % 2 == 1), Death(nth // 2, after=step % 2 == 0)):
            if dies(partial(side.update, step, mine=side is machine.one), death):
                deaths += 1
                side = machine.other()
        side.update(step, mine=side is machine.one)
        assert_same(side.state(), expected())
    assert deaths >= 20
    machine.close()


NTH = 8, 8, 4, *range(1, 13), *range(1, 13)
"""Of all calls with which a share of a few pieces is updated; at first those at the end of a piece that gets state."""


def dies(update: Callable[[], None], death: Death) -> bool:
    with (
        death.of(PiecesDone, "keep", spoil_room),
        death.of(PiecesDone, "begin"),
        death.of(PiecesDone, "end"),
        death.of(Replica, "update", spoil_update),
        suppress(Killed),
    ):
        update()
    return death.came


def spoil_room(pieces: PiecesDone, spans: Any) -> None:
    """What is kept is half written."""
    pieces.room[: len(pieces.room) // 2] = 255


def halved(block: Tensor) -> None:
    """As if a process had ended while it wrote it."""
    block[: len(block) // 2] = torch.nan


@given(st.integers(1, 12), st.integers(1, 10), st.booleans())
def test_adding_that_is_broken_off_anywhere_is_ended_by_another_with_the_same_bits(
    workers: int, nth: int, after: bool
) -> None:
    layout = Layout((torch.Size([64 * workers]),), ((1,),), (0,), 64 * workers, 16)
    reduction, worker = Reduction(layout, 2 * workers, workers), workers - 1
    cut = reduction.pieces[0][worker]
    generator = torch.Generator().manual_seed(workers)
    rows = [torch.randn(layout.size, generator=generator)[cut] for _ in reduction.nodes]
    undo = Undo(1, reduction.room_bytes)
    undo.attach(torch.zeros(undo.nbytes, dtype=torch.uint8), ())
    (expected,) = reduction.add(worker, [row.clone() for row in rows])

    def while_adding(pieces: PiecesDone, piece: int) -> None:
        halved(pieces.room.view(torch.float32))

    def while_copying(pieces: PiecesDone, piece: int) -> None:
        halved(rows[0][16 * piece : 16 * (piece + 1)])

    death = Death(nth, after=after)
    with death.of(PiecesDone, "begin", while_adding), death.of(PiecesDone, "end", while_copying), suppress(Killed):
        reduction.add(worker, rows, tracked=undo.track(0, 5))
    (found,) = reduction.add(worker, rows, tracked=undo.track(0, 5))
    assert torch.equal(found, expected)


@given(st.integers(1, 33), st.integers(1, 7))
def test_no_more_sums_are_kept_at_once_than_the_tree_is_deep(microbatches: int, workers: int) -> None:
    reduction = Reduction(Layout((), (), (), 1, 1), microbatches, min(workers, microbatches))
    plan = merge_plan(reduction.nodes, microbatches)
    steps = steps_of(plan, len(reduction.nodes))
    assert all(4 * (into + 1 - len(reduction.nodes)) <= reduction.room_bytes for _, _, into in steps)


# ------------------------------------------------------------------------------------------------ killed at any moment


class Wide(nn.Module):
    """So large that a kill falls into any of what is done with it."""

    def __init__(self) -> None:
        super().__init__()
        self.of = nn.ParameterList(
            [nn.Parameter(torch.ones(size)) for size in (300_000, 40, 300_000, 200_000, 200_000)]
        )


LARGE = {
    "AdamW, fused": partial(optim.AdamW, lr=0.01, fused=True),
    "SGD, foreach": partial(optim.SGD, lr=0.1, momentum=0.9, foreach=True),
}


def until_killed(side: Side, step: int, marks: NDArray[np.int64], *, mine: bool) -> None:
    """Makes step after step, and says where it is."""
    for number in range(step, step + 1000):
        for stage, part in enumerate((side.write_rows, side.add, partial(side.update, mine=mine))):
            marks[0] = 3 * number + stage
            part(number)
        marks[0] = 3 * (number + 1)


@pytest.mark.processes
@pytest.mark.parametrize("kills", [5, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LARGE)
def test_what_a_process_is_at_when_it_is_killed_another_ends_with_the_same_bits(name: str, kills: int) -> None:
    machine, chance = Machine(recipe_with(LARGE[name], model=Wide)), random.Random(0)
    expected, made, side, marks = undisturbed(machine), 0, machine.one, machine.memory.stages
    for _ in range(kills):
        child = os.fork()
        if not child:
            with suppress(BaseException):
                until_killed(side, made, marks, mine=side is machine.one)
            os._exit(1)
        time.sleep(chance.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        step, stage = divmod(int(marks[0]), 3)
        side = machine.other()
        for part in (side.write_rows, side.add, partial(side.update, mine=False))[stage:]:
            part(step)
        marks[0] = 3 * (step + 1)
        made += 1
        while made <= step:
            expected()
            made += 1
        assert_same(side.state(), expected())
    machine.close()
