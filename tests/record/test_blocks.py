"""Events in columns: a reader gets the same from whole blocks, and damage is a sentence."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instep.cli import main
from instep.clock.network import Network
from instep.clock.times import Failures, WorkerTimes
from instep.errors import RecordError
from instep.offline.schedule import simulate
from instep.offline.trace import EventListener, Listener
from instep.record import blocks, tape
from instep.record.blocks import BlockTape
from instep.record.events import WarnedEvent, plain
from instep.record.files import json_text
from instep.rules import UpdateRule, parse
from instep.rules.actions import Contribution, Drop, Merge
from instep.rules.work import Pieces

PIECES = Pieces(parse("local_sgd:3"), 3, 8, 17)
COUNT = st.integers(0, 1 << 60)
TIME = st.floats(0, 1e9)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
WORKER = st.integers(0, 1 << 24)
CONTRIBUTION = st.builds(Contribution, COUNT, WORKER, COUNT, COUNT, COUNT)
PART = st.tuples(CONTRIBUTION, st.floats(allow_nan=False, allow_infinity=False), COUNT)
MERGE = st.builds(
    lambda version, parts: Merge(version, *zip(*parts, strict=True)), COUNT, st.lists(PART, min_size=1, max_size=3)
)
TOLD: st.SearchStrategy[tuple[Any, ...]] = st.one_of(
    st.tuples(st.just("joined"), TIME, WORKER),
    st.tuples(st.just("left"), TIME, WORKER, TEXT),
    st.tuples(st.just("released"), TIME, WORKER, COUNT, COUNT),
    st.tuples(st.just("pushed"), TIME, WORKER, COUNT, COUNT, TIME, TIME, COUNT, COUNT, COUNT),
    st.tuples(st.just("merged"), TIME, MERGE),
    st.tuples(st.just("dropped"), TIME, st.builds(Drop, CONTRIBUTION, TEXT)),
)  # fmt: skip


def one_by_one(tell: Callable[[EventListener], object], pieces: Pieces = PIECES) -> list[str]:
    """The lines of a tape whose events are made one after the other."""
    lines = [json_text(started())]
    tell(EventListener(pieces, lambda event: lines.append(json_text(plain(event)))))
    return lines


def in_columns(path: Path, tell: Callable[[BlockTape], object], pieces: Pieces = PIECES) -> list[str]:
    """The lines that a reader makes of a tape in columns."""
    file = tape.Tape(path / "tape.jsonl")
    file.write(started())
    with contextlib.closing(BlockTape(file, pieces, lambda event: None)) as written:
        tell(written)
    return [json_text(event) for event in tape.read(path / "tape.jsonl")]


@settings(max_examples=40)
@given(st.lists(TOLD, min_size=1, max_size=20), st.integers(1, 8))
def test_events_come_out_of_columns_as_one_by_one(history: list[tuple[Any, ...]], size: int) -> None:
    def tell(listener: Listener) -> None:
        for name, *values in history:
            getattr(listener, name)(*values)

    with tempfile.TemporaryDirectory() as path, pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "SIZE", size)
        assert in_columns(Path(path), tell) == one_by_one(tell)


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
@pytest.mark.parametrize(
    "text",
    [
        "asynchronous",
        "synchronous",
        "softsync",
        "post_local_sgd:4,after=3",
        "at most 1 late",
        "asynchronous,grace_s=0.5",
    ],
)
def test_a_simulation_in_columns_has_the_tape_of_one_by_one(
    text: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With joins, failures, contributions that come too late, pieces of unequal size and a ragged end."""
    monkeypatch.setattr(blocks, "SIZE", 100)
    rule = UpdateRule(name=text, quorum="1", max_staleness=1) if text == "at most 1 late" else parse(text)
    pieces = Pieces(rule, workers, 8, 23)
    times = WorkerTimes.lognormal(1.0, 0.5, seed=3, failures=Failures(12.0, 2.0))

    def tell(listener: Listener) -> None:
        simulate(
            rule, pieces, times, Network(1e4, 0.01), contribution_bytes=300, weights_bytes=500, merge_s=0.1,
            listener=listener,
        )  # fmt: skip

    lines = one_by_one(tell, pieces)
    assert in_columns(tmp_path, tell, pieces) == lines
    kinds = {json.loads(line)["kind"] for line in lines}
    assert kinds >= {"joined", "left", "released", "computed", "pushed", "merged"}
    assert ("grace_ended" in kinds) == (rule.grace_s is not None and workers > 1)
    assert ("dropped" in kinds) == (text == "at most 1 late" and workers > 1)


def started() -> dict[str, Any]:
    return {"t_s": 0.0, "clock": "virtual", "kind": "run_started", "schema": 3, "version": 0}


def made(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A tape of three blocks of 6, 3 and 2 events, with an event of the frame before the last."""
    monkeypatch.setattr(blocks, "SIZE", 4)
    warned = WarnedEvent(t_s=3.0, clock="virtual", why="slow")
    file = tape.Tape(path / "tape.jsonl")
    file.write(started())
    events: list[dict[str, Any]] = [started()]
    with contextlib.closing(BlockTape(file, PIECES, lambda event: None)) as written:
        alone = EventListener(PIECES, lambda event: events.append(plain(event)))
        for number in range(4):
            if number == 3:
                written.write(warned)
                events.append(plain(warned))
            for listener in (written, alone):
                listener.pushed(number / 8, number % 3, number, 2 * number, 0.0, number / 8, number, 1, 4)
                if number != 3:
                    listener.released(number / 8, number % 3, number + 1, 2 * number)
    return events


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
    assert list(tape.read(tmp_path / "tape.jsonl")) == events[:7]


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
