"""Adding in rounds, first on each machine and then between them: who adds what, and the tree's sum all the same."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from instep.reduce.layout import Layout
from instep.reduce.levels import Shares, levels_of, machine_of
from instep.reduce.reduction import Reduction
from instep.reduce.tree import tree_sum

machines_of = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def test_two_levels_where_several_machines_have_several_workers() -> None:
    assert levels_of([3]) == ((range(3),),)
    assert levels_of([1, 1]) == ((range(2),),)
    assert levels_of([2, 1]) == ((range(2), range(2, 3)), (range(3),))
    assert [machine_of(rank, [2, 1]) for rank in range(3)] == [range(2), range(2), range(2, 3)]


@given(machines_of, st.integers(0, 40))
def test_one_worker_of_each_machine_adds_a_cut_and_all_that_it_adds_is_one_run(machines: list[int], count: int) -> None:
    shares, size = Shares(levels_of(machines)), sum(machines)
    reduction = Reduction(Layout((), (), (), count, 1), size, levels_of(machines))
    assert sorted(block for cut in reduction.cuts[0] for block in cut) == list(range(count))
    assert max(map(len, reduction.cuts[0])) - min(map(len, reduction.cuts[0])) <= 1
    for machine, ranks in enumerate(shares.machines):
        for rank in range(size):
            assert shares.helper(machine, rank) in ranks
        for rank in ranks:
            assert shares.helper(machine, rank) == rank
            assert shares.machine_of(rank) == machine
            region = shares.region(reduction.pieces[0], rank)
            own = [block for other in shares.helped(rank) for block in reduction.cuts[0][other]]
            assert own == list(range(region.start, region.stop))


@given(machines_of, st.integers(0, 8), st.integers(0, 2**31))
def test_level_by_level_the_sum_is_that_of_the_tree(machines: list[int], more: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    workers, microbatches = sum(machines), sum(machines) + more
    layout = Layout.of([torch.empty(90)], block=16)
    leaves = [torch.randn(layout.size, generator=generator) for _ in range(microbatches)]
    reduction = Reduction(layout, microbatches, levels_of(machines))
    rows = [tree_sum(leaves[slice(*node)], torch.add).clone() for node in reduction.nodes]
    expected, piece = tree_sum(leaves, torch.add), reduction.pieces[0]
    if len(reduction.levels) == 1:
        sums = [reduction.add(rank, [row[piece[rank]] for row in rows]) for rank in range(workers)]
    else:
        sums = [two_levels(reduction, rows, rank) for rank in range(workers)]
    for rank, (part,) in enumerate(sums):
        assert torch.equal(part.view(torch.int32), expected[piece[rank]].view(torch.int32))


def two_levels(reduction: Reduction, rows: list[torch.Tensor], rank: int) -> list[torch.Tensor]:
    """What `rank` comes to: on each machine its helper adds, on a copy, and then it adds these."""
    shares, came = reduction.shares, []
    for machine, ranks in enumerate(shares.machines):
        helper = shares.helper(machine, rank)
        region = shares.region(reduction.pieces[0], helper)
        here = [rows[index] for other in ranks for index in reduction.slots_of(other)]
        cut = reduction.pieces[0][rank]
        sums = reduction.add(helper, [row[region].clone() for row in here])
        assert len(sums) == reduction.sums[machine]
        came += [each[cut.start - region.start : cut.stop - region.start] for each in sums]
    return reduction.add(rank, came, 1)
