"""When a run evaluates, saves, marks the best and ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instep.worker.milestones import Milestones, Progress

EVERY = st.integers(0, 7)


def at(steps: int, **changes: object) -> Progress:
    return Progress(version=steps, steps=steps, **changes)  # type: ignore[arg-type]


@given(steps=st.integers(1, 40), evaluate_every=EVERY, checkpoint_every=EVERY, jumps=st.lists(st.integers(1, 9)))
def test_each_is_due_once_however_many_batches_an_update_brings(
    steps: int, evaluate_every: int, checkpoint_every: int, jumps: list[int]
) -> None:
    milestones, now = Milestones(steps, evaluate_every, checkpoint_every), 0
    for jump in [*jumps, steps]:
        before, now = now, min(steps, now + jump)
        came, end = range(before + 1, now + 1), now == steps
        for every, due in (evaluate_every, milestones.evaluates), (checkpoint_every, milestones.saves):
            multiple = any(every and batch % every == 0 for batch in came)
            assert due(before, now) == (multiple and not end)


@given(steps=st.integers(1, 40), evaluate_every=EVERY, checkpoint_every=EVERY, batch=st.integers(0, 39))
def test_whatever_may_be_saved_is_known_before(
    steps: int, evaluate_every: int, checkpoint_every: int, batch: int
) -> None:
    milestones = Milestones(steps, evaluate_every, checkpoint_every)
    due = milestones.evaluates(batch, batch + 1) or milestones.saves(batch, batch + 1)
    if due or batch + 1 == steps:
        assert milestones.may_save(batch)


def test_an_evaluation_comes_before_its_checkpoint_which_tells_of_it() -> None:
    said: list[str] = []
    progress = at(4)

    def evaluate() -> bool:
        assert progress.unevaluated, "a checkpoint that an error here leaves says that it is missing"
        said.append("evaluated")
        return True

    Milestones(8, 2, 4).reached(progress, 3, evaluate, lambda due, best: said.append(f"kept {due} {best}"))
    assert said == ["evaluated", "kept True True"]
    assert not progress.unevaluated


def test_an_evaluation_that_raised_is_made_up_for_and_nothing_is_due_twice() -> None:
    milestones, progress, kept = Milestones(8, 2, 2), at(4), list[tuple[bool, bool]]()

    def fails() -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        milestones.reached(progress, 3, fails, lambda due, best: kept.append((due, best)))
    assert progress.unevaluated
    assert not kept
    milestones.reached(progress, 4, lambda: True, lambda due, best: kept.append((due, best)))
    assert kept == [(False, True)]
    assert not progress.unevaluated


def test_the_end_evaluates_unless_the_last_evaluation_was_of_these_weights() -> None:
    said: list[str] = []

    def evaluate() -> bool:
        said.append("evaluated")
        return True

    milestones = Milestones(8, 2)
    milestones.ended(at(8), evaluate, lambda: said.append("marked"))
    assert said == ["evaluated", "marked"]
    milestones.ended(at(8, held_out={"version": 8}), evaluate, lambda: said.append("marked"))
    assert said == ["evaluated", "marked"]


def test_patience_ends_a_run_after_so_many_evaluations_without_progress_but_not_at_its_last_step() -> None:
    progress = at(0)
    for steps, objective in enumerate([3.0, 2.0, 2.5, float("nan"), 2.0], start=1):
        progress.steps = progress.version = steps
        progress.evaluated({"version": steps, "objective": objective}, steps=5, patience=2)
        assert bool(progress.stopped) == (steps >= 4)
    assert progress.best == {"version": 2, "objective": 2.0}
    assert progress.evaluations_since == 2
