"""Events in columns: a reader gets the same from whole blocks, and damage is a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instep.cli import main
from instep.errors import RecordError
from instep.record import blocks, tape
from instep.record.blocks import BlockTape, packed, unpacked
from instep.record.events import (
    ComputedEvent,
    DroppedEvent,
    Event,
    JoinedEvent,
    LeftEvent,
    MergedContribution,
    MergedOnClockEvent,
    PushedToServerEvent,
    ReleasedEvent,
    WarnedEvent,
    plain,
)

COUNT = st.integers(0, 1 << 62)
TIME = st.floats(0, 1e9)
SPAN = st.lists(COUNT, min_size=2, max_size=2)
WHEN: dict[str, Any] = {"t_s": TIME, "clock": st.just("virtual"), "worker": st.integers(0, 1 << 24)}
WORK: dict[str, Any] = {
    **WHEN, "version": COUNT, "piece": COUNT, "batch": COUNT, "local_steps": COUNT, "microbatches": SPAN,
}  # fmt: skip
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
PARTS = st.lists(
    st.builds(MergedContribution, seq=COUNT, worker=COUNT, version=COUNT, piece=COUNT, items=COUNT), max_size=3
)
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(JoinedEvent, **WHEN),
    st.builds(LeftEvent, **WHEN, why=TEXT),
    st.builds(ReleasedEvent, **WHEN, version=COUNT, piece=COUNT),
    st.builds(ComputedEvent, **WORK, from_s=TIME, to_s=TIME),
    st.builds(PushedToServerEvent, **WORK, seq=COUNT, items=COUNT, bytes=COUNT),
    st.builds(DroppedEvent, **WHEN, seq=COUNT, piece=COUNT, version=COUNT, items=COUNT, why=TEXT),
    st.builds(
        MergedOnClockEvent, t_s=TIME, clock=st.just("virtual"), version=COUNT, contributions=PARTS,
        weights=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3),
        staleness=st.lists(COUNT, max_size=3),
    ),
)  # fmt: skip


@given(st.lists(EVENTS, min_size=1, max_size=20))
def test_events_come_out_of_columns_as_they_went_in(events: list[Event]) -> None:
    assert [list(each.items()) for each in unpacked(packed(events))] == [list(plain(each).items()) for each in events]


def started() -> dict[str, Any]:
    return {"t_s": 0.0, "clock": "virtual", "kind": "run_started", "schema": 2, "version": 0}


def some(count: int) -> list[Event]:
    return [ReleasedEvent(t_s=i / 8, clock="virtual", worker=i % 5, version=i, piece=2 * i) for i in range(count)]


def made(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A tape of three blocks of up to 4 events, with an event of the frame between them."""
    monkeypatch.setattr(blocks, "SIZE", 4)
    file = tape.Tape(path / "tape.jsonl")
    file.write(started())
    written = BlockTape(file)
    events = [*some(6), WarnedEvent(t_s=3.0, clock="virtual", why="slow"), *some(3)]
    for event in events:
        written.write(event)
    written.close()
    return [started(), *map(plain, events)]


def test_a_reader_gets_the_events_of_blocks_and_lines_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events = made(tmp_path, monkeypatch)
    assert list(tape.read(tmp_path / "tape.jsonl")) == events
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "tape.jsonl").read_text().splitlines()]
    assert kinds == ["run_started", "block", "block", "warned", "block"]
    (tmp_path / "recipe.toml").write_text("")
    assert main(["tape", str(tmp_path)]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == events


def test_what_was_killed_is_read_up_to_its_last_whole_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = made(tmp_path, monkeypatch)
    lines = (tmp_path / "tape.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "tape.jsonl").write_bytes(b"".join(lines[:2]))  # the second block was not named yet
    assert list(tape.read(tmp_path / "tape.jsonl")) == events[:5]


@pytest.mark.parametrize("harm", ["missing", "cut", "changed", "another", "pickled"])
def test_a_block_that_is_missing_or_damaged_is_a_sentence(
    harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path, monkeypatch)
    path = tmp_path / "tape" / "000002.npz"
    whole = path.read_bytes()
    if harm == "missing":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(whole[:-7])
    elif harm == "changed":
        at = whole.index(b"NUMPY") + 130
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    elif harm == "another":
        shutil.copy(tmp_path / "tape" / "000001.npz", path)
    else:
        np.savez(path, kinds=np.array([{}], dtype=object))
        line = (tmp_path / "tape.jsonl").read_text()
        (tmp_path / "tape.jsonl").write_text(line.replace(str(len(whole)), str(path.stat().st_size)))
    with pytest.raises(RecordError, match=r"^the block \S+00000\d.npz of the tape .*; restore the file\.$"):
        list(tape.read(tmp_path / "tape.jsonl"))


def test_a_block_outside_its_folder_is_refused(tmp_path: Path) -> None:
    with tape.Tape(tmp_path / "tape.jsonl") as file:
        file.write(started())
        file.write({"t_s": 0.0, "clock": "virtual", "kind": "block", "file": "../x.npz", "events": 1, "bytes": 9})
    with pytest.raises(RecordError, match=r"names a block '\.\./x\.npz', which is none"):
        list(tape.read(tmp_path / "tape.jsonl"))
