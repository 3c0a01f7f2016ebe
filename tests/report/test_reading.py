"""What a report reads of tapes: sessions, restarts, workers' time, bytes; equal to what plain loops find there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from instep.errors import RecordError
from instep.report.history import windows
from instep.report.reading import MOST_STRIPS, read, read_all
from support import runs


@pytest.mark.pure
def test_seconds_begin_with_the_first_worker_and_go_on_over_sessions(tmp_path: Path) -> None:
    first = [runs.started(), *runs.joined(2.0, 0, 1), *runs.step(1, 2.0, 3.0), *runs.step(2, 2.5, 2.0)]
    second = [
        runs.started(t_s=0.5, resumed=True, version=2), *runs.joined(1.0, 0, 1), *runs.step(3, 1.0, 1.0),
        runs.ended(3, 2.0),
    ]  # fmt: skip
    found = read(runs.folder(tmp_path / "run", first + second))
    last_of_first = 2.65 - 2.0
    assert list(found.curve.seconds) == pytest.approx([0.15, 0.65, last_of_first + 1.15])
    assert (found.sessions, found.restarts, found.state, found.updates) == (2, 0, "ended", 3)
    assert list(found.curve.items) == [8, 16, 24]
    assert list(found.curve.bytes) == [80, 160, 240]


@pytest.mark.pure
def test_a_restart_takes_updates_and_items_back_but_not_seconds_and_bytes(tmp_path: Path) -> None:
    events = [
        runs.started(), *runs.joined(2.0, 0, 1), *runs.step(1, 2.0, 3.0), *runs.step(2, 2.5, 2.0),
        runs.event("left", 2.7, worker=1, why="worker 1 was killed."), runs.started(t_s=3.0, resumed=True, version=1),
        *runs.joined(3.1, 0, 1), *runs.step(2, 3.1, 2.0), *runs.step(3, 3.4, 1.5),
    ]  # fmt: skip
    found = read(runs.folder(tmp_path / "run", events))
    assert list(found.curve.version) == [1, 2, 3]
    assert list(found.curve.items) == [8, 16, 24]
    assert list(found.curve.bytes) == [80, 240, 320]
    assert found.curve.seconds[1] == pytest.approx(3.25 - 2.0)
    assert (found.sessions, found.restarts, found.problems) == (1, 1, ["worker 1 was killed."])
    assert [what for _, what in found.strips[1].events] == ["worker 1 was killed.", "joined"]


@pytest.mark.pure
def test_a_run_that_was_just_taken_back_has_no_update_beyond(tmp_path: Path) -> None:
    events = [
        runs.started(), *runs.joined(2.0, 0, 1), *runs.step(1, 2.0, 3.0), *runs.step(2, 2.5, 2.0),
        runs.event("evaluated", 2.7, version=2, objective=2.0, terms={}, items=5),
        runs.started(t_s=3.0, resumed=True, version=1),
    ]  # fmt: skip
    found = read(runs.folder(tmp_path / "run", events))
    assert (found.updates, list(found.curve.items), found.held_out) == (1, [8], [])


@pytest.mark.pure
def test_bytes_told_after_their_update_count_for_it(tmp_path: Path) -> None:
    """As in lockstep, where workers hand on what they did up to a step later."""
    first, second = runs.step(1, 2.0, 3.0), runs.step(2, 2.5, 2.0)
    late = [first[0], first[1], first[4], first[2], first[3]]
    found = read(runs.folder(tmp_path / "run", [runs.started(), *runs.joined(2.0, 0, 1), *late, *second]))
    assert list(found.curve.bytes) == [80, 160]


@pytest.mark.pure
def test_in_lockstep_those_who_are_done_wait_and_then_all_exchange(tmp_path: Path) -> None:
    events = [runs.started(), *runs.joined(2.0, 0, 1), *runs.step(1, 2.0, 3.0, slow=0.4)]
    found = read(runs.folder(tmp_path / "run", events))
    for worker, computed in ((0, 0.1), (1, 0.4)):
        strip = found.strips[worker]
        assert list(strip.computing) == pytest.approx([0.0, computed])
        assert list(strip.communicating) == pytest.approx([0.4, 0.45])
        assert list(strip.there) == pytest.approx([0.0, 0.45])
    assert found.idle_share == pytest.approx(1 - (0.1 + 0.4) / 2 / 0.45)


@pytest.mark.pure
def test_a_tape_that_is_being_written_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    events = [runs.started(), *runs.joined(2.0, 0, 1), *runs.step(1, 2.0, 3.0)]
    found = read(runs.folder(tmp_path / "run", events, tail='{"t_s": 3.0, "clo'))
    assert (found.state, found.updates, found.torn) == ("going on or killed", 1, "")
    damaged = read(runs.folder(tmp_path / "other", events, tail="nonsense\n" + json.dumps(events[1]) + "\n"))
    assert damaged.updates == 1
    assert "is damaged" in damaged.torn


@pytest.mark.pure
def test_a_folder_that_is_no_run_and_a_run_without_an_event_are_told(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="is not the folder of a run"):
        read(tmp_path)
    with pytest.raises(RecordError, match="has no event on its tape yet; wait until it trains"):
        read(runs.folder(tmp_path / "run", []))


@pytest.mark.pure
def test_a_run_named_twice_is_read_once(tmp_path: Path) -> None:
    path = runs.curve(tmp_path / "run", "synchronous", [3.0, 2.0])
    assert len(read_all([path, tmp_path / "x" / ".." / "run"] if (tmp_path / "x").mkdir() is None else [])) == 1


@pytest.mark.pure
def test_of_many_workers_evenly_spaced_ones_are_drawn(tmp_path: Path) -> None:
    team = {"workers": 1000, "device": "cpu", "restarts": 3}
    events = [runs.started(rule="asynchronous", team=team), *runs.joined(2.0, *range(1000))]
    found = read(runs.folder(tmp_path / "run", events))
    assert len(found.strips) == MOST_STRIPS
    assert {b - a for a, b in zip(list(found.strips), list(found.strips)[1:], strict=False)} <= {62, 63}


@pytest.mark.pure
def test_windows_hold_the_mean_by_items_and_leave_out_what_is_not_finite(tmp_path: Path) -> None:
    values = [float(value) for value in range(1, 11)]
    events = [runs.started(), *runs.joined(2.0, 0, 1)]
    for version, value in enumerate(values, 1):
        events += runs.step(version, 2.0 + version, None if value == 3 else value)
    curve = read(runs.folder(tmp_path / "run", events)).curve
    assert [point.objective for point in windows(curve, 100)] == [value for value in values if value != 3]
    found = windows(curve, 5)
    assert [point.objective for point in found] == [1.5, 4.0, 5.5, 7.5, 9.5]
    assert [point.items for point in found] == [16, 32, 48, 64, 80]
    assert all(math.isfinite(point.objective) for point in found)


@pytest.mark.pure
def test_in_lockstep_all_evaluate_and_do_not_wait_meanwhile(tmp_path: Path) -> None:
    events = [
        runs.started(), *runs.joined(2.0, 0, 1), *runs.step(1, 2.0, 3.0),
        runs.event("evaluated", 2.65, version=1, objective=2.0, terms={}, items=5, took_s=0.4),
        *runs.step(2, 2.75, 2.5),
    ]  # fmt: skip
    found = read(runs.folder(tmp_path / "run", events))
    for strip in found.strips.values():
        assert list(strip.evaluating) == pytest.approx([0.25, 0.65])
        assert list(strip.evaluating_version) == [1]
        assert list(strip.communicating) == pytest.approx([0.1, 0.15, 0.85, 0.9])
    assert found.idle_share == pytest.approx(1 - 0.2 / (0.9 - 0.4)), "evaluations are left out"


@pytest.mark.pure
def test_while_a_server_evaluates_only_who_does_nothing_else_waits_for_it(tmp_path: Path) -> None:
    piece = {"batch": 0, "local_steps": 1, "microbatches": [0, 2]}
    events = [
        runs.started(rule="asynchronous"), *runs.joined(2.0, 0, 1),
        runs.event("computed", 2.1, worker=0, version=0, from_s=2.0, to_s=2.1, **piece),
        runs.event("pushed", 2.1, worker=0, version=0, bytes=40, items=8),
        runs.merged(1, 2.1, 3.0, staleness=(0,)),
        runs.event("evaluated", 2.6, version=1, objective=2.0, terms={}, items=5, took_s=0.5),
        runs.event("released", 2.6, worker=0, version=1, piece=2),
        runs.event("computed", 2.7, worker=1, version=0, from_s=2.0, to_s=2.4, **piece),
        runs.event("pushed", 2.7, worker=1, version=0, bytes=40, items=8),
        runs.merged(2, 2.8, 3.0, staleness=(1,)),
    ]  # fmt: skip
    found = read(runs.folder(tmp_path / "run", events))
    assert list(found.strips[0].evaluating) == pytest.approx([0.1, 0.6])
    assert list(found.strips[1].evaluating) == pytest.approx([0.4, 0.6])
    assert list(found.strips[1].communicating) == pytest.approx([0.6, 0.7])


@pytest.mark.pure
def test_what_models_made_on_the_way_is_told_by_version_after_a_restart_too(tmp_path: Path) -> None:
    def made(version: int, t_s: float, text: str) -> dict[str, Any]:
        return runs.event("sampled", t_s, version=version, sample=text, files=[], figures={}, took_s=0.1)

    events = [
        runs.started(), *runs.joined(2.0, 0, 1), *runs.step(1, 2.0, 3.0), made(1, 2.3, "one"),
        *runs.step(2, 2.5, 2.0), made(2, 2.8, "lost"), runs.started(t_s=3.0, resumed=True, version=1),
        *runs.joined(3.1, 0, 1), *runs.step(2, 3.1, 2.0), made(2, 3.4, "two"), runs.ended(2, 3.5, sample="end"),
    ]  # fmt: skip
    found = read(runs.folder(tmp_path / "run", events))
    assert [(each.version, each.text) for each in found.shown] == [(1, "one"), (2, "two"), (2, "end")]
    assert found.shown[-1].seconds is None
