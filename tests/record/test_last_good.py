"""What is uncertain of a machine stays so when its team starts anew: until an audit there is good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from instep.record.last_good import LastGood, last_good

pytestmark = pytest.mark.pure

Event = dict[str, Any]


def start(version: int, *hosts: str, audit: str = "1%", first: bool = True) -> list[Event]:
    """A start of a team on these machines; `joined` comes after it in a run's first one, and else before."""
    began = {"kind": "run_started", "version": version, "team": {"workers": len(hosts), "audit": audit}}
    joined = [{"kind": "joined", "worker": worker, "host": host} for worker, host in enumerate(hosts)]
    return [began, *joined] if first else [*joined, began]


def merged(version: int) -> Event:
    return {"kind": "merged", "version": version}


def good(owner: int, version: int) -> Event:
    return {"kind": "audited", "owner": owner, "version": version}


def known(events: list[Event], path: Path) -> LastGood:
    """As who hears of the events knows it, and who reads them."""
    heard = LastGood()
    for event in events:
        heard.note(event)
    path.write_text("".join(json.dumps(event) + "\n" for event in events) + '{"kind": "joined", torn')
    read = last_good(path)
    assert [heard.began(worker) for worker in range(4)] == [read.began(worker) for worker in range(4)]
    return heard


@pytest.mark.parametrize("first", [True, False])
def test_another_team_begins_with_what_its_machines_were_last_known_to_be(first: bool, tmp_path: Path) -> None:
    events = [*start(0, "a", "b"), merged(1), good(0, 4), merged(5), good(0, 7), good(1, 5), merged(9)]
    found = known([*events, *start(9, "b", "a", "c", first=first)], tmp_path / "tape")
    assert [found.began(worker) for worker in range(3)] == [(6, 5), (8, 7), (9, 9)]
    for event in (merged(10), good(0, 11)):
        found.note(event)
    assert [found.began(worker) for worker in range(3)] == [None, (8, 7), (9, 9)]


@pytest.mark.parametrize("first", [True, False])
def test_a_team_without_an_audit_makes_nothing_certain(first: bool, tmp_path: Path) -> None:
    events = [*start(0, "a", "b"), merged(1), good(0, 4), good(1, 4), merged(9)]
    events += [*start(9, "a", "b", first=first), merged(10), good(1, 12), merged(13)]
    found = known([*events, *start(13, "a", "a", first=first)], tmp_path / "tape")
    assert [found.began(worker) for worker in range(2)] == [(5, 4), (5, 4)]


def test_of_a_machine_with_several_workers_the_least_certain_counts(tmp_path: Path) -> None:
    events = [*start(0, "a", "a"), merged(1), good(0, 8), good(1, 3), merged(9), *start(9, "a")]
    assert known(events, tmp_path / "tape").began(0) == (4, 3)


def test_who_goes_back_further_is_certain_from_there(tmp_path: Path) -> None:
    events = [*start(0, "a", "b"), merged(1), good(0, 8), good(1, 3), merged(9), *start(2, "a", "b")]
    found = known(events, tmp_path / "tape")
    assert [found.began(worker) for worker in range(2)] == [(2, 2), (2, 2)]


def test_sessions_without_audits_are_trusted(tmp_path: Path) -> None:
    events = [*start(0, "a"), merged(1), good(0, 1), merged(5), *start(5, "a", audit=""), merged(6)]
    assert known([*events, *start(8, "a")], tmp_path / "tape").began(0) == (8, 8)


def test_a_run_that_has_no_tape_yet_knows_nothing(tmp_path: Path) -> None:
    assert last_good(tmp_path / "none").began(0) == (0, 0)
