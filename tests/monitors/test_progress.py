from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instep.monitors.progress import (
    BAR,
    Part,
    ProgressDisplay,
    Throughput,
    clock,
    duration,
    fit,
    number,
    rate,
    short_rate,
)
from support.events import a_run, merged, started

pytestmark = pytest.mark.pure

# Throughput


def test_the_pace_leaves_out_evaluations_checkpoints_and_restarts() -> None:
    progress = ProgressDisplay()
    for event in a_run(died=True):
        progress.see(event)
    assert progress.items_per_s == pytest.approx(1000)
    progress.see({"t_s": 1e6, "kind": "checkpointed"})
    progress.see(merged(1e6 + 1, 21))
    assert progress.items_per_s == pytest.approx(1000)


def test_an_update_without_items_leaves_the_objective_as_it_was() -> None:
    progress = ProgressDisplay()
    progress.see(started(0.0))
    progress.see(merged(1, 1))
    progress.see(merged(2, 2, objective=None, terms={}, items=0))
    assert progress.objective == 3.9
    assert progress.done == 2


def test_a_resumed_run_counts_this_session_only() -> None:
    progress = ProgressDisplay()
    progress.see(started(1.0, 15, resumed=True))
    progress.see(merged(3, 16))
    assert progress.items_per_s is None
    assert progress.eta_s is None
    progress.see(merged(5, 17))
    assert progress.items_per_s == pytest.approx(500)
    assert progress.eta_s == pytest.approx(6)


def test_the_time_left_counts_evaluations_in() -> None:
    pace = Throughput()
    t_s = 0.0
    pace.step(t_s, 1)
    for _ in range(3):
        for _ in range(10):
            t_s += 1
            pace.step(t_s, 1)
        t_s += 5
        pace.pause(t_s)
    assert pace.items_per_s == pytest.approx(1)
    assert pace.eta_s(10) == pytest.approx(15)
    assert pace.eta_s(0) is None


@pytest.mark.parametrize(("updates", "steps"), [(4, 1), (1, 1), (1, 20)])
def test_the_time_left_is_of_steps_however_many_updates_they_take(updates: int, steps: int) -> None:
    """A step takes a second. Contributions merge one by one, or updates come every `steps`."""
    progress = ProgressDisplay()
    progress.see({**started(0.0), "steps": 1000})
    for update in range(1, 41):
        step = update * steps // updates
        progress.see({**merged(update * steps / updates, update), "step": step})
    assert progress.eta_s == pytest.approx(1000 - step, rel=0.06)


def test_the_pace_follows_a_change() -> None:
    pace = Throughput()
    for step in range(100):
        pace.step(step * 0.1, 1)
    for step in range(100):
        pace.step(10 + step * 0.01, 1)
    assert pace.items_per_s == pytest.approx(100, rel=0.01)


def test_slow_steps_still_have_a_pace() -> None:
    pace = Throughput()
    for step in range(9):
        pace.step(step * 100.0, 50)
    assert pace.items_per_s == pytest.approx(0.5)


@given(st.lists(st.tuples(st.floats(0, 1e3), st.integers(0, 10**6), st.sampled_from(["step", "pause", "interrupt"]))))
def test_any_pace_is_finite(marks: list[tuple[float, int, str]]) -> None:
    pace = Throughput()
    for t_s, items, kind in sorted(marks):
        arguments = {"step": (t_s, items), "pause": (t_s,), "interrupt": ()}[kind]
        getattr(pace, kind)(*arguments)
        for value in (pace.items_per_s, pace.eta_s(10)):
            assert value is None or value >= 0


# Forms

LABELS = st.text("abc", max_size=9)
PARTS = st.lists(
    st.builds(
        lambda label, short, more, rank: Part(label, short + more, short, rank),
        LABELS,
        st.text("0123", min_size=1, max_size=9),
        st.text("45", max_size=9),
        st.integers(1, 5),
    ),
    max_size=6,
)


@given(PARTS, st.integers(20, 120))
def test_a_line_fits_or_is_one_part(parts: list[Part], columns: int) -> None:
    texts, bar = fit([Part("step", "1/9", "1/9", 0), *parts], columns)
    width = len("  ".join(f"{label} {value}".lstrip() for label, value in texts)) + (bar + 2 if bar else 0)
    assert width <= columns or len(texts) == 1
    assert bar == 0 or bar in BAR
    assert texts[0] == ("step", "1/9")


def test_the_highest_ranks_go_first() -> None:
    parts = [Part("", "aaaa", "aaaa", 0), Part("", "bbbbbbbb", "bbbb", 2), Part("", "cccc", "cccc", 1)]
    assert fit(parts, 30) == ([("", "aaaa"), ("", "bbbbbbbb"), ("", "cccc")], 8)
    assert fit(parts, 29) == ([("", "aaaa"), ("", "bbbb"), ("", "cccc")], 11)
    assert fit(parts, 16) == ([("", "aaaa"), ("", "bbbb"), ("", "cccc")], 0)
    assert fit(parts, 15) == ([("", "aaaa"), ("", "cccc")], 0)
    assert fit(parts, 3) == ([("", "aaaa")], 0)


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (number, 3.14159, "3.1416"),
        (number, 0.0, "0.0000"),
        (number, -0.5, "-0.5000"),
        (number, 0.00123456, "1.235e-03"),
        (number, 123456.0, "1.235e+05"),
        (number, math.inf, "not finite"),
        (number, None, "not finite"),
        (rate, 0.25, "0.25"),
        (rate, 12.34, "12.3"),
        (rate, 99.96, "100"),
        (rate, 68267.4, "68,267"),
        (short_rate, 12.34, "12.3"),
        (short_rate, 999.4, "999"),
        (short_rate, 999.6, "1.0k"),
        (short_rate, 68267.4, "68.3k"),
        (short_rate, 999_960.0, "1.0M"),
        (clock, 0.4, "0:00"),
        (clock, 59.6, "1:00"),
        (clock, 3599.7, "1:00:00"),
        (clock, 90061.0, "1 d 01:01:01"),
        (duration, 12.34, "12.3 s"),
        (duration, 59.96, "1:00"),
        (duration, 75.0, "1:15"),
    ],
)
def test_forms(form: Callable[[Any], str], value: Any, text: str) -> None:
    assert form(value) == text


def test_a_part_of_the_first_step_is_step_1_and_not_0() -> None:
    """Where contributions merge one by one, the first updates are each a part of it."""
    progress = ProgressDisplay()
    progress.see({"kind": "run_started", "step": 0, "steps": 3, "t_s": 0.0})
    assert progress.parts()[0].long == "0/3", "nothing is done"
    progress.see({"kind": "merged", "step": 0, "objective": 4.5, "items": 2, "t_s": 1.0})
    assert progress.line(evaluated=False).startswith("step 1/3  objective 4.5")
    assert progress.parts()[0].long == "1/3"
    progress.see({"kind": "merged", "step": 2, "objective": 4.5, "items": 2, "t_s": 2.0})
    assert progress.line(evaluated=False).startswith("step 2/3")
