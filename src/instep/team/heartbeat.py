"""Signs of life: what workers write and the agent reads, without a message."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from instep.descendants import die_with_parent
from instep.team.doing import DoingBoard
from instep.transport.meter import METER

_PAUSE = 2
_HOLDERS = 1 << 25
"""Above the number of any worker."""

BEAT_S = 0.25
"""Seconds between two beats of a worker."""


class HeartbeatBoard:
    """The signs of life of all workers, in memory that forked processes share. [W] arrays of int64."""

    def __init__(self, workers: int):
        memory = mmap.mmap(-1, 8 * (8 * workers + 7))
        table = np.frombuffer(memory, np.int64)
        self.beats, self.progress, self.waits, self.sent, self.received, self.answers = table[: 6 * workers].reshape(
            6, workers
        )
        """Beats so far; pieces of work finished; since when the worker waits for others, in ns of the monotonic clock,
        0 where it does not; bytes to and from other hosts, of all processes that have had the worker's place; 1 where
        it may be asked for its stack."""
        self.doing = DoingBoard(workers)
        self.holders, self.successors = table[6 * workers : -7].reshape(2, workers)
        """Of each worker that has died in lockstep: who holds its place, as `hold` writes it; and the incarnation of
        its successor that can take it."""
        self._stop, self._told, self._changes, self._left = table[-7:-3].reshape(4, 1)
        self._next, self._fewer, self._placed = table[-3:].reshape(3, 1)

    @property
    def spare(self) -> int:
        """The place of a process that has none of a worker yet: the last."""
        return len(self.beats) - 1

    def give_place(self, pid: int) -> None:
        """The process of this id, which had none, has a worker's place from now on."""
        self._placed[0] = pid

    def has_place(self, pid: int) -> bool:
        """Whether that was said of it."""
        return bool(self._placed[0] == pid)

    def hold(self, holders: Mapping[int, tuple[int, int]], told: int) -> None:
        """Has workers hold the places of others, which are dead: by its number, who does, and the incarnation of its
        successor. told: the last update that the tape has.
        """
        self._told[0] = told
        for worker, (holder, incarnation) in holders.items():
            self.holders[worker] = incarnation * _HOLDERS + holder
        self._changes[0] += 1

    def held_by(self, holder: int) -> dict[int, int]:
        """The workers whose places it was told to hold, each with the incarnation of its successor."""
        words = enumerate(self.holders.tolist())
        return {worker: word // _HOLDERS for worker, word in words if word and word % _HOLDERS == holder}

    def all_held(self) -> dict[int, int]:
        """Of all workers whose places were held, the incarnation of the last successor."""
        return {worker: word // _HOLDERS for worker, word in enumerate(self.holders.tolist()) if word}

    @property
    def changes(self) -> int:
        """How often `hold` was called."""
        return int(self._changes[0])

    @property
    def told(self) -> int:
        """The last update that the tape had then."""
        return int(self._told[0])

    def regroup(self, generation: int, *, at_once: bool, fewer: bool = False) -> None:
        """Has the workers go on in the group of this generation, after the present step or at once. fewer: without some
        of them, who live.
        """
        self._fewer[0] = generation if fewer else self._fewer[0]
        self._next[0] = generation
        if at_once:
            self._left[0] = generation

    def next_group(self, generation: int) -> bool:
        """Whether there is to be another than that of this generation."""
        return bool(self._next[0] > generation)

    def fewer(self, generation: int) -> bool:
        """Whether some of this generation are to be in no group any more."""
        return bool(self._fewer[0] > generation)

    def left(self, generation: int) -> bool:
        """Whether the group of this generation is to be left at once."""
        return bool(self._left[0] > generation)

    def ask_to_stop(self) -> None:
        """Asks the team to end after the present step, with a checkpoint."""
        self._stop[0] = 1

    def ask_to_pause(self) -> None:
        """The same, for a team that is to start anew."""
        self._stop[0] = self._stop[0] or _PAUSE

    def stop_wanted(self) -> bool:
        """Whether `ask_to_stop` was called."""
        return bool(self._stop[0] == 1)

    def end_wanted(self) -> bool:
        """Whether the team is to end after the present step, for good or to start anew."""
        return bool(self._stop[0])


class Heartbeat:
    """One worker's side: beats from a thread of its own, and ends the process when its agent is gone. spare: it has no
    place yet, and is to have that of this worker.
    """

    def __init__(self, board: HeartbeatBoard, worker: int, agent: int, generation: int = 0, *, spare: bool = False):
        self._board, self._agent = board, agent
        self.spare, self._due = spare, worker if spare else None
        """Whether it had no place when it began."""
        self._worker = board.spare if spare else worker
        self.generation = generation
        """Of the group that the worker is in, see `instep.team.messages.NextGroup`."""
        self._save_due: Callable[[], bool] = lambda: False
        self._lock, self._before = threading.Lock(), self._carried()

    def start(self) -> None:
        """Starts to beat. On Linux the kernel ends a worker without agent even if it is stopped."""
        die_with_parent()
        self._board.answers[self._worker] = 1
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def take_place(self) -> None:
        """It has its place from now on, if it had none."""
        with self._lock:
            if self._due is None:
                return
            board, old = self._board, self._worker
            board.answers[old], board.answers[self._due] = 0, 1
            board.sent[old], board.received[old] = self._before
            self._worker, self._due = self._due, None
            self._before = self._carried()

    def _carried(self) -> tuple[int, int]:
        """What all processes that had the place before have sent and received."""
        return int(self._board.sent[self._worker]), int(self._board.received[self._worker])

    def advance(self) -> None:
        """A piece of work is finished."""
        self._board.progress[self._worker] += 1

    def waiting(self, flag: bool) -> None:
        """Whether the worker waits for others."""
        self._board.waits[self._worker] = flag and time.monotonic_ns()

    def doing(self, what: str) -> None:
        """What the worker does from now on, in words."""
        self._board.doing.write(self._worker, what)

    def stop_wanted(self) -> bool:
        """Whether the team was asked to end after the present step."""
        return self._board.end_wanted()

    def regroup_wanted(self) -> bool:
        """Whether it is to go on in another group after that."""
        return self._board.next_group(self.generation)

    def fewer_wanted(self) -> bool:
        """Whether some of the present group are not to be in another one."""
        return self._board.fewer(self.generation)

    def ask_for_saves(self, due: Callable[[], bool]) -> None:
        """From now on `due()` says what `save_wanted` does."""
        self._save_due = due

    def save_wanted(self) -> bool:
        """Whether, by the clock, a checkpoint is due after the present step."""
        return self._save_due()

    def is_past(self, generation: int) -> bool:
        """Whether nobody is to go on in the group of this generation any more."""
        return self._board.left(generation)

    def left(self) -> bool:
        """Whether the group is to be left at once."""
        return self._board.left(self.generation)

    def count_bytes(self) -> None:
        """Notes what this process has sent to and received from other hosts by now; each beat does."""
        with self._lock:
            sent, received = METER.look()
            self._board.sent[self._worker] = self._before[0] + sent
            self._board.received[self._worker] = self._before[1] + received

    def _beat(self) -> None:
        while True:
            if os.getppid() != self._agent:
                os.kill(os.getpid(), signal.SIGKILL)
            if self._due is not None and self._board.has_place(os.getpid()):
                self.take_place()
            self._board.beats[self._worker] += 1
            self.count_bytes()
            time.sleep(BEAT_S)


class Liveness:
    """The agent's side: how long each worker has been silent, or has got nowhere. No clock of its own.

    Time is counted in looks, each worth `longest_look_s` at most, so that a suspended machine or agent does not make
    its workers look dead when it wakes.
    """

    longest_look_s = 0.5

    def __init__(
        self,
        board: HeartbeatBoard,
        pids: list[int],
        answer_timeout_s: float,
        stall_timeout_s: float,
        names: Sequence[str] = (),
        *,
        now_s: float,
    ):
        self._board, self._pids = board, pids
        self._names = names or [f"worker {worker}" for worker in range(len(pids))]
        self._answer_timeout_s, self._stall_timeout_s = answer_timeout_s, stall_timeout_s
        self._beats, self._progress = board.beats.copy(), board.progress.copy()
        self._silent_s, self._stalled_s = np.zeros(len(pids)), np.zeros(len(pids))
        self._cpu = [0] * len(pids)
        self._looked_s = now_s

    def renew(self, worker: int, pid: int) -> None:
        """Another process has taken the worker's place."""
        self._pids[worker] = pid
        self._silent_s[worker] = self._stalled_s[worker] = 0.0
        self._cpu[worker] = 0
        self._board.waits[worker] = 0

    def look(self, now_s: float, states: Mapping[int, tuple[str, int]]) -> tuple[int, str] | None:
        """The first worker that has stopped answering or getting on, and a sentence on it.

        states: what `process_state` tells of those who are waited for, by number; the others' silence is no fault.
        """
        passed = min(now_s - self._looked_s, self.longest_look_s)
        self._looked_s = now_s
        beats, progress = self._board.beats.copy(), self._board.progress.copy()
        self._silent_s = np.where(beats == self._beats, self._silent_s + passed, 0)
        busy = (progress == self._progress) & (self._board.waits == 0)
        self._stalled_s = np.where(busy, self._stalled_s + passed, 0)
        self._beats, self._progress = beats, progress
        for worker, (state, cpu) in sorted(states.items()):
            pid = self._pids[worker]
            # A worker inside C code that holds the interpreter's lock is silent too, but uses the processor, or waits
            # for its turn to, as does who cannot beat in time, on a machine with much else to do.
            if state == "R" or (state not in "Tt" and cpu > self._cpu[worker]):
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


def process_state(pid: int) -> tuple[str, int]:
    """The kernel's letter for the process's state, "R" where any of its threads computes or waits for a processor, and
    its processor time in ticks; ("?", 0) where unknown.
    """
    try:
        state, *fields = _stat(f"/proc/{pid}/stat")
        ticks = int(fields[10]) + int(fields[11])
    except (OSError, IndexError, ValueError):
        return "?", 0
    # The main thread may sleep while the one that beats waits for its turn.
    return "R" if state in "SD" and "R" in _states_of_threads(pid) else state, ticks


def _states_of_threads(pid: int) -> list[str]:
    found = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError, IndexError):  # it has ended
                found.append(_stat(f"/proc/{pid}/task/{thread}/stat")[0])
    return found


def _stat(path: str) -> list[str]:
    """The fields after the name, which may hold anything."""
    return Path(path).read_text().rpartition(")")[2].split()
