"""Whole processes for tests: how to wait for what they do, find all of their descendants, and see that none is left."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from support.patience import LONG_S

INSTEP = [sys.executable, "-m", "instep"]

MODULE = """\
import os, time
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Net(nn.Sequential):
    def __init__(self, width=5):
        super().__init__(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))

def numbers(samples=40):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(samples, 3, generator=generator), torch.randn(samples, 1, generator=generator))

def pause(gradient):
    if not os.path.exists(os.environ.get("GO", "")):
        time.sleep(float(os.environ.get("PAUSE_S", "0")))

def squares(model, batch):
    total = (model(batch[0]) - batch[1]).square().sum()
    if total.requires_grad:
        total.register_hook(pause)
    return total

def mean(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()
"""

RECIPE = """\
batch = 8
microbatches = 4
steps = 20
[model]
use = "mymodel:Net"
args = { width = 7 }
[objective]
use = "mymodel:squares"
[data]
use = "mymodel:numbers"
[team]
workers = 2
checkpoint_every = 5
"""


# PAUSE_S: of each microbatch, until there is the file GO, if that is named.


def write_project(folder: Path) -> Path:
    """Puts the recipe, and the module that it names, into `folder`."""
    (folder / "mymodel.py").write_text(MODULE)
    (folder / "my.toml").write_text(RECIPE)
    return folder


class Started:
    """A process in a session of its own, its output in files, that can tell its descendants by that session, and those
    that left it by their environment. With `forked` it is INSTEP or a script, without the seconds of a new Python.
    """

    def __init__(
        self, command: Sequence[str], folder: Path, *, stdin: str = "", forked: bool = False, **environment: str
    ) -> None:
        self._mark = f"INSTEP_TEST={uuid.uuid4()}"
        self._files = folder / f"output-{uuid.uuid4()}"
        self._files.mkdir(parents=True)
        self._shared_memory = shared_memory()
        (self._files / "in").write_text(stdin)
        name, _, value = self._mark.partition("=")
        with (self._files / "in").open() as given, self._file("out", "w") as out, self._file("err", "w") as err:
            options: dict[str, Any] = {
                "cwd": folder, "stdin": given, "stdout": out, "stderr": err, "start_new_session": True,
                "env": {**os.environ, name: value, **environment},
            }  # fmt: skip
            self.process: Any
            if forked:
                from support import forks  # torch, which not all tests of processes need

                python, *rest = command
                assert python == sys.executable
                self.process = forks.instep(*rest[2:], **options) if rest[0] == "-m" else forks.script(*rest, **options)
            else:
                self.process = subprocess.Popen(command, **options)

    def _file(self, name: str, mode: str = "r") -> Any:
        return (self._files / name).open(mode)

    @property
    def out(self) -> str:
        return (self._files / "out").read_text()

    @property
    def err(self) -> str:
        return (self._files / "err").read_text()

    def says(self, text: str, within_s: float = LONG_S) -> float:
        """Waits until `text` is printed on stdout; gives the seconds."""
        return wait_until(lambda: text in self.out, within_s, f"{text!r} in {self.out!r}, stderr {self.err!r}", self)

    def pids(self) -> list[int]:
        """The living processes of the run but the first."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                pid = int(path.parent.name)
                if session_of(pid) == self.process.pid or self._mark.encode() in path.read_bytes().split(b"\0"):
                    found.append(pid)
        return [pid for pid in found if pid != self.process.pid]

    def supervisor(self) -> int:
        """Its pid, once it is the first process's only child."""
        return only_child(self.process.pid)

    def workers(self) -> int:
        """How many there are now: the supervisor's children. One that measures has a child too."""
        parents = {pid: parent_of(pid) for pid in self.pids()}
        return sum(parents.get(parent) == self.process.pid for parent in parents.values())

    def press_ctrl_c(self) -> None:
        assert self.process.poll() is None, f"it has ended already; stdout {self.out!r}, stderr {self.err!r}"
        os.killpg(self.process.pid, signal.SIGINT)

    def ends(self, within_s: float = LONG_S) -> int:
        """Waits for the end; gives the exit status. Fails if anything of the run is left."""
        try:
            status: int = self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it did not end in {within_s} s; stdout {self.out!r}, stderr {self.err!r}")
        self.leaves_nothing()
        return status

    def leaves_nothing(self, within_s: float = LONG_S) -> None:
        wait_until(lambda: not self.pids(), within_s, "the end of all processes of the run")
        no_shared_memory_since(self._shared_memory, within_s)

    def end(self) -> None:
        for pid in [self.process.pid, *self.pids()] if self.process.poll() is None else self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if Path("/dev/shm").exists() else set()


def no_shared_memory_since(before: set[str], within_s: float = 60) -> None:
    """Fails where a name that was not there stays. Other tests' processes have names there for a moment."""
    left = shared_memory() - before
    wait_until(lambda: not left & shared_memory(), within_s, f"the end of {left} in /dev/shm")


def only_child(pid: int) -> int:
    """Waits until the process has one child alone: it may have more while it measures, say, and none at first."""
    found: list[int] = []

    def look() -> bool:
        found[:] = [child for child in children_of(pid) if session_of(child)]
        return len(found) == 1

    wait_until(look, 60, f"the only child of process {pid}")
    return found[0]


def children_of(pid: int) -> list[int]:
    """None where the process is gone."""
    with contextlib.suppress(OSError):
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    return []


def command_of(pid: int) -> str:
    """Its words, with a zero byte after each; "" where the process is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""


def parent_of(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def session_of(pid: int) -> int:
    """0 for a process that is gone, and only waited for."""
    with contextlib.suppress(OSError):
        state, _, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
        return int(session) if state not in "ZX" else 0
    return 0


def wait_until(true: Callable[[], bool], within_s: float, what: str, started: Started | None = None) -> float:
    began = time.monotonic()
    while not true():
        ended = started is not None and started.process.poll() is not None
        if time.monotonic() - began > within_s or (ended and not true()):
            pytest.fail(f"waited {time.monotonic() - began:.1f} s in vain for {what}")
        time.sleep(0.02)
    return time.monotonic() - began


def complaint(started: Started) -> str:
    """The one line that it printed on stderr."""
    assert started.err.startswith("instep: ")
    assert started.err.count("\n") == 1, started.err
    assert started.err.endswith((".\n", "?\n"))
    return started.err


def free_port() -> int:
    """A port of this machine that nobody listens at, and that the kernel gives to nobody who takes any port."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)  # whatever seed another test has left
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
