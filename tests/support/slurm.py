"""A Slurm for tests, of hosts that are namespaces: its commands are those of `support.slurm_stub`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.hosts import HOME, WORK, Hosts, Recorded
from support.patience import LONG_S

_STUB = Path(__file__).with_name("slurm_stub.py")


class Slurm:
    """Whose nodes are `hosts`. `folder`: for its programs, and for what they print."""

    def __init__(self, hosts: Hosts, folder: Path):
        self._hosts, self._folder = hosts, folder
        programs = folder / "bin"
        programs.mkdir(parents=True)
        for name in ("sbatch", "srun"):
            (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {_STUB} {name} "$@"\n')
            (programs / name).chmod(0o755)
        nodes = [(host.name, host.entering([])) for host in hosts]
        path = f"{programs}:{Path(sys.executable).parent}:{hosts[0].environment['PATH']}"
        self._environment = {**hosts[0].environment, "PATH": path, "STUB_HOSTS": json.dumps(nodes)}

    def start(self, *command: str, **environment: str) -> Submitted:
        """Begins `sbatch` or `srun`, in the first host's folder `WORK`."""
        return Submitted(command, self._hosts[0].path(WORK), self._folder, {**self._environment, **environment})

    def share_home(self) -> None:
        """Gives all hosts the home of the first, as a cluster's file system does."""
        self._hosts.share(HOME)


class Submitted(Recorded):
    """A command of Slurm's, its output in files."""

    def __init__(self, command: tuple[str, ...], at: Path, outputs: Path, environment: dict[str, str]):
        name = str(len(list(outputs.glob("*.out"))))
        super().__init__(["setpriv", "--pdeathsig", "KILL", *command], outputs, name, cwd=at, env=environment)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def ends(self, within_s: float = LONG_S) -> int:
        """Waits for its end; gives the exit status."""
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            pytest.fail(f"it did not end in {within_s} s; stdout {self.out!r}, stderr {self.err!r}")
