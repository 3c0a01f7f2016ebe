"""Which way gradients travel is found out by trying both."""

from __future__ import annotations

import random

import pytest

from instep.engines.trial import EVERY, TRIED, Trial


def ways(steps: int, took_s: dict[bool, float], noise_s: float = 0.0) -> list[bool]:
    """How each step went, where steps take so long early and late, and one in five longer."""
    trial, early, found, draw = Trial(), False, list[bool](), random.Random(0)
    for _ in range(steps):
        found.append(early)
        told = trial.next()
        trial.ended(early=early, took_s=took_s[early] + noise_s * (draw.random() < 0.2))
        early = told
    return found


@pytest.mark.parametrize("early", [True, False])
def test_both_are_tried_by_turns_and_the_faster_one_is_kept(early: bool) -> None:
    found = ways(EVERY, {early: 0.100, not early: 0.101})
    assert found[:TRIED] == [False, True] * (TRIED // 2)
    assert set(found[TRIED:]) == {early}


def test_a_step_that_takes_long_for_another_reason_does_not_decide() -> None:
    assert set(ways(EVERY, {True: 1.0, False: 1.1}, noise_s=5.0)[TRIED:]) == {True}


def test_a_link_that_has_changed_is_tried_again() -> None:
    took_s = {True: 1.0, False: 2.0}
    trial, early, found = Trial(), False, list[bool]()
    for step in range(EVERY + TRIED + 3):
        if step == EVERY // 2:
            took_s = {True: 2.0, False: 1.0}
        found.append(early)
        told = trial.next()
        trial.ended(early=early, took_s=took_s[early])
        early = told
    assert found[EVERY - 1]
    assert not any(found[EVERY + TRIED :])
    assert found[EVERY : EVERY + TRIED] == [False, True] * (TRIED // 2)


@pytest.mark.parametrize("asked", [True, False])
def test_of_steps_that_are_of_no_trial_nothing_is_kept(asked: bool) -> None:
    """As of all of them where there is one machine, and nobody asks."""
    trial, took_s = Trial(), [float(step) for step in range(3 * EVERY)]
    for each in took_s:
        early = asked and trial.next()
        trial.ended(early=early, took_s=each)
        assert sum(map(len, trial._took_s.values())) < TRIED
