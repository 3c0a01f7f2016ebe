"""How many microbatches a worker gets: as speed asks for, unmoved by noise, and looked at again where it got none."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instep.engines import balance
from instep.engines.balance import Balance, ranges_of, soonest

pytestmark = pytest.mark.pure

seconds_of_some = st.lists(st.floats(0.001, 100.0), min_size=1, max_size=4)


@given(seconds_of_some, st.integers(1, 9))
def test_the_last_is_done_as_early_as_whole_microbatches_allow(seconds: list[float], microbatches: int) -> None:
    every = itertools.product(range(microbatches + 1), repeat=len(seconds))
    best = min(
        max(n * s for n, s in zip(counts, seconds, strict=True)) for counts in every if sum(counts) == microbatches
    )
    counts = soonest(seconds, microbatches)
    assert sum(counts) == microbatches
    assert max(n * s for n, s in zip(counts, seconds, strict=True)) == best


@given(seconds_of_some, st.integers(4, 9), st.integers(0, 15))
def test_who_is_looked_at_gets_one_and_the_others_the_rest_as_early_as_may_be(
    seconds: list[float], microbatches: int, bits: int
) -> None:
    least = [bits >> worker & 1 for worker in range(len(seconds))]
    every = itertools.product(range(microbatches + 1), repeat=len(seconds))
    best = min(
        max(n * s for n, s in zip(counts, seconds, strict=True))
        for counts in every
        if sum(counts) == microbatches and all(n >= m for n, m in zip(counts, least, strict=True))
    )
    counts = soonest(seconds, microbatches, least)
    assert sum(counts) == microbatches
    assert max(n * s for n, s in zip(counts, seconds, strict=True)) == best


def test_ranges_are_neighbours_of_these_sizes() -> None:
    assert ranges_of([13, 0, 3]) == [(0, 13), (13, 13), (13, 16)]


class Steps:
    """A team whose workers take `speed(step, worker)` seconds for a microbatch, as lockstep decides for it: what a step
    took is known when the ranges of the next one are.
    """

    def __init__(self, counts: list[int], speed: Callable[[int, int], float]):
        self.policy, self.speed, self.taken = Balance(counts), speed, list[list[int]]()
        self._coming = [counts, counts]

    def run(self, steps: int) -> float:
        """The seconds of so many steps."""
        total_s = 0.0
        for _ in range(steps):
            counts, step = self._coming.pop(0), len(self.taken)
            self.taken.append(counts)
            seconds = [self.speed(step, worker) for worker in range(len(counts))]
            total_s += max(n * s for n, s in zip(counts, seconds, strict=True))
            told = [s if n else 0.0 for n, s in zip(counts, seconds, strict=True)]
            self._coming.append(list(self.policy.decide(told)))
        return total_s

    @property
    def moves(self) -> list[int]:
        """The steps whose counts are others than those before."""
        return [step + 1 for step, (a, b) in enumerate(itertools.pairwise(self.taken)) if a != b]


def test_a_factor_above_2_moves_them_after_two_steps_and_back() -> None:
    steps = Steps([8, 8], lambda step, worker: 0.01 * (4 if worker == 1 and 100 <= step < 200 else 1))
    steps.run(300)
    assert steps.moves == [102, 202]
    assert steps.taken[99:103] == [[8, 8], [8, 8], [8, 8], [13, 3]]
    assert steps.taken[299] == [8, 8]


def test_slowness_that_goes_from_worker_to_worker_costs_two_steps_each_time() -> None:
    steps = Steps([8, 8], lambda step, worker: 0.01 * (4 if worker == step // 100 % 2 else 1))
    steps.run(100)
    assert steps.run(1000) <= 1000 * 0.13 / 0.94
    assert steps.moves[1:] == [100 * turn + 2 for turn in range(1, 11)]


def noisy(sigma: float, seed: int) -> Callable[[int, int], float]:
    draw = random.Random(seed)
    return lambda step, worker: 0.01 * draw.lognormvariate(0.0, sigma)


@pytest.mark.parametrize("counts", [[8, 8], [3, 3, 2], [1, 1, 1, 1], [4] * 16])
def test_noise_of_a_sixth_moves_nothing(counts: list[int]) -> None:
    for seed in range(3):
        steps = Steps(counts, noisy(0.16, seed))
        steps.run(1000)
        assert not steps.moves, seed


def test_who_is_a_third_slower_for_long_gets_less_in_spite_of_noise() -> None:
    noise = noisy(0.16, 1)
    steps = Steps([8, 8], lambda step, worker: noise(step, worker) * (1.35 if worker else 1.0))
    steps.run(300)
    assert steps.taken[100:] == [[9, 7]] * 200


def test_hiccups_that_come_again_and_again_are_believed_ever_less() -> None:
    draw = random.Random(3)
    steps = Steps([8, 8], lambda step, worker: 0.01 * (8 if draw.random() < 0.02 else 1))
    steps.run(2000)
    assert len(steps.moves) < 60, "of some 80 hiccups, each of which would move them and move them back"
    assert steps.taken[-1] == [8, 8]


def test_who_gets_none_is_looked_at_seldom_and_gets_its_share_when_it_is_as_fast_as_the_others() -> None:
    steps = Steps([8, 8], lambda step, worker: 0.01 * (40 if worker == 1 and step < 1000 else 1))
    spent_s = steps.run(1000)
    looks = [step for step, counts in enumerate(steps.taken[20:], 20) if counts == [15, 1]]
    assert steps.taken[500] == [16, 0]
    assert 3 <= len(looks) <= 10
    assert sum(steps.taken[step][1] for step in range(20, 1000)) <= len(looks) + 8, "one each, but for its first"
    assert spent_s <= 12 * 3.2 + 988 * 0.16 * 1.03
    steps.run(300)
    assert steps.taken[-1] == [8, 8]


@pytest.mark.parametrize("seen", [True, False])
def test_a_process_that_was_halted_once_gets_its_share_back_soon(seen: bool) -> None:
    """Even where the next step, a smaller one, tells nothing."""

    def speed(step: int, worker: int) -> float:
        if step == 51 and not seen:
            return 0.0
        return 600.0 if (step, worker) == (50, 1) else 0.01

    steps = Steps([8, 8], speed)
    steps.run(150)
    assert steps.moves
    assert steps.taken[-1] == [8, 8]


def test_a_look_at_a_bad_moment_is_not_the_last_one() -> None:
    looks = list[int]()

    def speed(step: int, worker: int) -> float:
        if worker == 1 and steps.taken[step] == [15, 1]:
            looks.append(step)
        return 600.0 if [step] == looks else 0.01 * (40 if worker == 1 and step < 300 else 1)

    steps = Steps([8, 8], speed)
    steps.run(1000)
    assert looks
    assert steps.taken[-1] == [8, 8]


def test_nothing_moves_where_it_gains_milliseconds_at_most_or_memory_is_short() -> None:
    slow = [0.0001, 0.0004]
    steps = Steps([8, 8], lambda step, worker: slow[worker])
    steps.run(100)
    assert not steps.moves
    steps = Steps([8, 8], lambda step, worker: 100 * slow[worker])
    steps.policy = Balance([8, 8], lambda counts: max(counts) < 10)
    steps.run(100)
    assert not steps.moves


def test_steps_of_which_nothing_is_known_change_nothing() -> None:
    speed = [0.01, 0.04]
    steps = Steps([8, 8], lambda step, worker: speed[worker])
    steps.run(50)
    assert steps.policy.decide([0.0, 0.0]) == [13, 3]
    assert steps.policy.decide([0.0, 0.04]) == [13, 3]
    assert balance.FIRST_STEPS < 50
