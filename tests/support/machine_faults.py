"""Random faults of machines, one after the other, in one run over three hosts: what was done, who was named and when,
and what it cost.

The agents have srun's environment, and are started again by hand where they have ended. A host that is killed says
nothing, for its cable comes out first, and comes back with its disk. After each fault the run must be whole again, with
workers on all hosts, and at the end it must have the digest of a run that nothing happened to.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.fault_kinds import KINDS, LOST, Fault, plan
from support.hosts import WORK, Command, Host, Hosts
from support.processes import MODULE, children_of, command_of

HOSTS, WORKERS, EVERY = 3, 5, 10
NAMED_S = 10.0
"""Seconds within which somebody is to be named."""

WORD_S = 90.0
"""Seconds for a word to come on a loaded machine: what is held against `NAMED_S` is written down."""

CHECKPOINT_S = 1.5
"""Seconds between two checkpoints, about."""

WHOLE_S = 180.0
"""Seconds at most until the run is whole again, on a loaded machine too."""

RECIPE = """\
batch = 8
microbatches = 8
steps = 1000000
{rule}
[model]
use = "mymodel:Net"
args = {{ width = 7 }}
[objective]
use = "mymodel:squares"
[data]
use = "mymodel:numbers"
[optimizer]
use = "torch.optim:AdamW"
args = {{ lr = 0.001 }}
[team]
workers = {workers}
checkpoint_every = {every}
restarts = 1000
lease_s = {lease_s}
give_up_s = {give_up_s}
when_lost = "{when_lost}"
"""


def _changes(event: dict[str, Any]) -> bool:
    """Whether others make a step from it on; who leaves since others have come is no longer of their group then."""
    return event["kind"] == "regrouped" or (event["kind"] == "left" and not event.get("resized"))


class Tape:
    """What the run's tape tells, as it grows. `path()`: where it is now."""

    def __init__(self, path: Callable[[], Path]):
        self._path, self._offset = path, 0
        self.events: list[dict[str, Any]] = []

    def read(self) -> None:
        with contextlib.suppress(FileNotFoundError), self._path().open("rb") as file:
            file.seek(self._offset)
            whole = file.read().rpartition(b"\n")[0]
            if whole:
                self._offset += len(whole) + 1
                self.events += map(json.loads, whole.splitlines())

    def since(self, place: int, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in self.events[place:] if event["kind"] in kinds]


