"""Reads a run's tape, event by event, into its `History`."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from instep.errors import RecordError
from instep.ranges import equal_ranges
from instep.record import tape
from instep.record.folder import RunFolder
from instep.report.history import Curve, History, MadeAt, Point, Strip
from instep.report.spans import Spans, tell_evaluations

MOST_STRIPS = 16
"""Workers whose time is drawn; of more of them, as many, evenly spaced."""


def read(path: Path | str, *, strips: int | None = MOST_STRIPS) -> History:
    """The history of the run in the folder `path`. A tape that is still being written is read as far as it goes.

    strips: the most workers whose time is kept, evenly spaced; None keeps all.

    Raises RecordError where there is no run, or no event that could be read.
    """
    folder = RunFolder.open(path)
    reader = _Reader(Path(path), strips)
    try:
        for event in events_of(folder):
            reader.see(event)
    except RecordError as error:
        if reader.start is None:
            raise
        reader.torn = error.message
    if reader.start is None:
        raise no_event_yet(folder)
    return reader.history()


def events_of(folder: RunFolder) -> Iterable[Mapping[str, Any]]:
    """Those of its tape, as far as it is written. Raises RecordError, where there is no tape yet too."""
    if not folder.tape_path.exists():
        raise no_event_yet(folder)
    return tape.read(folder.tape_path)


def no_event_yet(folder: RunFolder) -> RecordError:
    """The error on a run of which nothing can be shown yet."""
    return RecordError(f"the run in {folder.path} has no event on its tape yet; wait until it trains, then try again.")


class _Reader:
    """Takes events in one by one."""

    def __init__(self, path: Path, strips: int | None):
        self._most_strips = strips
        self.start: dict[str, Any] | None = None
        self.torn = ""
        self._path = path
        self._curve = Curve()
        self._held_out: list[tuple[int, float, float]] = []
        self._by_turn: dict[str, list[tuple[int, float, float]]] = {}
        """(version, seconds, objective)"""
        self._evaluations = Spans()
        self._strips: dict[int, Strip] = {}
        self._busy_s, self._there_s = defaultdict[int, float](float), defaultdict[int, float](float)
        self._since_s: dict[int, float] = {}
        self._staleness: Counter[int] = Counter()
        self._hosts: dict[str, None] = {}
        self._planned: dict[str, Any] | None = None
        self._shown: list[MadeAt] = []
        self._problems: dict[str, None] = {}
        self._result: dict[str, Any] | None = None
        self._failed, self._ended_at = "", 0
        self._offset_s = self._last_s = self._train_end_s = 0.0
        self._bytes = self._dropped = self._restarts = 0
        self._sessions = 0
        self._began = False
        self._drawn: frozenset[int] = frozenset()
        self._pulled_bytes = 0
        self._server = False
        self._released_s: dict[int, float] = {}
        self._computed: dict[int, tuple[float, int]] = {}
        self._last_end_s: dict[int, float] = {}
        """In lockstep, by the version that was worked on: when the last worker had computed."""
        self._merged_s: dict[int, float] = {}
        """In lockstep, by the version that was worked on: when the next was made."""
        self._see = {
            "run_started": self._run_started, "joined": self._joined, "left": self._left, "released": self._released,
            "computed": self._computed_event, "pushed": self._pushed, "merged": self._merged,
            "dropped": self._dropped_event, "evaluated": self._evaluated, "sampled": self._sampled,
            "planned": self._planned_event, "warned": self._warned, "failed": self._failed_event,
            "run_ended": self._run_ended,
        }  # fmt: skip

    def see(self, event: Mapping[str, Any]) -> None:
        see = self._see.get(event["kind"])
        if see is not None:
            see(event)
        self._last_s = max(self._last_s, self._offset_s + event["t_s"])

    def _at(self, event: Mapping[str, Any]) -> float:
        return float(self._offset_s + event["t_s"])

    def _run_started(self, event: Mapping[str, Any]) -> None:
        self._leave_all(self._train_end_s or self._last_s)
        if self.start is None:
            self.start = dict(event)
            count = int(event["team"].get("workers", 1))
            self._drawn = frozenset(start for start, _ in equal_ranges(count, min(count, self._most_strips or count)))
            self._sessions = 1
        elif self._offset_s + event["t_s"] < self._last_s:  # the clock began anew
            self._offset_s = self._last_s
            self._sessions += 1
        else:
            self._restarts += 1
        self._server = event["engine"] != "lockstep"
        self._pulled_bytes = 4 * event["parameters"]
        self._result, self._failed = None, ""
        self._curve.back_to(event["version"])
        self._held_out = [point for point in self._held_out if point[0] <= event["version"]]
        for turn, points in self._by_turn.items():
            self._by_turn[turn] = [point for point in points if point[0] <= event["version"]]
        self._shown = [each for each in self._shown if each.version <= event["version"]]
        self._released_s.clear()
        self._computed.clear()
        for seen in (self._last_end_s, self._merged_s):
            for version in [version for version in seen if version >= event["version"]]:
                del seen[version]

    def _joined(self, event: Mapping[str, Any]) -> None:
        if not self._began:  # what came before is the start of Python
            self._began, self._offset_s, self._last_s = True, -event["t_s"], 0.0
        worker, at = event["worker"], max(0.0, self._at(event))
        self._leave(worker, at)  # nothing, unless its loss was not told
        self._since_s[worker] = at
        if event.get("host"):
            self._hosts[event["host"]] = None
        if worker in self._drawn:
            strip = self._strips.setdefault(worker, Strip())
            strip.there.append(at)
            if len(strip.there) > 1:
                strip.events.append((at, "joined"))

    def _left(self, event: Mapping[str, Any]) -> None:
        at = self._at(event)
        if event["worker"] in self._strips:
            self._strips[event["worker"]].events.append((at, event["why"]))
        self._problems[event["why"]] = None
        self._leave(event["worker"], at)

    def _leave(self, worker: int, at: float) -> None:
        since = self._since_s.pop(worker, None)
        if since is None:
            return
        self._there_s[worker] += max(0.0, at - since)
        if worker in self._strips:
            self._strips[worker].there.append(max(at, since))

    def _leave_all(self, at: float) -> None:
        for worker in list(self._since_s):
            self._leave(worker, at)

    def _released(self, event: Mapping[str, Any]) -> None:
        self._bytes += self._pulled_bytes
        if event["worker"] in self._strips:
            self._released_s[event["worker"]] = self._at(event)

    def _computed_event(self, event: Mapping[str, Any]) -> None:
        worker, version = event["worker"], event["version"]
        start, end = self._offset_s + event["from_s"], self._offset_s + event["to_s"]
        ahead = [self._offset_s + each_s for each_s in event.get("ahead", ())]
        self._busy_s[worker] += end - start + (ahead[1] - ahead[0] if ahead else 0.0)
        if not self._server:
            self._last_end_s[version] = max(end, self._last_end_s.get(version, end))
        strip = self._strips.get(worker)
        if strip is None:
            return
        strip.computing.extend((*ahead, start, end))
        strip.computing_version.extend([version] * (2 if ahead else 1))
        if worker in self._released_s:
            self._communicated(strip, self._released_s.pop(worker), start, version)
        if self._server:
            self._computed[worker] = end, version

    def _communicated(self, strip: Strip, start: float, end: float, version: int) -> None:
        if end > start:
            strip.communicating.extend((start, end))
            strip.communicating_version.append(version)

    def _pushed(self, event: Mapping[str, Any]) -> None:
        self._bytes += event["bytes"]
        worker = event["worker"]
        if self._server:
            wire = self.start["recipe"]["rule"].get("wire", "float32") if self.start else "float32"
            if wire != "float32":  # what comes is as narrow as what goes
                self._pulled_bytes = event["bytes"]
            if worker in self._computed:
                end, version = self._computed.pop(worker)
                self._communicated(self._strips[worker], end, self._at(event), version)
            return
        place = len(self._curve) - 1
        while place >= 0 and self._curve.version[place] > event["version"]:  # it was told after the update
            self._curve.bytes[place] += event["bytes"]
            place -= 1

    def _merged(self, event: Mapping[str, Any]) -> None:
        at = self._at(event)
        items = event.get("items")
        if items is None:  # without gradients
            items = sum(each.get("items", 0) for each in event["contributions"])
        self._curve.back_to(event["version"] - 1)
        curve, objective = self._curve, event.get("objective")
        curve.version.append(event["version"])
        curve.items.append((curve.items[-1] if len(curve.items) else 0) + items)
        curve.own_items.append(items)
        curve.seconds.append(at)
        curve.bytes.append(self._bytes)
        curve.objective.append(math.nan if objective is None else objective)
        curve.turn.append(event.get("turn", ""))
        self._staleness.update(event["staleness"])
        self._train_end_s = max(self._train_end_s, at)
        if not self._server:
            self._merged_s[event["version"] - 1] = at

    def _dropped_event(self, event: Mapping[str, Any]) -> None:
        self._dropped += 1

    def _evaluated(self, event: Mapping[str, Any]) -> None:
        version, objective = event["version"], event["objective"]
        self._looked(event)
        if objective is not None and not (self._held_out and self._held_out[-1][0] >= version):
            self._held_out.append((version, self._at(event), objective))
            for turn, value in (event.get("turns") or {}).items():
                if value is not None:
                    self._by_turn.setdefault(turn, []).append((version, self._at(event), value))

    def _looked(self, event: Mapping[str, Any]) -> None:
        if event.get("took_s"):
            self._evaluations.add(self._at(event) - event["took_s"], self._at(event), event["version"])

    def _sampled(self, event: Mapping[str, Any]) -> None:
        version = event["version"]
        self._looked(event)
        self._shown = [each for each in self._shown if each.version < version]
        self._shown.append(MadeAt(version, self._at(event), event["sample"], event["files"], event["figures"]))

    def _planned_event(self, event: Mapping[str, Any]) -> None:
        self._planned = dict(event)

    def _warned(self, event: Mapping[str, Any]) -> None:
        self._problems[event["why"]] = None

    def _failed_event(self, event: Mapping[str, Any]) -> None:
        self._failed = event["why"]

    def _run_ended(self, event: Mapping[str, Any]) -> None:
        self._result, self._ended_at = dict(event["result"]), event["version"]
        self._leave_all(self._train_end_s or self._at(event))

    def _shown_at_the_end(self) -> list[MadeAt]:
        result = self._result or {}
        artifacts = result.get("artifacts") or {"files": [], "figures": {}}
        if not result.get("sample") and not any(artifacts.values()):
            return []
        return [MadeAt(self._ended_at, None, result.get("sample"), artifacts["files"], artifacts["figures"])]

    def history(self) -> History:
        """What was seen so far."""
        assert self.start is not None
        self._leave_all(self._train_end_s or self._last_s)
        self._tell_exchanges()
        for strip in self._strips.values():
            tell_evaluations(strip, self._evaluations)
        self._count_collectives()
        return History(
            path=self._path, start=self.start, curve=self._curve, held_out=list(map(self._point, self._held_out)),
            strips=dict(sorted(self._strips.items())), busy_s=dict(self._busy_s), there_s=dict(self._there_s),
            staleness=self._staleness, hosts=list(self._hosts), planned=self._planned, problems=list(self._problems),
            result=self._result, failed=self._failed, seconds=self._train_end_s or self._last_s, bytes=self._bytes,
            dropped=self._dropped, sessions=self._sessions, restarts=self._restarts,
            shown=self._shown + self._shown_at_the_end(), torn=self.torn,
            held_out_by_turn={turn: list(map(self._point, seen)) for turn, seen in self._by_turn.items()},
        )  # fmt: skip

    def _tell_exchanges(self) -> None:
        """In lockstep all wait for the last of a step, then exchange gradients and update."""
        for strip in self._strips.values():
            for version in strip.computing_version:
                if version in self._last_end_s and version in self._merged_s:
                    self._communicated(strip, self._last_end_s[version], self._merged_s[version], version)

    def _count_collectives(self) -> None:
        """On a virtual clock rules in lockstep may reduce among themselves, without a server."""
        if self.start and self.start["clock"] == "virtual" and self._result and self._bytes:
            total = self._result["bytes_sent"]
            self._curve.bytes = array("q", [round(sent * total / self._bytes) for sent in self._curve.bytes])
            self._bytes = total

    def _point(self, seen: tuple[int, float, float]) -> Point:
        version, at, objective = seen
        curve = self._curve
        place = bisect_right(curve.version, version) - 1
        if place < 0:
            return Point(version, 0, at if version else 0.0, 0, objective)
        return Point(version, curve.items[place], curve.seconds[place], curve.bytes[place], objective)


def read_all(paths: Sequence[Path | str]) -> list[History]:
    """The histories of several runs, in order, see `read`."""
    return [read(path) for path in _once(paths)]


def _once(paths: Iterable[Path | str]) -> list[Path]:
    return list({Path(path).resolve(): Path(path) for path in paths}.values())
