"""Since when the workers of each machine are known to compute right, from what the tape tells of audits. No torch.

A team that starts anew has other processes on the same machines, and perhaps other numbers for them: what was uncertain
before stays so until an audit there is good. What a session without audits did is trusted.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Good = tuple[int, int]
"""The version after which weights are uncertain for a worker, and the newest to begin again from, see `WrongWorker`."""


class LastGood:
    """Takes the events of a run in, in the order in which they happen or in that of the tape."""

    def __init__(self) -> None:
        self._joined: dict[int, str] = {}  # machines by worker; in a start they may come before or after it
        self._hosts: dict[int, str] | None = None  # of the present team, once it has made an update
        self._before: dict[str, Good] = {}  # by machine, of the teams before
        self._good: dict[int, Good] = {}  # by worker, of the present team
        self.start = 0
        """The version that the present team has begun with."""
        self._workers = 0
        self._audits = False

    @property
    def unsettled(self) -> bool:
        """Whether the next update tells where the workers of the present team are."""
        return self._hosts is None

    def note(self, event: Mapping[str, Any]) -> None:
        """Takes an event in."""
        match event:
            case {"kind": "joined", "worker": int(worker)}:
                self._joined[worker] = str(event.get("host") or "")
            case {"kind": "run_started", "version": int(version), "team": Mapping() as team}:
                self._end()
                self.start, self._workers, self._audits = version, team.get("workers", 1), bool(team.get("audit"))
                self._before = {host: _earlier(good, version) for host, good in self._before.items()}
            case {"kind": "audited", "owner": int(owner), "version": int(version)}:
                self._settle()
                self._good[owner] = version + 1, version
            case {"kind": "merged"}:
                self._settle()

    def began(self, worker: int) -> Good | None:
        """What is known of the machine of a worker from before its team; None once an audit of this team was good."""
        return None if worker in self._good else self.before(worker)

    def before(self, worker: int) -> Good:
        """The same, whatever audits of this team were."""
        return self._began(self._joined.get(worker, ""))

    def _began(self, host: str) -> Good:
        return _earlier(self._before.get(host, (self.start, self.start)), self.start)

    def _settle(self) -> None:
        if self._hosts is None:
            self._hosts = {worker: host for worker, host in self._joined.items() if worker < self._workers}

    def _end(self) -> None:
        """The present team ends."""
        if not self._audits:
            self._before.clear()
        found: dict[str, Good] = {}
        for worker, host in (self._hosts or {}).items():
            good = self._good.get(worker) or self._began(host)
            found[host] = min(good, found.get(host, good))
        if self._audits:
            self._before |= found
        self._hosts, self._good = None, {}


def last_good(path: Path | str) -> LastGood:
    """What the tape tells, nothing where there is none. Damaged lines are passed over. Raises OSError."""
    found = LastGood()
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            kinds = (b'"audited"', b'"run_started"', b'"joined"', *([b'"merged"'] if found.unsettled else []))
            if any(kind in line for kind in kinds):
                with contextlib.suppress(ValueError, RecursionError):
                    event = json.loads(line)
                    found.note(event if isinstance(event, dict) else {})
    return found


def _earlier(good: Good, version: int) -> Good:
    return min(good[0], version), min(good[1], version)
