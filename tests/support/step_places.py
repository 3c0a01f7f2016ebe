"""Where a run in step is that suffers faults: on this machine, or on several hosts."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from support.hosts import Command, Hosts, Recorded
from support.present import Process
from support.two_models import trains


class Machine:
    """This one. folder: an empty one. commands: of the run."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.commands: list[Recorded] = []

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self._folder / "run"

    def start(self, files: Mapping[str, str], *arguments: str) -> None:
        """Begins the command that trains what these files tell."""
        self.commands.append(trains(files, self._folder, *arguments))

    def signal(self, process: Process, which: signal.Signals) -> None:
        """To a worker, which may have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, which)

    def stop(self, within_s: float) -> None:
        """Asks the run to end, and waits for it."""
        self.commands[0].process.terminate()
        for command in self.commands:
            command.process.wait(within_s)

    def end(self) -> None:
        """Ends at once what has not ended."""
        for command in self.commands:
            if command.process.poll() is None:
                command.process.kill()
                command.process.wait()


class Machines(Machine):
    """Several hosts, whose agents have srun's environment."""

    def __init__(self, folder: Path, count: int):
        super().__init__(folder)
        self.hosts = Hosts(count, folder / "hosts")

    @property
    def run(self) -> Path:
        return self.hosts[0].path() / "run"

    def start(self, files: Mapping[str, str], *arguments: str) -> None:
        self.hosts.put(files)
        names = ",".join(host.name for host in self.hosts)
        for host in self.hosts:
            self.commands.append(host.start(
                sys.executable, "-m", "instep", "train", "my.toml", "--out", "run", *arguments, OMP_NUM_THREADS="1",
                INSTEP_SECRET="0123456789abcdef", SLURM_STEP_ID="0", SLURM_PROCID=str(host.number),
                SLURM_NTASKS=str(len(self.hosts)), SLURM_NODEID=str(host.number), SLURM_LOCALID="0",
                SLURM_JOB_ID="77", SLURM_JOB_NODELIST=names,
            ))  # fmt: skip

    def signal(self, process: Process, which: signal.Signals) -> None:
        there = next(host for host in self.hosts if host.name == process.host)
        there.start("kill", f"-{which.value}", str(process.pid)).ends()

    def stop(self, within_s: float) -> None:
        first = self.commands[0]
        assert isinstance(first, Command)
        first.signal(signal.SIGTERM)
        for command in self.commands:
            command.process.wait(within_s)

    def end(self) -> None:
        self.hosts.close()

    def cut(self, name: str, seconds: float) -> None:
        """Takes a host's cable out for so long."""
        number = next(host.number for host in self.hosts if host.name == name)
        self.hosts.cut(number)
        time.sleep(seconds)
        self.hosts.heal(number)


def place(folder: Path, hosts: int) -> Machine:
    """One of so many hosts."""
    return Machine(folder) if hosts == 1 else Machines(folder, hosts)
