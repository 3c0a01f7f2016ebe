"""What a run's tape tells of each version, of the history that counts. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instep.errors import RecordError
from instep.recipe import Recipe
from instep.record import tape
from instep.record.folder import RunFolder
from instep.tables import as_saved

FIGURES = {"objective": "objective", "terms": "terms", "items": "items", "lr": "learning rate", "grad_norm": "gradient"}
"""What is told of every update and depends on no clock, with its name for sentences."""

ARRIVAL = ("worker", "piece", "version")
"""What tells which contribution it is that a server merged."""


@dataclass
class Told:
    """By version: `updates` have figures, `sums` checksums by tensor, `arrivals` what a server merged, with checksums.

    ranges and pushed are, in lockstep, the microbatches of each worker and checksums of what it contributed.
    start: the last session's ``run_started``; starts: all that count. digests: of weights. last: the version up to
    which the tape goes. ended: whether the run is over, and how. torn: why the tape could not be read to its end.
    exported: whether it comes from a file of another machine, with checksums that were computed there.
    """

    path: str
    starts: list[Mapping[str, Any]] = field(default_factory=list)
    updates: dict[int, dict[str, Any]] = field(default_factory=dict)
    sums: dict[int, dict[str, str]] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)
    arrivals: dict[int, list[tuple[Any, ...]]] = field(default_factory=dict)
    contributions: dict[int, list[list[str]]] = field(default_factory=dict)
    ranges: dict[int, dict[int, tuple[int, int]]] = field(default_factory=dict)
    pushed: dict[int, dict[int, list[str]]] = field(default_factory=dict)
    workers: dict[int, None] = field(default_factory=dict)
    last: int = 0
    ended: str = "not ended"
    checksum_s: float = 0.0
    train_s: float = 0.0
    torn: str = ""
    exported: bool = False

    @property
    def start(self) -> Mapping[str, Any]:
        return self.starts[-1]

    @property
    def rule(self) -> str:
        return str(self.start["recipe"].get("rule", {}).get("name", "synchronous"))

    @property
    def lockstep(self) -> bool:
        """Whether every update is a function of the recipe alone."""
        return all(start["engine"] == "lockstep" for start in self.starts)

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe's table, with the fields that were added since."""
        return as_saved(Recipe, self.start["recipe"])

    @property
    def arrival_decides(self) -> bool:
        """Whether an update hangs on who sent what, and when: not in lockstep, nor on a server that adds as it does."""
        rule = self.recipe["rule"]
        in_step = (rule.get("order"), rule.get("max_lead"), rule.get("outer")) == ("round", 0, "none")
        return not in_step or any(start["cut"] > self.recipe["microbatches"] for start in self.starts)

    @property
    def shared(self) -> bool:
        """Whether the workers, of one machine, each updated a share of the parameters."""
        team = self.start["team"]
        alone = team.get("workers", 1) == 1 or bool(self.start.get("hosts")) or team.get("device", "cpu") != "cpu"
        return self.lockstep and not alone and team.get("shard") != "none" and not self.start.get("whole_update")

    def started(self, version: int) -> Mapping[str, Any]:
        """The start of the session that made this version."""
        return next((start for start in reversed(self.starts) if start["version"] < version), self.starts[0])

    def about(self) -> str:
        """What the run was, in a line."""
        teams = "/".join(map(str, self.workers)) or "?"
        several = "" if teams == "1" else "s"
        return (
            f"{self.rule}, {teams} worker{several}, {self.last:,} update{'' if self.last == 1 else 's'}, {self.ended}"
        )


def told(path: str | os.PathLike[str]) -> Told:
    """What the tape of the run folder `path` tells; of one that is still being written, what there is.

    Raises RecordError where there is no run, or nothing on its tape yet.
    """
    folder, found = RunFolder.open(Path(path)), Told(str(path))
    if not folder.tape_path.exists():
        raise RecordError(f"the run in {path} has no tape yet; wait until it trains, then try again.")
    try:
        take(found, tape.read(folder.tape_path))
    except RecordError as error:
        if not found.starts:
            raise
        found.torn = error.message
    if not found.starts:
        raise RecordError(f"the run in {path} has no event on its tape yet; wait until it trains, then try again.")
    return found


def take(found: Told, events: Iterable[Mapping[str, Any]]) -> None:
    """Takes events in."""
    sent: dict[int, list[str]] = {}
    for event in events:
        match event["kind"]:
            case "run_started":
                _back_to(found, event["version"])
                tape.take_back(found.pushed, event["version"])
                found.starts = [start for start in found.starts if start["version"] < event["version"]] + [event]
                found.workers[event["team"].get("workers", 1)] = None
                if event.get("digest"):
                    found.digests[event["version"]] = event["digest"]
                found.ended = "not ended"
            case "merged":
                if event["version"] <= found.last:
                    _back_to(found, event["version"] - 1)
                found.last = event["version"]
                _merged(found, event, sent)
            case "pushed" if "seq" in event:
                sent[event["seq"]] = event.get("checksum", [])
            case "pushed" if event.get("checksum"):
                found.pushed.setdefault(event["version"] + 1, {})[event["worker"]] = event["checksum"]
            case "checksummed":
                found.sums[event["version"]] = {**event["weights"], **event["optimizer"]}
                found.checksum_s += event.get("took_s", 0.0)
            case "checkpointed":
                found.digests[event["version"]] = event["digest"]
            case "failed":
                found.ended = "failed"
            case "run_ended":
                found.ended = "interrupted" if event["interrupted"] else "ended"
                if event["digest"]:
                    found.digests[event["version"]] = event["digest"]


def _merged(found: Told, event: Mapping[str, Any], sent: Mapping[int, list[str]]) -> None:
    if "objective" in event:  # not in a simulation without gradients
        found.updates[event["version"]] = {name: event.get(name) for name in FIGURES}
    found.train_s = event.get("train_s", found.train_s)
    if found.starts and found.starts[-1]["engine"] == "lockstep":
        parts = [each for each in event["contributions"] if "microbatches" in each]
        found.ranges[event["version"]] = {each["worker"]: tuple(each["microbatches"]) for each in parts}
    else:
        found.arrivals[event["version"]] = [
            tuple(each.get(name) for name in ARRIVAL) for each in event["contributions"]
        ]
        sums = [sent.get(each.get("seq", -1), []) for each in event["contributions"]]
        found.contributions[event["version"]] = [*sums, event.get("checksum", [])]


def _back_to(found: Told, version: int) -> None:
    """Takes back what was told of later versions."""
    found.last = version
    for by_version in (found.updates, found.sums, found.digests, found.arrivals, found.contributions, found.ranges):
        tape.take_back(by_version, version)
