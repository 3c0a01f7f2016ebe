"""The planner: exact where it can be checked, monotone, never below its bound, quick."""

from __future__ import annotations

import itertools
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instep.errors import CheckpointingError
from instep.gradient_checkpointing import planning
from instep.gradient_checkpointing.frontier import Graph, choice_of, frontier, nothing, priced
from instep.gradient_checkpointing.planning import least_bytes, lower_bound, peak_bytes, plan, plans
from instep.gradient_checkpointing.structure import BlockKind, Moment, Operation, Profile, Storage

pytestmark = pytest.mark.pure


@st.composite
def kinds(draw: st.DrawFn, most: int = 5) -> BlockKind:
    """A block: each operation makes one storage from some of those before it."""
    length = draw(st.integers(1, most))
    operations, storages = [], []
    for place in range(length):
        reads = draw(st.sets(st.integers(0, place - 1), max_size=3)) if place else set()
        operations.append(
            Operation(
                f"aten.op{place}.default", flops=draw(st.integers(0, 50)), seconds=draw(st.integers(0, 50)) / 64,
                reads=tuple(sorted(reads)), writes=(place,),
            )
        )  # fmt: skip
        packed = draw(st.booleans()) or place == length - 1
        storages.append(Storage(draw(st.integers(1, 40)), place, draw(st.integers(place, length)), packed))
    held = sum(storage.nbytes for storage in storages if storage.packed)
    return BlockKind(tuple(operations), tuple(storages), held, draw(st.integers(0, 9)))


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """One to three blocks in a row, of one or two kinds."""
    found = draw(st.lists(kinds(3), min_size=1, max_size=2, unique=True))
    kind_of = draw(st.lists(st.integers(0, len(found) - 1), min_size=1, max_size=2))
    return chain(found, kind_of, draw(st.lists(st.integers(0, 30), min_size=9, max_size=9)))


def chain(found: list[BlockKind], kind_of: list[int], bases: list[int]) -> Profile:
    moments: list[Moment] = []
    for block in range(len(kind_of)):
        held = found[kind_of[block]].held_bytes
        moments += [Moment("run", bases[block % 9] + held), Moment("hold", block=block)]
    moments.append(Moment("run", bases[8]))
    for block in reversed(range(len(kind_of))):
        held = found[kind_of[block]].held_bytes
        moments += [Moment("recompute", bases[(block + 4) % 9], block), Moment("run", bases[block % 9] + held, block)]
    return settled(
        Profile(tuple(found), tuple(f"b{i}" for i in range(len(kind_of))), tuple(kind_of), tuple(moments), 300, 10.0, 0)
    )


def settled(profile: Profile) -> Profile:
    peak = peak_bytes(profile, [nothing(profile.kinds[kind]) for kind in profile.kind_of])
    fields = {name: getattr(profile, name) for name in Profile.__dataclass_fields__}
    return Profile(**{**fields, "peak_bytes": peak})


def brute_force(profile: Profile, budget: int) -> float | None:
    """The least seconds of all plans within the budget, every subset of every block tried."""
    each = []
    for kind in profile.kind_of:
        graph = Graph(profile.kinds[kind])
        places = range(len(graph.groups))
        subsets = [kept for n in range(len(places) + 1) for kept in itertools.combinations(places, n)]
        each.append([nothing(profile.kinds[kind]), *(choice_of(graph, kept) for kept in subsets)])
    fitting = [c for c in itertools.product(*each) if peak_bytes(profile, c) <= budget]
    return min((sum(choice.seconds for choice in choices) for choices in fitting), default=None)


@given(profiles(), st.integers(1, 400), st.sampled_from([planning.EXHAUSTIVE, 0]))
@settings(deadline=None, max_examples=250)
def test_a_small_plan_is_as_cheap_as_the_best_of_all(profile: Profile, budget: int, exhaustive: int) -> None:
    """Also where combinations count as too many to be tried, and mixtures of a chain's choices are looked at."""
    best = brute_force(profile, budget)
    with patch.object(planning, "EXHAUSTIVE", exhaustive):
        _is_the_best(profile, budget, best)


