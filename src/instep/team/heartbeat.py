"""Signs of life: what workers write and the supervisor reads, without a message."""

from __future__ import annotations

import mmap
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from instep.descendants import die_with_parent

BEAT_S = 0.25
"""Seconds between two beats of a worker."""


class HeartbeatBoard:
    """The signs of life of all workers, in memory that forked processes share. [W] arrays of int64."""

    def __init__(self, workers: int):
        memory = mmap.mmap(-1, 8 * (3 * workers + 1))
        table = np.frombuffer(memory, np.int64)
        self.beats, self.progress, self.waits = table[:-1].reshape(3, workers)
        """Beats so far; pieces of work finished; 1 where the worker waits for others."""
        self._stop = table[-1:]

    def ask_to_stop(self) -> None:
        """Asks the team to end after the present step, with a checkpoint."""
        self._stop[0] = 1

    def stop_wanted(self) -> bool:
        """Whether `ask_to_stop` was called."""
        return bool(self._stop[0])


class Heartbeat:
    """One worker's side: beats from a thread of its own, and ends the process when its supervisor is gone."""

    def __init__(self, board: HeartbeatBoard, worker: int, supervisor: int):
        self._board, self._worker, self._supervisor = board, worker, supervisor

    def start(self) -> None:
        """Starts to beat. On Linux the kernel ends a worker without supervisor even if it is stopped."""
        die_with_parent()
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def advance(self) -> None:
        """A piece of work is finished."""
        self._board.progress[self._worker] += 1

    def waiting(self, flag: bool) -> None:
        """Whether the worker waits for others."""
        self._board.waits[self._worker] = flag

    def stop_wanted(self) -> bool:
        """Whether the run was asked to end after the present step."""
        return self._board.stop_wanted()

    def _beat(self) -> None:
        while True:
            if os.getppid() != self._supervisor:
                os.kill(os.getpid(), signal.SIGKILL)
            self._board.beats[self._worker] += 1
            time.sleep(BEAT_S)


class Liveness:
    """The supervisor's side: how long each worker has been silent, or has got nowhere.

    Time is counted in looks, each worth `longest_look_s` at most, so that a suspended machine or supervisor does not
    make its workers look dead when it wakes.
    """

    longest_look_s = 0.5

    def __init__(
        self,
        board: HeartbeatBoard,
        pids: list[int],
        answer_timeout_s: float,
        stall_timeout_s: float,
        names: Sequence[str] = (),
    ):
        self._board, self._pids = board, pids
        self._names = names or [f"worker {worker}" for worker in range(len(pids))]
        self._answer_timeout_s, self._stall_timeout_s = answer_timeout_s, stall_timeout_s
        self._beats, self._progress = board.beats.copy(), board.progress.copy()
        self._silent_s, self._stalled_s = np.zeros(len(pids)), np.zeros(len(pids))
        self._cpu = [0] * len(pids)
        self._left_out: set[int] = set()
        self._looked = time.monotonic()

    def renew(self, worker: int, pid: int) -> None:
        """Another process has taken the worker's place."""
        self._pids[worker] = pid
        self._silent_s[worker] = self._stalled_s[worker] = 0.0
        self._cpu[worker] = 0
        self._board.waits[worker] = 0

    def leave_out(self, worker: int) -> None:
        """The worker has done its part: from now on its silence is no fault."""
        self._left_out.add(worker)

    def look(self) -> tuple[int, str] | None:
        """The first worker that has stopped answering or getting on, and a sentence on it."""
        now = time.monotonic()
        passed = min(now - self._looked, self.longest_look_s)
        self._looked = now
        beats, progress = self._board.beats.copy(), self._board.progress.copy()
        self._silent_s = np.where(beats == self._beats, self._silent_s + passed, 0)
        busy = (progress == self._progress) & (self._board.waits == 0)
        self._stalled_s = np.where(busy, self._stalled_s + passed, 0)
        self._beats, self._progress = beats, progress
        for worker, pid in enumerate(self._pids):
            if worker in self._left_out:
                continue
            state, cpu = _process_state(pid)
            # A worker inside C code that holds the interpreter's lock is silent too, but uses the processor.
            if state not in "Tt" and cpu > self._cpu[worker]:
                self._silent_s[worker] = 0
            self._cpu[worker] = cpu
            if self._silent_s[worker] >= self._answer_timeout_s:
                how = ": it is stopped (SIGSTOP or a debugger)" if state in "Tt" else ""
                return worker, (
                    f"{self._names[worker]} (pid {pid}) has not answered for {self._silent_s[worker]:.1f} s{how}; "
                    f"team.answer_timeout_s is {self._answer_timeout_s:g}."
                )
            if self._stalled_s[worker] >= self._stall_timeout_s:
                return worker, (
                    f"{self._names[worker]} (pid {pid}) answers, but has finished nothing for "
                    f"{self._stalled_s[worker]:.0f} s; if its steps take that long, raise team.stall_timeout_s, "
                    f"now {self._stall_timeout_s:g}."
                )
        return None


def _process_state(pid: int) -> tuple[str, int]:
    """The kernel's letter for the process's state, and its processor time in ticks; ("?", 0) where unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[11]) + int(fields[12])
    except (OSError, IndexError, ValueError):
        return "?", 0
