"""The tape: what is written is read, after crashes and full disks too, and damage is named."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from instep.errors import RecordError, ResourceError
from instep.record.tape import Tape, latest, read
from support.full_disk import full_disk

quick = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def started(**fields: Any) -> dict[str, Any]:
    return {"t_s": 0.0, "clock": "wall", "kind": "run_started", "schema": 2, "version": 0} | fields


def merged(version: int, **fields: Any) -> dict[str, Any]:
    return {"t_s": 1.0, "clock": "wall", "kind": "merged", "version": version} | fields


def make(path: Path, *events: dict[str, Any], append: bool = False) -> Path:
    with Tape(path, append=append) as tape:
        for event in events:
            tape.write(event)
    return path


def finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


@given(payloads=st.lists(plain, max_size=5))
@example(payloads=[math.nan, [math.inf], {"x": (-math.inf, 1.5)}])
@quick
def test_events_come_back_and_every_line_is_standard_json(payloads: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "tape.jsonl"
    path.unlink(missing_ok=True)
    events = [started(), *(merged(i, note=note) for i, note in enumerate(payloads))]
    make(path, *events)
    assert list(read(path)) == finite(events)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)


@given(cut=st.integers(0, 400), data=st.data())
@quick
def test_a_tape_cut_anywhere_is_read_and_continued(cut: int, data: st.DataObject, tmp_path: Path) -> None:
    """A crash may leave any number of the bytes, and after them zeros that a file system filled in."""
    path = tmp_path / "tape.jsonl"
    path.unlink(missing_ok=True)
    events = [started(), *(merged(i, note="x" * i) for i in range(1, 5))]
    whole = make(path, *events).read_bytes()
    kept = whole[:cut] + b"\0" * data.draw(st.integers(0, 3))
    path.write_bytes(kept)
    # An event counts once its closing brace is there; the newline after it may be missing.
    count = sum(kept.startswith(b"\n".join(whole.split(b"\n")[: n + 1])) for n in range(len(events)))
    if kept != whole[:cut] and cut and whole[:cut].endswith(b"}"):
        count -= 1  # zeros after the brace are part of that line: it is torn
    assert list(read(path)) == events[:count]
    make(path, started(version=3), merged(4), append=True)
    assert list(read(path)) == [*events[:count], started(version=3), merged(4)]
    assert path.read_bytes().count(b"\n") == count + 2


def test_a_long_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = make(tmp_path / "tape.jsonl", started())
    with path.open("ab") as file:
        file.write(b'{"kind": "merged", "x": "' + b"y" * 300_000)
    make(path, merged(1), append=True)
    assert list(read(path)) == [started(), merged(1)]


def test_a_long_sound_last_line_is_kept(tmp_path: Path) -> None:
    path = make(tmp_path / "tape.jsonl", started(), merged(1, x="y" * 300_000))
    make(path, merged(2), append=True)
    assert [event.get("version") for event in read(path)] == [0, 1, 2]


@pytest.mark.parametrize("line", [b"{torn", b"", b"[1]", b'{"t_s": 1}', b'{"kind": 3}', b"\xff", b"[" * 100_000])
def test_damage_before_the_last_line_is_named(line: bytes, tmp_path: Path) -> None:
    path = make(tmp_path / "tape.jsonl", started(), merged(1), merged(2))
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], line, lines[2]]) + b"\n")
    events = read(path)
    assert next(events) == started()
    with pytest.raises(RecordError, match=f"line 2 of the tape {path} is damaged"):
        next(events)


def test_a_tape_of_another_schema_or_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="has schema 1 at line 1, and this version of Instep reads 2 and 3;"):
        list(read(make(tmp_path / "a", started(schema=1))))
    with pytest.raises(RecordError, match="has schema None at line 2"):
        list(read(make(tmp_path / "b", started(), {"kind": "run_started"})))
    with pytest.raises(RecordError, match="first event is 'merged', not 'run_started'"):
        list(read(make(tmp_path / "c", merged(1))))
    with pytest.raises(RecordError, match="cannot be read: No such file"):
        list(read(tmp_path / "none"))


def test_an_existing_tape_is_not_overwritten(tmp_path: Path) -> None:
    path = make(tmp_path / "tape.jsonl", started())
    with pytest.raises(RecordError, match="exists already"):
        Tape(path)
    assert list(read(path)) == [started()]
    with pytest.raises(ResourceError, match="cannot be opened: No such file"):
        Tape(tmp_path / "none" / "tape.jsonl")


def test_important_events_are_written_at_once_and_frequent_ones_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "tape.jsonl"
    tape = Tape(path)
    tape.write(started())
    assert list(read(path)) == [started()]
    tape.write(merged(1))
    assert list(read(path)) == [started()]
    tape.write(merged(2, x="y" * 70_000))
    assert len(list(read(path))) == 3
    tape.write(merged(3))
    tape.flush()
    assert len(list(read(path))) == 4
    tape.close()
    tape.close()


@pytest.mark.parametrize("kind", ["released", "computed", "pushed", "merged", "dropped"])
def test_what_comes_with_every_contribution_is_written_in_one_with_what_follows(kind: str, tmp_path: Path) -> None:
    with Tape(tmp_path / "tape.jsonl") as tape:
        tape.write(started())
        for version in range(3):
            tape.write({**merged(version), "kind": kind})
        assert list(read(tape.path)) == [started()]
        tape.write({**merged(2), "kind": "left"})
        assert len(list(read(tape.path))) == 5


@pytest.mark.processes
def test_important_events_survive_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "tape.jsonl"
    child = os.fork()
    if not child:
        tape = Tape(path)
        tape.write(started())
        tape.write(merged(1))
        tape.write({"kind": "warned", "why": "slow"})
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert [event["kind"] for event in read(path)] == ["run_started", "merged", "warned"]


@pytest.mark.processes
def test_a_forked_copy_writes_nothing(tmp_path: Path) -> None:
    tape = Tape(tmp_path / "tape.jsonl")
    tape.write(started())
    tape.write(merged(1))
    child = os.fork()
    if not child:
        del tape
        os._exit(0)
    os.waitpid(child, 0)
    tape.close()
    assert list(read(tape.path)) == [started(), merged(1)]


@pytest.mark.processes
def test_a_full_disk_is_a_sentence_and_the_tape_stays_whole(tmp_path: Path) -> None:
    with full_disk(tmp_path, size_bytes=1 << 20) as disk:
        path = disk / "tape.jsonl"
        tape = Tape(path)
        tape.write(started())
        filler = disk / "filler"
        filler.write_bytes(b"x" * (1000 << 10))  # leaves a few pages
        with pytest.raises(ResourceError, match=f"the tape {path} cannot be written: No space left on device; free"):
            tape.write({"kind": "warned", "why": "y" * 60_000})
        assert path.read_bytes().count(b"\n") == path.read_bytes().count(b"}\n")
        assert list(read(path)) == [started()]
        with pytest.raises(ResourceError, match="No space left"):
            tape.flush()
        filler.unlink()
        tape.write(merged(1))
        tape.close()
        assert [event["kind"] for event in read(path)] == ["run_started", "warned", "merged"]


@pytest.mark.processes
def test_close_closes_on_a_full_disk_and_the_first_error_is_seen(tmp_path: Path) -> None:
    with full_disk(tmp_path, size_bytes=1 << 20) as disk:
        tape = Tape(disk / "tape.jsonl")
        tape.write(started())
        tape._waiting += b" " * (2 << 20)
        with pytest.raises(ResourceError, match="No space left"):
            tape.close()
        tape.close()
        with pytest.raises(TypeError, match="first"), Tape(disk / "other.jsonl") as tape:
            _fill_and_fail(tape)


def _fill_and_fail(tape: Tape) -> None:
    tape._waiting += b" " * (2 << 20)
    raise TypeError("first")


def test_an_event_that_is_not_plain_leaves_the_tape_alone(tmp_path: Path) -> None:
    with Tape(tmp_path / "tape.jsonl") as tape:
        tape.write(started())
        with pytest.raises(TypeError):
            tape.write(merged(1, x=object()))
        with pytest.raises(KeyError):
            tape.write({"version": 1})
        tape.write(merged(1))
    assert list(read(tape.path)) == [started(), merged(1)]


def test_the_later_event_of_a_version_wins() -> None:
    def evaluated(version: int, objective: float) -> dict[str, Any]:
        return {"kind": "evaluated", "version": version, "objective": objective}

    events = [
        started(),
        evaluated(0, 0.0),
        *(merged(v, objective=0.1 * v) for v in range(1, 7)),
        evaluated(4, 0.4),
        evaluated(6, 0.6),
        # A worker died; the team went on from version 3, without a new run_started.
        *(merged(v, objective=0.2 * v) for v in range(4, 6)),
        # The run was resumed from version 4 and ended at 5.
        started(version=4),
        merged(5, objective=5.0),
        evaluated(5, 5.0),
    ]
    assert [(e["version"], e["objective"]) for e in latest(events)] == [
        (1, 0.1), (2, 0.2), (3, pytest.approx(0.3)), (4, 0.8), (5, 5.0)
    ]  # fmt: skip
    assert latest(events, "evaluated") == [evaluated(0, 0.0), evaluated(5, 5.0)]
    assert latest([]) == []


@example(ends=[(0, 5, True), (3, 0, True)])
@given(ends=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()), max_size=6))
def test_latest_is_one_history_without_gaps(ends: list[tuple[int, int, bool]]) -> None:
    """Random restarts: whatever was taken back, the versions left are 1, 2, ... up to where the last attempt came."""
    events, reached = [started()], 0
    for attempt, (wanted, steps, resumed) in enumerate(ends):
        base = min(wanted, reached)
        if resumed:
            events.append(started(version=base))
            reached = base
        events += [merged(base + 1 + i, attempt=attempt) for i in range(steps)]
        reached = base + steps if steps else reached
    found = latest(events)
    assert [event["version"] for event in found] == list(range(1, reached + 1))
    attempts = [event["attempt"] for event in found]
    assert attempts == sorted(attempts)
