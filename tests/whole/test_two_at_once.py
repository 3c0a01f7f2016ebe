"""Two workers on different hosts that die at once, at a random moment of a step: the others go on in that step."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import pytest

from support.present import Process, merged_again, starts
from support.step_faults import Run, Setting, StepFault
from support.step_places import Machines
from support.two_models import undisturbed

pytestmark = [pytest.mark.processes, pytest.mark.slow]

TOGETHER_S = 0.05
"""Between the two deaths, at most."""


class Pairs(Run):
    """A run over hosts, each fault of which is the death of a worker on each of two of them."""

    def _kill(self, fault: StepFault) -> None:
        there = list(self.team.processes.values())
        hosts = self._draw.sample(sorted({process.host for process in there}), 2)
        both = [self._draw.choice([process for process in there if process.host == host]) for host in hosts]
        first, second = (self._outside(process) for process in both)
        apart_s = self._draw.uniform(0, TOGETHER_S)
        os.kill(first, signal.SIGKILL)
        time.sleep(apart_s)
        os.kill(second, signal.SIGKILL)
        fault.worker, fault.host, fault.pid = both[0]
        fault.happened = f"{both[0]} and, {apart_s:.3f} s later, {both[1]} were killed"
        self._wait(lambda: all(process in self.team.left for process in both), f"a word on {fault}")
        self._go_on(fault)
        self._wait(lambda: self.team.whole, f"successors of {fault}")

    def _outside(self, process: Process) -> int:
        """Its number on this machine."""
        assert isinstance(self._place, Machines)
        host = next(each for each in self._place.hosts if each.name == process.host)
        space = os.readlink(f"/proc/{host.pid}/ns/pid")
        for each in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, AttributeError):
                found = re.search(r"^NSpid:.*\t(\d+)$", (each / "status").read_text(), re.MULTILINE)
                if os.readlink(each / "ns" / "pid") == space and int(found[1]) == process.pid:  # type: ignore[index]
                    return int(each.name)
        raise AssertionError(f"{process} is not there")


@pytest.mark.parametrize(
    "setting", [Setting("gpt", 4, 2, kills=6), Setting("convnet", 5, 2, kills=6)], ids=lambda setting: setting.model
)
def test_two_that_die_at_once_on_different_hosts_cost_no_step(setting: Setting, tmp_path: Path) -> None:
    run = Pairs(setting, tmp_path, "two at once")
    run.suffer()
    events = run.tape.events
    happened = [fault.happened for fault in run.faults], [e["why"] for e in events if e["kind"] == "warned"]
    assert (starts(events), merged_again(events)) == ([], 0), happened
    assert len(run.team.left) == 2 * setting.kills
    alone = undisturbed(setting.files, max(run.team.digests), tmp_path / "alone")
    assert run.team.digests.items() <= alone.items()