class Campaign:
    """One run, and the faults that it suffers. when_lost, give_up_s: of its team."""

    kinds = tuple(KINDS)
    most_again: int | None = 1
    """Steps that one of `LOST` may cost."""
    rule, every, pause_s = "", EVERY, 0.05

    def __init__(
        self,
        hosts: Hosts,
        seed: int,
        count: int,
        *,
        lease_s: float,
        workers: int = WORKERS,
        when_lost: str = "continue",
        give_up_s: float | None = None,
        note: Callable[[Fault], None] = print,
    ):
        self.hosts, self._draw, self._note, self._lease_s = hosts, random.Random(seed), note, lease_s
        self._plan = plan(self._draw, count, self.kinds)
        self._workers = workers
        recipe = RECIPE.format(
            rule=self.rule, workers=workers, every=self.every, lease_s=lease_s, when_lost=when_lost,
            give_up_s=6 * lease_s if give_up_s is None else give_up_s,
        )  # fmt: skip
        hosts.put({"mymodel.py": MODULE, "my.toml": recipe})
        self.commands: dict[int, Command] = {}
        self._tape = Tape(lambda: hosts[0].path() / "run" / "tape.jsonl")
        self.faults: list[Fault] = []
        self._away: set[int] = set()  # hosts whose agents nobody starts now
        self._began = time.monotonic()

    # The run

    def start(self, host: Host) -> Command:
        """By hand: the command of before, or to go on where agent 0 had begun."""
        begun = host.number == 0 and (host.path() / "run" / "recipe.toml").exists()
        run = ["--resume", "run"] if begun else ["my.toml", "--out", "run"]
        return host.start(
            sys.executable, "-m", "instep", "train", *run, "--workers", str(self._workers),
            PAUSE_S=str(self.pause_s), OMP_NUM_THREADS="1", INSTEP_SECRET="0123456789abcdef", SLURM_STEP_ID="0",
            SLURM_PROCID=str(host.number), SLURM_NTASKS=str(len(self.hosts)), SLURM_NODEID=str(host.number),
            SLURM_LOCALID="0", SLURM_JOB_ID="77", SLURM_JOB_NODELIST=",".join(each.name for each in self.hosts),
        )  # fmt: skip

    def look(self) -> None:
        """Reads what is new, and starts again who has ended."""
        self._tape.read()
        for host in self.hosts:
            command = self.commands.get(host.number)
            if host.number not in self._away and (command is None or command.process.poll() is not None):
                self.commands[host.number] = self.start(host)

    def wait(self, true: Callable[[], Any], within_s: float, what: str) -> float:
        """Waits for it; gives the seconds. Raises AssertionError with all that is known."""
        began = time.monotonic()
        while not true():
            assert time.monotonic() - began < within_s, f"waited in vain for {what}; {self._state()}"
            time.sleep(0.03)
            self.look()
        return time.monotonic() - began

    def _state(self) -> str:
        last = [e for e in self._tape.events if e["kind"] in ("run_started", "left", "warned", "failed")][-8:]
        told = [{k: e.get(k) for k in ("kind", "t_s", "version", "why", "hosts") if k in e} for e in last]
        return f"tape {told}, stderr { ({n: c.err[-1500:] for n, c in self.commands.items()}) }, away {self._away}"

    @property
    def patient(self) -> bool:
        """Whether each start had workers on all hosts."""
        starts = self._tape.since(0, "run_started")
        return all(sum(host["workers"] > 0 for host in e["hosts"]) == len(self.hosts) for e in starts)

    def whole(self) -> bool:
        """Whether workers of all hosts train, and a checkpoint of theirs is there."""
        events = self._tape.events
        at = next((at for at in reversed(range(len(events))) if events[at]["kind"] == "run_started"), None)
        if at is None or sum(host["workers"] > 0 for host in events[at]["hosts"]) < len(self.hosts):
            return False
        changes = [at for at in range(at, len(events)) if _changes(events[at])]
        if changes:  # and the others went on
            at = changes[-1]
            homes = {event["worker"]: event["host"] for event in events if event["kind"] == "joined"}
            if not self._all_regrouped(events[at]) or len({homes[w] for w in events[at]["workers"]}) < len(self.hosts):
                return False
            if any(event["kind"] == "joined" for event in events[at:]):
                return False  # or all start anew, with the host that has come
        later = [event["kind"] for event in events[at:] if event["kind"] in ("checkpointed", "merged")]
        saved = later.index("checkpointed") if "checkpointed" in later else len(later)
        return later[saved:].count("merged") >= 3

    def _all_regrouped(self, event: dict[str, Any]) -> bool:
        return event["kind"] == "regrouped" and len(event["workers"]) == self._workers

    def run(self) -> dict[str, Any]:
        """All of it, and a stop. Gives the result."""
        self.begin()
        for number, kind in enumerate(self._plan):
            self._suffer(number, kind)
        return self.end()

    def begin(self) -> None:
        """Starts all, until they train."""
        self.wait(self.whole, WHOLE_S, "the beginning")

    def told(self, kind: str) -> list[dict[str, Any]]:
        """The events of this kind so far."""
        self.look()
        return self._tape.since(0, kind)

    def end(self) -> dict[str, Any]:
        """A stop, which saves. Gives the result."""
        self.commands[0].signal(signal.SIGTERM)
        for command in self.commands.values():
            command.ends(WHOLE_S)
        self._tape.read()
        assert not any((host.path() / "run").exists() for host in list(self.hosts)[1:]), "one host has the folder"
        return self._result("run")

    def _result(self, folder: str) -> dict[str, Any]:
        result: dict[str, Any] = json.loads((self.hosts[0].path() / folder / "result.json").read_text())
        return result

    def undisturbed(self, steps: int) -> dict[str, Any]:
        """The result of so many steps on one host, by one worker, to which nothing happens."""
        self.hosts[0].run(
            sys.executable, "-m", "instep", "train", "my.toml", "--workers", "1", "--out", "alone",
            "--steps", str(steps), OMP_NUM_THREADS="1", within_s=600,
        )  # fmt: skip
        return self._result("alone")

    # Faults

    def _suffer(self, number: int, kind: str) -> None:
        host = 0 if kind.startswith("agent 0") else self._draw.randrange(1, HOSTS)
        act = getattr(self, "_" + re.sub(r"\W+", "_", kind))
        until = time.monotonic() + self._draw.uniform(0, CHECKPOINT_S)
        self.wait(lambda: time.monotonic() > until, WHOLE_S, "a moment between two checkpoints")
        most = self.most_again if kind in LOST else None
        fault = Fault(number, kind, host, round(time.monotonic() - self._began, 3), most_again=most)
        self._at, self._marks = len(self._tape.events), {n: len(c.err) for n, c in self.commands.items()}
        self._happened = time.monotonic()
        act(fault)
        self._away.clear()
        self.wait(lambda: self._cured(fault), WHOLE_S, f"the end of {fault}")
        fault.whole_after_s = round(time.monotonic() - self._happened, 3)
        self._count(fault)
        self.faults.append(fault)
        self._note(fault)

    def _cured(self, fault: Fault) -> bool:
        return self.whole() and (not fault.named or bool(self._tape.since(self._at, "run_started", "regrouped")))

    def _count(self, fault: Fault) -> None:
        """Which steps were done again."""
        done = saved = 0
        for at, event in enumerate(self._tape.events):
            match event["kind"]:
                case "merged":
                    done = max(done, event["version"])
                case "checkpointed":
                    saved = max(saved, event["version"])
                case "run_started":
                    if at >= self._at:
                        fault.starts.append(event["version"])
                        fault.again += done - event["version"]
                        fault.before_checkpoint += max(0, saved - event["version"])
                    done = event["version"]
        if fault.kind in LOST:  # its clock began with the command
            events = self._tape.events[self._at :]
            started = next(at for at, event in enumerate(events) if event["kind"] == "run_started")
            fault.commit_s = next(event["t_s"] for event in events[started:] if event["kind"] == "merged")

    def _named(self, fault: Fault, pattern: str, within_s: float = WORD_S) -> None:
        """Waits until the tape names somebody."""

        def found() -> list[str]:
            return [e["why"] for e in self._tape.since(self._at, "left") if re.search(pattern, e["why"])]

        self.wait(found, within_s, f"a word on {fault}")
        if not fault.named:
            fault.named, fault.named_after_s = found()[0], round(time.monotonic() - self._happened, 3)

    def _named_by_others(self, fault: Fault) -> None:
        """Waits until the other agents tell that agent 0 is lost."""

        def found(number: int) -> list[str]:
            said = self.commands[number].err[self._marks.get(number, 0) :]
            return re.findall(r"agent 0 on .*|the connection to agent 0 .*", said)

        self.wait(lambda: all(found(number) for number in (1, 2)), WORD_S, f"a word on {fault}")
        if not fault.named:
            fault.named, fault.named_after_s = found(1)[0], round(time.monotonic() - self._happened, 3)

    def _host_killed(self, fault: Fault) -> None:
        self._away.add(fault.host)
        self.hosts.crash(fault.host)
        self._named(fault, rf"host {fault.host} ")
        self.hosts.boot(fault.host)

    def _host_stopped(self, fault: Fault) -> None:
        self.hosts[fault.host].stop()
        self._named(fault, rf"host {fault.host} ")
        time.sleep(self._draw.uniform(0, self._lease_s))
        self.hosts[fault.host].go_on()

    def _host_cut_off_for_good(self, fault: Fault) -> None:
        """Until its agent has given up, and is started again."""
        self._away.add(fault.host)
        self.hosts.cut(fault.host)
        self._named(fault, rf"host {fault.host} ")
        command = self.commands[fault.host]
        self.wait(lambda: command.process.poll() is not None, 12 * self._lease_s + WORD_S, "the end of who is cut off")
        fault.how = command.err.strip().splitlines()[-1].replace(f"{WORK}/", "")
        assert re.match(rf"instep: agent {fault.host} ends: .* could not be reached again", fault.how), command.err
        self.hosts.heal(fault.host)

    def _host_cut_off_and_back_before_its_lease(self, fault: Fault) -> None:
        seconds = self._draw.uniform(0.2, 0.5) * self._lease_s
        fault.how = f"{seconds:.1f} s"
        self.hosts.cut(fault.host)
        time.sleep(seconds)
        self.hosts.heal(fault.host)
        until = time.monotonic() + self._lease_s + 2
        self.wait(lambda: time.monotonic() > until, WORD_S, "time")
        assert not self._tape.since(self._at, "left"), f"nobody is lost: {self._state()}"

    def _host_cut_off_and_back_after_its_lease(self, fault: Fault) -> None:
        self.hosts.cut(fault.host)
        self._named(fault, rf"host {fault.host} ")
        time.sleep(self._draw.uniform(0, 2 * self._lease_s))
        self.hosts.heal(fault.host)

    def _link_cut_one_way_what_it_sends(self, fault: Fault) -> None:
        self.hosts.cut_from(fault.host)
        self._cut_until_named(fault, rf"host {fault.host} ")

    def _link_cut_one_way_what_it_is_sent(self, fault: Fault) -> None:
        self.hosts.cut_to(fault.host)
        self._cut_until_named(fault, rf"host {fault.host} ")

    def _link_cut_one_way_what_it_sends_to_one_other(self, fault: Fault) -> None:
        other = HOSTS - fault.host
        self.hosts.cut_between(fault.host, other)
        self._cut_until_named(fault, rf"host {min(fault.host, other)} .* and host {max(fault.host, other)} ")

    def _cut_until_named(self, fault: Fault, pattern: str) -> None:
        self._named(fault, pattern)
        time.sleep(self._draw.uniform(0, self._lease_s))
        self.hosts.heal(fault.host)

    def _worker_killed(self, fault: Fault) -> None:
        started = max(at for at, e in enumerate(self._tape.events) if e["kind"] == "run_started")
        before = self._tape.events[:started]
        # Those of the newest start; they join before it is on the tape, or right after.
        joined = {e["worker"]: e for e in [*before, *self._tape.events[started:]] if e["kind"] == "joined"}
        worker = self._draw.choice(sorted(joined))
        fault.host = next(h.number for h in self.hosts if h.name == joined[worker]["host"])
        self.hosts[fault.host].run("kill", "-KILL", str(joined[worker]["pid"]))
        self._named(fault, rf"worker {worker} ")

    def _agent_0_supervisor_killed(self, fault: Fault) -> None:
        self._kill_agent_0(fault, supervisor_of(self.commands[0].pid))

    def _agent_0_its_client_killed(self, fault: Fault) -> None:
        self._kill_agent_0(fault, self.commands[0].pid)

    def _kill_agent_0(self, fault: Fault, pid: int) -> None:
        self._away.add(0)
        os.kill(pid, signal.SIGKILL)
        self._named_by_others(fault)
        self.commands[0].ends()

    def _agent_0_host_killed(self, fault: Fault) -> None:
        self._away.add(0)
        self.hosts.crash(0)
        self._named_by_others(fault)
        self.hosts.boot(0)

    def _agent_0_host_stopped(self, fault: Fault) -> None:
        """A second agent 0 is started meanwhile by somebody, and must not write. Nobody is lost."""
        self.hosts[0].stop()
        self._named_by_others(fault)
        second = self.start(self.hosts[0])
        assert second.ends() == 1, second.err
        fault.how = second.err.strip().splitlines()[-1].replace(f"{WORK}/", "")
        assert "is being trained by another process" in fault.how
        self.hosts[0].go_on()

    def _agent_0_host_cut_off(self, fault: Fault) -> None:
        self.hosts.cut(0)
        self._named(fault, r"host [12] ")
        self._named_by_others(fault)
        self.hosts.heal(0)


def supervisor_of(pid: int) -> int:
    """The supervisor that a command has started."""
    for child in children_of(pid):
        if "instep.team.agent" in command_of(child):
            return child
    raise ProcessLookupError("there is no supervisor")
