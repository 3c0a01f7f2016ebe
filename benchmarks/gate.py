"""Lets one team of processes work at a time: steps are granted to it, and without a grant its processes sleep."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

PATIENCE_S = 120.0
"""Seconds after which a team that does not come back counts as hung."""


class Gate:
    """A worker's side. It calls `tick` at the top of every step."""

    def __init__(self, address: str):
        self._address = address
        self._line: Connection | None = None
        self._left = 0
        self._stamps: list[float] = []

    def tick(self) -> None:
        """Notes the time. Where the granted steps are used up, reports the times and sleeps until the next grant."""
        self._stamps.append(time.monotonic())
        if self._left == 0:
            if self._line is None:
                line = socket.socket(socket.AF_UNIX)
                line.connect(self._address)
                self._line = Connection(line.detach())
                self._line.send(os.getpid())
            self._line.send(self._stamps)
            self._left = self._line.recv()
            self._stamps = [time.monotonic()]
        self._left -= 1


class Team:
    """The benchmark's side of one contender: it starts its programs, and grants steps to its workers.

    Each of `commands` is a program; together they have so many `workers`, which connect to the socket at `address`.
    """

    def __init__(self, commands: list[list[str]], workers: int, address: Path, environment: dict[str, str]):
        self.log = address.parent / "log.txt"
        self.pids: list[int] = []
        self._workers = workers
        self._lines: list[Connection] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(address))
        self._listener.listen(workers)
        self._listener.settimeout(1.0)
        with self.log.open("wb") as log:
            self.launchers = [
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
                for command in commands
            ]

    def admit(self) -> None:
        """Waits until all workers have reached their gates."""
        deadline = time.monotonic() + PATIENCE_S
        while len(self._lines) < self._workers:
            try:
                self._lines.append(Connection(self._listener.accept()[0].detach()))
            except TimeoutError:
                self._check(deadline)
        self.pids = [int(line.recv()) for line in self._lines]
        self.wait()

    def work(self, steps: int, meanwhile: Callable[[], None] | None = None) -> list[list[float]]:
        """Wakes the workers for so many steps and waits until all sleep again.

        Returns their times, in seconds, at the top of each step and at the end: [workers, steps + 1]. `meanwhile` is
        called again and again while they work.
        """
        self.grant(steps)
        return self.wait(meanwhile)

    def grant(self, steps: int) -> None:
        """Wakes the workers for so many steps."""
        for line in self._lines:
            line.send(steps)

    def wait(self, meanwhile: Callable[[], None] | None = None) -> list[list[float]]:
        """Waits until all workers sleep, see `work`."""
        deadline = time.monotonic() + PATIENCE_S
        for line in self._lines:
            while not line.poll(1.0 if meanwhile is None else 0.0):
                self._check(deadline)
                if meanwhile is not None:
                    meanwhile()
        try:
            return [line.recv() for line in self._lines]
        except EOFError:
            raise SystemExit(self._failure()) from None

    def finish(self) -> None:
        """Grants the last step, after which the programs end by themselves."""
        self.grant(1)
        for launcher in self.launchers:
            try:
                status = launcher.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                status = None
            if status != 0:
                raise SystemExit(self._failure())

    def processes(self) -> list[psutil.Process]:
        """All processes of its programs."""
        programs = [psutil.Process(launcher.pid) for launcher in self.launchers]
        return programs + [child for program in programs for child in program.children(recursive=True)]

    def close(self) -> None:
        """Ends what still runs; workers end with their launcher."""
        self._listener.close()
        for launcher in self.launchers:
            if launcher.poll() is None:
                launcher.terminate()
        for launcher in self.launchers:
            try:
                launcher.wait(20)
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.wait()
        for line in self._lines:  # now a worker that outlived its launcher ends at its gate
            line.close()

    def _check(self, deadline: float) -> None:
        if any(launcher.poll() is not None for launcher in self.launchers) or time.monotonic() > deadline:
            raise SystemExit(self._failure())

    def _failure(self) -> str:
        text = self.log.read_text(errors="replace")[-3000:]
        ends = [launcher.poll() for launcher in self.launchers]
        return f"the contender '{self.log.parent.name}' ended early or hangs (exit status {ends}); it printed:\n{text}"
