"""Teams over every kind of group, each rank a process that was forked from the test's."""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import FileStore

from instep.memory_file import memory_file
from instep.reduce.levels import levels_of, machine_of
from instep.transport.distributed import DistributedGroup, of_ranks
from instep.transport.gpus import DeviceGroup, Staged, without_rows
from instep.transport.group import Group, Sizes, Solo
from instep.transport.memory import reserve
from instep.transport.shared_memory import SharedMemoryGroup, regions
from support.hosts import Hosts


@dataclass(frozen=True)
class Kind:
    """What to run over: machines of so many workers each, whether what is between them is gloo, whether they are hosts
    of `support.hosts`, and whether rows pose as those of GPUs: "staged" or "direct".
    """

    name: str
    machines: tuple[int, ...]
    gloo: bool = False
    apart: bool = False
    gpus: str = ""

    @property
    def size(self) -> int:
        return sum(self.machines)

    @property
    def teams(self) -> list[range]:
        """The ranks that share memory."""
        return [machine_of(sum(self.machines[:i]), self.machines) for i in range(len(self.machines))]


SOLO = Kind("solo", (1,))
SHARED = [Kind("2 in memory", (2,)), Kind("3 in memory", (3,))]
DISTRIBUTED = [Kind("2 by gloo", (1, 1), True), Kind("3 by gloo", (1, 1, 1), True), Kind("2 + 2", (2, 2), True),
               Kind("3 + 1 + 1", (3, 1, 1), True)]  # fmt: skip
APART = [Kind("2 hosts", (1, 1), True, True), Kind("3 hosts", (2, 1, 1), True, True)]
STAGED = [Kind("3 staged", (3,), gpus="staged"), Kind("2 + 2 staged", (2, 2), True, gpus="staged")]
DIRECT = [Kind("3 on GPUs", (3,), gpus="direct"), Kind("3 on GPUs of hosts", (1, 1, 1), True, gpus="direct")]
ON_GPUS = [*STAGED, *DIRECT]
ALL = [SOLO, *SHARED, *DISTRIBUTED, *ON_GPUS]


def sizes_of(kind: Kind, rows: Sequence[int] = (), width: int = 64, fact: int = 4096, common: int = 64) -> Sizes:
    """Sizes of a group of that kind; one row a rank, if nothing else is said."""
    levels = levels_of(kind.machines)
    sums = tuple(1 for _ in kind.machines) if len(levels) > 1 else ()
    return Sizes(levels, tuple(rows or [1] * kind.size), sums, width, fact, common)


Body = Callable[[Callable[..., Group], int], Any]
"""What a rank does; it is given what makes its group, and the rank."""


class Ranks:
    """The processes of a team at work. `answers` are None for those that have ended without a word."""

    def __init__(self, kind: Kind, sizes: Sizes, body: Body):
        self._open = ExitStack()
        self._files = []
        for team in kind.teams:
            self._files.append(memory_file())
            self._open.callback(os.close, self._files[-1])
            if len(team) > 1:
                reserve(self._files[-1], regions(of_ranks(_of_host(kind, sizes), team)))
        folder = Path(self._open.enter_context(tempfile.TemporaryDirectory()))
        self._store = f"{folder}/store"
        self.hosts = self._open.enter_context(Hosts(len(kind.machines), folder / "hosts")) if kind.apart else None
        context = multiprocessing.get_context("fork")
        self.processes, self._pipes = [], []
        for rank in range(kind.size):
            ours, theirs = multiprocessing.Pipe()
            process = context.Process(target=self._run, args=(kind, sizes, rank, body, theirs))
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)

    def answers(self, within_s: float = 60) -> list[Any]:
        """What each body gave, by rank. Raises what one raised, and ends those that take longer."""
        found: list[Any] = [None] * len(self.processes)
        waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        try:
            while waiting:
                ready = wait(list(waiting), within_s)
                assert ready, f"ranks {sorted(waiting.values())} gave no answer"
                for pipe in ready:
                    assert isinstance(pipe, Connection)
                    rank = waiting.pop(pipe)
                    try:
                        found[rank], trace = pipe.recv()
                    except EOFError:
                        continue
                    assert trace is None, f"rank {rank}: {trace}"
        finally:
            self.end()
        return found

    def end(self) -> None:
        """Ends all."""
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._open.close()

    def _run(self, kind: Kind, sizes: Sizes, rank: int, body: Body, pipe: Connection) -> None:
        gc.freeze()  # what was inherited: stores whose threads are not here must not be taken down
        if self.hosts is not None:
            self.hosts[self._at(kind, rank)].enter()
        torch.set_num_threads(1)
        try:
            answer = body(lambda own, name="team": self.group(kind, own, rank, name), rank), None
        except BaseException:
            answer = None, traceback.format_exc()
        pipe.send(answer)
        pipe.close()
        os._exit(0)  # what was inherited is the parent's

    def group(self, kind: Kind, sizes: Sizes, rank: int, name: str) -> Group:
        """This rank's group."""
        host = self._host_group(kind, _of_host(kind, sizes), rank, name)
        if kind.gpus == "direct":
            return DeviceGroup(host, self._connect, f"{name}, GPUs", sizes, device="cpu", address="127.0.0.1")
        return Staged(host, "cpu") if kind.gpus else host

    def _host_group(self, kind: Kind, sizes: Sizes, rank: int, name: str) -> Group:
        at = self._at(kind, rank)
        team = kind.teams[at]
        machine: Group | None = None
        if len(team) > 1:
            machine = SharedMemoryGroup(self._files[at], of_ranks(sizes, team), rank - team.start)
        if not kind.gloo:
            return machine or Solo(sizes)
        address = "127.0.0.1" if self.hosts is None else self.hosts[at].address
        return DistributedGroup(self._connect, name, rank, sizes, machine, address=address)

    def _connect(self) -> FileStore:
        return FileStore(self._store)

    def _at(self, kind: Kind, rank: int) -> int:
        """The machine of a rank."""
        return next(i for i, team in enumerate(kind.teams) if rank in team)


def _of_host(kind: Kind, sizes: Sizes) -> Sizes:
    """Those of the group in the machines' memory."""
    return without_rows(sizes) if kind.gpus == "direct" else sizes


def run(kind: Kind, sizes: Sizes, body: Body) -> list[Any]:
    """What each rank's body gave."""
    return Ranks(kind, sizes, body).answers()
