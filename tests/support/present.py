"""Who of a run in step is there, and what was computed again, as its tape tells."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_LOST = re.compile(r"worker \d+(?: on host \d+ \(\S+\))? \(pid (\d+)\)")


class Process(NamedTuple):
    """Of a worker. host: its name, or "" where there is one machine alone; pid: as the host counts."""

    worker: int
    host: str
    pid: int


@dataclass
class Present:
    """Processes by worker; whose places are vacant; the newest update. machine: whether there is one alone; workers:
    that the team has, or is to have.
    """

    machine: bool
    workers: int = 0
    processes: dict[int, Process] = field(default_factory=dict)
    vacant: set[int] = field(default_factory=set)
    version: int = 0
    going: bool = False
    digests: dict[int, str] = field(default_factory=dict)
    """Of the weights, at checkpoints."""
    resizes: int = 0
    left: dict[Process, int] = field(default_factory=dict)
    """Places on the tape."""

    def take(self, event: dict[str, Any], place: int) -> None:
        """One event, in order."""
        match event["kind"]:
            case "checkpointed":
                self.digests[event["version"]] = event["digest"]
            case "resized":
                self.resizes, self.workers = self.resizes + 1, event["workers"]
            case "run_started":
                self.vacant.clear()
                self.version, self.going = event["version"], False
                self.workers = event["team"]["workers"]
                self.processes = {w: each for w, each in self.processes.items() if w < self.workers}
            case "joined":
                where = "" if self.machine else event["host"]
                self.processes[event["worker"]] = Process(event["worker"], where, event["pid"])
            case "left":
                there, lost = self.processes.pop(event["worker"], None), _LOST.match(event["why"])
                if there is not None and (lost is None or int(lost[1]) == there.pid):
                    self.left[there] = place
                self.vacant.add(event["worker"])
            case "took_place":
                self.vacant.discard(event["worker"])
            case "regrouped":
                self.vacant = {*self.processes, *self.vacant} - set(event["workers"])
            case "merged":
                self.version, self.going = event["version"], True

    @property
    def seated(self) -> list[int]:
        """Those that have their places."""
        return [worker for worker in self.processes if worker not in self.vacant]

    @property
    def whole(self) -> bool:
        """Whether all have their places, and go on."""
        return self.going and not any(worker < self.workers for worker in self.vacant)


def starts(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The starts of a team after the first one."""
    return [event for event in events if event["kind"] == "run_started"][1:]


def merged_again(events: Sequence[dict[str, Any]]) -> int:
    """Updates that the tape tells of more than once, as often."""
    merged = Counter(event["version"] for event in events if event["kind"] == "merged")
    return sum(count - 1 for count in merged.values())


def computed_again(events: Sequence[dict[str, Any]], microbatches: int) -> dict[int, int]:
    """By the version that a step starts from: how many more than its microbatches were computed for it, those that
    were of the dead not counted where the tape tells of them; up to a start of the team from such a version.
    """
    computed, dead = Counter[int](), Counter[int]()
    for event in events:
        if event["kind"] in ("computed", "stood_in") and "microbatches" in event:
            first, end = event["microbatches"]
            (computed if event["kind"] == "computed" else dead)[event["version"]] += end - first
    low = min((start["version"] for start in starts(events)), default=max(computed, default=0) + 1)
    more = {version: count - microbatches - dead[version] for version, count in sorted(computed.items())}
    return {version: count for version, count in more.items() if version < low and count > 0}
