"""A checkpoint that the tape tells of late is read where its version was made."""

from __future__ import annotations

from typing import Any

import pytest

from instep.offline.stretches import in_place

pytestmark = pytest.mark.pure


def started(version: int, engine: str = "server", minutes: float = 1.0) -> dict[str, Any]:
    told = {"kind": "run_started", "version": version, "engine": engine, "digest": f"d{version}", "t_s": 0.5}
    return {**told, "team": {"checkpoint_minutes": minutes}}


def merged(version: int) -> dict[str, Any]:
    return {"kind": "merged", "version": version}


def saved(version: int, **more: Any) -> dict[str, Any]:
    return {"kind": "checkpointed", "version": version, "digest": f"d{version}", **more}


GIVEN = {"kind": "released", "version": 1}


def test_one_of_the_background_comes_after_its_update_and_others_stay() -> None:
    late = saved(1, step_s=0.1)
    events = [started(0), merged(1), GIVEN, merged(2), saved(2), late, merged(3)]
    found = in_place(events)
    assert found == [started(0), merged(1), late, GIVEN, merged(2), saved(2), merged(3)]
    assert in_place(found) == found


def test_the_update_is_that_of_the_present_session() -> None:
    again = [started(0), merged(1), merged(2), started(1), merged(2), merged(3), saved(2, step_s=0.1)]
    found = in_place(again)
    assert [each["kind"] for each in found[-4:]] == ["run_started", "merged", "checkpointed", "merged"]
    unknown = [started(0), merged(1), started(1), saved(1, step_s=0.1)]
    assert in_place(unknown)[-1] == saved(1, step_s=0.1)


def test_one_that_the_tape_never_told_of_is_known_from_the_start_that_goes_on_from_it() -> None:
    events = [started(0), merged(1), GIVEN, merged(2), started(1), merged(2)]
    found = in_place(events)
    assert found[2] == saved(1, t_s=0.5)
    assert [each for each in found if each["kind"] != "checkpointed"] == events
    assert in_place(found) == found
    told = [started(0), merged(1), saved(1), GIVEN, merged(2), started(1), merged(2)]
    assert in_place(told) == told
    in_lockstep = [started(0, "lockstep"), merged(1), merged(2), started(1, "lockstep"), merged(2)]
    assert in_place(in_lockstep) == in_lockstep
    without = [started(0, minutes=0), merged(1), merged(2), started(1), merged(2)]
    assert in_place(without) == without, "a tape that was changed by hand is told apart"
