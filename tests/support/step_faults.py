"""Random faults of workers in step, one after the other: whom they befell and when, and what was done again for it.

Each run is a command of its own, on this machine or on several hosts, and suffers at random moments of random steps.
What it must have come to is read from its tape: each update told of once, no checkpoint loaded, and nothing computed
again but microbatches of the dead.
"""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instep.recipe import Team
from instep.team.asking import resized
from support.machine_faults import Tape
from support.present import Present, Process, computed_again
from support.step_places import Machines, place
from support.two_models import files_of

MICROBATCHES, EVERY, ANSWER_S = 16, 25, 2.0
"""Of a step; steps between checkpoints; seconds without an answer after which a worker that is stopped is lost."""

HELD = 12
"""Updates that may be told after what came later."""

CUT_S, LEASE_S = (0.5, 6.0), 30.0
"""Seconds that a host is cut off, and after which it would be lost."""

REMEMBERED = Team().remember
"""Steps that one worker may do again."""

PATIENCE_S = 240.0
"""Seconds for what takes a few on a machine with nothing else to do."""


@dataclass(frozen=True)
class Setting:
    """One run: its model, how many workers and hosts it has, whether it compiles or computes again what memory lacks,
    and the kinds of faults that it suffers.
    """

    model: str
    workers: int
    hosts: int = 1
    compiled: bool = False
    memory: bool = False
    kills: int = 0
    stops: int = 0
    cuts: int = 0
    joins: int = 0

    @property
    def files(self) -> dict[str, str]:
        """What its command needs."""
        return files_of(self.model, compiled=self.compiled, every=EVERY, answer_s=ANSWER_S, lease_s=LEASE_S)

    @property
    def kinds(self) -> list[str]:
        """Of all faults."""
        return ["kill"] * self.kills + ["stop"] * self.stops + ["cut"] * self.cuts + ["join"] * self.joins

    def plan(self, draw: random.Random) -> list[str]:
        """These in a drawn order."""
        return draw.sample(kinds := self.kinds, len(kinds))


@dataclass
class StepFault:
    """One, and what came of it. `happened`: how; of those that were lost `recovered` is "in the step", "at once", where
    nobody had to do its part, as where it had no place yet, "from memory", for one worker, or "went back: " and why.
    again: microbatches that were computed again for it, or steps of one worker; most: that may be, or, where others of
    its host, which are `beside` it, were adding what they share with it, most_of_host.
    """

    number: int
    kind: str
    model: str
    workers: int
    hosts: int
    compiled: bool
    memory: bool
    t_s: float
    worker: int | None = None
    host: str = ""
    pid: int | None = None
    happened: str = ""
    recovered: str = ""
    version: int | None = None
    again: int = 0
    most: int = 0
    most_of_host: int = 0
    beside: list[int] = field(default_factory=list)

    @property
    def process(self) -> Process:
        """That it befell."""
        assert self.worker is not None
        assert self.pid is not None
        return Process(self.worker, self.host, self.pid)