def _is_the_best(profile: Profile, budget: int, best: float | None) -> None:
    planning._candidates.cache_clear()
    planning._fronts.cache_clear()
    if best is None:
        with pytest.raises(CheckpointingError, match="the least that one needs"):
            plan(profile, budget_bytes=budget)
        assert least_bytes(profile) > budget
    else:
        found = plan(profile, budget_bytes=budget)
        assert found.seconds == pytest.approx(best)
        assert found.peak_bytes <= budget
        assert found.peak_bytes == peak_bytes(profile, [block.choice for block in found.blocks])
        assert lower_bound(profile, budget) <= best + 1e-9


@given(kinds(9))
@settings(deadline=None, max_examples=100)
def test_dynamic_programming_finds_what_trying_every_subset_finds(kind: BlockKind) -> None:
    price = (1.0, 0.0)
    slow = frontier(kind, price)
    graph = Graph(kind)
    quick = [choice_of(graph, kept) for kept in planning_states(graph)]
    for choice in slow:
        if choice.acts:
            assert any(
                other.held_bytes <= choice.held_bytes and priced(other, price) <= priced(choice, price) + 1e-9
                for other in [*quick, nothing(kind)]
            )


def planning_states(graph: Graph) -> list[tuple[int, ...]]:
    from instep.gradient_checkpointing.frontier import _by_states

    return _by_states(graph, (1.0, 0.0))


@given(kinds(12), st.integers(2, 12), st.lists(st.integers(0, 40), min_size=9, max_size=9))
@settings(deadline=None, max_examples=40)
def test_a_larger_budget_never_costs_more_and_no_plan_costs_less_than_the_bound(
    kind: BlockKind, depth: int, bases: list[int]
) -> None:
    profile = chain([kind], [0] * depth, bases)
    least = least_bytes(profile)
    costs = []
    for share in range(8):
        budget = least + (profile.peak_bytes - least) * share // 7
        found = plan(profile, budget_bytes=max(1, budget))
        assert found.cost >= found.lower_bound - 1e-9
        costs.append(found.cost)
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0  # where everything fits, nothing is recomputed


def test_the_plan_of_a_hundred_blocks_uses_what_it_is_given() -> None:
    operations = tuple(
        Operation(f"aten.op{i}.default", flops=i % 7, seconds=(i * 37 % 11) / 1e4,
                  reads=(i - 1, i - 3) if i > 2 else (i - 1,) if i else (), writes=(i,))
        for i in range(40)
    )  # fmt: skip
    storages = tuple(Storage(100 + i * 53 % 97, i, i + 2, i % 3 != 1) for i in range(40))
    kind = BlockKind(operations, storages, sum(s.nbytes for s in storages if s.packed))
    profile = chain([kind], [0] * 100, [5] * 9)
    found = plan(profile, budget_bytes=profile.peak_bytes // 2)
    assert 0.95 * found.budget_bytes < found.peak_bytes <= found.budget_bytes


def test_the_whole_trade_runs_from_nothing_recomputed_to_the_least() -> None:
    kind = BlockKind(
        (Operation("aten.mm.default", flops=9, seconds=1.0, writes=(0,)),
         Operation("aten.gelu.default", seconds=0.1, reads=(0,), writes=(1,))),
        (Storage(10, 0, 1, True), Storage(10, 1, 1, True)), 20,
    )  # fmt: skip
    profile = chain([kind], [0] * 6, [0] * 9)
    found = plans(profile)
    assert found[0].cost == 0
    assert found[0].peak_bytes == profile.peak_bytes
    assert found[-1].peak_bytes == least_bytes(profile)
    assert [p.peak_bytes for p in found] == sorted((p.peak_bytes for p in found), reverse=True)
    assert [p.cost for p in found] == sorted(p.cost for p in found)


@pytest.mark.parametrize("budget", [0, -5, True, 1.5, "512MiB"])
def test_a_budget_that_is_no_number_of_bytes_is_a_sentence(budget: object) -> None:
    profile = chain([BlockKind((), (), 0)], [0], [1] * 9)
    with pytest.raises(CheckpointingError, match="whole number of bytes above 0"):
        plan(profile, budget_bytes=budget)  # type: ignore[arg-type]
