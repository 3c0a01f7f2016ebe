"""The canonical tree: whoever folds which microbatches, the additions and their order are those of the definition."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instep.reduce.tree import fold_plan, maximal_nodes, merge_plan, split, tree_sum, worker_ranges

pytestmark = pytest.mark.pure

SIZES = range(1, 41)
TEAMS = [(microbatches, workers) for microbatches in SIZES for workers in range(1, microbatches + 1)]


def plus(a: str, b: str) -> str:
    return f"({a}+{b})"


def leaves(start: int, stop: int) -> list[str]:
    return [str(microbatch) for microbatch in range(start, stop)]


def folded(start: int, stop: int) -> tuple[str, int]:
    """What a worker has after it followed the plan of a node, and how many buffers it held at once."""
    stack: list[str] = []
    most = 0
    for microbatch, leaf in zip(range(start, stop), fold_plan(start, stop), strict=True):
        if leaf.add:
            stack[-1] = plus(stack[-1], str(microbatch))
        else:
            stack.append(str(microbatch))
        most = max(most, len(stack))
        for _ in range(leaf.merges):
            top = stack.pop()
            stack[-1] = plus(stack[-1], top)
    (result,) = stack
    return result, most


def reduced(ranges: list[tuple[int, int]], microbatches: int) -> str:
    """What a team that owns `ranges` has in the first slot at the end."""
    nodes = [node for start, stop in ranges for node in maximal_nodes(start, stop, microbatches)]
    slots = [folded(*node)[0] for node in nodes]
    for into, source in merge_plan(nodes, microbatches):
        slots[into] = plus(slots[into], slots[source])
    return slots[0]


@st.composite
def any_ranges(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int]:
    """Microbatches given to workers in contiguous ranges of any size, and their number."""
    microbatches = draw(st.integers(1, 200))
    cuts = draw(st.sets(st.integers(1, microbatches - 1))) if microbatches > 1 else set()
    return list(itertools.pairwise([0, *sorted(cuts), microbatches])), microbatches


@pytest.mark.parametrize(
    ("microbatches", "order"),
    [
        (1, "0"),
        (2, "(0+1)"),
        (3, "((0+1)+2)"),
        (4, "((0+1)+(2+3))"),
        (5, "(((0+1)+(2+3))+4)"),
        (6, "(((0+1)+(2+3))+(4+5))"),
        (7, "(((0+1)+(2+3))+((4+5)+6))"),
        (8, "(((0+1)+(2+3))+((4+5)+(6+7)))"),
    ],
)
def test_the_order_of_additions_is_what_it_always_was(microbatches: int, order: str) -> None:
    assert tree_sum(leaves(0, microbatches), plus) == order


def test_a_node_is_cut_after_the_largest_power_of_two_that_leaves_something() -> None:
    for length in range(2, 300):
        left = split(7, 7 + length) - 7
        assert math.log2(left).is_integer()
        assert left < length <= 2 * left


@pytest.mark.parametrize(("microbatches", "workers"), [(8, 8), (8, 3), (7, 5), (1, 1)])
def test_ranges_of_workers_are_even(microbatches: int, workers: int) -> None:
    ranges = worker_ranges(microbatches, workers)
    assert [place for bounds in ranges for place in range(*bounds)] == list(range(microbatches))
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_any_team_adds_in_the_order_of_the_tree() -> None:
    for microbatches, workers in TEAMS:
        assert reduced(worker_ranges(microbatches, workers), microbatches) == tree_sum(leaves(0, microbatches), plus)


@given(any_ranges())
def test_any_assignment_adds_in_the_order_of_the_tree(assignment: tuple[list[tuple[int, int]], int]) -> None:
    ranges, microbatches = assignment
    assert reduced(ranges, microbatches) == tree_sum(leaves(0, microbatches), plus)


def test_maximal_nodes_cover_their_range_and_cannot_be_larger() -> None:
    for microbatches in SIZES:
        for start, stop in itertools.combinations(range(microbatches + 1), 2):
            nodes = maximal_nodes(start, stop, microbatches)
            assert [place for node in nodes for place in range(*node)] == list(range(start, stop))
            assert len(nodes) <= max(1, 2 * math.log2(microbatches))
            parents = {
                node: parent for parent in tree_nodes(microbatches) for node in halves(*parent)
            }  # a child's parent reaches outside the range, or the child was not maximal
            for node in nodes:
                if node in parents:
                    assert not (start <= parents[node][0] and parents[node][1] <= stop)
                else:
                    assert node == (0, microbatches)


def tree_nodes(microbatches: int) -> list[tuple[int, int]]:
    """Every node of two microbatches or more."""
    found, todo = [], [(0, microbatches)]
    while todo:
        node = todo.pop()
        if node[1] - node[0] > 1:
            found.append(node)
            todo += halves(*node)
    return found


def halves(start: int, stop: int) -> list[tuple[int, int]]:
    return [(start, split(start, stop)), (split(start, stop), stop)]


def test_an_empty_range_has_no_node() -> None:
    assert maximal_nodes(3, 3, 8) == []


def test_equal_powers_of_two_need_one_node_a_worker() -> None:
    for microbatches, workers in itertools.product([1, 2, 4, 8, 16, 32], repeat=2):
        if workers <= microbatches:
            for bounds in worker_ranges(microbatches, workers):
                assert maximal_nodes(*bounds, microbatches) == [bounds]


def test_folding_a_node_gives_its_part_of_the_tree_with_few_buffers() -> None:
    for microbatches in SIZES:
        for node in [*tree_nodes(microbatches), (0, 1)]:
            result, most = folded(*node)
            assert result == tree_sum(leaves(*node), plus)
            assert most <= max(1, math.log2(node[1] - node[0]))  # one less than the design allows


def test_merging_reads_every_other_slot_once_and_never_one_that_was_read() -> None:
    for microbatches, workers in TEAMS:
        ranges = worker_ranges(microbatches, workers)
        nodes = [node for bounds in ranges for node in maximal_nodes(*bounds, microbatches)]
        plan = merge_plan(nodes, microbatches)
        sources = [source for _, source in plan]
        assert sorted(sources) == list(range(1, len(nodes)))
        for place, (into, _) in enumerate(plan):
            assert into not in sources[:place]
