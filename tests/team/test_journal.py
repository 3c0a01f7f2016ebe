"""What the journal knows of what the tape has been told."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

from instep.record.events import Event, RunStartedEvent
from instep.team.journal import Journal
from support.events import update


def started(version: int) -> Event:
    texts: Any = dict.fromkeys(("folder", "fingerprint", "data_digest"), "")
    tables: Any = {name: {} for name in ("recipe", "team", "libraries")}
    numbers: Any = dict.fromkeys(("schema", "samples", "cut", "parameters", "steps"), 9)
    return RunStartedEvent(
        engine="lockstep", version=version, step=version, resumed=version > 0, import_paths=[], **texts, **tables,
        **numbers,
    )  # fmt: skip


def test_a_team_that_starts_again_from_an_earlier_version_has_told_of_no_later_one() -> None:
    journal = Journal(Mock(), Mock(), Mock(), 0.0)
    journal.record(started(0))
    journal.pass_on([update(1), update(2), update(3)])
    assert journal.merged == 3
    journal.record(started(2))
    assert journal.merged == 2, "or who speaks for worker 0, dead at once, would leave the third update out"
    journal.pass_on([update(3)])
    assert journal.merged == 3
