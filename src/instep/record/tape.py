"""The tape: a run's event log, one JSON object a line.

Every event has ``t_s`` (seconds since the run's start), ``clock`` ("wall" or "virtual") and ``kind``; the first is
``run_started`` and names the tape's schema. A number that is not finite is written as null, so that every JSON reader
takes the tape. After a crash the last line may be torn: it is skipped by `read` and cut off before new events follow.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from instep.errors import RecordError, ResourceError, shown
from instep.record.event_kinds import QUIET
from instep.record.events import SCHEMA, SCHEMA_IN_BLOCKS
from instep.record.files import close_own, disk_error, hold_alone, json_text, sync_folder
from instep.record.schema import any_event, by_kind
from instep.record.shapes import misfit

_DURABLE = frozenset({"run_started", "checkpointed", "failed", "run_ended"})
"""Kinds after which the tape is synced, so that it survives a power cut."""

_WAIT_BYTES = 1 << 16


class _Read(dict[str, Any]):
    """An event as it was read, which says what it lacks."""

    def __missing__(self, name: str) -> Any:
        raise RecordError(
            f"an event {shown(self.get('kind'))} of the tape, at {self.get('t_s')} s, lacks '{name}'; restore the file."
        )


class Tape:
    """A tape open for writing.

    Frequent events wait in memory for a `flush`, for 64 KiB of them or for an event of another kind. A forked process
    may drop its copy freely: only the process that calls `write` writes.

    path: the file. Without `append` it must not exist; with it, it may, and a torn last line is cut off.
    Raises RecordError if the tape exists already, and ResourceError if the disk refuses.
    """

    def __init__(self, path: Path | str, *, append: bool = False) -> None:
        self.path = Path(path)
        self._waiting = bytearray()
        self._descriptor = -1
        try:
            flags = os.O_RDWR | os.O_CREAT | (0 if append else os.O_EXCL)
            self._descriptor = os.open(self.path, flags, 0o666)
            hold_alone(self._descriptor)
            self._end = _sound_end(self._descriptor)
            os.ftruncate(self._descriptor, self._end)
            os.lseek(self._descriptor, self._end, os.SEEK_SET)
            if self._end and os.pread(self._descriptor, 1, self._end - 1) != b"\n":
                self._waiting += b"\n"
            sync_folder(self.path.parent)
        except FileExistsError:
            raise RecordError(
                f"the tape {self.path} exists already; use another run folder, or resume this run."
            ) from None
        except OSError as error:
            raise disk_error(f"the tape {self.path} cannot be opened", error) from error
        self.begun = self._end > 0
        """Whether it had events when it was opened."""

    def write(self, event: Mapping[str, Any]) -> None:
        """Adds `event`, a mapping of plain values with a ``kind``. Raises ResourceError if the disk refuses.

        After an error the event is still held, and `flush` tries again: nothing is lost if space was made.
        """
        kind = event["kind"]
        self._waiting += json_text(event).encode() + b"\n"
        if kind not in QUIET or len(self._waiting) > _WAIT_BYTES:
            self.flush(sync=kind in _DURABLE)

    def flush(self, *, sync: bool = False) -> None:
        """Hands all events to the system; with `sync` they survive a power cut too. Raises ResourceError."""
        try:
            self._write_out()
            if sync:
                os.fsync(self._descriptor)
        except OSError as error:
            raise disk_error(f"the tape {self.path} cannot be written", error) from error

    def _write_out(self) -> None:
        written = 0
        try:
            while written < len(self._waiting):
                written += os.write(self._descriptor, self._waiting[written:])
        except OSError:
            # A full disk takes part of a line: without this, later events would follow it and damage the tape.
            os.ftruncate(self._descriptor, self._end)
            os.lseek(self._descriptor, self._end, os.SEEK_SET)
            raise
        self._end += written
        self._waiting.clear()

    def close(self) -> None:
        """Writes what waits, syncs, closes; a second call does nothing. Raises ResourceError, having closed."""
        if self._descriptor < 0:
            return
        try:
            self.flush(sync=True)
        finally:
            close_own(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Tape:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(*(() if error is None else (ResourceError,))):  # the first error is the one to see
            self.close()


def read(path: Path | str) -> Iterator[dict[str, Any]]:
    """The events of a tape, in order. A torn last line, left by a crash, is skipped.

    Raises RecordError, when it gets there, for a missing file, a damaged line (by number, from 1), a field of another
    kind than was written, see `instep.record.events`, a first event that is not ``run_started``, or a schema that is
    neither `SCHEMA` nor `SCHEMA_IN_BLOCKS`. A field that an event lacks raises RecordError where it is asked for.
    """
    known, other = by_kind(), any_event()
    try:
        with open(path, "rb") as file:
            line, number = file.readline(), 1
            while line:
                following = file.readline()
                event = _event(line)
                if event is None and following:
                    raise RecordError(
                        f"line {number} of the tape {path} is damaged: it is not a JSON object with a kind; restore "
                        "the file, or remove that line to read the rest."
                    )
                if event is not None:
                    _check_schema(event, number, path)
                    wrong = misfit(event, known.get(event["kind"], other))
                    if wrong is not None:
                        raise RecordError(
                            f"line {number} of the tape {path} is not as it was written: of the event "
                            f"{shown(event['kind'])} {wrong}; restore the file."
                        )
                    if event["kind"] == "block":
                        from instep.record.blocks import read_block

                        yield from map(_Read, read_block(Path(path), event))
                    else:
                        yield _Read(event)
                line, number = following, number + 1
    except OSError as error:
        raise RecordError(f"the tape {path} cannot be read: {error.strerror}; check the path.") from error


def latest(events: Iterable[Mapping[str, Any]], kind: str = "merged") -> list[dict[str, Any]]:
    """The events of one `kind` that count, by rising version, for kinds with one event a version.

    After a restart from an earlier version, steps already seen are seen again. A ``run_started`` or ``merged`` event
    takes the history back to where it goes on from: what was recorded beyond that is superseded.
    """
    kept: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["kind"] in ("run_started", "merged"):
            base = event["version"] - (event["kind"] == "merged")
            while kept and next(reversed(kept)) > base:
                kept.popitem()
        if event["kind"] == kind:
            kept[event["version"]] = dict(event)
    return list(kept.values())


def take_back(known: MutableMapping[int, Any], version: int) -> None:
    """Removes what is known of later versions: what went back to this one has superseded it."""
    for later in [each for each in known if each > version]:
        del known[later]


@dataclass
class ToldCheckpoints:
    """What a tape tells of its run's checkpoints: the run's id, if it has one, and the digest of each version's."""

    run: str | None = None
    digests: dict[int, str] = field(default_factory=dict)

    def note(self, event: Mapping[str, Any]) -> None:
        """Takes an event in. A start of the run takes later checkpoints back."""
        match event:
            case {"kind": "run_started", "version": int(version)}:
                if isinstance(event.get("run"), str):
                    self.run = event["run"]
                take_back(self.digests, version)
            case {"kind": "checkpointed", "version": int(version), "digest": str(digest)}:
                self.digests[version] = digest