class Run:
    """One run and its faults. folder: an empty one; note: is told of each fault."""

    def __init__(self, setting: Setting, folder: Path, seed: str, note: Callable[[StepFault], None] = lambda _: None):
        self.setting, self._folder, self._draw, self._note = setting, folder, random.Random(seed), note
        self.tape = Tape(lambda: self._place.run / "tape.jsonl")
        self.team, self._read = Present(machine=setting.hosts == 1), 0
        self.faults: list[StepFault] = []
        self._spans: list[tuple[int, int]] = []
        """Of the faults, on the tape."""

    # The run

    def suffer(self) -> None:
        """All of it, from the start to a stop."""
        setting = self.setting
        workers = setting.workers - (setting.joins > 0 and setting.workers > 2)  # one alone may not be struck
        memory = ["--memory", "70%"] if setting.memory else []
        self._place = place(self._folder, setting.hosts)
        try:
            self._place.start(setting.files, "--workers", str(workers), *memory)
            self._began = time.monotonic()
            self._wait(lambda: self.team.version >= 3, "the beginning")
            for number, kind in enumerate(setting.plan(self._draw)):
                self._suffer(number, kind)
            at = self.team.version
            self._wait(
                lambda: self.team.whole and max(self.team.digests, default=0) > at, "a checkpoint of a whole team"
            )
            self._place.stop(PATIENCE_S)
            self._look()
        finally:
            self._place.end()
        self._count()

    def _look(self) -> None:
        self.tape.read()
        for at, event in enumerate(self.tape.events[self._read :], self._read):
            self.team.take(event, at)
        self._read = len(self.tape.events)

    def _wait(self, true: Callable[[], Any], what: str) -> None:
        until = time.monotonic() + PATIENCE_S
        self._look()
        while not true():
            commands = self._place.commands
            if time.monotonic() > until or any(command.process.poll() is not None for command in commands):
                quiet = ("computed", "pushed", "merged", "run_started")
                told = [event for event in self.tape.events if event["kind"] not in quiet][-8:]
                err, there = [command.err[-2000:] for command in commands], list(self.team.processes.values())
                raise AssertionError(f"waited in vain for {what} in {self.setting}: {there}, {told}, {err}")
            time.sleep(0.005)
            self._look()

    # Faults

    def _suffer(self, number: int, kind: str) -> None:
        setting, moment = self.setting, self._draw.uniform(0, 0.5)
        self._wait((lambda: self.team.whole) if kind == "join" else self._enough, "enough that live")
        moment += time.monotonic()
        self._wait(lambda: time.monotonic() >= moment and self._enough(), "a moment")
        fault = StepFault(
            number, kind, setting.model, setting.workers, setting.hosts, setting.compiled, setting.memory,
            round(time.monotonic() - self._began, 3),
        )  # fmt: skip
        began = len(self.tape.events)
        {"kill": self._kill, "stop": self._stop, "cut": self._cut, "join": self._join}[kind](fault)
        self.faults.append(fault)
        self._spans.append((began, len(self.tape.events)))
        self._note(fault)

    def _enough(self) -> bool:
        """Whether one with a place is left when any other is lost, of many, half of them; over hosts all are there."""
        least = min(self.setting.workers, max(2, self.setting.workers // 2))
        if self.setting.hosts > 1:
            return self.team.whole
        return self.team.going and len(self.team.seated) >= least

    def _signal(self, fault: StepFault, which: signal.Signals) -> Process:
        """To any that lives, with a place or without, which it gives."""
        fault.worker = self._draw.choice(sorted(self.team.processes))
        process = self.team.processes[fault.worker]
        fault.host, fault.pid = process.host, process.pid
        fault.beside = sorted(w for w, each in self.team.processes.items() if each.host == process.host)
        self._place.signal(process, which)
        return process

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
        there = self.team.processes.get(fault.process.worker)
        return there not in (None, fault.process)

    def _stop(self, fault: StepFault) -> None:
        process = self._signal(fault, signal.SIGSTOP)
        if self._draw.random() < 0.5:
            seconds = self._draw.uniform(0.1, 0.5) * ANSWER_S
            time.sleep(seconds)
            self._place.signal(process, signal.SIGCONT)
            fault.happened = f"stopped for {seconds:.2f} s"
            self._go_on(fault)
            return
        fault.happened = "stopped for good"
        self._is_lost(fault)

    def _cut(self, fault: StepFault) -> None:
        """Of a host with workers from all others, for less than it takes to be lost."""
        assert isinstance(self._place, Machines)
        fault.host = self._draw.choice(sorted({process.host for process in self.team.processes.values()}))
        seconds = self._draw.uniform(*CUT_S)
        self._place.cut(fault.host, seconds)
        fault.happened = f"cut off for {seconds:.2f} s"
        self._look()
        at = self.team.version  # and of some before it may be told later
        self._wait(lambda: self.team.going and self.team.version > at + HELD, f"updates after {fault}")

    def _join(self, fault: StepFault) -> None:
        wanted = self.setting.workers
        if len(self.team.processes) == wanted:  # one leaves first
            self._resize(wanted - 1)
        self._resize(wanted)
        fault.happened = f"{wanted - 1} became {wanted}"

    def _resize(self, workers: int) -> None:
        there = self.team.resizes
        assert resized(self._place.run, workers)["workers"] == workers
        self._wait(lambda: self.team.resizes > there, "a word on it")
        self._wait(lambda: self.team.whole and len(self.team.processes) == workers, f"a team of {workers}")
        at = self.team.version  # who has joined may be killed before a first update, and is then not asked for any more
        self._wait(lambda: self.team.whole and self.team.version > at + HELD, f"updates of a team of {workers}")

    # What came of it

    def _loss(self, fault: StepFault) -> int | None:
        """The place on the tape where it is told that this process is lost."""
        return self.team.left.get(fault.process) if fault.pid is not None else None

    def _count(self) -> None:
        events = self.tape.events
        self.more = computed_again(events, MICROBATCHES)
        for fault, (began, end) in zip(self.faults, self._spans, strict=True):
            if fault.kind == "cut":
                self._count_cut(fault, events[began:end])
                continue
            at = self._loss(fault)
            if at is None or at >= end:  # who was stopped for a while may be killed later
                continue
            if self.setting.workers == 1:
                self._count_alone(fault, at)
            elif self.setting.hosts > 1:
                self._count_over_hosts(fault, at)
            else:
                self._count_here(fault, events[at + 1 :])

    def _count_here(self, fault: StepFault, later: Sequence[dict[str, Any]]) -> None:
        number = fault.worker
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
            fault.most += (end - first) * ([first, end] in self._ranges(event["version"]))

    def _ranges(self, version: int) -> list[Any]:
        """Of those who made the update of this version."""
        made = [e for e in self.tape.events if e["kind"] == "merged" and e["version"] == version + 1]
        return [each["microbatches"] for event in made for each in event["contributions"]]

    def _count_over_hosts(self, fault: StepFault, at: int) -> None:
        told = next(event for event in self.tape.events[at:] if event["kind"] in ("regrouped", "run_started"))
        fault.version, fault.again = told["version"], self.more.get(told["version"], 0)
        had = self._had(told["version"], at)
        fault.most, fault.most_of_host = had[fault.process.worker], sum(had[worker] for worker in fault.beside)
        fault.recovered = "in the step" if told["kind"] == "regrouped" else "went back: the team started again"

    def _had(self, version: int, at: int) -> dict[int, int]:
        """How many microbatches each worker had at most in the step from this version, before this place on the tape:
        as many as in the step before, if none moved, or as all have where it is a new one's first.
        """
        before = self.tape.events[:at]
        merged = [e for e in before if e["kind"] == "merged" and e["version"] == version]
        had = {each["worker"]: each["microbatches"] for event in merged[-1:] for each in event["contributions"]}
        moved = [e for e in before if e["kind"] == "ranges_moved" and e["version"] == version]
        had |= {worker: span for event in moved[-1:] for worker, span in enumerate(event["ranges"])}
        groups = [len(event["workers"]) for event in before if event["kind"] == "regrouped"]
        equal = -(-MICROBATCHES // (groups[-1] if groups else self.setting.workers))
        spans = {worker: had.get(worker, (0, 0)) for worker in range(self.setting.workers)}
        return {worker: max(stop - start, equal) for worker, (start, stop) in spans.items()}

    def _count_cut(self, fault: StepFault, meanwhile: Sequence[dict[str, Any]]) -> None:
        """Nobody is lost by it."""
        kinds = [event["kind"] for event in meanwhile]
        again = [event["version"] for event in meanwhile if event["kind"] == "regrouped"]
        fault.recovered = "in the step" if again else "at once"
        if "left" in kinds or "run_started" in kinds:
            fault.recovered = "went back: somebody was lost"
        fault.version = again[-1] if again else None
        fault.again = sum(self.more.get(version, 0) for version in set(again))

    def computed_too_often(self) -> list[int]:
        """Steps in which more was computed than its microbatches, for none of the faults."""
        return sorted(self.more.keys() - {fault.version for fault in self.faults if fault.hosts > 1})

    def _count_alone(self, fault: StepFault, at: int) -> None:
        before, later = self.tape.events[:at], self.tape.events[at + 1 :]
        start = next(event for event in later if event["kind"] == "run_started")
        fault.version = next((e["version"] for e in reversed(before) if e["kind"] in ("merged", "run_started")), 0)
        fault.again, fault.most = fault.version - start["version"], REMEMBERED
        from_memory = start.get("remembered") or not start["version"]
        fault.recovered = "from memory" if from_memory else "went back: it was not remembered"
