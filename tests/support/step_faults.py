"""Random faults of workers in step, one after the other: whom they befell and when, and what was done again for it.

Each run is a command of its own on this machine, and suffers at random moments of random steps.
What it must have come to is read from its tape: each update told of once, no checkpoint loaded, and nothing computed
again but microbatches of the dead.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instep.recipe import Team
from instep.team.asking import resized
from support.machine_faults import Tape
from support.two_models import files_of, trains

MICROBATCHES, EVERY, ANSWER_S = 16, 25, 2.0
"""Of a step; steps between checkpoints; seconds without an answer after which a worker that is stopped is lost."""

REMEMBERED = Team().remember
"""Steps that one worker may do again."""

PATIENCE_S = 240.0
"""Seconds for what takes a few on a machine with nothing else to do."""


@dataclass(frozen=True)
class Setting:
    """One run: its model, how many workers it has, whether it compiles or computes again what memory lacks, and the
    kinds of faults that it suffers.
    """

    model: str
    workers: int
    compiled: bool = False
    memory: bool = False
    kills: int = 0
    stops: int = 0
    joins: int = 0

    @property
    def files(self) -> dict[str, str]:
        """What its command needs."""
        return files_of(self.model, compiled=self.compiled, every=EVERY, answer_s=ANSWER_S)

    def plan(self, draw: random.Random) -> list[str]:
        """The faults in a drawn order."""
        kinds = ["kill"] * self.kills + ["stop"] * self.stops + ["join"] * self.joins
        draw.shuffle(kinds)
        return kinds


@dataclass
class StepFault:
    """One, and what came of it. `happened`: how; of those that were lost `recovered` is "in the step", "at once", where
    nobody had to do its part, as where it had no place yet, "from memory", for one worker, or "went back: " and why.
    again: microbatches that were computed again for it, or steps of one worker; most: that may be.
    """

    number: int
    kind: str
    model: str
    workers: int
    hosts: int = field(default=1, init=False)
    compiled: bool
    memory: bool
    t_s: float
    worker: int | None = None
    pid: int | None = None
    happened: str = ""
    recovered: str = ""
    version: int | None = None
    again: int = 0
    most: int = 0


@dataclass
class Present:
    """Who is there, as the tape tells: pids by worker; whose places are vacant; the newest update."""

    pids: dict[int, int] = field(default_factory=dict)
    vacant: set[int] = field(default_factory=set)
    version: int = 0
    going: bool = False
    digests: dict[int, str] = field(default_factory=dict)
    """Of the weights, at checkpoints."""
    resizes: int = 0
    left: dict[str, int] = field(default_factory=dict)
    """By what is said of a loss, up to the process, its place on the tape."""

    def take(self, event: dict[str, Any], place: int) -> None:
        """One event, in order."""
        match event["kind"]:
            case "checkpointed":
                self.digests[event["version"]] = event["digest"]
            case "resized":
                self.resizes += 1
            case "run_started":
                self.vacant.clear()
                self.version, self.going = event["version"], False
                self.pids = {w: pid for w, pid in self.pids.items() if w < event["team"]["workers"]}
            case "joined":
                self.pids[event["worker"]] = event["pid"]
            case "left":
                self.left[event["why"].partition(")")[0]] = place
                self.pids.pop(event["worker"], None)
                self.vacant.add(event["worker"])
            case "took_place":
                self.vacant.discard(event["worker"])
            case "merged":
                self.version, self.going = event["version"], True

    @property
    def seated(self) -> list[int]:
        """Those that have their places."""
        return [worker for worker in self.pids if worker not in self.vacant]


class Run:
    """One run and its faults. folder: an empty one; note: is told of each fault."""

    def __init__(self, setting: Setting, folder: Path, seed: str, note: Callable[[StepFault], None] = lambda _: None):
        self.setting, self._folder, self._draw, self._note = setting, folder, random.Random(seed), note
        self._path = folder / "run"
        self.tape = Tape(lambda: self._path / "tape.jsonl")
        self.team, self._read = Present(), 0
        self.faults: list[StepFault] = []

    # The run

    def suffer(self) -> None:
        """All of it, from the start to a stop."""
        setting = self.setting
        workers = setting.workers - (setting.joins > 0 and setting.workers > 2)  # one alone may not be struck
        memory = ["--memory", "70%"] if setting.memory else []
        self._command = trains(setting.files, self._folder, "--workers", str(workers), *memory)
        try:
            self._began = time.monotonic()
            self._wait(lambda: self.team.version >= 3, "the beginning")
            for number, kind in enumerate(setting.plan(self._draw)):
                self._suffer(number, kind)
            at = self.team.version
            self._wait(lambda: self._whole() and max(self.team.digests, default=0) > at, "a checkpoint of a whole team")
            self._command.process.terminate()
            self._command.process.wait(PATIENCE_S)
            self._look()
        finally:
            self._end()
        self._count()

    def _end(self) -> None:
        if self._command.process.poll() is None:
            self._command.process.kill()
            self._command.process.wait()

    def _look(self) -> None:
        self.tape.read()
        for place, event in enumerate(self.tape.events[self._read :], self._read):
            self.team.take(event, place)
        self._read = len(self.tape.events)

    def _wait(self, true: Callable[[], Any], what: str) -> None:
        until = time.monotonic() + PATIENCE_S
        self._look()
        while not true():
            if time.monotonic() > until or self._command.process.poll() is not None:
                quiet = ("computed", "pushed", "merged", "run_started")
                told = [event for event in self.tape.events if event["kind"] not in quiet][-8:]
                err = self._command.err[-2000:]
                raise AssertionError(f"waited in vain for {what} in {self.setting}: {self.team.pids}, {told}, {err}")
            time.sleep(0.005)
            self._look()

    def _whole(self) -> bool:
        return self.team.going and not self.team.vacant

    # Faults

    def _suffer(self, number: int, kind: str) -> None:
        setting, moment = self.setting, self._draw.uniform(0, 0.5)
        self._wait(self._whole if kind == "join" else self._enough, "enough that live")
        moment += time.monotonic()
        self._wait(lambda: time.monotonic() >= moment and self._enough(), "a moment")
        fault = StepFault(
            number, kind, setting.model, setting.workers, setting.compiled, setting.memory,
            round(time.monotonic() - self._began, 3),
        )  # fmt: skip
        {"kill": self._kill, "stop": self._stop, "join": self._join}[kind](fault)
        self.faults.append(fault)
        self._note(fault)

    def _enough(self) -> bool:
        """Whether one with a place is left when any other is lost; of many, half of them."""
        least = min(self.setting.workers, max(2, self.setting.workers // 2))
        return self.team.going and len(self.team.seated) >= least

    def _signal(self, fault: StepFault, which: signal.Signals) -> int:
        """To any that lives, with a place or without; gives its pid."""
        fault.worker = self._draw.choice(sorted(self.team.pids))
        fault.pid = self.team.pids[fault.worker]
        with contextlib.suppress(ProcessLookupError):
            os.kill(fault.pid, which)
        return fault.pid

    def _kill(self, fault: StepFault) -> None:
        self._signal(fault, signal.SIGKILL)
        while not self._is_lost(fault):  # it had ended, with all others, for a fault of before
            self._wait(self._enough, "enough that live")
            self._signal(fault, signal.SIGKILL)

    def _is_lost(self, fault: StepFault) -> bool:
        """Waits until it is followed; whether it was missed, for there is another in its place unless it was."""
        self._wait(lambda: self._loss(fault) is not None or self._is_another(fault), f"a word on {fault}")
        self._go_on(fault)
        return self._loss(fault) is not None

    def _go_on(self, fault: StepFault) -> None:
        """Waits for updates after it."""
        at = self.team.version  # one more may have been on its way
        self._wait(lambda: self.team.going and self.team.version not in (at, at + 1), f"updates after {fault}")

    def _is_another(self, fault: StepFault) -> bool:
        return fault.worker in self.team.pids and self.team.pids[fault.worker] != fault.pid

    def _stop(self, fault: StepFault) -> None:
        pid = self._signal(fault, signal.SIGSTOP)
        if self._draw.random() < 0.5:
            seconds = self._draw.uniform(0.1, 0.5) * ANSWER_S
            time.sleep(seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            fault.happened = f"stopped for {seconds:.2f} s"
            self._go_on(fault)
            return
        fault.happened = "stopped for good"
        self._is_lost(fault)

    def _join(self, fault: StepFault) -> None:
        wanted = self.setting.workers
        if len(self.team.pids) == wanted:  # one leaves first
            self._resize(wanted - 1)
        self._resize(wanted)
        fault.happened = f"{wanted - 1} became {wanted}"

    def _resize(self, workers: int) -> None:
        there = self.team.resizes
        assert resized(self._path, workers)["workers"] == workers
        self._wait(lambda: self.team.resizes > there, "a word on it")
        self._wait(lambda: self._whole() and len(self.team.pids) == workers, f"a team of {workers}")

    # What came of it

    def _loss(self, fault: StepFault) -> int | None:
        """The place on the tape where it is told that this process is lost."""
        return self.team.left.get(f"worker {fault.worker} (pid {fault.pid}")

    def _count(self) -> None:
        events = self.tape.events
        ranges: dict[int, list[Any]] = {}
        for event in events:
            if event["kind"] == "merged":
                ranges.setdefault(event["version"] - 1, []).extend(e["microbatches"] for e in event["contributions"])
        for fault in self.faults:
            if (at := self._loss(fault)) is None:
                continue
            number, later = fault.worker, events[at + 1 :]
            if self.setting.workers == 1:
                self._count_alone(fault, events[:at], next(e for e in later if e["kind"] == "run_started"))
                continue
            stop = next((i for i, e in enumerate(later) if e["kind"] == "left" and e["worker"] == number), len(later))
            own = [e for e in later[:stop] if e["kind"] == "stood_in" and e["worker"] == number]
            died = rf"worker {number} died while (.*?)[;.]"
            back = next((found[1] for e in later[:stop] if (found := re.search(died, e.get("why", "")))), "")
            told = next((e["kind"] for e in later if e["kind"] in ("stood_in", "run_started", "took_place")), "")
            back = back or ("the team started again" if told == "run_started" else "")
            fault.recovered = f"went back: {back}" if back else "in the step" if own else "at once"
            for event in own:
                first, end = event.get("microbatches", (0, 0))
                fault.version, fault.again = event["version"], fault.again + end - first
                fault.most += (end - first) * ([first, end] in ranges.get(event["version"], ()))

    def _count_alone(self, fault: StepFault, before: list[dict[str, Any]], start: dict[str, Any]) -> None:
        fault.version = next((e["version"] for e in reversed(before) if e["kind"] in ("merged", "run_started")), 0)
        fault.again, fault.most = fault.version - start["version"], REMEMBERED
        from_memory = start.get("remembered") or not start["version"]
        fault.recovered = "from memory" if from_memory else "went back: it was not remembered"

    def starts(self) -> list[dict[str, Any]]:
        """The starts of its team after the first one."""
        return [event for event in self.tape.events if event["kind"] == "run_started"][1:]

    def again(self) -> int:
        """Updates that the tape tells of more than once, as often."""
        merged = Counter(event["version"] for event in self.tape.events if event["kind"] == "merged")
        return sum(count - 1 for count in merged.values())

    def computed_too_often(self) -> list[int]:
        """Steps in which more microbatches were computed than there are, and than were those of the dead."""
        computed, dead = Counter[int](), Counter[int]()
        for event in self.tape.events:
            if event["kind"] in ("computed", "stood_in") and "microbatches" in event:
                first, end = event["microbatches"]
                (computed if event["kind"] == "computed" else dead)[event["version"]] += end - first
        again = {start["version"] for start in self.starts()}
        low = min(again, default=max(computed, default=0) + 1)
        return [v for v, count in sorted(computed.items()) if v < low and count > MICROBATCHES + dead[v]]