def told(path: Path | str) -> ToldCheckpoints:
    """What the tape tells of checkpoints; nothing where there is none. Raises RecordError where it cannot be read.

    Only the lines that matter are looked at, and damaged ones are passed over, so that a resume need not read it whole.
    """
    found = ToldCheckpoints()
    try:
        with open(path, "rb") as file:
            for line in file:
                if b'"checkpointed"' in line or b'"run_started"' in line:
                    found.note(_event(line) or {})
    except FileNotFoundError:
        return found
    except OSError as error:
        raise RecordError(f"the tape {path} cannot be read: {error.strerror}; check the path.") from error
    return found


def last_update(path: Path | str) -> int:
    """The version that the tape's last update has made, or that its last start goes on from; 0 where there is none."""
    last = b""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            if b'"merged"' in line or b'"run_started"' in line:
                last = line
    version = (_event(last) or {}).get("version", 0)
    return version if isinstance(version, int) else 0


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("kind"), str) else None


def _check_schema(event: dict[str, Any], number: int, path: Path | str) -> None:
    if number == 1 and event["kind"] != "run_started":
        raise RecordError(
            f"{path} is not a tape of a run: its first event is {shown(event['kind'])}, not 'run_started'."
        )
    if event["kind"] == "run_started" and event.get("schema") not in (SCHEMA, SCHEMA_IN_BLOCKS):
        raise RecordError(
            f"the tape {path} has schema {shown(event.get('schema'))} at line {number}, and this version of Instep "
            f"reads {SCHEMA} and {SCHEMA_IN_BLOCKS}; read it with the version that wrote it."
        )


def _sound_end(descriptor: int) -> int:
    """The size of the file in bytes without a torn last line."""
    size = os.fstat(descriptor).st_size
    tail, start = b"", size
    while start and b"\n" not in tail[:-1]:
        start = max(0, start - _WAIT_BYTES)
        tail = os.pread(descriptor, size - start, start)
    last = tail[tail.rfind(b"\n", 0, -1) + 1 :]
    return size if not last or _event(last) is not None else size - len(last)
